"""What goes into a merge: words of the command -> checkpoints, opened and checked, and the base they belong to."""

from __future__ import annotations

import contextlib
import hashlib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_peft.adapters import inject
from rwkv_peft.adapters.specs import ALIASES, METHODS
from rwkv_peft.checkpoint import base_model, pth, run_dir, sidecars, step_log
from rwkv_peft.common import hashing, paths
from rwkv_peft.common.atomic_io import open_regular
from rwkv_peft.common.errors import SettingError, SettingErrors, UserError
from rwkv_peft.common.file_watch import FileWatch

from . import legacy
from .fold import MergeInput

PLACES = ("output", "merge", "model")  # where a file is looked for
SIDECAR = ("method", "base", "base_sha256", "epoch", "step")


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that was named. sidecar: {} for files of others. label: what it is called in the result's name."""

    path: Path
    part: MergeInput
    sidecar: dict
    label: str

    @property
    def words(self) -> str:
        """What it is, for the user."""
        method = METHODS[self.part.setup.method]
        named = {k: v for k, v in self.part.setup.options.items() if k in ("rank", "alpha")}
        settings = "".join(f" {k}={v:g}" for k, v in named.items())
        whole = self.sidecar.get("epoch_finished", True) or run_dir.STEP.fullmatch(self.path.name)
        early = "" if whole else " (stopped early)"
        step = f", step {self.sidecar['step']}{early}" if self.sidecar else ""
        return f"{paths.display_path(self.path)}: {method.words}{settings}{step}"


def checkpoint_files(words: Sequence[str], run: str, several: str = "") -> list[Path]:
    """The files that the words behind the command address: none, EPOCH, RUN, RUN EPOCH or FILE.

    run: the run that --run or RUN names. several: --stack or --average, where each word addresses a checkpoint of its own.
    """
    if several:
        return several_files(words, run, several)
    epoch = words[1].removeprefix("rwkv-").removesuffix(".pth") if len(words) == 2 else ""
    if len(words) > 1 and not run_dir.is_epoch(epoch):
        for word in words:
            if not run_dir.is_epoch(word):
                run_dir.find_checkpoint(word, places=PLACES)  # what is no checkpoint is not to be stacked
        raise UserError(only_one(words))
    if len(words) == 2:
        return [of_run(words[0], epoch, run)]
    if not words or (run and run_dir.is_epoch(words[0])):
        folder = run_dir.run_folder(run)
        return [run_dir.epoch_file(folder, words[0]) if words else last_of(folder)]
    [word] = words
    if run:
        print(f"note: RUN={run} is not used, because {word} says which checkpoint is meant", file=sys.stderr)
    named = None if run_dir.is_epoch(word) else run_dir.find_run_folder(word)
    return [last_of(named) if named else run_dir.find_checkpoint(word, places=PLACES)]


def several_files(words: Sequence[str], run: str, option: str) -> list[Path]:
    """Return the checkpoints of an option that takes several."""
    if len(words) < 2:
        raise UserError(f"{option} needs two checkpoints or more.")
    bare = [word for word in words if run_dir.is_epoch(word)]
    if bare and len(bare) < len(words) and not run:
        others = [word for word in words if word not in bare]
        name = next((word.rstrip("/") for word in others if run_dir.find_run_folder(word)), "RUN")
        raise UserError(
            f"{bare[0]}: of which run? Write the run and the epoch together, as {shlex.quote(f'{name}/{bare[0]}')}, or name the "
            "run of bare epochs with --run."
        )
    if run and not bare:
        print(f"note: RUN={run} is not used, because every checkpoint is named with its run", file=sys.stderr)
    return [run_dir.find_checkpoint(word, run, PLACES) for word in words]


def of_run(name: str, epoch: str, run: str) -> Path:
    """The checkpoint that RUN EPOCH addresses."""
    folder = run_dir.find_run_folder(name)
    if folder:
        if run:
            print(f"note: RUN={run} is not used, because {name} says which run is meant", file=sys.stderr)
        return run_dir.epoch_file(folder, epoch)
    if run_dir.is_epoch(name):
        raise UserError(
            f"{name} {epoch}: there is no run of the name {name}. Two epochs of the newest run are folded into one model, one "
            f"after the other, by\n  {stacking([name, epoch])}"
        )
    if any(paths.resolve_path(name, place).is_file() for place in PLACES):
        raise UserError(f"{name} is a file, which has no epoch {epoch}. Leave one of the two away.")
    raise run_dir.unknown_run_error(f"{name}: there is no such run", name)


