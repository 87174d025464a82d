"""Sidecars: beside each checkpoint of a run lies a file of the same name with .json, which says what made it, so that nothing
is typed twice. Floor 0."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .atomic import create, glob_escape, read_text, reading, remove, sync, sync_folder, temporary
from .errors import UserError
from .hashing import sha256
from .methods import MOST_ALPHA, QUANTS
from .project import shown


def path_of(path: str | os.PathLike) -> Path:
    return Path(path).with_suffix(".json")


def read(path: str | os.PathLike, wanted: tuple[str, ...]) -> dict[str, Any]:
    """The sidecar of a checkpoint, with at least the wanted keys. UserError if it is missing or unreadable."""
    sidecar = path_of(path)
    if not sidecar.is_file():
        raise UserError(
            f"{shown(sidecar)}: is missing. It is written with every checkpoint and says how {shown(path)} was made."
        )
    try:
        content = json.loads(read_text(sidecar))
    except ValueError as error:
        raise UserError(f"{shown(sidecar)}: is not readable as JSON ({error}).") from None
    missing = [key for key in wanted if not isinstance(content, dict) or key not in content]
    if missing:
        raise UserError(f"{shown(sidecar)}: does not say {', '.join(missing)}; it is not a sidecar of this kit.")
    wrong = [key for key in content if key in SIDECAR and not SIDECAR[key](content[key])]
    if wrong:
        raise UserError(f"{shown(sidecar)}: {wrong[0]} cannot be {content[wrong[0]]!r}. Was the file edited?")
    return content


def replace_pair(fresh: Path, fresh_note: Path, path: Path) -> None:
    """Give a checkpoint and its sidecar their names: both, or where that fails neither.

    The sidecar comes first. A process that ends between the two renames leaves the new sidecar, the earlier checkpoint, and the
    new checkpoint under its temporary name: complete_pair ends what was begun.
    """
    note = path_of(path)
    kept = temporary(note.with_name(f"{note.name}.earlier"))
    try:
        if there := note.is_file():  # now, while nothing has changed: a copy needs room on the disk
            with reading(note) as old, create(kept) as file:
                file.write(old.read())
                sync(file)
        os.replace(fresh_note, note)
        try:
            os.replace(fresh, path)
        except OSError:
            if there:
                os.replace(kept, note)
            else:
                note.unlink()
            raise
    finally:
        remove(kept)
    sync_folder(path.parent)


def complete_pair(path: Path, content: dict[str, Any]) -> bool:
    """Whether the checkpoint that a sidecar belongs to was found under its temporary name, and has its own now: the process
    that wrote both ended between the two renames. content: of the sidecar."""
    for left in path.parent.glob(f"{glob_escape(path.name)}.tmp-*"):
        if left.is_file() and not left.is_symlink() and sha256(left) == content.get("checkpoint_sha256"):
            os.replace(left, path)
            sync_folder(path.parent)
            return True
    return False


def whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= MOST_ALPHA


# what a sidecar's values must be
SIDECAR: dict[str, Callable[[Any], bool]] = {
    "method": lambda value: isinstance(value, str),
    "rank": lambda value: whole(value, 1),
    "alpha": number,
    "rslora": lambda value: isinstance(value, bool),
    "niter": lambda value: whole(value, 0),
    "shifts": lambda value: isinstance(value, bool),
    "layers": lambda value: whole(value, 1),
    "every": lambda value: whole(value, 1),
    "config": lambda value: isinstance(value, dict),
    "base": lambda value: isinstance(value, str) and value == Path(value).name != "",
    "base_path": lambda value: isinstance(value, str),
    "base_sha256": lambda value: isinstance(value, str),
    "base_mark": lambda value: value is None or isinstance(value, list),
    "checkpoint_sha256": lambda value: isinstance(value, str),
    "start_sha256": lambda value: isinstance(value, str),
    "geometry": lambda value: isinstance(value, dict),
    "quant": lambda value: value in ("none", *QUANTS),
    "quant_parts": lambda value: isinstance(value, list) and all(isinstance(part, str) for part in value),
    "quant_kept": lambda value: isinstance(value, list) and all(isinstance(layer, str) for layer in value),
    "epoch": lambda value: whole(value, 0),
    "step": lambda value: whole(value, 0),
    "prompt_type": lambda value: value is None or isinstance(value, str),
    "eot": lambda value: value is None or isinstance(value, str),
    "bos": lambda value: value is None or value in (0, 1),
    "blank_lines": lambda value: value is None or isinstance(value, bool),
    "template": lambda value: value is None or isinstance(value, dict),
}
