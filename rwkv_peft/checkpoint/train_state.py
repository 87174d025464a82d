"""Training states for an exact resume: a folder state/step-NNNNNN of the run with safetensors files and a manifest.

Nothing in it is a pickle, so a run folder that was shared cannot execute anything. Such a folder has its name only
when it is complete: it is filled under another name, every file is on the disk, the manifest with their checksums
comes last, and one rename makes it valid. Older ones are removed when the new one exists.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rwkv_peft.checkpoint.lazy_tensors import LazyTensors
from rwkv_peft.common import hashing, json_reader
from rwkv_peft.common.atomic_io import check_disk_space, fsync_dir, make_own_folder, write_json
from rwkv_peft.common.atomic_io import remove_path as take_away
from rwkv_peft.common.errors import EXHAUSTED_ERRNOS, UserError, describe_nonfatal
from rwkv_peft.common.file_watch import Stamp, read_stamp
from rwkv_peft.common.paths import display_path

from . import safetensors_io

FORMAT = 1
MANIFEST = "manifest.json"
NAME = re.compile(r"step-[0-9]{6,}")
UNFINISHED, REPLACED = ".unfinished-", ".replaced-"
WANTED = (
    "format", "step", "steps", "finished", "world", "settings", "became", "plan", "base", "data", "options", "start_sha256",
    "optimizer", "scaler", "tokens", "blocks", "wandb", "files",
)  # fmt: skip
PARTS = ("weights", "optimizer", "random")
MOST = 1 << 40  # of a count


def is_count(value: Any) -> bool:
    """Return whether a value is a whole number from 0 to MOST."""
    return json_reader.is_whole(value, 0, MOST)


def is_content(value: Any) -> bool:
    """Return whether a value is the name of a file and its content.

    The content is a checksum of all of it with a stamp, or of a sample.
    """
    if (
        not json_reader.is_object(value)
        or not json_reader.is_text(value.get("name"))
        or not {"sha256", "sample"} & {*value}
    ):
        return False
    mark = json_reader.is_none_or(lambda mark: json_reader.is_list(mark, json_reader.is_whole))
    return all(json_reader.is_hash(value[key] or "0" * 64) for key in ("sha256", "sample") if key in value) and mark(
        value.get("mark")
    )


def are_state_files(value: Any) -> bool:
    """Return whether a value names the files of a state with sizes and checksums: only these files are opened."""
    if not json_reader.is_object(value) or {*value} != {f"{part}.safetensors" for part in PARTS}:
        return False
    return all(
        json_reader.is_object(one) and is_count(one.get("bytes")) and json_reader.is_hash(one.get("sha256"))
        for one in value.values()
    )


# what the values of a manifest must be
SCHEMA: json_reader.Schema = {
    "step": is_count,
    "steps": is_count,
    "finished": json_reader.is_bool,
    "world": lambda value: json_reader.is_whole(value, 1, MOST),
    "settings": json_reader.is_object,
    "became": json_reader.is_object,
    "plan": lambda value: json_reader.is_object(value) and all(map(is_count, value.values())),
    "base": lambda value: is_content(value) and "sha256" in value,
    "data": lambda value: json_reader.is_object(value) and json_reader.is_list(value.get("files"), is_content),
    "options": json_reader.is_object,
    "start_sha256": json_reader.is_none_or(json_reader.is_hash),
    "optimizer": lambda value: json_reader.is_object(value) and all(map(json_reader.is_object, value.values())),
    "scaler": json_reader.is_none_or(
        lambda value: json_reader.is_object(value) and all(map(json_reader.is_number, value.values()))
    ),
    "tokens": is_count,
    "in_a_row": is_count,
    "blocks": json_reader.is_none_or(lambda value: json_reader.is_list(value, is_count)),
    "wandb": json_reader.is_none_or(json_reader.is_text),
    "trackers": lambda value: (
        json_reader.is_object(value) and all(map(json_reader.is_none_or(json_reader.is_text), value.values()))
    ),
    "quant_kept": lambda value: json_reader.is_list(value, json_reader.is_text),
    "files": are_state_files,
}


@dataclass(frozen=True)
class TrainState:
    """A saved state.

    Attributes:
        folder: of the state.
        facts: its manifest.
        beside: the states of the run at that time, this one included.
        stamps: of its files, from before their content was read.
    """

    folder: Path
    facts: Mapping[str, Any]
    beside: tuple[str, ...] = ()
    stamps: Mapping[str, Stamp] = field(default_factory=dict, compare=False)

    @property
    def run(self) -> Path:
        """The folder of its run."""
        return self.folder.parent.parent

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return self.facts["step"]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Map the tensors of a part, by name.

        Raises:
            UserError: one holds NaN, which would be blamed on the next steps.
        """
        from safetensors.torch import load_file

        tensors = load_file(self.folder / f"{part}.safetensors")
        if bad := next((name for name, tensor in tensors.items() if tensor.isnan().any()), ""):
            raise UserError(
                f"{display_path(self.folder)}: {bad} in {part}.safetensors holds NaN, which is never saved. Was it edited? Take "
                "the folder away, and the run goes on from an earlier state."
            )
        return tensors


