"""Read and write large pieces of files directly on the disk, without the system's file cache (O_DIRECT).

Buffered I/O copies the data into memory that has to be allocated first, and the disk takes it from there. Where memory is
allocated slowly (virtual machines, WSL2) that takes several times as long as the disk itself, and it evicts what other
programs have mapped. Where a file system does not support O_DIRECT, and for what does not fill whole blocks, buffered
I/O is used.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterable
from typing import BinaryIO

BLOCK = 4096  # offsets, sizes and memory must be multiples of the disk's blocks; no disk has larger ones
BUFFER_BYTES = 8 << 20  # bytes that are written or read at once
_MIN_DIRECT = 1 << 17  # bytes from which on direct I/O is faster


def allocate_aligned(size: int) -> memoryview:
    """Allocate page-aligned memory for `size` bytes that begin anywhere in a block."""
    return memoryview(mmap.mmap(-1, size + 2 * BLOCK))


def _open_direct(path: str | os.PathLike[str], flags: int) -> int | None:
    try:
        return os.open(path, flags | os.O_DIRECT)
    except (OSError, AttributeError):  # not supported by the file system, or by the system
        return None


def _write_buffered(file: int, data: memoryview, at: int) -> None:
    while data:  # a write may take less than it is given: 2 GB at most
        written = os.pwrite(file, data, at)
        data, at = data[written:], at + written


class DirectWriter:
    """Writes into a file from several threads, one write at a time: otherwise they would spin on the system's own lock.

    Args:
        file: opened for writing; whoever opened it syncs it.
    """

    def __init__(self, file: BinaryIO):
        self._file, self._path = file.fileno(), file.name
        self._lock, self._local = threading.Lock(), threading.local()

    def __enter__(self) -> DirectWriter:
        self._direct = _open_direct(self._path, os.O_WRONLY | os.O_NOFOLLOW)
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._direct is not None:
            os.close(self._direct)

    def write(self, data: bytes | memoryview, at: int) -> None:
        """Write a few bytes at an offset."""
        with self._lock:
            _write_buffered(self._file, memoryview(data), at)

    def pieces(self, pieces: Iterable[bytes | memoryview], at: int) -> int:
        """Write consecutive pieces from an offset on. Returns the offset of their end."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = allocate_aligned(BUFFER_BYTES)
        buffer, filled = self._local.buffer, 0
        for piece in pieces:
            left = memoryview(piece)
            if not filled and at % BLOCK:  # up to the next block
                head, left = left[: -at % BLOCK], left[-at % BLOCK :]
                self.write(head, at)
                at += len(head)
            while left:
                some = left[: BUFFER_BYTES - filled]
                buffer[filled : filled + len(some)] = some
                filled, left = filled + len(some), left[len(some) :]
                if filled == BUFFER_BYTES:
                    at, filled = self._flush(buffer[:BUFFER_BYTES], at), 0
        return self._flush(buffer[:filled], at)

    def _flush(self, data: memoryview, at: int) -> int:
        """Write data that begins at a block's beginning, in memory and in the file. Returns the offset of its end."""
        blocks = data[: len(data) // BLOCK * BLOCK]
        with self._lock:
            written = 0
            if self._direct is not None and len(blocks) >= _MIN_DIRECT:
                try:
                    written = os.pwrite(self._direct, blocks, at)
                except OSError as error:
                    if error.errno != errno.EINVAL:  # its blocks are larger, or it claims support that it does not have
                        raise
            _write_buffered(self._file, data[written:], at + written)
        return at + len(data)


class DirectReader:
    """Reads pieces of a file from several threads: from the disk if it can, not from the system's file cache."""

    def __init__(self, path: str | os.PathLike[str]):
        self._file, self._direct = os.open(path, os.O_RDONLY), _open_direct(path, os.O_RDONLY)

    def close(self) -> None:
        """Close the file."""
        for file in (self._file, self._direct):
            if file is not None:
                os.close(file)

    def read(self, room: memoryview, size: int, at: int) -> memoryview:
        """Read bytes at an offset.

        Args:
            room: memory, `aligned` for `size` bytes.
            size: how many bytes.
            at: the offset.

        Returns:
            The bytes, a part of `room`; fewer than `size` at the end of the file.
        """
        skipped = at % BLOCK
        if self._direct is not None:
            try:
                count = os.preadv(self._direct, [room[: -(-(skipped + size) // BLOCK) * BLOCK]], at - skipped)
                return room[skipped : min(skipped + size, max(count, skipped))]
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        return room[: os.preadv(self._file, [room[:size]], at)]
