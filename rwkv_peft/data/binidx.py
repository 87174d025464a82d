"""Reader and writer of the .bin/.idx format (Megatron MMIDIDX).

    NAME.bin   all rows one after another, little-endian, no padding
    NAME.idx   9 bytes magic, u64 version 1, u8 dtype code, u64 rows N, u64 D, i32 sizes [N] in tokens,
               i64 byte offsets [N] into .bin, i64 document index [D] (0..N here: each row is a document)

Tokens are uint16; roles (who said each token) are a second pair of files with uint8. Byte-compatible with RWKV-LM and
json2binidx_tool. Source of the layout: rwkvt/dataset/binidx.py of RWKV-PEFT (github.com/Joluck/RWKV-PEFT).
"""

from __future__ import annotations

import array
import contextlib
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from rwkv_peft.common import atomic_io
from rwkv_peft.common.atomic_io import (
    check_not_folder,
    create_file,
    fsync_dir,
    fsync_file,
    name_refused_write,
    remove_stale_temps,
    temp_path,
)
from rwkv_peft.common.errors import UserError
from rwkv_peft.common.formatting import plural
from rwkv_peft.common.paths import describe_missing, display_path

MAGIC = b"MMIDIDX\0\0"
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float64, 8: np.uint16}
CODES = {np.dtype(np.uint8): 1, np.dtype(np.uint16): 8}
INDEX_ROWS = 1 << 20  # rows of an index that are in memory at once
HEADER = len(MAGIC) + 8 + 1 + 8 + 8


def index_chunks(sizes: np.ndarray, dtype: DTypeLike) -> Iterator[bytes]:
    """Yield the content of an .idx file for rows of these sizes (tokens) stored one after another.

    It comes in chunks: for millions of rows the whole would take much memory.
    """
    dtype, rows = np.dtype(dtype), len(sizes)
    yield MAGIC + struct.pack("<QBQQ", 1, CODES[dtype], rows, rows + 1)
    for begin in range(0, rows, INDEX_ROWS):
        yield sizes[begin : begin + INDEX_ROWS].astype("<i4").tobytes()
    offset = 0
    for begin in range(0, rows, INDEX_ROWS):
        ends = offset + np.cumsum(sizes[begin : begin + INDEX_ROWS].astype(np.int64) * dtype.itemsize)
        yield np.append(offset, ends[:-1]).astype("<i8").tobytes()
        offset = int(ends[-1])
    for begin in range(0, rows + 1, INDEX_ROWS):
        yield np.arange(begin, min(begin + INDEX_ROWS, rows + 1), dtype="<i8").tobytes()


class Header(NamedTuple):
    """The first HEADER bytes of an .idx, unchecked, and where they say that the rest is.

    Attributes:
        magic: identifies the format.
        version: 1.
        code: of the tokens' dtype, a key of DTYPES.
        rows: number of rows.
        documents: entries of the document index.
    """

    magic: bytes
    version: int
    code: int  # of the token's dtype, a key of DTYPES
    rows: int
    documents: int  # entries of the document index

    @classmethod
    def parse(cls, index: bytes) -> Header:
        """Parse a header. index: at least the first HEADER bytes of the file."""
        return cls._make(struct.unpack_from("<9sQBQQ", index))

    @property
    def dtype(self) -> np.dtype:
        """Of the tokens, little-endian. KeyError for an unknown code."""
        return np.dtype(DTYPES[self.code]).newbyteorder("<")

    @property
    def offsets_at(self) -> int:
        """Byte of the first row offset."""
        return HEADER + 4 * self.rows

    @property
    def documents_at(self) -> int:
        """Byte of the document index."""
        return HEADER + 12 * self.rows

    @property
    def end(self) -> int:
        """Bytes that the .idx should have."""
        return self.documents_at + 8 * self.documents


class Reader:
    """Rows of a .bin/.idx pair, mapped, never copied as a whole. Refuses a pair that does not fit together.

    Args:
        prefix: path without ending.

    Attributes:
        sizes: tokens of each row, int32 [N].
        tokens: of all rows.
    """

    def __init__(self, prefix: str | os.PathLike):
        bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        for path in (idx_path, bin_path):
            if not path.is_file():
                raise UserError(
                    f"{display_path(path)}: {describe_missing(path)}. Make it with ./make_tokenize.sh, or correct DATA_PATH."
                )
        index = idx_path.read_bytes()
        if len(index) < HEADER or index[: len(MAGIC)] != MAGIC:
            raise UserError(
                f"{display_path(idx_path)}: is not an .idx file (it does not begin with MMIDIDX). Tokenize the data again."
            )
        header = Header.parse(index)
        if header.version != 1 or header.code not in DTYPES:
            raise UserError(
                f"{display_path(idx_path)}: has version {header.version} and dtype code {header.code}; "
                "known are version 1, codes 1 to 8."
            )
        self.dtype, rows = header.dtype, header.rows
        if len(index) != header.end:
            raise UserError(
                f"{display_path(idx_path)}: has {len(index):,} bytes, but its header ({plural(rows, 'row')}) asks for "
                f"{header.end:,}. It was cut off or damaged; tokenize the data again."
            )
        self.sizes = np.frombuffer(index, "<i4", rows, HEADER)
        self.offsets = np.frombuffer(index, "<i8", rows, header.offsets_at)
        have = bin_path.stat().st_size
        need = int(self.sizes.sum(dtype=np.int64)) * self.dtype.itemsize
        if have != need:
            raise UserError(
                f"{display_path(bin_path)}: has {have:,} bytes, but {idx_path.name} describes {need:,}. "
                "One of the two was cut off or belongs to other data; tokenize the data again."
            )
        starts = np.zeros(rows, dtype=np.int64)
        np.cumsum(self.sizes[:-1].astype(np.int64) * self.dtype.itemsize, out=starts[1:])
        if (self.sizes < 0).any() or not np.array_equal(self.offsets, starts):
            bad = int(np.flatnonzero((self.sizes < 0) | (self.offsets != starts))[0])
            raise UserError(
                f"{display_path(idx_path)}: row {bad} points to the wrong place in the .bin. Tokenize the data again."
            )
        self.path = bin_path
        self.tokens = np.memmap(bin_path, dtype=self.dtype, mode="r") if have else np.zeros(0, self.dtype)

    def __len__(self) -> int:
        return len(self.sizes)

    def row(self, i: int) -> np.ndarray:
        """Return the tokens of row `i` as a read-only view."""
        start = int(self.offsets[i]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sizes[i])]