def state_folder(run: Path) -> Path:
    """Return the folder of the states of a run."""
    return run / "state"


def save_state(
    run: Path,
    parts: Mapping[str, LazyTensors],
    facts: Mapping[str, Any],
    keep: int,
    last_look: Callable[[], None] = lambda: None,
) -> TrainState:
    """Save a state of a run and remove all but the newest `keep`.

    Args:
        run: the run folder.
        parts: file stem -> tensors, which come to the host one at a time.
        facts: for the manifest.
        keep: number of states to keep.
        last_look: called before the state gets its name; raises if it must not.

    Raises:
        UserError: it cannot be written; the earlier states are then complete.
        OSError: likewise.
    """
    there = state_folder(run)
    make_own_folder(there)
    remove_leftovers(run)
    check_disk_space(there, sum(lazy.nbytes for tensors in parts.values() for lazy in tensors.wholes.values()))
    name = f"step-{facts['step']:06}"
    fresh, target = there / f"{UNFINISHED}{name}", there / name
    fresh.mkdir()
    try:
        files = {}
        for part, tensors in parts.items():
            path = fresh / f"{part}.safetensors"
            shapes = {name: lazy.shape for name, lazy in tensors.wholes.items()}
            dtypes = {name: lazy.dtype for name, lazy in tensors.wholes.items()}
            read = functools.partial(finite_tensor, tensors) if part == "weights" else tensors.__getitem__
            digest = hashlib.sha256()
            size = safetensors_io.write_safetensors(path, shapes, dtypes, functools.partial(read_one, read), digest)
            files[path.name] = {"bytes": size, "sha256": digest.hexdigest()}
        content = {"format": FORMAT, **facts, "files": files}
        write_json(fresh / MANIFEST, {**content, "sha256": manifest_checksum(content)})
        fsync_dir(fresh)
        last_look()
        if os.path.lexists(target):  # of the same step, from before the run was stopped and resumed
            os.replace(target, there / f"{REPLACED}{name}")
        os.replace(fresh, target)
        fsync_dir(there)
    finally:
        remove_leftovers(run)
    for old in [n for n in state_names(run) if state_step(n) <= facts["step"]][:-keep]:
        remove_state(there / old)
    return TrainState(target, json_reader.load_json(target / MANIFEST))


def read_one(read: Callable[[str], Tensor], name: str) -> list[Tensor]:
    """Return a tensor as the only piece of itself."""
    return [read(name)]


def finite_tensor(tensors: LazyTensors, name: str) -> Tensor:
    """Return a weight after a check that it is finite.

    No run could resume from it, and older states would be removed for it.

    Raises:
        UserError: it is not finite.
    """
    if not torch.isfinite(tensor := tensors[name]).all():
        raise UserError(f"{name} has become NaN or infinite.")
    return tensor


