"""Sidecars: the .json of the same name beside each checkpoint, which records how it was made.

So nothing has to be typed twice. Floor 0.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv_peft.adapters.specs import MOST_ALPHA, PARTS, QUANTS
from rwkv_peft.common import json_reader
from rwkv_peft.common.atomic_io import (
    create_file,
    fsync_dir,
    fsync_file,
    open_regular,
    remove_path,
    temp_path,
    write_json,
)
from rwkv_peft.common.errors import UserError
from rwkv_peft.common.formatting import join_names
from rwkv_peft.common.hashing import sha256
from rwkv_peft.common.paths import describe_missing, display_path

SEAL = "fields_sha256"  # key of the checksums of all other fields
ACCEPT = "--accept-edited"  # option of training.sh, merge.sh and chat.sh that accepts an edited sidecar
WHAT = "sidecar of this kit"


def sidecar_path(path: str | os.PathLike) -> Path:
    """Return the path of the sidecar of a checkpoint."""
    return Path(path).with_suffix(".json")


def read_sidecar(path: str | os.PathLike, wanted: tuple[str, ...]) -> dict[str, Any]:
    """Read the sidecar of a checkpoint, with at least the wanted keys.

    Raises:
        UserError: it is missing or unreadable.
    """
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        raise UserError(
            f"{display_path(sidecar)}: {missing_reason(sidecar)}. It is written with every checkpoint and says "
            f"how {display_path(path)} was made."
        )
    return json_reader.read_json(sidecar, WHAT, SIDECAR, wanted)


def missing_reason(sidecar: Path) -> str:
    """Return the message for a sidecar that is not a file."""
    return describe_missing(sidecar) if os.path.lexists(sidecar) else "is missing"


def write_sidecar(path: Path, content: Mapping[str, Any]) -> None:
    """Write a sidecar, with a checksum of each field."""
    write_json(path, with_checksums(content))


def with_checksums(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content with a checksum of each field."""
    fields = json.loads(json.dumps({key: value for key, value in content.items() if key != SEAL}))
    return {**fields, SEAL: {key: field_checksum(key, value) for key, value in fields.items()}}


def field_checksum(key: str, value: Any) -> str:
    """Return half of a SHA-256: it reveals changes, but does not stop anyone who writes new checksums."""
    return hashlib.sha256(json.dumps([key, value], sort_keys=True).encode()).hexdigest()[:32]


def edited_fields(content: Mapping[str, Any]) -> list[str]:
    """Return the fields that were changed, added or removed since the sidecar was written.

    Empty for a sidecar of an earlier version, which has no checksums.
    """
    if SEAL not in content:
        return []
    then, now = content[SEAL], with_checksums(content)[SEAL]
    return [key for key in {**now, **then} if then.get(key) != now.get(key)]


def check_unedited(path: str | os.PathLike, content: Mapping[str, Any], accept: bool) -> None:
    """Check that a checkpoint's sidecar was not edited since it was written.

    Args:
        path: the checkpoint.
        content: of the sidecar.
        accept: warn only.

    Raises:
        UserError: it was edited and that is not accepted.
    """
    if SEAL not in content:
        words = "has no checksums of its fields (earlier versions wrote none), so an edit would not be noticed"
        print(f"note: {display_path(sidecar_path(path))}: {words}", file=sys.stderr)
    if not (changed := edited_fields(content)):
        return
    verb = "is" if len(changed) == 1 else "are"
    words = f"{display_path(sidecar_path(path))}: was edited: {join_names(changed)} {verb} not as written"
    if not accept:
        raise UserError(f"{words}. Copy the file again from the run, or use it as it is with {ACCEPT}.")
    print(f"warning: {words}. It is used as it is ({ACCEPT}).", file=sys.stderr)


