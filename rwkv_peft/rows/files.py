"""Files of any format of the field -> blocks of rows that know their file and line, read as a stream.

A file of any size takes the memory of a few blocks. What cannot be read as a row travels along as a RowError, so that it
is counted and told with its place; a file that is broken as a whole raises UserError.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .. import project
from ..errors import UserError
from ..project import shown
from ..words import count, did_you_mean, listed
from .schemas import MESSAGES, PAIRS, Row, RowError

BLOCK = 1 << 18  # bytes of lines that are worked on at once; larger ones fall out of the processor's cache
HEAD = 1 << 16  # bytes that are read from the disk at once, and that a format may be told by
LINE_LIMIT = 32 << 20  # bytes; a longer line is a file without line breaks, not a row
ROWS = 512  # of a table that are worked on at once
FIELDS_LIMIT = 1 << 27


@dataclass(frozen=True)
class Block:
    """Rows behind one another. data: bytes of whole JSON lines, the first of which is line `first`; or a list of
    (number, JSON bytes | row | RowError). read: bytes of the file up to here."""

    file: str
    first: int
    data: bytes | list[tuple[int, bytes | Row | RowError]]
    read: int


class Frames(io.RawIOBase):
    """Frames of a packed file behind one another, as one stream. EOFError if the last one was cut off, which the library's
    own stream passes over in silence."""

    def __init__(self, raw: IO[bytes], begin: Callable):
        """begin: makes an object that unpacks one frame."""
        self.raw, self.begin, self.frame, self.left = raw, begin, None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, target) -> int:
        while not self.left:
            packed = self.frame.unused_data if self.frame and self.frame.eof else b""
            packed = packed or self.raw.read(HEAD)
            if not packed:
                if self.frame and not self.frame.eof:
                    raise EOFError("the file ends inside a frame")
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = self.begin()
            self.left = self.frame.decompress(packed)
        size = min(len(target), len(self.left))
        target[:size], self.left = self.left[:size], self.left[size:]
        return size


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """The bytes of a file, unpacked, and a function that tells how many bytes of the file itself have been read."""
    with contextlib.ExitStack() as open_files:
        raw = open_files.enter_context(open(path, "rb", HEAD))
        file = raw
        if path.suffix.lower() == ".gz":
            file = open_files.enter_context(gzip.GzipFile(fileobj=raw))
        elif path.suffix.lower() == ".zst":
            try:
                import zstandard
            except ImportError:
                raise UserError(
                    f"{shown(path)}: reading .zst needs the package zstandard: pip install zstandard"
                ) from None
            unpacker = zstandard.ZstdDecompressor()
            file = open_files.enter_context(io.BufferedReader(Frames(raw, unpacker.decompressobj), HEAD))
        try:
            if file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise UserError(f"{shown(path)}: is UTF-16. Save it as UTF-8 (in an editor: Save as, encoding UTF-8).")
            if file.peek(3)[:3] == codecs.BOM_UTF8:
                file.read(3)
            yield file, raw.tell if raw.seekable() else lambda: 0  # nobody knows how far a pipe is
        except (EOFError, OSError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None and not isinstance(error, gzip.BadGzipFile):
                raise
            raise UserError(f"{shown(path)}: cannot be unpacked: {error}. It was cut off or damaged.") from None
        except Exception as error:
            if type(error).__name__ != "ZstdError":
                raise
            raise UserError(f"{shown(path)}: cannot be unpacked: {error}. It was cut off or damaged.") from None


def json_lines(path: Path) -> Iterator[Block]:
    """Lines of a .jsonl file in blocks of whole lines."""
    name = shown(path)
    with unpacked(path) as (file, read):
        number = 1
        while piece := file.read(BLOCK):
            if not piece.endswith(b"\n"):
                piece += file.readline(LINE_LIMIT + 1)
            end = piece.rfind(b"\n") + 1
            is_too_long = len(piece) - end > LINE_LIMIT
            whole = piece[:end] if is_too_long else piece
            if whole:
                yield Block(name, number, whole, read())
                number += whole.count(b"\n")
            if is_too_long:
                yield Block(name, number, [(number, too_long("Every line must be one JSON object"))], read())
                skip_line(file)
                number += 1


def too_long(law: str) -> RowError:
    return RowError("too long", f"is longer than {LINE_LIMIT >> 20} MB. {law}; split this one into several rows")


def skip_line(file: IO[bytes]) -> None:
    """Go to behind the next line break."""
    while (rest := file.readline(LINE_LIMIT)) and not rest.endswith(b"\n"):
        pass


# a JSON text is cut at its brackets; strings are stepped over as a whole; a lone quote begins a string that was cut
JSON_PARTS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]]|"', re.S)
ROW_KEYS = {
    b'"%s"' % key.encode() for key in (*MESSAGES, *(name for pair in PAIRS for name in pair), "text", "history")
}


def json_array(path: Path) -> Iterator[Block]:
    """The objects of a .json file: of a list, of an object that holds one list, or simply one behind another.

    The file is cut where an object ends, without reading it as a whole, so that one bad object spoils only itself.
    """
    name = shown(path)
    with unpacked(path) as (file, read):
        head = file.peek(HEAD).lstrip()
        level = 2 if is_wrapped(head) else int(head.startswith(b"["))  # brackets around the rows
        between = b" \t\r\n," + (b"[]" if level == 1 else b"")
        text, at, depth = b"", 0, 0
        gap, start = 0, None  # where the text between two objects began, and the object at hand
        line, counted = 1, 0  # line breaks before text[counted] are in line
        found: list[tuple[int, bytes | Row | RowError]] = []
        size = 0

        def line_at(place: int) -> int:
            nonlocal line, counted
            line += text.count(b"\n", counted, place)
            counted = place
            return line

        def look_between(end: int) -> None:
            odd = text[gap:end].strip(between)
            if odd and level < 2:
                found.append(
                    (
                        line_at(end),
                        RowError("wrong type", f"must be a JSON object, not {odd[:40].decode('utf-8', 'replace')}"),
                    )
                )

        while piece := file.read(BLOCK):
            text += piece
            for part in JSON_PARTS.finditer(text, at):
                token, begin, at = part[0], part.start(), part.end()
                if token == b'"':
                    at = begin
                    break
                if token in b"{[":
                    depth += 1
                    if depth == level + 1 and token == b"{" and start is None:
                        look_between(begin)
                        start = begin
                elif token in b"}]":
                    depth -= 1
                    if depth <= level and start is not None:
                        found.append((line_at(start), text[start:at]))
                        size += at - start
                        start, gap = None, at
                        if size >= BLOCK:
                            yield Block(name, found[0][0], found, read())
                            found, size = [], 0
            keep = gap if start is None else start
            line_at(keep)
            text, at, counted, gap = text[keep:], at - keep, 0, 0
            start = None if start is None else 0
            if len(text) > LINE_LIMIT:
                raise UserError(
                    f"{name}:{line}: what begins here is longer than {LINE_LIMIT >> 20} MB, or its brackets do not close. "
                    "Rows must be objects in a list."
                )
        if start is not None:
            raise UserError(
                f"{name}:{line}: the object that begins here never ends: a quote or a bracket is missing in it, or the file was "
                "cut off. What comes behind it cannot be told apart; mend it, or write one object per line (.jsonl)."
            )
        look_between(len(text))
        if depth > 0:
            found.append((line_at(len(text)), RowError("not JSON", "is not valid JSON: the file ends inside its list")))
        if found:
            yield Block(name, found[0][0], found, read())


def is_wrapped(head: bytes) -> bool:
    """Whether a file that begins so is one object around a list of rows: {"data": [{...}, ...]}."""
    depth, lists, last = 0, 0, b""
    for part in JSON_PARTS.finditer(head):
        token = part[0]
        if token[:1] == b'"':
            if depth == 1 and token in ROW_KEYS:
                return False
        elif token in b"{[":
            lists += depth == 2 and token == b"{" and last == b"["
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                return lists > 0 and not head[part.end() :].strip()
        last = token
    return lists > 0 and head.startswith(b"{")


def table(path: Path) -> Iterator[Block]:
    """Rows of a .csv or .tsv file; the first line names the columns. Cells that hold JSON lists are read where they are
    wanted as lists."""
    csv.field_size_limit(FIELDS_LIMIT)
    with unpacked(path) as (file, read):
        text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
        lines, number = RowLines(text), 2
        first = next(lines, "")
        told = re.fullmatch(r"sep=(.)\s*", first)  # Excel's way to say what stands between cells
        if told:
            first, number = next(lines, ""), 3
        bare = re.sub(r'"[^"]*"', "", first)
        marks = told[1] if told else "\t" if ".tsv" in path.suffixes else max(",;\t", key=bare.count)
        lines.again.append(first)
        lines.begin()
        try:
            header = next(csv.reader(lines, delimiter=marks, strict=True), [])
        except csv.Error as error:
            raise UserError(
                f"{shown(path)}: its first line, which names the columns, is not valid CSV: {error}."
            ) from None
        twice = sorted({name for name in header if header.count(name) > 1})
        if not any(header) or twice:
            wrong = f"names {twice[0]!r} twice" if twice else "must name the columns"
            raise UserError(f"{shown(path)}: its first line {wrong}.")
        yield from grouped(path, table_rows(lines, header, marks, number - 1 + len(lines.row)), read)


class RowLines:
    """The lines of a table, one by one, with those of the row at hand kept: they can be given back."""

    def __init__(self, lines: Iterator[str]):
        self.lines, self.again = lines, deque()
        self.begin()

    def begin(self) -> None:
        """A new row begins."""
        self.row: list[str] = []
        self.size = 0

    def __iter__(self) -> RowLines:
        return self

    def __next__(self) -> str:
        line = self.again.popleft() if self.again else next(self.lines)
        self.row.append(line)
        self.size += len(line)
        if self.size > LINE_LIMIT:
            raise csv.Error("a quote that is opened here is never closed")
        return line

    def give_back_all_but_one(self) -> None:
        """Only the first line of the row is at fault: the others are rows of their own."""
        self.again.extendleft(reversed(self.row[1:]))


def table_rows(lines: RowLines, header: list[str], marks: str, number: int) -> Iterator[tuple[int, Row | RowError]]:
    """Rows with their lines, from line `number` on. A quote that is not closed spoils its own line and no other."""
    rows = csv.reader(lines, delimiter=marks, strict=True)
    while True:
        lines.begin()
        wrong, cells = "", []
        try:
            cells = next(rows)
            if cells and len(cells) != len(header):
                wrong = f"has {count(len(cells), 'cell')}, but the first line names {len(header)}"
        except StopIteration:
            return
        except csv.Error as error:
            ends = "unexpected end" in str(error)
            wrong = f"is not valid CSV: {'a quote that is opened here is never closed' if ends else error}"
        if wrong:
            yield number, RowError("not CSV", wrong)
            lines.give_back_all_but_one()
            number, rows = number + 1, csv.reader(lines, delimiter=marks, strict=True)
            continue
        if any(not cell.isascii() and not is_utf8(cell) for cell in cells):
            yield number, not_utf8(",".join(cells).encode("utf-8", "surrogateescape"))
        elif cells:
            yield number, dict(zip(header, (cell or None for cell in cells), strict=True))
        number += len(lines.row)


def not_utf8(data: bytes) -> RowError:
    """What to say of a row in another encoding; Chinese Windows and its Excel write GB18030."""
    words = "is not valid UTF-8; save the file as UTF-8"
    with contextlib.suppress(UnicodeDecodeError):
        if any("\u4e00" <= c <= "\u9fff" for c in data.decode("gb18030")):
            words += ". It looks like GB18030: iconv -f GB18030 -t UTF-8 OLD > NEW"
    return RowError("not UTF-8", words)


def is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def columnar(path: Path) -> Iterator[Block]:
    """Rows of a .parquet or .arrow file."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(
            f"{shown(path)}: reading {path.suffix} needs the package pyarrow: pip install pyarrow"
        ) from None

    def batches():
        if path.suffix.lower() == ".parquet":
            with pq.ParquetFile(path) as file:
                yield from file.iter_batches(batch_size=ROWS)
            return
        with pa.OSFile(str(path)) as source:  # not mapped: a damaged file would end the process without a word
            try:  # files that may be read from any place, or streams (what the `datasets` package writes)
                reader = pa.ipc.open_file(source)
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pa.ArrowInvalid:
                source.seek(0)
                yield from pa.ipc.open_stream(source)

    number = 1
    size = path.stat().st_size
    try:
        for batch in batches():
            batch.validate(full=True)
            for begin in range(0, batch.num_rows, ROWS):
                rows = batch.slice(begin, ROWS).to_pylist()
                yield Block(shown(path), number, list(enumerate(rows, number)), 0)
                number += len(rows)
    except (pa.ArrowException, OSError, ValueError, SystemError, OverflowError) as error:
        raise UserError(f"{shown(path)}: cannot be read as {path.suffix[1:]}: {str(error).splitlines()[0]}.") from None
    yield Block(shown(path), number, [], size)