def manifest_checksum(content: Mapping[str, Any]) -> str:
    """Return the checksum of a manifest without its checksum."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def remove_leftovers(run: Path) -> None:
    """Remove states that were never finished or have been replaced.

    A state whose replacement failed gets its name back. Only the process that trains the run may call this.
    """
    there = state_folder(run)
    for left in replaced_states(there):
        name = there / left.name.removeprefix(REPLACED)
        if os.path.lexists(name):
            try_remove(there / f"{UNFINISHED}{name.name}")
            name = there / f"{UNFINISHED}{name.name}"
        os.replace(left, name)
    for left in there.glob(f"{UNFINISHED}*"):
        try_remove(left)


def replaced_states(there: Path) -> list[Path]:
    """Return the states that were renamed to make room for another one of the same step."""
    return [p for p in there.glob(f"{REPLACED}*") if NAME.fullmatch(p.name.removeprefix(REPLACED))]


def try_remove(path: Path) -> None:
    """Remove a path that no longer has the name of a state. If that fails it stays, which is harmless."""
    with contextlib.suppress(OSError):
        take_away(path)


def remove_state(folder: Path) -> None:
    """Remove a state. It is renamed first: an incomplete folder must not look like a state."""
    gone = folder.with_name(f"{UNFINISHED}{folder.name}")
    try_remove(gone)
    os.replace(folder, gone)
    try_remove(gone)


def remove_newer_states(run: Path, step: int) -> None:
    """Remove states of later steps than the one that the run resumes from: they are damaged."""
    for name in state_names(run):
        if state_step(name) > step:
            remove_state(state_folder(run) / name)


def state_step(name: str) -> int:
    """Return the step in the name of a state."""
    return int(name.rpartition("-")[2])


def state_names(run: Path) -> list[str]:
    """Return the names of the saved states of a run, oldest first."""
    there = state_folder(run)
    names = [p.name for p in there.iterdir() if NAME.fullmatch(p.name)] if there.is_dir() else []
    return sorted(names, key=state_step)


def states_newest_first(run: Path) -> list[Path]:
    """Return the folders of the states that a run could resume from, including one that was about to be replaced."""
    there = state_folder(run)
    alone = [p for p in replaced_states(there) if not (there / p.name.removeprefix(REPLACED)).exists()]
    return sorted(
        [*(there / name for name in state_names(run)), *alone], key=lambda p: state_step(p.name), reverse=True
    )


def read_manifest(folder: Path) -> TrainState:
    """Read the manifest of a saved state.

    Raises:
        UserError: it is not what was written.
    """
    manifest = folder / MANIFEST
    try:
        facts = json_reader.load_json(manifest)
    except OSError as error:
        if error.errno in EXHAUSTED_ERRNOS:
            raise
        raise UserError(f"{display_path(manifest)}: cannot be read ({error.strerror or error}).") from None
    except ValueError as error:
        raise UserError(f"{display_path(manifest)}: is not readable as JSON: it {error}.") from None
    if wrong := json_reader.describe_mismatch(facts, {}, "manifest"):
        raise UserError(f"{display_path(manifest)}: {wrong}")
    recorded = facts.pop("sha256", None)
    if recorded != manifest_checksum(facts) or facts.get("step") != state_step(folder.name):
        raise UserError(f"{display_path(manifest)}: is damaged (its content is not what was written).")
    missing = [key for key in WANTED if key not in facts]
    if facts.get("format") != FORMAT or missing:
        raise UserError(f"{display_path(manifest)}: was written by another version of the kit.")
    if wrong := json_reader.describe_mismatch(facts, SCHEMA, "manifest"):
        raise UserError(f"{display_path(manifest)}: {wrong}")
    return TrainState(
        folder,
        facts,
        tuple(p.name for p in states_newest_first(folder.parent.parent)),
        file_stamps(folder, facts["files"]),
    )


def file_stamps(folder: Path, names: Iterable[str]) -> dict[str, Stamp]:
    """Return the stamps of those files that exist, by path."""
    stamps = {}
    for name in names:
        with contextlib.suppress(OSError):
            stamps[str(folder / name)] = read_stamp(folder / name)
    return stamps


@contextlib.contextmanager
def explain_mismatch(state: TrainState) -> Iterator[None]:
    """Convert errors from loading a state into its run to a UserError.

    They occur when the content does not fit the run that resumes from it, although its checksums are right.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError, SafetensorError) as error:
        of_others = isinstance(error, RuntimeError) and torch.distributed.is_initialized()  # another rank has died
        if of_others or isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise
        why = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{display_path(state.folder)}: does not fit the run that it is of ({type(error).__name__}: {why}). Was it edited? "
            "Take the folder away, and the run goes on from an earlier state."
        ) from error


def check_files(state: TrainState) -> None:
    """Check that every byte of a state is as it was written.

    Raises:
        UserError: it is not.
    """
    for name, recorded in state.facts["files"].items():
        path = state.folder / name
        try:
            if hashing.sha256(path) != recorded["sha256"]:
                raise UserError(f"{display_path(path)}: is damaged (its content is not what the manifest says).")
        except OSError as error:
            if error.errno in EXHAUSTED_ERRNOS:
                raise
            raise UserError(f"{display_path(path)}: cannot be read ({describe_nonfatal(error)})") from None


def latest_valid(
    run: Path, say: Callable[[str], None], wanted: Callable[[TrainState], bool] = lambda _: True
) -> TrainState | None:
    """Return the newest state that is wanted and valid; None if there is none.

    Args:
        run: the run folder.
        say: called with a message about each damaged state.
        wanted: decides whether to use a state, before its files are read.

    Raises:
        UserError: there are only damaged states.
    """
    folders = states_newest_first(run)
    for folder in folders:
        try:
            state = read_manifest(folder)
            if not wanted(state):
                return None
            check_files(state)
            return state
        except UserError as error:
            say(f"warning   {error}")
    if folders:
        raise UserError(
            f"{display_path(state_folder(run))}: none of its states is whole; nothing can go on from there."
        )
    return None


def get_rng_state(device: torch.device) -> dict[str, Tensor]:
    """Return the RNG state that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore the RNG state that dropout draws from."""
    torch.set_rng_state(state["cpu"].clone())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].clone(), device)
