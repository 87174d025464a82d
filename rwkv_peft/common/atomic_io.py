"""Write files atomically, and never through a link.

Trusted are the folders output/, data/ and merge/, a run's own folder in output/, and the folder that holds the rows. The user
has named them, and each may be a link to another disk. What is read may be reached through a link as well. But the
content of those folders may come from somebody else (an archive, a shared folder): a symbolic or hard link, a FIFO, a
device, a folder in the place of a file. Therefore, inside them:

  atomic_write, create  make a new file (O_EXCL, O_NOFOLLOW) under a temporary name in the same folder, then rename it:
                        fsync, rename, fsync of the folder. What had the name, a link too, is replaced and not followed
  appending             adds to a file of lines, which must be a regular file. One with several names (hard links) is copied
  own_folder            makes a folder, or takes a real one that exists; a link to a folder is refused
  remove                removes a link, and not its target
  reading               opens a regular file, and never waits for a FIFO or a device

The kit writes to these folders in no other way, except for trackers (run_dir.check_tracker_links).
"""

from __future__ import annotations

import contextlib
import glob
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
from .errors import WRITE_ERRNOS, UserError
from .paths import display_path

StrPath = str | os.PathLike[str]

_KINDS = (
    (stat.S_ISLNK, "a symbolic link"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"), (stat.S_ISREG, "a file"),
)  # fmt: skip


def _lstat_mode(path: StrPath) -> int:
    """Return the mode of what has this name, of the link if it is one; 0 if the name is free."""
    try:
        return os.lstat(path).st_mode
    except FileNotFoundError:
        return 0


def _describe_mode(mode: int) -> str:
    return next(kind for is_kind, kind in _KINDS if is_kind(mode))


def describe_kind(path: StrPath) -> str:
    """Describe what has this name, with the target of a link: "a folder"."""
    mode = os.lstat(path).st_mode
    return _describe_mode(mode) + (f" to {os.readlink(path)}" if stat.S_ISLNK(mode) else "")


def temp_path(path: StrPath) -> Path:
    """Return the name of a file while it is written; it holds our process id, by which leftovers are recognized."""
    return Path(f"{path}.tmp-{os.getpid()}")


def fsync_file(file: IO[Any]) -> None:
    """Flush a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def fsync_dir(folder: StrPath) -> None:
    """Make renames in the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder that the user has named, and its parents.

    Raises:
        UserError: something else has the name of one of them.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        first = next(path for path in (*reversed(folder.parents), folder) if _lstat_mode(path) and not path.is_dir())
        dangling = ", which is not there (is its disk mounted?)" if first.is_symlink() and not first.exists() else ""
        raise UserError(
            f"{display_path(first)}: is {describe_kind(first)}{dangling}, and a folder is needed there."
        ) from None


def make_own_folder(path: Path) -> None:
    """Make a folder inside a trusted one, or take the one that exists.

    Raises:
        UserError: the name is a link or a file.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    check_own_folder(path)


def check_own_folder(path: Path) -> None:
    """Check that a name is free or that of a real folder: the target of a link may belong to another run.

    Raises:
        UserError: it is anything else.
    """
    if (mode := _lstat_mode(path)) and not stat.S_ISDIR(mode):
        raise UserError(
            f"{display_path(path)}: is {describe_kind(path)}, and a folder of this name is written to and tidied up. Move it "
            "away, or put the folder itself in its place. (The folder of a run may be a link as a whole.)"
        )


def check_not_folder(path: Path) -> None:
    """Check that no folder has the name of a file that is to be written.

    Raises:
        UserError: one has.
    """
    if stat.S_ISDIR(_lstat_mode(path)):
        raise UserError(
            f"{display_path(path)}: is a folder, and a file of this name is to be written. Move the folder away."
        )


def check_line_file(path: Path) -> None:
    """Check that a name is free or that of a regular file: lines are appended to it in place.

    Raises:
        UserError: it is anything else.
    """
    if (mode := _lstat_mode(path)) and not stat.S_ISREG(mode):
        raise UserError(
            f"{display_path(path)}: is {describe_kind(path)}, and lines are added only to a file that lies here itself. Remove "
            "it, or put the file in its place."
        )


def _open_new(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def _open_regular(path: str, flags: int) -> int:
    if not stat.S_ISREG(mode := os.stat(path).st_mode):
        raise OSError(EINVAL, f"is {_describe_mode(mode)}, and a file is needed", str(path))
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def create_file(path: StrPath, mode: str = "wb", **kwargs: Any) -> IO[Any]:
    """Open a new file; what a killed process, or somebody else, has left under that name is removed."""
    remove_path(path)
    return open(path, mode, opener=_open_new, **kwargs)


def open_append(path: Path, mode: str = "a", own: Callable[[IO[Any]], None] | None = None, **kwargs: Any) -> IO[Any]:
    """Open a file of lines to append to it or to truncate it.

    Args:
        path: the file; if it has further names (hard links), a copy takes its place.
        mode: as for `open`.
        own: called with the file, and with the copy before that gets its name: to lock them.
        **kwargs: as for `open`.

    Raises:
        UserError: the name is a link or no regular file.
    """
    check_line_file(path)
    file = open(path, mode, opener=_open_no_link, **kwargs)  # noqa: SIM115 (returned)
    with contextlib.ExitStack() as failed:
        failed.callback(file.close)
        if own:
            own(file)
        if os.fstat(file.fileno()).st_nlink > 1:
            first, file = file, create_file(temp_path(path), mode, **kwargs)
            failed.callback(file.close)
            failed.callback(remove_path, temp_path(path))
            if own:
                own(file)
            with open_regular(path) as old, open(file.fileno(), "wb", closefd=False) as copy:
                shutil.copyfileobj(old, copy)
                fsync_file(copy)
            os.replace(temp_path(path), path)
            first.close()
        failed.pop_all()
    return file


def open_regular(path: StrPath, mode: str = "rb", **kwargs: Any) -> IO[Any]:
    """Open a regular file to read it.

    Raises:
        OSError: it is anything else; raised without waiting for it.
    """
    return open(path, mode, opener=_open_regular, **kwargs)


def remove_path(path: StrPath) -> None:
    """Remove a file, a link (not its target) or a whole folder, if it exists."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError:
        if not stat.S_ISDIR(_lstat_mode(path)):
            raise
        shutil.rmtree(path)


@contextlib.contextmanager
def name_refused_write(path: StrPath) -> Iterator[None]:
    """Add the file's name to the error of a refused write, which has none."""
    try:
        yield
    except OSError as error:
        if error.errno in WRITE_ERRNOS and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic_write(path: StrPath, mode: str = "wb", **kwargs: Any) -> Iterator[Any]:
    """Open a file that gets its name when the block ends without an error; the old file stays whole until then.

    Args:
        path: its name; the folder is made.
        mode: as for `open`.
        **kwargs: as for `open`.
    """
    path = Path(path)
    make_folder(path.parent)
    check_not_folder(path)
    remove_stale_temps(path)
    temporary = temp_path(path)
    try:
        with name_refused_write(path):
            with create_file(temporary, mode, **kwargs) as file:
                yield file
                fsync_file(file)
            os.replace(temporary, path)
            fsync_dir(path.parent)
    finally:
        remove_path(temporary)


def write_json(path: StrPath, content: Mapping[str, Any]) -> None:
    """Write a JSON object atomically."""
    with atomic_write(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def check_disk_space(folder: Path, size: int) -> None:
    """Check, before anything is written, that the disk can hold `size` bytes. Makes the folder.

    Raises:
        UserError: it cannot.
    """
    make_folder(folder)
    free, needed = shutil.disk_usage(folder).free, int(size * 1.02) + (1 << 20)
    if free < needed:
        have, want = formatting.format_size(free), formatting.format_size(needed)
        if have == want:
            have, want = f"{free:,} bytes", f"{needed:,}"
        raise UserError(f"{folder}: {have} are free, {want} are needed. Nothing was written; free some space.")


def remove_stale_temps(path: Path) -> None:
    """Remove temporary files of `path` whose process has ended (it was killed while it wrote)."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.tmp-*"):
        pid = re.fullmatch(r".*\.tmp-([0-9]+)(\.old)?", left.name, re.DOTALL)
        if pid and not is_alive(int(pid[1])):
            remove_path(left)


def is_alive(pid: int) -> bool:
    """Return whether a process of this id exists."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # (OverflowError: a number that no process can have)
        return False
    except PermissionError:
        return True
    return True