def last_of(folder: Path) -> Path:
    """The last epoch of a run, and a word where an earlier one may be the better."""
    newest = run_dir.checkpoint_file(folder)
    if run_dir.has_better_checkpoint(folder, newest):
        command = f"./merge.sh {run_dir.merge_arguments(folder, 'best')}"
        print(f"note: the validation was better before {newest.name}: {command} takes that checkpoint")
    return newest


def only_one(words: Sequence[str]) -> str:
    """What to write instead of words that are no RUN EPOCH, the command on a line of its own."""
    if len(words) == 2 and run_dir.is_epoch(words[0]) and run_dir.find_run_folder(words[1]):
        return f"{shlex.join(words)}: the run comes first:\n  ./merge.sh {shlex.join(words[::-1])}"
    several = "Several are folded into one model, one after the other, by"
    return f"{shlex.join(words)}: a merge takes one checkpoint. {several}\n  {stacking(words)}"


def stacking(words: Sequence[str]) -> str:
    """The command that folds all of them. RUN 1 2 is meant as RUN/1 RUN/2: --stack takes bare epochs alone or none."""
    if not all(map(run_dir.is_epoch, words)):
        run = next((word for word in words if not run_dir.is_epoch(word) and run_dir.find_run_folder(word)), "latest")
        named: list[str] = []
        for i, word in enumerate(words):
            if run_dir.is_epoch(word):
                named.append(f"{run.rstrip('/')}/{word}")
                continue
            is_run = run_dir.find_run_folder(word) is not None
            run = word if is_run else run
            if not is_run or not run_dir.is_epoch(words[i + 1] if i + 1 < len(words) else ""):
                named.append(word)
        words = named if len(named) > 1 else words
    return f"./merge.sh --stack {shlex.join(words)}"


def shares(words: Sequence[str]) -> tuple[list[str], list[float]]:
    """CHECKPOINT:WEIGHT ... -> checkpoints and their shares, which sum to 1. Without a weight: 1."""
    names, weights = [], []
    for word in words:
        name, colon, weight = word.rpartition(":")
        try:
            value = float(weight) if colon else 1.0
        except ValueError:  # a colon of the path's own
            name, value = word, 1.0
        if not 0 < value < 1e9:
            raise UserError(f"{word}: a weight must be more than 0, and less than 1e9.")
        names.append(name if colon and name != word else word)
        weights.append(value)
    return names, [weight / sum(weights) for weight in weights]


def load_checkpoint(
    path: Path,
    method: str,
    alpha: float | None,
    init: Path | None,
    quantised: bool,
    accept_edited: bool = False,
    in_use: FileWatch | None = None,
) -> LoadedCheckpoint:
    """A checkpoint with what its sidecar says; without one, with what its tensors and the user say.

    method, alpha, init: METHOD, LORA_ALPHA and PISSA_INIT. quantised: fold into the base as the run had it in memory.
    accept_edited: take a sidecar that was edited. in_use: watches the checkpoint.
    """
    where = paths.display_path(path)
    described = pth.read_header(path)  # refuses what is no checkpoint before its sidecar is asked for
    if has_sidecar(path):
        sidecar = sidecars.read_sidecar(path, SIDECAR)
        if legacy.is_model(described) and "merged" in sidecar:  # a model that merge.sh made
            sidecars.check_unedited(path, sidecar, accept_edited)
            pth.check_checksums(path)
            return LoadedCheckpoint(
                path, MergeInput(where, inject.AdapterConfig("full"), pth.load(path)), {}, path.stem
            )
        setup = inject.setup_of(sidecar, where)
        base_model.check_sidecar(path, sidecar, accept_edited, in_use)
        tensors = pth.load(path)
        contradicts(method, alpha, setup, where)
        start = base_model.load_adapter_init(path, sidecar, setup.method, init)
        quantised = quantised and sidecar.get("quant", "none") != "none"
        setup = inject.AdapterConfig(
            setup.method,
            setup.options,
            quant=sidecar.get("quant", "none"),
            quant_parts=tuple(sidecar.get("quant_parts", ())),
            quant_kept=tuple(sidecar.get("quant_kept", ())),  # earlier versions kept none
        )
        return LoadedCheckpoint(
            path,
            MergeInput(where, setup, tensors, start, quantised),
            sidecar,
            f"{run_of(path)}-{number_of(path, sidecar)}",
        )
    if not method and not legacy.is_model(described):  # METHOD says that it is another's file
        base_model.check_sidecar_exists(path)
    pth.check_checksums(path)
    tensors = legacy.our_names(pth.load(path), where)
    setup = legacy.setup_of(tensors, where, method, alpha)
    part = MergeInput(where, setup, tensors, legacy.start_of(path, setup, init))
    return LoadedCheckpoint(
        path,
        part,
        {},
        path.stem
        if setup.method == "full" or not numbered(path)
        else f"{run_of(path)}-{path.stem.removeprefix('rwkv-')}",
    )


