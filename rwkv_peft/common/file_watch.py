"""Check that the files a command reads are still those it started with.

Files are mapped for hours, or read more than once, while somebody may overwrite, replace, truncate or remove them. A check of a
file compares what the file system reports about it (device, inode, size, times), and samples of its content: there are
writes that leave the times unchanged (through a shared mapping on tmpfs), and file systems whose clock is coarse.

A file whose modification time changes while it is in use counts as changed, whatever its content is now: it may have had other
bytes between two checks. If only its permissions or names change (chmod, a backup's hard link), it is unchanged, unless
samples of the content differ, or all of it where its hash is known (a time can be set back). If another file takes its name,
what is mapped stays as it was; the same content, where its hash is known, is no change. A detected change is final: something
may have been computed with it.
"""

from __future__ import annotations

import contextlib
import os
import random
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .errors import EXIT_USER, UserError
from .formatting import plural
from .hashing import crc32, sha256
from .paths import display_path

LOOK = 1.0  # seconds between two checks of all files ...
LONGEST = 5.0  # ... and up to this many where there are many files ...
_LOAD = 0.002  # ... so that checks take about this part of the time
_SAMPLE_BYTES = 4096
_SAMPLES = 16  # of a file ...
_ALL_SAMPLES = 2048  # ... and of all files
SMALL = 64 << 20  # bytes of a file that is hashed when it is added, if no other code hashes it ...
_ALL_SMALL = 256 << 20  # ... and of all such files
PATIENCE = 2.0  # seconds for a file that is missing, or cannot be read, to come back: somebody may be replacing it
_TRIES = 4  # to read a file that is being written to


class FileChanged(UserError):
    """A file is not what it was when the command started."""


class Stamp(NamedTuple):
    """What changes when somebody writes to a file, or another file takes its name."""

    kind: int  # a regular file, a folder, a pipe
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


