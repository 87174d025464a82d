"""Every write of the kit: whole or not at all, and never through a link. Floor 0.

What is trusted: the folders output/, data/ and merge/, a run's own folder in output/, and the folder that rows lie in. The user
has named them, and each may be a link to another disk. What is read may be reached through a link as well. But what lies inside
those folders may come from somebody else (an archive, a shared folder): a symbolic or hard link, a FIFO, a device, a folder where
a file belongs. So inside them

  writing, create   make a new file (O_EXCL, O_NOFOLLOW) under a temporary name in the same folder, which is renamed: fsync,
                    rename, fsync of the folder. What had the name, a link as well, is replaced and not followed
  appending         adds to a file of lines, which must be a regular file. One of several names (hard links) gets a copy
  own_folder        makes a folder, or takes a real one that is there; a link to a folder is refused
  remove            takes away a link, and not what it leads to
  reading           takes a regular file, and never waits for a FIFO or a device

Nothing in the kit writes to these folders in another way, but for trackers (runs.must_lead_nowhere).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from errno import EINVAL
from pathlib import Path
from typing import IO, Any

from . import formatting
from .errors import WRITING, UserError
from .paths import display_path

KINDS = (
    (stat.S_ISLNK, "a symbolic link"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"), (stat.S_ISREG, "a file"),
)  # fmt: skip


def mode_of(path: str | os.PathLike) -> int:
    """What has this name, the link where it is one; 0 where nothing has."""
    try:
        return os.lstat(path).st_mode
    except FileNotFoundError:
        return 0


def what_it_is(path: str | os.PathLike) -> str:
    """In words, with what a link leads to."""
    kind = next(kind for is_kind, kind in KINDS if is_kind(os.lstat(path).st_mode))
    return f"{kind} to {os.readlink(path)}" if os.path.islink(path) else kind


def temp_path(path: str | os.PathLike) -> Path:
    """The name a file has while it is being written; it carries our process id, so that leftovers can be told apart."""
    return Path(f"{path}.tmp-{os.getpid()}")


def sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def fsync_dir(folder: str | os.PathLike) -> None:
    """Make renames in the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder that the user has named, and those above it. UserError where something else has its name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        first = next(path for path in (*reversed(folder.parents), folder) if mode_of(path) and not path.is_dir())
        there = ", which is not there (is its disk mounted?)" if first.is_symlink() and not first.exists() else ""
        raise UserError(
            f"{display_path(first)}: is {what_it_is(first)}{there}, and a folder is needed there."
        ) from None


def own_folder(path: Path) -> None:
    """Make a folder inside one that the user has named, or take the one that is there. UserError for a link."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    must_be_own_folder(path)


def must_be_own_folder(path: Path) -> None:
    """UserError unless a name is free, or that of a real folder: what a link leads to may belong to another run."""
    if mode_of(path) and not stat.S_ISDIR(mode_of(path)):
        raise UserError(
            f"{display_path(path)}: is {what_it_is(path)}, and a folder of this name is written to and "
            f"tidied up. Move it away, or put "
            "the folder itself in its place. (The folder of a run may be a link as a whole.)"
        )


def must_not_be_folder(path: Path) -> None:
    """UserError where a folder has the name of a file that is to be written."""
    if stat.S_ISDIR(mode_of(path)):
        raise UserError(
            f"{display_path(path)}: is a folder, and a file of this name is to be written. Move the folder away."
        )


def must_be_lines(path: Path) -> None:
    """UserError unless a name is free, or that of a regular file: lines are added to it where it is."""
    if mode_of(path) and not stat.S_ISREG(mode_of(path)):
        raise UserError(
            f"{display_path(path)}: is {what_it_is(path)}, and lines are added only to a file that lies "
            f"here itself. Remove it, or put "
            "the file in its place."
        )


def only_new(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def without_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def without_waiting(path: str, flags: int) -> int:
    if not stat.S_ISREG(mode := os.stat(path).st_mode):
        kind = next(kind for is_kind, kind in KINDS if is_kind(mode))
        raise OSError(EINVAL, f"is {kind}, and a file is needed", str(path))
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def create(path: str | os.PathLike, mode: str = "wb", **kwargs) -> IO[Any]:
    """A new file under a temporary name. What a killed process, or somebody else, has left of that name goes."""
    remove(path)
    return open(path, mode, opener=only_new, **kwargs)


def appending(path: Path, mode: str = "a", own: Callable[[IO[Any]], None] | None = None, **kwargs) -> IO[Any]:
    """A file of lines, opened to add to it or to cut it; see the top. own: is called with the file, and with the copy that takes
    its place where it has other names, before the copy is to be seen: for a lock.
    """
    must_be_lines(path)
    file = open(path, mode, opener=without_links, **kwargs)  # noqa: SIM115 (returned)
    with contextlib.ExitStack() as failed:
        failed.callback(file.close)
        if own:
            own(file)
        if os.fstat(file.fileno()).st_nlink > 1:
            first, file = file, create(temp_path(path), mode, **kwargs)
            failed.callback(file.close)
            failed.callback(remove, temp_path(path))
            if own:
                own(file)
            with reading(path) as old, open(file.fileno(), "wb", closefd=False) as copy:
                shutil.copyfileobj(old, copy)
                sync(copy)
            os.replace(temp_path(path), path)
            first.close()
        failed.pop_all()
    return file


def reading(path: str | os.PathLike, mode: str = "rb", **kwargs) -> IO[Any]:
    """A regular file, opened to be read. OSError for anything else, without waiting for it."""
    return open(path, mode, opener=without_waiting, **kwargs)


def remove(path: str | os.PathLike) -> None:
    """Take away a file, a link (and not what it leads to) or a whole folder, if it is there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError:
        if not stat.S_ISDIR(mode_of(path)):
            raise
        shutil.rmtree(path)


@contextlib.contextmanager
def named(path: str | os.PathLike) -> Iterator[None]:
    """Where a write is refused, the error tells which file it was for: a write knows no name."""
    try:
        yield
    except OSError as error:
        if error.errno in WRITING and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb", **kwargs) -> Iterator:
    """A file that gets its name when the block ends without an error; the old file stays whole until then."""
    path = Path(path)
    make_folder(path.parent)
    must_not_be_folder(path)
    remove_stale_temps(path)
    name = temp_path(path)
    try:
        with named(path):
            with create(name, mode, **kwargs) as file:
                yield file
                sync(file)
            os.replace(name, path)
            fsync_dir(path.parent)
    finally:
        remove(name)


def write_json(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    with atomic_write(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def check_disk_space(folder: Path, size: int) -> None:
    """Refuse before anything is written if the disk cannot hold `size` bytes. Makes the folder."""
    make_folder(folder)
    free, needed = shutil.disk_usage(folder).free, int(size * 1.02) + (1 << 20)
    if free < needed:
        have, want = formatting.format_size(free), formatting.format_size(needed)
        if have == want:
            have, want = f"{free:,} bytes", f"{needed:,}"
        raise UserError(f"{folder}: {have} are free, {want} are needed. Nothing was written; free some space.")


def remove_stale_temps(path: Path) -> None:
    """Remove temporary files of `path` whose process is gone (killed while it wrote)."""
    for left in path.parent.glob(glob_escape(path.name) + ".tmp-*"):
        pid = re.fullmatch(r".*\.tmp-([0-9]+)(\.old)?", left.name, re.DOTALL)
        if pid and not alive(int(pid[1])):
            remove(left)


def glob_escape(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # (OverflowError: a number that no process can have)
        return False
    except PermissionError:
        return True
    return True
