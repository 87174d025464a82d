"""What an exact resume needs, as a folder state/step-NNNNNN of the run: safetensors and a manifest. Nothing in it is a pickle,
so a run folder that somebody has shared can execute nothing.

Such a folder has its name only when it is whole: it is filled under another name, every file is on the disk, the manifest with
their checksums comes last, and one rename makes it count. Older ones go when the new one is there.
"""

from __future__ import annotations

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
from ..errors import UserError
from ..project import shown

FORMAT = 1
MANIFEST = "manifest.json"
NAME = re.compile(r"step-\d{6,}")
UNFINISHED, REPLACED = ".unfinished-", ".replaced-"
WANTED = ("format", "step", "steps", "finished", "world", "settings", "became", "plan", "base", "data", "files")


@dataclass(frozen=True)
class Snapshot:
    """A saved state. facts: its manifest."""

    folder: Path
    facts: Mapping[str, Any]

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


def write(run: Path, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any], keep: int) -> Snapshot:
    """Save a state of a run and remove all but the `keep` newest ones. parts: file stem -> tensors, on any device, which are
    copied to the host one at a time. UserError or OSError if it cannot be written: what was there before is whole then."""
    there = folder_of(run)
    there.mkdir(exist_ok=True)
    clear(there)
    need_space(there, sum(t.numel() * t.element_size() for tensors in parts.values() for t in tensors.values()))
    name = f"step-{facts['step']:06}"
    fresh, target = there / f"{UNFINISHED}{name}", there / name
    fresh.mkdir()
    try:
        files = {}
        for part, tensors in parts.items():
            path = fresh / f"{part}.safetensors"
            shapes = {n: tuple(t.shape) for n, t in tensors.items()}
            dtypes = {n: t.dtype for n, t in tensors.items()}
            safetensors_file.write(path, shapes, dtypes, lambda n, tensors=tensors: [tensors[n].detach().cpu()])
            files[path.name] = {"bytes": path.stat().st_size, "sha256": hashing.sha256(path)}
        write_json(fresh / MANIFEST, {"format": FORMAT, **facts, "files": files})
        sync_folder(fresh)
        if target.exists():  # of the same step, from before the run was stopped and gone on with
            os.replace(target, there / f"{REPLACED}{name}")
        os.replace(fresh, target)
        sync_folder(there)
    finally:
        clear(there)
    for old in names(run)[:-keep]:
        remove(there / old)
    return Snapshot(target, json.loads((target / MANIFEST).read_text(encoding="utf-8")))


def clear(there: Path) -> None:
    """Remove what was never finished, and what has been replaced; where it has not, it gets its name back."""
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


def names(run: Path) -> list[str]:
    """The saved states of a run, oldest first."""
    there = folder_of(run)
    found = [p.name for p in there.iterdir() if NAME.fullmatch(p.name)] if there.is_dir() else []
    return sorted(found, key=lambda name: int(name[5:]))


def newest(run: Path, say: Callable[[str], None]) -> Snapshot | None:
    """The newest state that is whole; None if the run has saved none. say: is told about damaged ones. UserError if there is
    nothing but damaged ones."""
    clear(folder_of(run))
    found = names(run)
    for name in reversed(found):
        try:
            return read(folder_of(run) / name)
        except UserError as error:
            say(f"careful   {error}")
    if found:
        raise UserError(f"{shown(folder_of(run))}: none of its states is whole; nothing can go on from there.")
    return None


def read(folder: Path) -> Snapshot:
    """A saved state, every byte of which is as it was written. UserError if not."""
    try:
        facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        missing = [key for key in WANTED if key not in facts]
        if facts.get("format") != FORMAT or missing:
            raise UserError(
                f"{shown(folder / MANIFEST)}: is of another version of the kit ({facts.get('format')!r}, {missing})."
            )
        for name, told in facts["files"].items():
            if "/" in name or not (folder / name).is_file():
                raise UserError(f"{shown(folder / name)}: is missing.")
            if hashing.sha256(folder / name) != told["sha256"]:
                raise UserError(f"{shown(folder / name)}: is damaged (its content is not what the manifest says).")
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{shown(folder / MANIFEST)}: cannot be read ({type(error).__name__}: {error}).") from None
    return Snapshot(folder, facts)


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
