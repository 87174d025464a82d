"""Large pieces of files straight to the disk and from it, past the memory in which the system keeps files. Floor 0.

The usual way copies them into memory that has to be found first, and the disk takes them from there. Where memory is given slowly
(virtual machines, WSL2) that takes several times as long as the disk itself, and it pushes out what others have mapped. Where a
file system has no other way (O_DIRECT), and for what does not fill whole blocks, the usual one is taken.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterable
from typing import BinaryIO

BLOCK = 4096  # places, sizes and memory have to be multiples of the disk's blocks; no disk has larger ones
ROOM = 8 << 20  # bytes that are written or read at once
WORTH = 1 << 17  # bytes from which on it is worth it


def aligned(size: int) -> memoryview:
    """Memory for so many bytes, wherever they begin in a block."""
    return memoryview(mmap.mmap(-1, size + 2 * BLOCK))


def opened(path: str | os.PathLike, how: int) -> int | None:
    """A file, to be read or written straight; None where that cannot be."""
    try:
        return os.open(path, how | os.O_DIRECT)
    except (OSError, AttributeError):  # the file system refuses, or the system knows no such way
        return None


def write_at(file: int, data: memoryview, at: int) -> None:
    """The usual way."""
    while data:  # a write may take less than it is given: 2 GB at most
        written = os.pwrite(file, data, at)
        data, at = data[written:], at + written


class DirectWriter:
    """Writes into a file, by several threads, one write at a time: the system would let the others turn in circles before its own
    lock. file: opened for writing; whoever opened it syncs it.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.path, self.one_at_a_time, self.own = (
            file.fileno(),
            file.name,
            threading.Lock(),
            threading.local(),
        )

    def __enter__(self) -> DirectWriter:
        self.straight = opened(self.path, os.O_WRONLY | os.O_NOFOLLOW)
        return self

    def __exit__(self, *_exception) -> None:
        if self.straight is not None:
            os.close(self.straight)

    def write(self, data: bytes | memoryview, at: int) -> None:
        """Something small."""
        with self.one_at_a_time:
            write_at(self.file, memoryview(data), at)

    def pieces(self, pieces: Iterable[bytes | memoryview], at: int) -> int:
        """Write what follows one another from a place on. Returns where it ends."""
        if not hasattr(self.own, "room"):
            self.own.room = aligned(ROOM)
        room, filled = self.own.room, 0
        for piece in pieces:
            left = memoryview(piece)
            if not filled and at % BLOCK:  # up to where a block begins
                head, left = left[: -at % BLOCK], left[-at % BLOCK :]
                self.write(head, at)
                at += len(head)
            while left:
                some = left[: ROOM - filled]
                room[filled : filled + len(some)] = some
                filled, left = filled + len(some), left[len(some) :]
                if filled == ROOM:
                    at, filled = self.flush(room[:ROOM], at), 0
        return self.flush(room[:filled], at)

    def flush(self, data: memoryview, at: int) -> int:
        """Write what begins where a block does, in memory and in the file."""
        blocks = data[: len(data) // BLOCK * BLOCK]
        with self.one_at_a_time:
            written = 0
            if self.straight is not None and len(blocks) >= WORTH:
                try:
                    written = os.pwrite(self.straight, blocks, at)
                except OSError as error:
                    if error.errno != errno.EINVAL:  # its blocks are larger, or it has promised what it cannot do
                        raise
            write_at(self.file, data[written:], at + written)
        return at + len(data)


class DirectReader:
    """Reads pieces of a file, by several threads: as they are on the disk where it can, and not what the system has in memory."""

    def __init__(self, path: str | os.PathLike):
        self.file, self.straight = os.open(path, os.O_RDONLY), opened(path, os.O_RDONLY)

    def close(self) -> None:
        for file in (self.file, self.straight):
            if file is not None:
                os.close(file)

    def read(self, room: memoryview, size: int, at: int) -> memoryview:
        """So many bytes, fewer at the end of the file, in a room that is `aligned` for as many."""
        skipped = at % BLOCK
        if self.straight is not None:
            try:
                got = os.preadv(self.straight, [room[: -(-(skipped + size) // BLOCK) * BLOCK]], at - skipped)
                return room[skipped : min(skipped + size, max(got, skipped))]
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        return room[: os.preadv(self.file, [room[:size]], at)]
