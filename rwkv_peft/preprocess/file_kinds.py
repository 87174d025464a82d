"""What a file is, by its content. A name may say something else: JSON lines in a .txt, a web page in a .jsonl."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import orjson

from rwkv_peft.common.errors import UserError
from rwkv_peft.common.paths import display_path

from . import reader
from .json_repair import COMMENTS, OUTSIDE, repair_json
from .keys import HISTORY, MESSAGES, MORE_MESSAGES, PROMPTS, RESPONSES, TEXTS
from .reader import Note, packing, unpacked

# names that an object around rows may have as well
UNSURE = (
    "data",
    "items",
    "contents",
    "user",
    "human",
    "q",
    "a",
    "bot",
    "gpt",
    "content",
    "inputs",
    "target",
    "targets",
    "assistant",
)
ROW_KEYS = frozenset((*MESSAGES, *MORE_MESSAGES, *PROMPTS, *RESPONSES, *TEXTS, *HISTORY)) - {*UNSURE}
# words in the names of lists that are two answers to one question, the better and the worse
PREFERENCE = re.compile(r"chosen|reject|prefer|winn|loser|losing|worse|better|\A(?:good|bad)\Z", re.I)
CONVERSATIONS = frozenset((*MESSAGES, *MORE_MESSAGES)) - {*UNSURE}
SPEAKERS = ("role", "from", "speaker", "sender")  # the keys that make an object a message
ROWS_OF_THEIR_OWN = ("id", "parent_id", "message_id", "conversation_id", "message_tree_id")  # a message as a row
LOOKED_AT = 20  # lines at the beginning of a file

# first bytes of files that are no rows, what they are, and what to do
FOREIGN = (
    (b"version https://git-lfs.github.com/spec/", "is a Git LFS pointer, not the data itself: run `git lfs pull` in its "
     "folder, or download the file again"),
    (b"%PDF", "is a PDF: save its text as .txt"),
    (b"{\\rtf", "is a document of a word processor (RTF): save it as plain text (.txt)"),
    (b"\x89PNG", "is a picture (PNG)"),
    (b"\xff\xd8\xff", "is a picture (JPEG)"),
    (b"GIF8", "is a picture (GIF)"),
    (b"GGUF", "is a model (GGUF), not data"),
    (b"\x93NUMPY", "is a NumPy array, not text"),
    (b"SQLite format 3\0", "is an SQLite database: export its table as .csv"),
    (b"MMIDIDX", "is the index of tokenized data (.idx) already: name it in DATA_PATH of training.sh"),
    (b"\x04\"M\x18", "is packed with lz4: unpack it, or pack it with gzip or zstd"),
    (b"BZh", "is packed with bzip2: unpack it (bunzip2), or pack it with gzip or zstd"),
    (b"\xfd7zXZ\0", "is packed with xz: unpack it (unxz), or pack it with gzip or zstd"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive: unpack it, and give the file or folder that comes out"),
    (b"Rar!", "is a RAR archive: unpack it, and give the file or folder that comes out"),
    (b"\x80\x02", "is a Python pickle, not text"), (b"\x80\x04", "is a Python pickle, not text"),
    (b"\x80\x05", "is a Python pickle, not text"),
)  # fmt: skip
ZIPPED = {  # a file that a zip holds -> how it is read, or what it is
    "xl/workbook.xml": ".xlsx", "xl/workbook.bin": ".xlsb", "content.xml": ".ods",
    "word/document.xml": "is a Word document: save it as plain text (.txt)",
    "ppt/presentation.xml": "is a PowerPoint file: save its text as .txt",
    "META-INF/container.xml": "is an e-book (EPUB): save its text as .txt",
}  # fmt: skip
PACKED = {".gz": "gzip", ".zst": "zstd"}
BINARY = (".parquet", ".arrow", ".feather", ".xlsx", ".xlsm", ".xlsb", ".xls", ".ods")
LINES = (".jsonl", ".ndjson", ".jsonlines", ".ldjson")
TABLES = (".csv", ".tsv")
WORDS = {".jsonl": "JSON lines", ".json": "JSON", ".csv": "a table", ".parquet": "Parquet", ".arrow": "Arrow",
         ".xlsx": "an Excel workbook", ".xlsb": "an Excel workbook", ".xls": "an old Excel workbook",
         ".ods": "an OpenDocument table"}  # fmt: skip


def kind_of(path: Path, by_name: str) -> tuple[str, list[Note]]:
    """Return the ending that says how a file is read, and notes where its own ending says something else.

    by_name: what its own ending says, or "". "" is returned if nothing shows it.

    Raises:
        UserError: the file has no rows.
    """
    if not path.is_file():  # a pipe can be read only once
        return by_name, []
    with open(path, "rb") as file:
        magic = file.read(4096)
    packed = packing(magic)
    if path.suffix.lower() in PACKED and packed != path.suffix.lower():
        what = PACKED[path.suffix.lower()]
        raise UserError(
            f"{display_path(path)}: cannot be unpacked: it is not {what}, though its name ends in {path.suffix}. If it has been "
            "unpacked already, take that ending off its name; else download it again."
        )
    detected = "" if packed else binary_kind(path, magic, by_name)
    if not detected and not by_name and not packed and not is_text(magic):
        return "", []
    if not detected and magic and by_name not in BINARY:
        with unpacked(path) as (file, _):
            head = file.read(reader.HEAD)
            whole = len(head) < reader.HEAD
        refuse_foreign(path, head, by_name)
        if head[257:262] == b"ustar":
            raise UserError(
                f"{display_path(path)}: is a tar archive: unpack it (tar xf), and give the folder that comes out."
            )
        detected = text_kind(head, whole, by_name)
    elif not detected and by_name in BINARY and is_text(magic) and not magic.startswith(b"PK\x03\x04"):
        refuse_foreign(path, magic, "")
        with unpacked(path) as (file, _):
            head = file.read(reader.HEAD)
        detected = text_kind(head, len(head) < reader.HEAD, "") or by_name
    kind = detected or by_name
    if kind == ".json" and by_name in LINES:
        return kind, [Note("note", display_path(path), f"{what_it_is(head)}; it is read as .json")]
    same = kind == by_name or {kind, by_name} <= set(LINES) or (kind, by_name) == (".xlsx", ".xlsm")
    same = same or (kind, by_name) == (".arrow", ".feather")
    if same or not kind:
        return by_name, []
    said = path.suffix or "no ending"
    return kind, [Note("note", display_path(path), f"is {WORDS[kind]} by its content, not what its name says ({said})")]


def what_it_is(head: bytes) -> str:
    """What to say of a file of JSON lines that has no object on each; it begins with `head`."""
    lines = [line for line in head.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    if len(lines) > 1:
        return "is JSON over several lines, not an object on each"
    what = "list of rows" if lines[0].lstrip()[:1] == b"[" else "object of lists or objects, which may hold many rows"
    return f"is one JSON {what}, on one line"


def is_text(data: bytes) -> bool:
    """Return whether bytes are text."""
    return b"\0" not in data and bool(data.strip())


def binary_kind(path: Path, magic: bytes, by_name: str) -> str:
    """Kinds that show in the first bytes of the file itself."""
    if magic.startswith(b"PAR1"):
        return ".parquet"
    if magic.startswith((b"ARROW1", b"\xff\xff\xff\xff")) and by_name not in (".parquet",):
        return ".arrow"
    if magic.startswith(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"):
        return ".xls"
    if magic.startswith(b"PK\x03\x04"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = set(archive.namelist())
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
            if by_name in BINARY:
                return ""  # its own reader says what is wrong
            raise UserError(f"{display_path(path)}: is a zip archive that was cut off or damaged.") from None
        for name, what in ZIPPED.items():
            if name in names:
                if not what.startswith("."):
                    raise UserError(f"{display_path(path)}: {what}.")
                return what
        raise UserError(
            f"{display_path(path)}: is a zip archive: unpack it, and give the file or folder that comes out."
        )
    refuse_foreign(path, magic, by_name)
    return ""


def refuse_foreign(path: Path, head: bytes, by_name: str) -> None:
    """UserError for what holds no rows, whatever its name."""
    for begins, what in FOREIGN:
        if head.startswith(begins):
            raise UserError(f"{display_path(path)}: {what}.")
    beginning = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:200].lower()
    if by_name != ".txt" and re.match(rb"(<!--.*?-->\s*)?<(!doctype html|html|head|body)\b", beginning, re.S):
        raise UserError(
            f"{display_path(path)}: is a web page (HTML), not data: a login or error page was saved in "
            f"its place. Download the file "
            "itself (on Hugging Face or GitHub: the link named download or raw)."
        )
    if by_name != ".txt" and beginning.startswith(b"<?xml"):
        raise UserError(f"{display_path(path)}: is XML, which is not read. Save it as .jsonl, .csv or .txt.")


def text_kind(head: bytes, whole: bool, by_name: str) -> str:
    """The kind of a text file that begins so, "" if its own ending must decide. whole: head is all of it."""
    text = head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    bare = COMMENTS.sub(lambda m: m[1] or m[2] or "", text) if text.lstrip()[:1] in ("/", "#") else text
    bare = bare.lstrip("\ufeff \t\r\n")
    if bare[:1] not in ("{", "["):
        if by_name not in (".txt", *TABLES) and is_table(bare):
            return ".csv"
        return ""
    lines = bare.split("\n")
    if not whole and len(lines) > 1:
        del lines[-1]  # it is cut off
    lines = [line.strip() for line in lines if line.strip()]
    if by_name == ".json":
        return ""
    if by_name in LINES:
        return "" if is_lines(lines, whole) else ".json"
    first = [value_of(line) for line in lines[:LOOKED_AT]]
    # one line is enough for a table or of a name without a known ending; a .txt may be meant to be text
    sample = first if by_name == ".txt" else first[:1]
    likely = all(isinstance(value, dict) and value for value in sample)
    if likely and not (whole and len(lines) == 1 and is_one_object_of_many(first[0])):
        return ".jsonl"
    if re.match(r'\[\s*[{\[]|\{\s*["\']', bare) and (by_name != ".txt" or names_a_row(bare)):
        return ".json"
    return ""


def is_lines(lines: list[str], whole: bool) -> bool:
    """Whether a file that begins with these lines has a row on each, and is not one text over all of them."""
    first = lines[0]
    value = value_of(first)
    if isinstance(value, dict):
        return not (whole and len(lines) == 1 and is_one_object_of_many(value))
    if isinstance(value, list):  # a conversation; or several rows, or several conversations, on one line
        rows = (
            bool(value)
            and all(isinstance(one, dict) for one in value)
            and not is_message(value[0])
            and names_row(value[0])
        )
        return not (rows or bool(value) and all(isinstance(one, list) and one and is_message(one[0]) for one in value))
    if first.startswith("["):
        if len(lines) == 1 and not whole:  # one line, longer than what was read
            return bool(re.match(r'\[\s*\{\s*"(?:role|from|speaker|sender)"', first))
        return first[1:].lstrip()[:1] not in ("", "{", "[") or first.endswith("]")
    return not continues(lines)


def continues(lines: list[str]) -> bool:
    """Whether the first line leaves a bracket open, and the next one holds its content."""
    bare = OUTSIDE.sub(lambda m: "" if m[1] is None else m[0], lines[0]).rstrip()
    if len(lines) < 2 or '"' in bare or bare.count("{") + bare.count("[") <= bare.count("}") + bare.count("]"):
        return False
    return bare.endswith("[") or bool(bare.endswith(("{", ",")) and re.match(r"[\]}\"'/#]", lines[1]))


def value_of(line: str):
    """The value that a line holds, None if it holds none."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            return repair_json(line)[0]
        except ValueError:
            return None


