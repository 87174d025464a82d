"""What readers of all formats share: blocks of rows, the bytes of a file whether packed or not, and what is wrong with rows."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from ..errors import UserError, install
from ..project import shown
from .schemas import Row, RowError

BLOCK = 1 << 18  # bytes of lines that are worked on at once; larger ones fall out of the processor's cache
BEGINNING = 512  # bytes in which a file that is no text shows that
HEAD = 1 << 16  # bytes that are read from the disk at once, and that a format may be told by
LINE_LIMIT = 32 << 20  # bytes; a longer line is a file without line breaks, not a row
ROWS = 512  # of a table that are worked on at once


class Note(NamedTuple):
    """What is to be said of a file as a whole. level: note or warning."""

    level: str
    file: str
    words: str


class TableRow(dict):
    """A row of a table whose cells are text: an empty cell may hold a word for it, like nan."""


@dataclass(frozen=True)
class Block:
    """Rows behind one another. data: bytes of whole JSON lines, the first of which is line `first`; or a list of
    (number, JSON bytes | row | RowError). read: bytes of the file up to here. held_out: they belong to NAME.valid."""

    file: str
    first: int
    data: bytes | list[tuple[int, bytes | Row | RowError]]
    read: int
    held_out: bool = False
    notes: tuple[Note, ...] = ()


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
        packed = path.suffix.lower() if path.suffix.lower() in (".gz", ".zst") else packing(raw.peek(4))
        if packed == ".gz":
            file = open_files.enter_context(gzip.GzipFile(fileobj=raw))
        elif packed == ".zst":
            try:
                import zstandard
            except ImportError:
                raise UserError(
                    f"{shown(path)}: reading .zst needs the package zstandard: {install('zstandard')}"
                ) from None
            unpacker = zstandard.ZstdDecompressor()
            file = open_files.enter_context(io.BufferedReader(Frames(raw, unpacker.decompressobj), HEAD))
        try:
            if file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise UserError(f"{shown(path)}: is UTF-16. Save it as UTF-8 (in an editor: Save as, encoding UTF-8).")
            if is_no_text(file.peek(HEAD)[:BEGINNING]):
                raise UserError(f"{shown(path)}: is no text; it holds bytes that no text has.")
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


def packing(begins: bytes) -> str:
    """.gz or .zst by the first bytes of a file, or ""."""
    if begins.startswith(b"\x1f\x8b"):
        return ".gz"
    return ".zst" if begins.startswith(b"\x28\xb5\x2f\xfd") or begins[1:4] == b"\x2a\x4d\x18" else ""


def is_no_text(beginning: bytes) -> bool:
    """Whether a file that begins so is none: a picture, a program. One stray byte makes no row worthless but its own."""
    try:
        beginning.decode("utf-8")
    except UnicodeDecodeError as error:
        return b"\0" in beginning and error.start < len(beginning) - 3  # (else a character is cut off)
    return False


def too_long(law: str) -> RowError:
    return RowError("too long", f"is longer than {LINE_LIMIT >> 20} MB. {law}; split this one into several rows")


def skip_line(file: IO[bytes]) -> None:
    """Go to behind the next line break."""
    while (rest := file.readline(LINE_LIMIT)) and not rest.endswith(b"\n"):
        pass


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
