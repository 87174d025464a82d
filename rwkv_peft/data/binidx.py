"""The .bin/.idx container of the field (Megatron MMIDIDX), reader and writer side by side.

    NAME.bin   all rows behind one another, little-endian, no padding
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
from typing import NamedTuple

import numpy as np

from rwkv_peft.common import atomic_io
from rwkv_peft.common.atomic_io import create, fsync_dir, must_not_be_folder, named, remove_stale_temps, sync, temp_path
from rwkv_peft.common.errors import UserError
from rwkv_peft.common.formatting import plural
from rwkv_peft.common.paths import display_path, missing

MAGIC = b"MMIDIDX\0\0"
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float64, 8: np.uint16}
CODES = {np.dtype(np.uint8): 1, np.dtype(np.uint16): 8}
INDEX_ROWS = 1 << 20  # of an index that are in memory at once
HEADER = len(MAGIC) + 8 + 1 + 8 + 8


def index_bytes(sizes: np.ndarray, dtype) -> bytes:
    """The content of an .idx file for rows of these sizes (tokens) stored one after another."""
    return b"".join(index_parts(np.asarray(sizes), dtype))


def index_parts(sizes: np.ndarray, dtype) -> Iterator[bytes]:
    """index_bytes piece by piece: for millions of rows the whole would take much memory for nothing."""
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
    """The first HEADER bytes of an .idx as they stand there, and where they say that the rest lies. Nothing is checked."""

    magic: bytes
    version: int
    code: int  # of the token's dtype, a key of DTYPES
    rows: int
    documents: int  # entries of the document index

    @classmethod
    def parse(cls, index: bytes) -> Header:
        """index: at least the first HEADER bytes of the file."""
        return cls._make(struct.unpack_from("<9sQBQQ", index))

    @property
    def dtype(self) -> np.dtype:
        """Of the tokens, little-endian. KeyError for a code that nobody knows."""
        return np.dtype(DTYPES[self.code]).newbyteorder("<")

    @property
    def offsets_at(self) -> int:
        return HEADER + 4 * self.rows

    @property
    def documents_at(self) -> int:
        return HEADER + 12 * self.rows

    @property
    def end(self) -> int:
        """Bytes that the .idx should have."""
        return self.documents_at + 8 * self.documents


class Reader:
    """Rows of a .bin/.idx pair, mapped, never copied as a whole. Refuses a pair that does not fit together.

    prefix: path without ending. sizes: int32 [N]. row(i): the tokens of row i as a read-only view.
    """

    def __init__(self, prefix: str | os.PathLike):
        bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        for path in (idx_path, bin_path):
            if not path.is_file():
                raise UserError(
                    f"{display_path(path)}: {missing(path)}. Make it with ./make_tokenize.sh, or correct DATA_PATH."
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
                f"{display_path(idx_path)}: has {len(index):,} bytes, but its header ({plural(rows, 'row')}) "
                f"asks for {header.end:,}. "
                "It was cut off or damaged; tokenize the data again."
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
        start = int(self.offsets[i]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sizes[i])]


class Writer:
    """Writes pairs under temporary names; `commit` gives all of them their final names, or none is touched.

    Use as a context manager. Without commit (an error, Ctrl-C) the temporary files go away and older files stay whole.
    """

    def __init__(self, prefix: str | os.PathLike, streams: dict[str, np.dtype]):
        """streams: ending between prefix and .bin ("" or ".roles") -> dtype. The stream "" is the one that marks them all."""
        self.prefix, self.streams = str(prefix), {ending: np.dtype(d) for ending, d in streams.items()}
        self.files = {}
        self.sizes = {ending: array.array("i") for ending in self.streams}

    def __enter__(self) -> Writer:
        for ending in self.streams:
            for kind in ("bin", "idx"):
                must_not_be_folder(self.final(ending, kind))
                remove_stale_temps(self.final(ending, kind))
            self.files[ending] = create(temp_path(self.final(ending, "bin")))  # closed by commit or by discard
        return self

    def __exit__(self, *_exception) -> None:
        self.discard()

    def final(self, ending: str, kind: str) -> Path:
        return Path(f"{self.prefix}{ending}.{kind}")

    def add(self, rows: dict[str, np.ndarray]) -> None:
        """One row: its values for each of some streams."""
        for ending, values in rows.items():
            # not tofile: it hides why a write failed (a full disk)
            content = values.astype(self.streams[ending].newbyteorder("<"), copy=False).tobytes()
            self.extend(ending, content, [len(values)])

    def extend(self, ending: str, content: bytes, sizes: Sequence[int]) -> None:
        """Rows of one stream behind one another, as the bytes of the file; sizes: values of each."""
        with named(self.final(ending, "bin")):
            self.files[ending].write(content)
        self.sizes[ending].extend(sizes)

    def commit(self, remove: Sequence[Path] = (), last_look: Callable[[], None] = lambda: None) -> None:
        """Flush everything to the disk, then rename. The .idx of "" comes last: a pair without it is refused.

        remove: files of an earlier run that do not belong to these; they go in the same moment. last_look: raises where nothing
        must get its name.
        """
        for ending, file in self.files.items():
            with named(self.final(ending, "bin")):
                sync(file)
                file.close()
            with named(self.final(ending, "idx")), create(temp_path(self.final(ending, "idx"))) as index:
                index.writelines(index_parts(np.frombuffer(self.sizes[ending], np.int32), self.streams[ending]))
                sync(index)
        names = [self.final(e, kind) for e in sorted(self.streams, reverse=True) for kind in ("bin", "idx")]
        last_look()
        put_in_place(names, remove)  # ends with the .idx of ""

    def discard(self) -> None:
        for ending, file in self.files.items():
            with contextlib.suppress(OSError):  # a full disk refuses what is still to be flushed: it is to go anyway
                file.close()
            for kind in ("bin", "idx"):
                atomic_io.remove(temp_path(self.final(ending, kind)))


def put_in_place(names: list[Path], remove: Sequence[Path] = ()) -> None:
    """Give temporary files their names and take the files of `remove` away, all or none. The last name is the mark without
    which readers refuse the rest: it goes first and comes back last, so that a kill in between never leaves an old and a new
    file that seem to belong together.
    """
    kept: dict[Path, Path] = {}
    placed: list[Path] = []
    try:
        for name in (*reversed(names), *remove):
            if os.path.lexists(name):
                atomic_io.remove(old := Path(f"{temp_path(name)}.old"))
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
        atomic_io.remove(old)
    fsync_dir(names[-1].parent)
