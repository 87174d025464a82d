"""Sidecars: beside each checkpoint of a run lies a file of the same name with .json, which says what made it, so that nothing
is typed twice. Floor 0."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv_peft.adapters.specs import MOST_ALPHA, PARTS, QUANTS
from rwkv_peft.common import json_reader
from rwkv_peft.common.atomic_io import create, fsync_dir, glob_escape, reading, remove, sync, temp_path, write_json
from rwkv_peft.common.errors import UserError
from rwkv_peft.common.formatting import join_names
from rwkv_peft.common.hashing import sha256
from rwkv_peft.common.json_reader import (
    Schema,
    is_bool,
    is_hash,
    is_list,
    is_none_or,
    is_number,
    is_object,
    is_path,
    is_text,
    is_whole,
)
from rwkv_peft.common.paths import display_path, missing

SEAL = "fields_sha256"  # key of the checksums of all other fields
ACCEPT = "--accept-edited"  # the option of training.sh, merge.sh and chat.sh that takes an edited sidecar as it is
WHAT = "sidecar of this kit"


def path_of(path: str | os.PathLike) -> Path:
    return Path(path).with_suffix(".json")


def read(path: str | os.PathLike, wanted: tuple[str, ...]) -> dict[str, Any]:
    """The sidecar of a checkpoint, with at least the wanted keys. UserError if it is missing or unreadable."""
    sidecar = path_of(path)
    if not sidecar.is_file():
        raise UserError(
            f"{display_path(sidecar)}: {why_not(sidecar)}. It is written with every checkpoint and says "
            f"how {display_path(path)} was made."
        )
    return json_reader.read(sidecar, WHAT, SIDECAR, wanted)


def why_not(sidecar: Path) -> str:
    """What to say of a sidecar that is no file."""
    return missing(sidecar) if os.path.lexists(sidecar) else "is missing"


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a sidecar, with a checksum of each field."""
    write_json(path, sealed(content))


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    fields = json.loads(json.dumps({key: value for key, value in content.items() if key != SEAL}))
    return {**fields, SEAL: {key: field_checksum(key, value) for key, value in fields.items()}}


def field_checksum(key: str, value: Any) -> str:
    """Half of a SHA-256: it tells changes, and hides none from somebody who writes new ones."""
    return hashlib.sha256(json.dumps([key, value], sort_keys=True).encode()).hexdigest()[:32]


def edited(content: Mapping[str, Any]) -> list[str]:
    """The fields that were changed, added or taken out since the sidecar was written; none for one of an earlier version, which
    has no checksums."""
    if SEAL not in content:
        return []
    told, now = content[SEAL], sealed(content)[SEAL]
    return [key for key in {**now, **told} if told.get(key) != now.get(key)]


def check_unedited(path: str | os.PathLike, content: Mapping[str, Any], accept: bool) -> None:
    """UserError for the sidecar of a checkpoint that was edited since it was written; with accept a warning."""
    if SEAL not in content:
        words = "has no checksums of its fields (earlier versions wrote none), so an edit would not be noticed"
        print(f"note: {display_path(path_of(path))}: {words}", file=sys.stderr)
    if not (changed := edited(content)):
        return
    words = (
        f"{display_path(path_of(path))}: was edited: {join_names(changed)} {'is' if len(changed) == 1 else 'are'} "
        f"not as written"
    )
    if not accept:
        raise UserError(f"{words}. Copy the file again from the run, or use it as it is with {ACCEPT}.")
    print(f"warning: {words}. It is used as it is ({ACCEPT}).", file=sys.stderr)


def replace_pair(fresh: Path, fresh_note: Path, path: Path) -> None:
    """Give a checkpoint and its sidecar their names: both, or where that fails neither.

    The sidecar comes first. A process that ends between the two renames leaves the new sidecar, the earlier checkpoint, and the
    new checkpoint under its temporary name: complete_pair ends what was begun.
    """
    note = path_of(path)
    kept = temp_path(note.with_name(f"{note.name}.earlier"))
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
    fsync_dir(path.parent)


def complete_pair(path: Path, content: dict[str, Any]) -> bool:
    """Whether the checkpoint that a sidecar belongs to was found under its temporary name, and has its own now: the process
    that wrote both ended between the two renames. content: of the sidecar."""
    for left in path.parent.glob(f"{glob_escape(path.name)}.tmp-*"):
        if left.is_file() and not left.is_symlink() and sha256(left) == content.get("checkpoint_sha256"):
            os.replace(left, path)
            fsync_dir(path.parent)
            return True
    return False


def is_geometry(value: Any) -> bool:
    """Whether a value is what Geometry.as_dict gives."""
    if not is_object(value) or not {"version", "n_layer", "n_embd"} <= {*value}:
        return False
    return all(is_text(size) if name == "version" else is_whole(size, 1) for name, size in value.items())


def is_file(value: Any) -> bool:
    """Whether a value is [name, SHA-256]."""
    return is_list(value, is_text) and len(value) == 2


# what a sidecar's values must be
SIDECAR: Schema = {
    "method": is_text,
    "rank": lambda value: is_whole(value, 1),
    "alpha": lambda value: is_number(value) and 0 < value <= MOST_ALPHA,
    "rslora": is_bool,
    "niter": is_whole,
    "shifts": is_bool,
    "layers": lambda value: is_whole(value, 1),
    "every": lambda value: is_whole(value, 1),
    "config": is_object,
    "dropout": lambda value: is_number(value) and 0 <= value <= 1,
    "parts": lambda value: is_list(value, lambda part: part in PARTS),
    "base": lambda value: is_path(value) and value == Path(value).name != "",
    "base_path": is_path,
    "base_sha256": is_hash,
    "base_mark": is_none_or(lambda value: is_list(value, is_whole)),
    "checkpoint_sha256": is_hash,
    "start_sha256": is_hash,
    "geometry": is_geometry,
    "quant": lambda value: value in ("none", *QUANTS),
    "quant_parts": lambda value: is_list(value, is_text),
    "quant_kept": lambda value: is_list(value, is_text),
    "precision": is_text,
    "epoch": is_whole,
    "epoch_finished": is_bool,
    "step": is_whole,
    "prompt_type": is_none_or(is_text),
    "eot": is_none_or(is_text),
    "bos": is_none_or(lambda value: is_whole(value, 0, 1)),
    "blank_lines": is_none_or(is_bool),
    "template": is_none_or(is_object),
    "data": lambda value: is_list(value, is_file),
    "versions": is_object,
    "merged": lambda value: is_list(value, is_object),
    "weights": lambda value: is_list(value, is_number),
    "merge_base": is_text,
    "merged_by": is_text,
    SEAL: lambda value: is_object(value) and all(map(is_text, value.values())),
}
