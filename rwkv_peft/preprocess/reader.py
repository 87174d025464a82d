"""What readers of all formats share: blocks of rows, the bytes of a file whether packed or not, and what is wrong with rows."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

from rwkv_peft.common.errors import UserError, pip_command
from rwkv_peft.common.formatting import plural
from rwkv_peft.common.paths import display_path

from . import encodings
from .schemas import Row, RowError

BLOCK = 1 << 18  # bytes of lines that are worked on at once; larger ones fall out of the processor's cache
HEAD = 1 << 16  # bytes that are read from the disk at once, and that a format may be recognised by
FED = 1 << 9  # bytes of a packed file that are unpacked at once: zstd makes up to 32,000 times as many of them
LINE_LIMIT = 32 << 20  # bytes; a longer line is a file without line breaks, not a row
ROWS = 512  # of a table that are worked on at once


class Note(NamedTuple):
    """What is to be said of a file as a whole. level: note or warning."""

    level: str
    file: str
    words: str


@dataclass(frozen=True)
class Block:
    """Rows one after another.

    Attributes:
        data: Bytes of whole JSON lines, the first of which is line `first`; or a list of (number, JSON bytes | row | RowError).
        read: Bytes of the file up to here.
        held_out: They belong to NAME.valid.
    """

    file: str
    first: int
    data: bytes | list[tuple[int, bytes | Row | RowError]]
    read: int
    held_out: bool = False
    notes: tuple[Note, ...] = ()


class Frames(io.RawIOBase):
    """The frames of a packed file as one stream.

    EOFError if the last one was cut off, which the library's own stream ignores.
    """

    def __init__(self, raw: IO[bytes], begin: Callable):
        """begin: makes an object that unpacks one frame."""
        self.raw, self.begin = raw, begin
        self.frame: Any = None  # zstandard's ZstdDecompressionObj
        self.packed = self.left = memoryview(b"")

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, target) -> int:
        """Fill a buffer; see io.RawIOBase."""
        while not self.left:
            self.packed = self.packed or memoryview(self.raw.read(HEAD))
            if not self.packed:
                if self.frame and not self.frame.eof:
                    raise EOFError("the file ends inside a frame")
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = self.begin()
            piece, self.packed = self.packed[:FED], self.packed[FED:]
            self.left = memoryview(self.frame.decompress(piece))
            if self.frame.eof and self.frame.unused_data:
                self.packed = memoryview(self.frame.unused_data + bytes(self.packed))
        size = min(len(target), len(self.left))
        target[:size], self.left = self.left[:size], self.left[size:]
        return size


Unpacked: TypeAlias = "io.BufferedReader[Any] | gzip.GzipFile"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Unpacked, io.BufferedReader[Any]]]:
    """The bytes of a file, unpacked, and the file itself."""
    with contextlib.ExitStack() as open_files:
        raw = io.BufferedReader(open_files.enter_context(open(path, "rb", 0)), HEAD)
        file: Unpacked = raw
        packed = path.suffix.lower() if path.suffix.lower() in (".gz", ".zst") else packing(raw.peek(4))
        if packed == ".gz":
            file = open_files.enter_context(gzip.GzipFile(fileobj=raw))
        elif packed == ".zst":
            try:
                import zstandard
            except ImportError:
                raise UserError(
                    f"{display_path(path)}: reading .zst needs the package zstandard: {pip_command('zstandard')}"
                ) from None
            unpacker = zstandard.ZstdDecompressor()
            file = open_files.enter_context(io.BufferedReader(Frames(raw, unpacker.decompressobj), HEAD))
        try:
            yield file, raw
        except (EOFError, OSError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None and not isinstance(error, gzip.BadGzipFile):
                raise
            raise UserError(f"{display_path(path)}: cannot be unpacked: {error}. It was cut off or damaged.") from None
        except Exception as error:
            if type(error).__name__ != "ZstdError":
                raise
            raise UserError(f"{display_path(path)}: cannot be unpacked: {error}. It was cut off or damaged.") from None


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[tuple[io.BufferedReader[Any], Callable[[], int]]]:
    r"""Open a file's text, unpacked, as UTF-8 with \n as line end.

    Yields the stream and a function that returns how many bytes of the file itself have been read.

    Raises:
        UserError: the file is no text, or its encoding is not clear.
    """
    with opened(path) as (file, raw):
        decided = encoding_of(path) if raw.seekable() else encoding_of_pipe(path, file)
        if isinstance(decided, encodings.Binary):
            why = f"is {decided.what}" if decided.what else "holds bytes that no text has"
            raise UserError(f"{display_path(path)}: is no text; it {why}.")
        if isinstance(decided, encodings.Unsure):
            raise UserError(undecided(path, decided))
        file.read(decided.skip)
        text = io.BufferedReader(encodings.AsUtf8(file, decided), HEAD)
        yield text, raw.tell if raw.seekable() else lambda: 0  # a pipe has no position


EncodingResult = encodings.Encoding | encodings.Unsure | encodings.Binary
NO_TEXTS = (".parquet", ".arrow", ".feather", ".xlsx", ".xlsm", ".xlsb", ".xls", ".ods")
# file -> ENCODING for it, what identifies its content, and what it is in. Reading a file twice, as tables and streams do, must
# not mean looking for its encoding twice, which takes a pass over all of it where it is ASCII
_settled: dict[str, tuple[str, tuple[int, int], EncodingResult]] = {}


def settle(paths: Sequence[Path], wanted: str = "auto") -> dict[str, str]:
    """Decide which encoding each file of text is read in.

    Args:
        paths: The files.
        wanted: ENCODING of make_tokenize.sh.

    Returns:
        The names of the files that are not UTF-8, as shown, with their encodings.

    Raises:
        UserError: names all files whose encoding is not clear.
    """
    others, refused = {}, []
    for path in paths:
        if path.suffix.lower() in NO_TEXTS or not path.is_file():
            _settled[os.path.abspath(path)] = (wanted, (0, 0), encodings.Encoding())
            continue
        _settled.pop(os.path.abspath(path), None)
        decided = encoding_of(path, wanted)
        if isinstance(decided, encodings.Unsure):
            refused.append(undecided(path, decided))
        elif isinstance(decided, encodings.Encoding) and decided.codec:
            others[display_path(path)] = decided.shown
    if refused:
        raise UserError("\n".join(refused))
    return others


def encoding_of(path: Path, wanted: str = "") -> EncodingResult:
    """What a file is in; as `settle` has decided, if it has. wanted: a name that takes the place of looking."""
    facts = path.stat()
    name, stamp = os.path.abspath(path), (facts.st_size, facts.st_mtime_ns)
    known = _settled.get(name)
    if known and known[1] == stamp and wanted in ("", known[0]):
        return known[2]
    wanted = wanted or (known[0] if known else "auto")
    with opened(path) as (file, _):
        encoding = encodings.decide(file) if wanted == "auto" else encodings.of_name(wanted, file.peek(4)[:4])
    _settled[name] = (wanted, stamp, encoding)
    return encoding


def encoding_of_pipe(path: Path, file: Unpacked) -> EncodingResult:
    """What a pipe is in, from what has come of it so far; it cannot be read twice."""
    known = _settled.get(os.path.abspath(path))
    head = file.peek(HEAD)
    if known and known[0] != "auto":
        return encodings.of_name(known[0], head[:4])
    return encodings.decide(io.BytesIO(head), whole=False)


def undecided(path: Path, unsure: encodings.Unsure) -> str:
    """Return the message about a file whose encoding is not clear."""
    width = max(len(codec) for codec, _ in (*unsure.candidates, ("utf-8", "")))
    rows = "\n".join(f"  --encoding {codec:{width}}   {sample}" for codec, sample in unsure.candidates)
    return (
        f"{display_path(path)}: is not UTF-8 ({plural(unsure.lines, 'line')} at least), and its encoding cannot be told for "
        "sure. Add the option whose\ntext reads right, or set ENCODING in make_tokenize.sh:\n"
        f"{rows}\n  --encoding {'utf-8':{width}}   leaves out the rows that are not UTF-8\n"
        "Or save the file as UTF-8 (in an editor: Save as, encoding UTF-8)."
    )


def packing(begins: bytes) -> str:
    """.gz or .zst by the first bytes of a file, or ""."""
    if begins.startswith(b"\x1f\x8b"):
        return ".gz"
    return ".zst" if begins.startswith(b"\x28\xb5\x2f\xfd") or begins[1:4] == b"\x2a\x4d\x18" else ""


def too_long(law: str) -> RowError:
    """Return the error about a row that is too long."""
    return RowError("too long", f"is longer than {LINE_LIMIT >> 20} MB. {law}; split this one into several rows")


def skip_line(file: IO[bytes]) -> None:
    """Go to behind the next line break."""
    while (rest := file.readline(LINE_LIMIT)) and not rest.endswith(b"\n"):
        pass


def not_utf8(data: bytes) -> RowError:
    """What to say of a row that does not belong to the encoding of its file."""
    if mark := encodings.MARK.search(data):
        name = mark[1].decode("utf-8", "replace")
        if name.startswith(encodings.UTF8_INSIDE):
            rest = name.removeprefix(encodings.UTF8_INSIDE)
            return RowError("not UTF-8", f"is UTF-8, but the file was read as {rest}. Save all of it in one encoding")
        return RowError("not UTF-8", f"holds bytes that are not {name}, the encoding that the file was read in")
    return RowError("not UTF-8", "is not valid UTF-8, the encoding of the file. Save this row as UTF-8, or take it out")


def text_row(data: bytes) -> Row | RowError:
    """Return a line of a text file as a row."""
    try:
        return {"text": data.decode("utf-8")}
    except UnicodeDecodeError:
        return not_utf8(data)


def grouped(path: Path, rows: Iterator[tuple[int, Row | RowError]], read: Callable[[], int]) -> Iterator[Block]:
    """Single rows in blocks: as many as a table's, or about a block's bytes of text."""
    batch: list[tuple[int, bytes | Row | RowError]] = []
    size = 0
    for number, row in rows:
        batch.append((number, row))
        size += sum(len(v) for v in row.values() if v) if isinstance(row, dict) else 0
        if len(batch) >= ROWS or size >= BLOCK:
            yield Block(display_path(path), batch[0][0], batch, read())
            batch, size = [], 0
    if batch:
        yield Block(display_path(path), batch[0][0], batch, read())