class Writer:
    """Writes pairs under temporary names; `commit` gives all of them their final names, or none is changed.

    Use as a context manager. Without commit (an error, Ctrl-C) the temporary files are removed and older files stay
    complete.

    Args:
        prefix: path without ending.
        streams: ending between prefix and .bin ("" or ".roles") -> dtype. A reader needs the stream "" to accept the
            others.
    """

    def __init__(self, prefix: str | os.PathLike, streams: dict[str, np.dtype]):
        self.prefix, self.streams = str(prefix), {ending: np.dtype(d) for ending, d in streams.items()}
        self.files: dict[str, IO[bytes]] = {}
        self.sizes = {ending: array.array("i") for ending in self.streams}

    def __enter__(self) -> Writer:
        for ending in self.streams:
            for kind in ("bin", "idx"):
                check_not_folder(self.final(ending, kind))
                remove_stale_temps(self.final(ending, kind))
            self.files[ending] = create_file(temp_path(self.final(ending, "bin")))  # closed by commit or by discard
        return self

    def __exit__(self, *_exception) -> None:
        self.discard()

    def final(self, ending: str, kind: str) -> Path:
        """Return the final name of a file."""
        return Path(f"{self.prefix}{ending}.{kind}")

    def add(self, rows: dict[str, np.ndarray]) -> None:
        """Add one row: its values for each of some streams."""
        for ending, values in rows.items():
            # not tofile: it hides why a write failed (a full disk)
            content = values.astype(self.streams[ending].newbyteorder("<"), copy=False).tobytes()
            self.extend(ending, content, [len(values)])

    def extend(self, ending: str, content: bytes, sizes: Sequence[int]) -> None:
        """Add consecutive rows of one stream.

        Args:
            ending: of the stream.
            content: the bytes for the file.
            sizes: values of each row.
        """
        with name_refused_write(self.final(ending, "bin")):
            self.files[ending].write(content)
        self.sizes[ending].extend(sizes)

    def commit(self, remove: Sequence[Path] = (), last_look: Callable[[], None] = lambda: None) -> None:
        """Flush everything to the disk, then rename. The .idx of "" comes last: a pair without it is refused.

        Args:
            remove: files of an earlier run that do not belong to these; they are removed in the same step.
            last_look: called before the renames; raises if the files must not get their names.
        """
        for ending, file in self.files.items():
            with name_refused_write(self.final(ending, "bin")):
                fsync_file(file)
                file.close()
            with (
                name_refused_write(self.final(ending, "idx")),
                create_file(temp_path(self.final(ending, "idx"))) as index,
            ):
                index.writelines(index_chunks(np.frombuffer(self.sizes[ending], np.int32), self.streams[ending]))
                fsync_file(index)
        names = [self.final(e, kind) for e in sorted(self.streams, reverse=True) for kind in ("bin", "idx")]
        last_look()
        put_in_place(names, remove)  # ends with the .idx of ""

    def discard(self) -> None:
        """Remove the temporary files."""
        for ending, file in self.files.items():
            with contextlib.suppress(OSError):  # a full disk refuses the rest of the data, which is discarded anyway
                file.close()
            for kind in ("bin", "idx"):
                atomic_io.remove_path(temp_path(self.final(ending, kind)))


def put_in_place(names: list[Path], remove: Sequence[Path] = ()) -> None:
    """Give temporary files their names and remove the files of `remove`, all or none.

    The last name is the one without which readers refuse the rest: it is removed first and comes back last, so that a
    kill in between never leaves an old and a new file that seem to belong together.
    """
    kept: dict[Path, Path] = {}
    placed: list[Path] = []
    try:
        for name in (*reversed(names), *remove):
            if os.path.lexists(name):
                atomic_io.remove_path(old := Path(f"{temp_path(name)}.old"))
                os.replace(name, old)
                kept[name] = old
        for name in names:
            os.replace(temp_path(name), name)
            placed.append(name)
    except BaseException:
        for name in reversed(placed):
            name.unlink()
        for name, old in reversed(kept.items()):
            os.replace(old, name)
        raise
    for old in kept.values():
        atomic_io.remove_path(old)
    fsync_dir(names[-1].parent)
