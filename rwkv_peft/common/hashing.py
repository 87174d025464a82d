"""Hashes and stamps of files, and a task in the background to compute them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from .atomic_io import open_regular
from .direct_io import BUFFER_BYTES, DirectReader, allocate_aligned

try:  # 5 to 10 times as fast, with the processor's carry-less products
    from zlib_ng.zlib_ng import crc32
except ImportError:
    crc32 = zlib.crc32

T = TypeVar("T")

_PIECE = 1 << 20
_SAMPLES = 64
SETTLED = 2.0  # seconds after which a file's clock has ticked, whatever the file system

__all__ = ["BackgroundTask", "crc32", "file_stamp", "fingerprint", "sample_hash", "sha256"]


def file_stamp(path: str | os.PathLike) -> list[int] | None:
    """Return what stays the same until a file is written to: size, inode, and the times of its last changes in ns.

    None for a file that was written to within SETTLED seconds: another write could fall into the same tick of the clock.
    """
    info = os.stat(path)
    if time.time() - max(info.st_mtime, info.st_ctime) < SETTLED:
        return None
    return [info.st_size, info.st_ino, info.st_mtime_ns, info.st_ctime_ns]


def sha256(path: str | os.PathLike, on_disk: bool = False) -> str:
    """Return the SHA-256 of a file (about 1 GB/s).

    Args:
        path: the file.
        on_disk: it was just written with direct I/O: read it that way, not through the system's cache.
    """
    digest = hashlib.sha256()
    if on_disk:
        with contextlib.closing(DirectReader(path)) as reader:
            buffer, at = allocate_aligned(BUFFER_BYTES), 0
            while piece := reader.read(buffer, BUFFER_BYTES, at):
                digest.update(piece)
                at += len(piece)
    else:
        buffer = memoryview(bytearray(_PIECE))
        with open_regular(path, buffering=0) as file:
            while size := os.readv(file.fileno(), [buffer]):
                digest.update(buffer[:size])
    return digest.hexdigest()


def sample_hash(path: str | os.PathLike) -> str:
    """Return a hash of a file's size, its first and last MB and samples between: for files too long to be read twice.

    It detects most changes, not all.
    """
    size = os.stat(path).st_size
    digest = hashlib.sha256(str(size).encode())
    with open_regular(path) as file:
        for begin in [0, *(size * part // _SAMPLES for part in range(1, _SAMPLES)), max(0, size - _PIECE)]:
            file.seek(begin)
            digest.update(file.read(_PIECE if begin in (0, size - _PIECE) else _PIECE >> 8))
    return digest.hexdigest()


def fingerprint(path: str | os.PathLike, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a file's SHA-256, its stamp ("mark") and its sample ("pieces").

    Args:
        path: the file.
        known: an earlier fingerprint: while the file's stamp and sample are unchanged, its hash is not computed again.
            (The sample detects writes that leave the stamp unchanged.)

    Returns:
        A dict; its "mark" is None if the file changed meanwhile, or has only just been written.
    """
    before, pieces = file_stamp(path), sample_hash(path)
    if known and before and before == known.get("mark") and known.get("pieces") in (None, pieces):
        return {"sha256": known["sha256"], "mark": before, "pieces": pieces}
    content = sha256(path)
    return {"sha256": content, "mark": before if before == file_stamp(path) else None, "pieces": pieces}


class BackgroundTask(Generic[T]):
    """A function that runs in a thread while the caller does something else."""

    def __init__(self, work: Callable[[], T]):
        self._work = work
        self._error: Exception | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)  # (does not keep a failed command alive)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except Exception as error:  # raised by `result`
            self._error = error

    def result(self) -> T:
        """Wait for the function's result, or raise its exception: OSError if a file could not be read."""
        self.thread.join()
        if self._error:
            raise self._error
        return self._result
