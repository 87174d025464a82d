"""Files appear whole or not at all: temporary name in the same folder, fsync, rename, fsync of the folder. Floor 0."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import words
from .errors import WRITING, UserError


def temporary(path: str | os.PathLike) -> Path:
    """The name a file has while it is being written; it carries our process id, so that leftovers can be told apart."""
    return Path(f"{path}.tmp-{os.getpid()}")


def sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: str | os.PathLike) -> None:
    """Make renames in the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
def writing(path: str | os.PathLike, mode: str = "wb", **kwargs) -> Iterator:
    """A file that gets its name when the block ends without an error; the old file stays whole until then."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path)
    name = temporary(path)
    try:
        with named(path):
            with open(name, mode, **kwargs) as file:
                yield file
                sync(file)
            os.replace(name, path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def write_json(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    with writing(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def need_space(folder: Path, size: int) -> None:
    """Refuse before anything is written if the disk cannot hold `size` bytes. Makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(folder).free, int(size * 1.02) + (1 << 20)
    if free < needed:
        have, want = words.size(free), words.size(needed)
        if have == want:
            have, want = f"{free:,} bytes", f"{needed:,}"
        raise UserError(f"{folder}: {have} are free, {want} are needed. Nothing was written; free some space.")


def clear_leftovers(path: Path) -> None:
    """Remove temporary files of `path` whose process is gone (killed while it wrote)."""
    for left in path.parent.glob(glob_escape(path.name) + ".tmp-*"):
        pid = re.fullmatch(r".*\.tmp-(\d+)", left.name)
        if pid and not alive(int(pid[1])):
            with contextlib.suppress(FileNotFoundError):
                left.unlink()


def glob_escape(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