def is_message(value) -> bool:
    """Whether an object is a message of a conversation, and no row of its own."""
    return (
        isinstance(value, dict)
        and any(key in value for key in SPEAKERS)
        and not any(k in value for k in ROWS_OF_THEIR_OWN)
    )


def names_row(value) -> bool:
    """Return whether an object has keys of rows."""
    return isinstance(value, dict) and bool(ROW_KEYS & value.keys())


def names_a_row(text: str) -> bool:
    """Whether one of the first keys of a text is one that rows have."""
    return any(
        key in ROW_KEYS or key in ("role", "from") for key in re.findall(r'["\'](\w+)["\']\s*:', text[:4000])[:20]
    )


def is_one_object_of_many(value: dict) -> bool:
    """Whether an object holds many rows: a list per column, or a list per split."""
    return (
        len(value) > 0
        and all(isinstance(v, list | dict) for v in value.values())
        and not any(k in value for k in CONVERSATIONS)
        and not is_row_of_messages(value)
    )


def is_row_of_messages(value: dict) -> bool:
    """Return whether an object is a row by its lists of messages.

    Such are one better and one worse answer, or a conversation with a system text beside it (Gemini's contents).
    """
    talks = [key for key, one in value.items() if isinstance(one, list) and one and is_message(one[0])]
    return (
        any(PREFERENCE.search(key) for key in talks)
        or len(talks) < len(value)
        and any(key in MORE_MESSAGES for key in talks)
    )


def is_table(text: str) -> bool:
    """Whether a text begins with the header of a table that holds rows."""
    line = text.partition("\n")[0]
    for mark in ",;\t|":
        cells = [cell.strip().strip('"').strip().lower() for cell in line.split(mark)]
        if len(cells) > 1 and len(ROW_KEYS & set(cells)) > 0 and all(len(cell) < 60 for cell in cells):
            return True
    return False
