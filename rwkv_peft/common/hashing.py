"""The content of files as a number that two different ones do not share. Floor 0."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from .atomic_io import reading
from .direct_io import ROOM, DirectReader, aligned

try:  # 5 to 10 times as fast, with the processor's carry-less products
    from zlib_ng.zlib_ng import crc32
except ImportError:
    crc32 = zlib.crc32

T = TypeVar("T")

PIECE = 1 << 20
SAMPLES = 64
SETTLED = 2.0  # seconds after which a file's clock has ticked, whatever the file system

__all__ = ["BackgroundTask", "crc32", "file_stamp", "fingerprint", "sample", "sha256"]


def file_stamp(path: str | os.PathLike) -> list[int] | None:
    """What stays the same as long as nobody writes to a file: size, inode, and the times of its last changes in ns. None for
    one that has only just been written: another write could fall into the same tick of the clock.
    """
    found = os.stat(path)
    if time.time() - max(found.st_mtime, found.st_ctime) < SETTLED:
        return None
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def sha256(path: str | os.PathLike, on_disk: bool = False) -> str:
    """The content hash of a file (about 1 GB/s). on_disk: it was just written past the system's memory."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(PIECE))
    if on_disk:
        reader, room, at = DirectReader(path), aligned(ROOM), 0
        try:
            while piece := reader.read(room, ROOM, at):
                digest.update(piece)
                at += len(piece)
        finally:
            reader.close()
        return digest.hexdigest()
    with reading(path, buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def sample(path: str | os.PathLike) -> str:
    """The content hash of a file's size, its first and last MB and some of what lies between: for files that are too long to be
    read twice. It tells most changes, not all.
    """
    size = os.stat(path).st_size
    digest = hashlib.sha256(str(size).encode())
    with reading(path) as file:
        for begin in [0, *(size * part // SAMPLES for part in range(1, SAMPLES)), max(0, size - PIECE)]:
            file.seek(begin)
            digest.update(file.read(PIECE if begin in (0, size - PIECE) else PIECE >> 8))
    return digest.hexdigest()


def fingerprint(path: str | os.PathLike, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """sha256 of a file, its mark, and its sample; None for the mark if the file has changed meanwhile. known: its content at an
    earlier time: if nobody has written to it since, it is not read. (The sample tells of writes that leave the mark alone.)
    """
    before, pieces = file_stamp(path), sample(path)
    if known and before and before == known.get("mark") and known.get("pieces") in (None, pieces):
        return {"sha256": known["sha256"], "mark": before, "pieces": pieces}
    found = sha256(path)
    return {"sha256": found, "mark": before if before == file_stamp(path) else None, "pieces": pieces}


class BackgroundTask(Generic[T]):
    """What takes a while to read, read while the caller does something else."""

    def __init__(self, work: Callable[[], T]):
        self.work = work
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self.run, daemon=True)  # nobody waits for it if the rest fails
        self.thread.start()

    def run(self) -> None:
        try:
            self.found = self.work()
        except Exception as error:  # raised where the result is asked for
            self.error = error

    def result(self) -> T:
        """Waits for it. Raises what the work has raised, like OSError if a file could not be read."""
        self.thread.join()
        if self.error:
            raise self.error
        return self.found
