"""The content of files as a number that two different ones do not share. Floor 0."""

from __future__ import annotations

import hashlib
import os
import threading

PIECE = 1 << 20


def sha256(path: str | os.PathLike) -> str:
    """The content hash of a file (about 1 GB/s)."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(PIECE))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


class Meanwhile:
    """The content hash of a file, computed while the caller does something else."""

    def __init__(self, path: str | os.PathLike):
        self.path, self.error, self.found = path, None, ""
        self.thread = threading.Thread(target=self.run, daemon=True)  # nobody waits for it if the rest fails
        self.thread.start()

    def run(self) -> None:
        try:
            self.found = sha256(self.path)
        except OSError as error:
            self.error = error

    def sha256(self) -> str:
        """Waits for it. OSError if the file could not be read."""
        self.thread.join()
        if self.error:
            raise self.error
        return self.found