def has_sidecar(path: Path) -> bool:
    """Whether a checkpoint's sidecar says what it is."""
    return sidecars.sidecar_path(path).is_file() and "method" in sidecars.read_sidecar(path, ())


def run_of(path: Path) -> str:
    """The name of the run that a checkpoint is of: that of its folder."""
    return path.resolve().parent.name


def numbered(path: Path) -> bool:
    """Return whether only the folder distinguishes a file of RWKV-PEFT from those of other runs: rwkv-2.pth."""
    return bool(run_dir.EPOCH.fullmatch(path.name)) and path.resolve().parent != paths.OUTPUT.resolve()


def number_of(path: Path, sidecar: Mapping[str, Any]) -> str:
    """What follows the run in the name of the result."""
    of_step = path.name == run_dir.BEST or run_dir.STEP.fullmatch(path.name)
    return path.stem.removeprefix("rwkv-") if of_step else str(sidecar["epoch"])


def contradicts(method: str, alpha: float | None, setup: inject.AdapterConfig, where: str) -> None:
    """Problems where merge.sh says something else than the sidecar of a run."""
    wrong = []
    if method and ALIASES.get(method, method) != setup.method:
        wrong.append(
            SettingError("METHOD", f"but {where} is a run of {setup.method}; leave it empty, its sidecar knows")
        )
    if alpha is not None and alpha != setup.options.get("alpha"):
        trained = setup.options.get("alpha")
        theirs = f"was trained with alpha {trained:g}" if trained else "has no alpha"
        wrong.append(SettingError("LORA_ALPHA", f"but {where} {theirs}; leave it empty, its sidecar knows"))
    if wrong:
        raise SettingErrors(*wrong)


def must_be_one_compressed_run(checkpoints: Sequence[LoadedCheckpoint]) -> None:
    """Problems where MERGE_BASE=quantised means nothing."""
    first = checkpoints[0]
    if len(checkpoints) > 1:
        raise SettingErrors(SettingError("MERGE_BASE", "must be original where several checkpoints go into one result"))
    if not first.part.quantised:
        why = f"{paths.display_path(first.path)} was not trained on a compressed base"
        raise SettingErrors(SettingError("MERGE_BASE", f"must be original: {why}"))


def base_of(
    checkpoints: Sequence[LoadedCheckpoint],
    model_path: str,
    doubts: list[Callable[[], None]] | None = None,
    in_use: FileWatch | None = None,
) -> Path:
    """Return the one base of all checkpoints.

    Args:
        checkpoints: To be merged.
        model_path: MODEL_PATH of merge.sh.
        doubts: As of base_model.find_base_model.
        in_use: Likewise.

    Raises:
        UserError: they have different bases, or none is named.
    """
    doubts = doubts if len(checkpoints) == 1 else None
    bases = {}
    for one in checkpoints:
        if one.sidecar:
            bases[base_model.find_base_model(one.sidecar, one.path, model_path, doubts, in_use=in_use)] = one
    contents = {one.sidecar["base_sha256"] for one in checkpoints if one.sidecar}
    if len(contents) > 1:
        first, second = list(bases.values())[:2] if len(bases) > 1 else checkpoints[:2]
        raise UserError(
            f"{paths.display_path(second.path)} was trained on {second.sidecar['base']}, {paths.display_path(first.path)} on "
            f"{first.sidecar['base']}: only runs on one base go together. Merge the first, and train the second on the result."
        )
    if bases:
        return next(iter(bases))
    models = [one.path for one in checkpoints if one.part.setup.method == "full"]
    if models and not model_path:  # whole models to be averaged: the first one gives names, shapes and formats
        return models[0]
    if not model_path:
        message = f"must name the base: {paths.display_path(checkpoints[0].path)} has no sidecar that says it"
        raise SettingErrors(SettingError("MODEL_PATH", message))
    return paths.resolve_model(model_path)


def sources(checkpoints: Sequence[LoadedCheckpoint]) -> list[dict]:
    """What the result's sidecar says of its parts."""
    return [
        {
            "run": run_of(one.path),
            "began": began(one.path),
            "checkpoint": paths.display_path(one.path),
            "sha256": hashing.sha256(one.path),
            "options": dict(one.part.setup.options),
        }
        for one in checkpoints
    ]


def began(path: Path) -> str | None:
    """Return what distinguishes a checkpoint's run from a later one of the same name; None where there is no log.

    It is a hash of its first step's record, which has the time that the step took.
    """
    with contextlib.suppress(OSError), open_regular(path.parent / step_log.FILE) as log:
        return hashlib.sha256(first).hexdigest() if (first := log.readline(step_log.MOST_LINE)) else None
    return None