def replace_pair(fresh: Path, fresh_note: Path, path: Path) -> None:
    """Give a checkpoint and its sidecar their names: both, or if that fails neither.

    The sidecar comes first. A process that ends between the two renames leaves the new sidecar, the earlier
    checkpoint, and the new checkpoint under its temporary name: `complete_pair` finishes the replacement.
    """
    note = sidecar_path(path)
    kept = temp_path(note.with_name(f"{note.name}.earlier"))
    try:
        if there := note.is_file():  # before anything changes: a copy needs disk space
            with open_regular(note) as old, create_file(kept) as file:
                file.write(old.read())
                fsync_file(file)
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
        remove_path(kept)
    fsync_dir(path.parent)


def complete_pair(path: Path, content: dict[str, Any]) -> bool:
    """Finish a replacement that was interrupted between the two renames of `replace_pair`.

    Args:
        path: the checkpoint.
        content: of its sidecar.

    Returns:
        Whether the checkpoint of this sidecar was found under its temporary name, and has its own now.
    """
    for left in path.parent.glob(f"{glob.escape(path.name)}.tmp-*"):
        if left.is_file() and not left.is_symlink() and sha256(left) == content.get("checkpoint_sha256"):
            os.replace(left, path)
            fsync_dir(path.parent)
            return True
    return False


def is_geometry(value: Any) -> bool:
    """Return whether a value is what Geometry.as_dict gives."""
    if not json_reader.is_object(value) or not {"version", "n_layer", "n_embd"} <= {*value}:
        return False
    return all(
        json_reader.is_text(size) if name == "version" else json_reader.is_whole(size, 1)
        for name, size in value.items()
    )


def is_hashed_file(value: Any) -> bool:
    """Return whether a value is [name, SHA-256]."""
    return json_reader.is_list(value, json_reader.is_text) and len(value) == 2


# checks of a sidecar's values
SIDECAR: json_reader.Schema = {
    "method": json_reader.is_text,
    "rank": lambda value: json_reader.is_whole(value, 1),
    "alpha": lambda value: json_reader.is_number(value) and 0 < value <= MOST_ALPHA,
    "rslora": json_reader.is_bool,
    "niter": json_reader.is_whole,
    "shifts": json_reader.is_bool,
    "layers": lambda value: json_reader.is_whole(value, 1),
    "every": lambda value: json_reader.is_whole(value, 1),
    "config": json_reader.is_object,
    "dropout": lambda value: json_reader.is_number(value) and 0 <= value <= 1,
    "parts": lambda value: json_reader.is_list(value, lambda part: part in PARTS),
    "base": lambda value: json_reader.is_path(value) and value == Path(value).name != "",
    "base_path": json_reader.is_path,
    "base_sha256": json_reader.is_hash,
    "base_mark": json_reader.is_none_or(lambda value: json_reader.is_list(value, json_reader.is_whole)),
    "checkpoint_sha256": json_reader.is_hash,
    "start_sha256": json_reader.is_hash,
    "geometry": is_geometry,
    "quant": lambda value: value in ("none", *QUANTS),
    "quant_parts": lambda value: json_reader.is_list(value, json_reader.is_text),
    "quant_kept": lambda value: json_reader.is_list(value, json_reader.is_text),
    "precision": json_reader.is_text,
    "epoch": json_reader.is_whole,
    "epoch_finished": json_reader.is_bool,
    "step": json_reader.is_whole,
    "prompt_type": json_reader.is_none_or(json_reader.is_text),
    "eot": json_reader.is_none_or(json_reader.is_text),
    "bos": json_reader.is_none_or(lambda value: json_reader.is_whole(value, 0, 1)),
    "blank_lines": json_reader.is_none_or(json_reader.is_bool),
    "template": json_reader.is_none_or(json_reader.is_object),
    "data": lambda value: json_reader.is_list(value, is_hashed_file),
    "versions": json_reader.is_object,
    "merged": lambda value: json_reader.is_list(value, json_reader.is_object),
    "weights": lambda value: json_reader.is_list(value, json_reader.is_number),
    "merge_base": json_reader.is_text,
    "merged_by": json_reader.is_text,
    SEAL: lambda value: json_reader.is_object(value) and all(map(json_reader.is_text, value.values())),
}