def plain(path: Path, mode: str) -> Iterator[Block]:
    """Documents of a .txt file: the file, every line, or every paragraph (a blank line ends one)."""
    with unpacked(path) as (file, read):
        yield from grouped(path, documents(file, mode), read)


def documents(file: IO[bytes], mode: str) -> Iterator[tuple[int, Row | RowError]]:
    if mode == "file":
        data = file.read(LINE_LIMIT + 1)
        if len(data) > LINE_LIMIT:
            law = "TXT_MODE=file takes a file as one document; with line or paragraph it becomes many"
            yield 1, RowError("too long", f"is longer than {LINE_LIMIT >> 20} MB. {law}")
        elif data.strip():
            yield 1, text_row(data)
        return
    number, begun, held, size = 0, 1, [], 0
    while line := file.readline(LINE_LIMIT + 1):
        number += 1
        if len(line) > LINE_LIMIT or size > LINE_LIMIT:
            yield begun if held else number, too_long(f"Every {mode} is one document")
            held, size = [], 0
            if not line.endswith(b"\n"):
                skip_line(file)
            continue
        if mode == "line":
            if line.strip():
                yield number, text_row(line.rstrip(b"\r\n"))
            continue
        if line.strip():
            begun = begun if held else number
            held.append(line)
            size += len(line)
        elif held:
            yield begun, text_row(b"".join(held).rstrip(b"\r\n"))
            held, size = [], 0
    if held:
        yield begun, text_row(b"".join(held).rstrip(b"\r\n"))


