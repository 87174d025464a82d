"""Are the files that a command reads still the ones that it began with? Floor 0.

Files are mapped for hours, or read more than once, while somebody may overwrite, replace, cut or remove them. A look at a file
compares what the file system says of it (device, inode, size, times), and pieces of its content: there are writes that leave
the times alone (through a shared mapping on tmpfs), and file systems whose clock is coarse.

A file whose time of writing moves while it is in use was changed, whatever it holds now: other bytes may have stood in it between
two looks. Where only its rights or its names change (chmod, a backup's hard link), that is no change, unless pieces of the
content differ, or all of it where it is known (a time may be put back). Where another file takes its name, what is mapped stays
as it was; the same content, where it is known, is no change. What was once seen to be changed stays so: something may have been
computed with it.
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

LOOK = 1.0  # seconds between two looks at all files ...
LONGEST = 5.0  # ... and up to this many where there are many files ...
SHARE = 0.002  # ... so that looking takes about this part of the time
PIECE = 4096  # bytes of a piece of the content
PIECES = 16  # of a file ...
ALL_PIECES = 2048  # ... and of all files
SMALL = 64 << 20  # bytes of a file whose whole content is taken when the watch begins, if nobody else takes it ...
ALL_SMALL = 256 << 20  # ... and of all such files
PATIENCE = 2.0  # seconds for a file that is missing, or cannot be read, to come back: one may be putting it there
TRIES = 4  # to read a file that is being written to


class FileChanged(UserError):
    """A file is not what it was when the command began."""


class Stamp(NamedTuple):
    """What changes when somebody writes to a file, or another file takes its name."""

    kind: int  # a regular file, a folder, a pipe
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


def stamp_of(path: str | os.PathLike) -> Stamp:
    found = os.stat(path)
    return Stamp(
        stat.S_IFMT(found.st_mode), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    )


def checksum(path: str | os.PathLike, begin: int, size: int) -> int:
    """Of a piece of a file."""
    file = os.open(path, os.O_RDONLY)
    try:
        return crc32(os.pread(file, size, begin))
    finally:
        os.close(file)


@dataclass
class Watched:
    """pieces: where a piece of the content begins, its length, and its checksum. sha256: of all of it, where that is known."""

    path: Path
    stamp: Stamp
    pieces: list[tuple[int, int, int]] = field(default_factory=list)
    sha256: str | None = None
    turn: int = 0  # of the piece that is compared next

    @property
    def is_folder(self) -> bool:
        return self.stamp.kind == stat.S_IFDIR

    def take_pieces(self, many: int) -> None:
        size = self.stamp.size
        many = min(many, -(-size // PIECE))
        dice = random.Random(size)
        begins = {0, max(0, size - PIECE), *(dice.randrange(max(1, size - PIECE)) for _ in range(many - 2))}
        self.pieces = [(begin, PIECE, checksum(self.path, begin, PIECE)) for begin in sorted(begins)[: max(1, many)]]

    def has_its_pieces(self, every: bool) -> bool:
        """Whether pieces of the content are what they were: all of them, or the next one."""
        self.turn += 1
        some = self.pieces if every else self.pieces[self.turn % len(self.pieces) :][:1] if self.pieces else []
        return all(checksum(self.path, begin, size) == known for begin, size, known in some)


class FileWatch:
    """The files that a command uses. begun: "this run began", what the command is called in messages. cure: a sentence about
    what to do. before_leaving: what to tidy up where the process must leave at once.
    """

    def __init__(self, begun: str, cure: str):
        self.begun, self.cure = begun, cure
        self.before_leaving: list[Callable[[], object]] = []
        self.files: dict[str, Watched] = {}
        self.changed: FileChanged | None = None
        self.note: Callable[[str], None] = lambda words: None
        self.silent = False  # another process says why this one leaves
        self.lock, self.over = threading.RLock(), threading.Event()
        self.last, self.learnt = time.monotonic(), 0
        self.looking = self.hashing = 0.0  # seconds of the last look without, and with nothing but, whole contents

    def add(self, paths: Iterable[str | os.PathLike], stamps: Mapping[str, Stamp] | None = None) -> None:
        """Watch regular files from here on. To be called before anything is read of them. stamps: what the files were before
        that, where somebody has read them already, by their paths.
        """
        new = [str(path) for path in paths if str(path) not in self.files]
        many = max(1, min(PIECES, ALL_PIECES // max(1, len(new) + len(self.files))))
        for path in new:
            with contextlib.suppress(OSError):  # what is not there is told by who wants to read it
                one = Watched(Path(path), (stamps or {}).get(path) or stamp_of(path))
                if one.stamp.kind != stat.S_IFREG:
                    continue
                one.take_pieces(many)
                if one.stamp.size <= min(SMALL, ALL_SMALL - self.learnt):
                    self.learnt += one.stamp.size
                    one.sha256 = sha256(path)
                    one.sha256 = one.sha256 if stamp_of(path) == one.stamp else None
                with self.lock:
                    self.files[path] = one

    def add_folder(self, path: Path) -> None:
        """Watch a folder that is written to by its name: it must not be renamed, nor another one take its place."""
        with self.lock:
            self.files[str(path)] = Watched(path, stamp_of(path))

    def is_there(self, path: Path) -> bool:
        """Whether what is watched at a path is still the same file or folder, whatever it holds."""
        try:
            return stamp_of(path)[:3] == self.files[str(path)].stamp[:3]
        except (OSError, KeyError):
            return False

    def release(self, paths: Iterable[str | os.PathLike]) -> None:
        """These are not used any more."""
        with self.lock:
            for path in paths:
                self.files.pop(str(path), None)

    def know(self, path: str | os.PathLike, content: str | None) -> None:
        """The SHA-256 of a file, which was read after `add`."""
        one = self.files.get(str(path))
        with contextlib.suppress(OSError):
            # (of a file that was written to meanwhile, nobody knows which content was read)
            if one and content and not one.sha256 and stamp_of(path) == one.stamp:
                one.sha256 = content

    def content(self, path: str | os.PathLike) -> str:
        """The SHA-256 of a file, read if it is not known."""
        one = self.files.get(str(path))
        if one and one.sha256:
            return one.sha256
        self.know(path, found := sha256(path))
        return found

    def look(self, every: bool = True) -> FileChanged | None:
        """What has changed, or had before. every: compare all pieces of the content, instead of one of each file."""
        with self.lock:
            began, self.hashing = time.thread_time(), 0.0
            for one in list(self.files.values()):
                if self.changed:
                    break
                if how := self.difference(one, every):
                    self.changed = FileChanged(f"{display_path(one.path)}: {how}. {self.cure}")
            self.last, self.looking = time.monotonic(), time.thread_time() - began - self.hashing
        return self.changed

    def must_be_unchanged(self) -> None:
        if changed := self.look():
            raise changed

    def glance(self) -> None:
        """must_be_unchanged every now and then, for a loop that asks often."""
        if time.monotonic() - self.last > LOOK and (changed := self.look(every=False)):
            raise changed

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """A file that has changed is the reason for whatever goes wrong in here."""
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
        """Look all the time, from a thread. note: is told of what looks like a change and is none."""
        self.note = note
        thread = threading.Thread(target=self.watch, name="file watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.over.set()
            self.note = lambda words: None

    def watch(self) -> None:
        while not self.over.wait(self.pause()):
            if self.look(every=False):
                return

    def pause(self) -> float:
        """Seconds until the next look. A whole content that had to be compared does not count: that comes once."""
        return min(LONGEST, max(LOOK, self.looking / SHARE))

    def difference(self, one: Watched, every: bool) -> str:
        """How a file differs from what it was, in words; "" where it does not."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return self.compared(one, every)
            except OSError as error:
                if time.monotonic() > deadline:
                    return gone(error)
                time.sleep(PATIENCE / 10)

    def compared(self, one: Watched, every: bool) -> str:
        now = stamp_of(one.path)
        if one.is_folder:
            same = now[:3] == one.stamp[:3]
            return "" if same else f"is not the folder that it was when {self.begun}: it was renamed or replaced"
        for _ in range(TRIES):
            if now.kind != one.stamp.kind:  # (a pipe would have to be waited for)
                return f"is no regular file any more, as it was when {self.begun}"
            if now.size != one.stamp.size:
                return resized(one.stamp.size, now.size, self.begun)
            if not one.has_its_pieces(every or now != one.stamp):
                return f"has other content than when {self.begun}"
            if now == one.stamp:
                return ""
            replaced = (now.device, now.inode) != (one.stamp.device, one.stamp.inode)
            if replaced and one.sha256 is None:
                return f"was replaced by another file since {self.begun}"
            if not replaced and now.mtime_ns != one.stamp.mtime_ns:
                return f"was written to, or touched, since {self.begun}"
            if one.sha256 and self.hashed(one.path) != one.sha256:
                return f"has other content than when {self.begun}"
            before, now = now, stamp_of(one.path)
            if now == before:
                one.stamp = now
                if replaced:
                    self.note(f"note      {display_path(one.path)} was replaced, and has the same content as before")
                return ""
        return f"is being written to since {self.begun}"

    def hashed(self, path: Path) -> str:
        """The SHA-256 of a file; how long that takes is kept apart."""
        began = time.thread_time()
        try:
            return sha256(path)
        finally:
            self.hashing += time.thread_time() - began

    def cut_off(self) -> str:
        """What to say of a file whose mapped content is not there any more; "" if there is none. Takes no lock: who asks may
        have one, or be stopped in the middle of anything.
        """
        found = []
        for one in [one for one in list(self.files.values()) if not one.is_folder]:
            try:
                now = stamp_of(one.path)
                if now != one.stamp:
                    how = resized(one.stamp.size, now.size, self.begun)
                    found.append((now.size >= one.stamp.size, how or f"was replaced since {self.begun}", one))
            except OSError as error:
                found.append((False, gone(error), one))
        if not found:
            return ""
        _, how, one = min(found, key=lambda entry: entry[0])
        return f"{display_path(one.path)}: {how}. {self.cure}"

    def leave_if_cut_off(self) -> None:
        """End this process with words if a mapped file has lost its content, so that nothing can be computed any more."""
        if not (words := self.cut_off()):
            return
        for tidy in self.before_leaving:
            with contextlib.suppress(Exception):
                tidy()
        if not self.silent:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            with contextlib.suppress(OSError):
                os.write(2, f"\n{words}\n".encode(sys.stderr.encoding or "utf-8", "replace"))
        os._exit(EXIT_USER)


def resized(before: int, now: int, begun: str) -> str:
    how = "shorter" if now < before else "longer"
    return f"became {how} since {begun}: {plural(now, 'byte')} instead of {before:,}" if now != before else ""


def gone(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "is not there any more: it was removed, renamed or replaced"
    return f"cannot be read any more ({error.strerror})"