def stamp_of(path: str | os.PathLike[str]) -> Stamp:
    """Return the stamp of a file or a folder."""
    info = os.stat(path)
    return Stamp(stat.S_IFMT(info.st_mode), info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


def _checksum(path: Path, begin: int) -> int:
    file = os.open(path, os.O_RDONLY)
    try:
        return crc32(os.pread(file, _SAMPLE_BYTES, begin))
    finally:
        os.close(file)


@dataclass
class WatchedFile:
    """A file, or a folder, as it was when it was added.

    Attributes:
        path: its name.
        stamp: its stamp.
        samples: (offset, checksum) of samples of the content.
        sha256: hash of all of it, where that is known.
        turn: counts the comparisons of single samples.
    """

    path: Path
    stamp: Stamp
    samples: list[tuple[int, int]] = field(default_factory=list)
    sha256: str | None = None
    turn: int = 0

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return self.stamp.kind == stat.S_IFDIR

    def take_samples(self, count: int) -> None:
        """Read samples of the content: the beginning, the end, and random places between."""
        size = self.stamp.size
        count = min(count, -(-size // _SAMPLE_BYTES))
        rng, last = random.Random(size), max(0, size - _SAMPLE_BYTES)
        begins = {0, last, *(rng.randrange(max(1, last)) for _ in range(count - 2))}
        self.samples = [(begin, _checksum(self.path, begin)) for begin in sorted(begins)[: max(1, count)]]

    def has_its_samples(self, every: bool) -> bool:
        """Return whether samples of the content are unchanged: every one, or only the next one in turn."""
        self.turn += 1
        some = self.samples if every or not self.samples else [self.samples[self.turn % len(self.samples)]]
        return all(_checksum(self.path, begin) == known for begin, known in some)


class FileWatch:
    """The files that a command uses.

    Args:
        begun: when the command started, for messages: "this run began".
        advice: a sentence about what to do after a change.

    Attributes:
        before_leaving: what to clean up if the process must exit at once.
        silent: another process reports why this one exits.
    """

    def __init__(self, begun: str, advice: str):
        self.begun, self.advice = begun, advice
        self.before_leaving: list[Callable[[], object]] = []
        self.files: dict[str, WatchedFile] = {}
        self.changed: FileChanged | None = None
        self.silent = False
        self._note: Callable[[str], None] = lambda words: None
        self._lock, self._over = threading.RLock(), threading.Event()
        self._last_check, self._hashed_bytes = time.monotonic(), 0
        # seconds of the last check without hashes of whole files, and of those alone
        self.seconds = self._hash_seconds = 0.0

    def add(self, paths: Iterable[str | os.PathLike[str]], stamps: Mapping[str, Stamp] | None = None) -> None:
        """Watch regular files from now on; call it before anything is read from them.

        Args:
            paths: the files.
            stamps: path -> the file's stamp before it was read, if it was read already.
        """
        new = [str(path) for path in paths if str(path) not in self.files]
        count = max(1, min(_SAMPLES, _ALL_SAMPLES // max(1, len(new) + len(self.files))))
        for path in new:
            with contextlib.suppress(OSError):  # whoever wants to read a missing file reports it
                one = WatchedFile(Path(path), (stamps or {}).get(path) or stamp_of(path))
                if one.stamp.kind != stat.S_IFREG:
                    continue
                one.take_samples(count)
                if one.stamp.size <= min(SMALL, _ALL_SMALL - self._hashed_bytes):
                    self._hashed_bytes += one.stamp.size
                    content = sha256(path)
                    one.sha256 = content if stamp_of(path) == one.stamp else None
                with self._lock:
                    self.files[path] = one

    def add_folder(self, path: Path) -> None:
        """Watch a folder that is written to by its name: it must be neither renamed nor replaced."""
        with self._lock:
            self.files[str(path)] = WatchedFile(path, stamp_of(path))

    def is_there(self, path: Path) -> bool:
        """Return whether a watched file or folder still has its name, whatever its content is."""
        try:
            return stamp_of(path)[:3] == self.files[str(path)].stamp[:3]
        except (OSError, KeyError):
            return False

    def release(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        """Stop watching files."""
        with self._lock:
            for path in paths:
                self.files.pop(str(path), None)

    def know(self, path: str | os.PathLike[str], content: str | None) -> None:
        """Keep the SHA-256 of a file, which was computed after `add`."""
        one = self.files.get(str(path))
        with contextlib.suppress(OSError):
            # (if the file was written to meanwhile, it is unknown which content was read)
            if one and content and not one.sha256 and stamp_of(path) == one.stamp:
                one.sha256 = content

    def content(self, path: str | os.PathLike[str]) -> str:
        """Return the SHA-256 of a file, computed if it is not known."""
        one = self.files.get(str(path))
        if one and one.sha256:
            return one.sha256
        self.know(path, content := sha256(path))
        return content

    def look(self, every: bool = True) -> FileChanged | None:
        """Check all files.

        Args:
            every: compare all samples of the content, instead of one of each file.

        Returns:
            The first change detected, now or before; None if there is none.
        """
        with self._lock:
            began, self._hash_seconds = time.thread_time(), 0.0
            for one in list(self.files.values()):
                if self.changed:
                    break
                if how := self._describe_change(one, every):
                    self.changed = FileChanged(f"{display_path(one.path)}: {how}. {self.advice}")
            self._last_check, self.seconds = time.monotonic(), time.thread_time() - began - self._hash_seconds
        return self.changed

    def must_be_unchanged(self) -> None:
        """Check all files.

        Raises:
            FileChanged: one has changed.
        """
        if changed := self.look():
            raise changed

    def glance(self) -> None:
        """Check one sample of each file if the last check is more than a second old; for loops that call it often.

        Raises:
            FileChanged: one has changed.
        """
        if time.monotonic() - self._last_check > LOOK and (changed := self.look(every=False)):
            raise changed

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Raise FileChanged in place of any other error of the block, if a file has changed."""
        try:
            yield
        except FileChanged:
            raise
        except Exception:
            if changed := self.look():
                raise changed from None
            raise

    @contextlib.contextmanager
    def watching(self, note: Callable[[str], None]) -> Iterator[None]:
        """Check all files repeatedly, from a thread, until the block ends.

        Args:
            note: is called with a message about what looks like a change and is none.
        """
        self._note = note
        thread = threading.Thread(target=self._watch, name="file watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._note = lambda words: None

    def _watch(self) -> None:
        while not self._over.wait(self.pause()):
            if self.look(every=False):
                return

    def pause(self) -> float:
        """Return the seconds until the next check. Hashes of whole files do not count: they are computed once."""
        return min(LONGEST, max(LOOK, self.seconds / _LOAD))

    def _describe_change(self, one: WatchedFile, every: bool) -> str:
        """Return how a file has changed; "" if it has not."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return self._compare(one, every)
            except OSError as error:
                if time.monotonic() > deadline:
                    return _describe_unreadable(error)
                time.sleep(PATIENCE / 10)

    def _compare(self, one: WatchedFile, every: bool) -> str:
        now = stamp_of(one.path)
        if one.is_folder:
            same = now[:3] == one.stamp[:3]
            return "" if same else f"is not the folder that it was when {self.begun}: it was renamed or replaced"
        for _ in range(_TRIES):
            if now.kind != one.stamp.kind:  # (reading a pipe would block)
                return f"is no regular file any more, as it was when {self.begun}"
            if now.size != one.stamp.size:
                return self._describe_resized(one.stamp.size, now.size)
            if not one.has_its_samples(every or now != one.stamp):
                return f"has other content than when {self.begun}"
            if now == one.stamp:
                return ""
            replaced = (now.device, now.inode) != (one.stamp.device, one.stamp.inode)
            if replaced and one.sha256 is None:
                return f"was replaced by another file since {self.begun}"
            if not replaced and now.mtime_ns != one.stamp.mtime_ns:
                return f"was written to, or touched, since {self.begun}"
            if one.sha256 and self._timed_sha256(one.path) != one.sha256:
                return f"has other content than when {self.begun}"
            before, now = now, stamp_of(one.path)
            if now == before:
                one.stamp = now
                if replaced:
                    self._note(f"note      {display_path(one.path)} was replaced, and has the same content as before")
                return ""
        return f"is being written to since {self.begun}"

    def _timed_sha256(self, path: Path) -> str:
        began = time.thread_time()
        try:
            return sha256(path)
        finally:
            self._hash_seconds += time.thread_time() - began

    def _describe_resized(self, before: int, now: int) -> str:
        how = "shorter" if now < before else "longer"
        return f"became {how} since {self.begun}: {plural(now, 'byte')} instead of {before:,}"

    def cut_off(self) -> str:
        """Return a message about a file whose mapped content no longer exists; "" if there is none.

        It takes no lock: the caller may hold one, or be interrupted at any point.
        """
        changes = []
        for one in [one for one in list(self.files.values()) if not one.is_folder]:
            try:
                now = stamp_of(one.path)
                if now.size != one.stamp.size:
                    changes.append((now.size > one.stamp.size, self._describe_resized(one.stamp.size, now.size), one))
                elif now != one.stamp:
                    changes.append((True, f"was replaced since {self.begun}", one))
            except OSError as error:
                changes.append((False, _describe_unreadable(error), one))
        if not changes:
            return ""
        _, how, one = min(changes, key=lambda change: change[0])
        return f"{display_path(one.path)}: {how}. {self.advice}"

    def leave_if_cut_off(self) -> None:
        """Exit with a message if a mapped file has lost its content, so that nothing can be computed any more."""
        if not (words := self.cut_off()):
            return
        for clean_up in self.before_leaving:
            with contextlib.suppress(Exception):
                clean_up()
        if not self.silent:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            with contextlib.suppress(OSError):
                os.write(2, f"\n{words}\n".encode(sys.stderr.encoding or "utf-8", "replace"))
        os._exit(EXIT_USER)


def _describe_unreadable(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "is not there any more: it was removed, renamed or replaced"
    return f"cannot be read any more ({error.strerror})"