def text_row(data: bytes) -> Row | RowError:
    try:
        return {"text": data.decode("utf-8")}
    except UnicodeDecodeError:
        return not_utf8(data)


def grouped(path: Path, rows: Iterator[tuple[int, Row | RowError]], read: Callable[[], int]) -> Iterator[Block]:
    """Single rows in blocks: as many as a table's, or about a block's bytes of text."""
    found, size = [], 0
    for number, row in rows:
        found.append((number, row))
        size += sum(len(v) for v in row.values() if v) if isinstance(row, dict) else 0
        if len(found) >= ROWS or size >= BLOCK:
            yield Block(shown(path), found[0][0], found, read())
            found, size = [], 0
    if found:
        yield Block(shown(path), found[0][0], found, read())


READERS: dict[str, Callable[..., Iterator[Block]]] = {
    ".jsonl": json_lines,
    ".json": json_array,
    ".csv": table,
    ".tsv": table,
    ".parquet": columnar,
    ".arrow": columnar,
    ".txt": plain,
}
PACKED = (".gz", ".zst")
OURS = (".rejects.jsonl", ".report.json")  # what make_tokenize.sh leaves beside data is never data


def format_of(path: Path) -> str:
    """The ending that says how a file is read (.jsonl.gz is .jsonl; a pipe without one is .jsonl), or ""."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        return (
            suffixes[-2]
            if len(suffixes) > 1 and suffixes[-2] in READERS and suffixes[-2] not in (".parquet", ".arrow")
            else ""
        )
    if suffixes and suffixes[-1] in READERS:
        return suffixes[-1]
    return ".jsonl" if path.is_fifo() else ""


def stem_of(path: Path) -> Path:
    """The path without the endings that say how it is read."""
    path = path.with_suffix("") if path.suffix.lower() in PACKED else path
    return path.with_suffix("") if path.suffix.lower() in READERS else path


def find(source: Path) -> tuple[list[Path], list[Path]]:
    """The files of a file or folder that can be read, sorted, and those of a folder that cannot."""
    if not source.is_dir():
        return [source], []
    files = sorted(
        p
        for p in source.rglob("*")
        if p.is_file()
        and not any(part.startswith(".") for part in p.relative_to(source).parts)
        and not p.name.endswith(OURS)
    )
    known = [p for p in files if format_of(p)]
    return known, [p for p in files if not format_of(p)]


def named(name: str) -> Path:
    """What the user calls a file, pipe or folder of rows: a name in data/, or a path. UserError if it cannot be read."""
    source = project.find(name, "data")
    where, endings = shown(source), ", ".join(READERS)
    if not source.exists():
        there = [p.name for p in (project.ROOT / "data").glob("*") if format_of(p) and not p.name.endswith(OURS)]
        raise UserError(
            f"{where}: there is no such file{did_you_mean(source.name, there) or '.'} In data/ there is: {listed(there)}."
        )
    if source.is_dir():
        if not find(source)[0]:
            raise UserError(f"{where}: holds no file that can be read ({endings}).")
    elif not format_of(source):
        raise UserError(f"{where}: must end in one of {endings} (or one of these with .gz or .zst behind it).")
    return source


def blocks(path: Path, txt_mode: str = "file") -> Iterator[Block]:
    """The rows of one file, whatever its format."""
    kind = format_of(path)
    return plain(path, txt_mode) if kind == ".txt" else READERS[kind](path)
