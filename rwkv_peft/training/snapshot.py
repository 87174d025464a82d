"""What an exact resume needs, as a folder state/step-NNNNNN of the run: safetensors and a manifest. Nothing in it is a pickle,
so a run folder that somebody has shared can execute nothing.

Such a folder has its name only when it is whole: it is filled under another name, every file is on the disk, the manifest with
their checksums comes last, and one rename makes it count. Older ones go when the new one is there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import hashing, safetensors_file
from ..atomic import need_space, sync_folder, write_json
from ..errors import OURS, UserError, in_words
from ..project import shown
from .spread import Parts

FORMAT = 1
MANIFEST = "manifest.json"
NAME = re.compile(r"step-\d{6,}")
UNFINISHED, REPLACED = ".unfinished-", ".replaced-"
WANTED = (
    "format", "step", "steps", "finished", "world", "settings", "became", "plan", "base", "data", "options", "start_sha256",
    "optimizer", "scaler", "tokens", "blocks", "wandb", "files",
)  # fmt: skip
PARTS = ("weights", "optimizer", "random")


@dataclass(frozen=True)
class Snapshot:
    """A saved state. facts: its manifest. beside: the states of the run at that moment, this one included."""

    folder: Path
    facts: Mapping[str, Any]
    beside: tuple[str, ...] = ()

    @property
    def run(self) -> Path:
        """The folder of the run that it is of."""
        return self.folder.parent.parent

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return self.facts["step"]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of a part, by name; mapped, read when they are used."""
        from safetensors.torch import load_file

        return load_file(self.folder / f"{part}.safetensors")


def folder_of(run: Path) -> Path:
    return run / "state"


def write(run: Path, parts: Mapping[str, Parts], facts: Mapping[str, Any], keep: int) -> Snapshot:
    """Save a state of a run and remove all but the `keep` newest ones. parts: file stem -> tensors, which come to the host one
    at a time. UserError or OSError if it cannot be written: what was there before is whole then."""
    there = folder_of(run)
    there.mkdir(exist_ok=True)
    tidy(run)
    need_space(there, sum(found.nbytes for tensors in parts.values() for found in tensors.wholes.values()))
    name = f"step-{facts['step']:06}"
    fresh, target = there / f"{UNFINISHED}{name}", there / name
    fresh.mkdir()
    try:
        files = {}
        for part, tensors in parts.items():
            path = fresh / f"{part}.safetensors"
            shapes = {name: found.shape for name, found in tensors.wholes.items()}
            dtypes = {name: found.dtype for name, found in tensors.wholes.items()}
            read = functools.partial(sound, tensors) if part == "weights" else tensors.__getitem__
            digest = hashlib.sha256()
            size = safetensors_file.write(path, shapes, dtypes, lambda name, read=read: [read(name)], digest)
            files[path.name] = {"bytes": size, "sha256": digest.hexdigest()}
        content = {"format": FORMAT, **facts, "files": files}
        write_json(fresh / MANIFEST, {**content, "sha256": checksum(content)})
        sync_folder(fresh)
        if target.exists():  # of the same step, from before the run was stopped and gone on with
            os.replace(target, there / f"{REPLACED}{name}")
        os.replace(fresh, target)
        sync_folder(there)
    finally:
        tidy(run)
    for old in [n for n in names(run) if step_of(n) <= facts["step"]][:-keep]:
        remove(there / old)
    return Snapshot(target, json.loads((target / MANIFEST).read_text(encoding="utf-8")))


def sound(tensors: Parts, name: str) -> Tensor:
    """UserError for a weight that is no number: nothing could go on from there, and older states would go for it."""
    if not torch.isfinite(tensor := tensors[name]).all():
        raise UserError(f"{name} has become NaN or infinite.")
    return tensor


def checksum(content: Mapping[str, Any]) -> str:
    """Of a manifest without this."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def tidy(run: Path) -> None:
    """Remove what was never finished, and what has been replaced; where it has not, it gets its name back. For the process
    alone that trains the run."""
    there = folder_of(run)
    for left in there.glob(f"{REPLACED}*"):
        name = there / left.name.removeprefix(REPLACED)
        os.replace(left, left.with_name(f"{UNFINISHED}{name.name}") if name.exists() else name)
    for left in there.glob(f"{UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)


def remove(folder: Path) -> None:
    """Take its name away first: half of a folder must not look like a whole one."""
    gone = folder.with_name(f"{UNFINISHED}{folder.name}")
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def drop_newer(run: Path, step: int) -> None:
    """Remove states of later steps than the one that the run goes on from: they are damaged."""
    for name in names(run):
        if step_of(name) > step:
            remove(folder_of(run) / name)


def step_of(name: str) -> int:
    return int(name.rpartition("-")[2])


def names(run: Path) -> list[str]:
    """The saved states of a run, oldest first."""
    there = folder_of(run)
    found = [p.name for p in there.iterdir() if NAME.fullmatch(p.name)] if there.is_dir() else []
    return sorted(found, key=step_of)


def newest_first(run: Path) -> list[Path]:
    """The folders of the states that a run could go on from; one that was about to be replaced is among them."""
    there = folder_of(run)
    replaced = [p for p in there.glob(f"{REPLACED}*") if not (there / p.name.removeprefix(REPLACED)).exists()]
    return sorted([*(there / name for name in names(run)), *replaced], key=lambda p: step_of(p.name), reverse=True)


def described(folder: Path) -> Snapshot:
    """What a saved state says of itself. UserError if that is not what was written."""
    manifest = folder / MANIFEST
    try:
        facts = json.loads(manifest.read_text(encoding="utf-8"))
        told = facts.pop("sha256", None)
        same = told == checksum(facts) and facts.get("step") == step_of(folder.name)
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno in OURS:
            raise
        raise UserError(f"{shown(manifest)}: cannot be read ({type(error).__name__}: {error}).") from None
    if not same:
        raise UserError(f"{shown(manifest)}: is damaged (its content is not what was written).")
    missing = [key for key in WANTED if key not in facts]
    if facts["format"] != FORMAT or missing or {f"{part}.safetensors" for part in PARTS} - {*facts["files"]}:
        raise UserError(f"{shown(manifest)}: was written by another version of the kit.")
    return Snapshot(folder, facts, tuple(p.name for p in newest_first(folder.parent.parent)))


def must_be_whole(found: Snapshot) -> None:
    """UserError unless every byte of a state is as it was written."""
    for name, told in found.facts["files"].items():
        path = found.folder / name
        try:
            if hashing.sha256(path) != told["sha256"]:
                raise UserError(f"{shown(path)}: is damaged (its content is not what the manifest says).")
        except OSError as error:
            if error.errno in OURS:
                raise
            raise UserError(f"{shown(path)}: cannot be read ({in_words(error)})") from None


def whole(
    run: Path, say: Callable[[str], None], wanted: Callable[[Snapshot], bool] = lambda _: True
) -> Snapshot | None:
    """The newest state that is wanted and whole; None if there is none. say: is told about damaged ones. wanted: is asked
    before the files are read. UserError if there is nothing but damaged ones."""
    folders = newest_first(run)
    for folder in folders:
        try:
            found = described(folder)
            if not wanted(found):
                return None
            must_be_whole(found)
            return found
        except UserError as error:
            say(f"warning   {error}")
    if folders:
        raise UserError(f"{shown(folder_of(run))}: none of its states is whole; nothing can go on from there.")
    return None


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the random numbers that dropout is drawn from."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].clone())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].clone(), device)
