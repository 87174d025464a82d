"""What goes into a merge: words of the command -> checkpoints, opened and checked, and the base they belong to."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_peft import bases, checkpoint, hashing, project, runs, sidecars
from rwkv_peft.adapters import attach
from rwkv_peft.errors import Problem, Problems, UserError
from rwkv_peft.methods import ALIASES, METHODS
from rwkv_peft.shell_vars import whole_number

from . import foreign
from .fold import Part

SIDECAR = ("method", "base", "base_sha256", "epoch", "step")


@dataclass(frozen=True)
class Found:
    """A checkpoint that was named. sidecar: {} for files of others. label: what it is called in the result's name."""

    path: Path
    part: Part
    sidecar: dict
    label: str

    @property
    def words(self) -> str:
        """What it is, for the user."""
        method = METHODS[self.part.setup.method]
        told = {k: v for k, v in self.part.setup.options.items() if k in ("rank", "alpha")}
        settings = "".join(f" {k}={v:g}" for k, v in told.items())
        whole = self.sidecar.get("epoch_finished", True) or runs.STEP.fullmatch(self.path.name)
        early = "" if whole else " (stopped early)"
        step = f", step {self.sidecar['step']}{early}" if self.sidecar else ""
        return f"{project.shown(self.path)}: {method.words}{settings}{step}"


def checkpoint_files(words: Sequence[str], run: str) -> list[Path]:
    """The files that words behind the command mean: a number is an epoch of the run, step-N a step of it, anything
    else a path; none is the newest epoch."""
    if not words:
        folder = runs.run_folder(run)
        newest = runs.checkpoint_file(folder)
        if runs.better(folder, newest):
            command = f"RUN={shlex.quote(folder.name)} ./merge.sh best"
            print(f"careful   the validation was better before {newest.name}: {command} takes that checkpoint")
        return [newest]
    return [one_file(word, run) for word in words]


def one_file(word: str, run: str) -> Path:
    if word == "best":
        return runs.best_file(runs.run_folder(run))
    if word.lstrip("+-").isdecimal():
        return runs.checkpoint_file(runs.run_folder(run), whole_number("EPOCH", word, 0))
    if word.startswith("step-") and word[5:].isdecimal():
        return runs.checkpoint_file(runs.run_folder(run), step=whole_number("STEP", word[5:], 0))
    path = next(
        (
            p
            for p in (project.find(word, "output"), project.find(word, "merge"), project.find(word, "model"))
            if p.exists()
        ),
        None,
    )
    if path is None:
        number_meant = "" if any(c in word for c in "/.") else " (an epoch is a whole number)"
        raise UserError(
            f"{word}: there is no such checkpoint{number_meant}. Give an epoch, or a path like output/RUN/rwkv-2.pth"
        )
    return runs.checkpoint_file(path) if path.is_dir() else path


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
            raise UserError(f"{word}: a weight must be more than 0.")
        names.append(name if colon and name != word else word)
        weights.append(value)
    return names, [weight / sum(weights) for weight in weights]


def found(path: Path, method: str, alpha: float | None, init: Path | None, quantised: bool) -> Found:
    """A checkpoint with what its sidecar says; without one, with what its tensors and the user say.

    method, alpha, init: METHOD, LORA_ALPHA and PISSA_INIT. quantised: fold into the base as the run had it in memory.
    """
    where = project.shown(path)
    described = checkpoint.describe(path)  # refuses what is no checkpoint before its sidecar is asked for
    tensors = checkpoint.load(path)
    if has_sidecar(path):
        sidecar = sidecars.read(path, SIDECAR)
        if foreign.is_model(described) and "merged" in sidecar:  # a model that merge.sh made
            checkpoint.must_be_sound(path)
            return Found(path, Part(where, attach.Setup("full"), tensors), {}, path.stem)
        setup = attach.setup_of(sidecar, where)
        bases.must_be_its_own(path, sidecar)
        contradicts(method, alpha, setup, where)
        start = bases.start_of(path, sidecar, setup.method, init)
        quantised = quantised and sidecar.get("quant", "none") != "none"
        setup = attach.Setup(
            setup.method,
            setup.options,
            quant=sidecar.get("quant", "none"),
            quant_parts=tuple(sidecar.get("quant_parts", ())),
            quant_kept=tuple(sidecar.get("quant_kept", ())),  # earlier versions kept none
        )
        return Found(
            path,
            Part(where, setup, tensors, start, quantised),
            sidecar,
            f"{setup.method.upper()}-{number_of(path, sidecar)}",
        )
    if not method and not foreign.is_model(described):  # METHOD says that it is another's file
        bases.must_not_lack_its_sidecar(path)
    checkpoint.must_be_sound(path)
    tensors = foreign.our_names(tensors, where)
    setup = foreign.setup_of(tensors, where, method, alpha)
    part = Part(where, setup, tensors, foreign.start_of(path, setup, init))
    return Found(
        path,
        part,
        {},
        path.stem if setup.method == "full" else f"{setup.method.upper()}-{path.stem.removeprefix('rwkv-')}",
    )


def has_sidecar(path: Path) -> bool:
    """Whether a checkpoint's sidecar says what it is."""
    return sidecars.path_of(path).is_file() and "method" in sidecars.read(path, ())


def number_of(path: Path, sidecar: Mapping[str, Any]) -> str:
    """What stands behind the method in the name of the result."""
    of_step = path.name == runs.BEST or runs.STEP.fullmatch(path.name)
    return path.stem.removeprefix("rwkv-") if of_step else str(sidecar["epoch"])


def contradicts(method: str, alpha: float | None, setup: attach.Setup, where: str) -> None:
    """Problems where merge.sh says something else than the sidecar of a run."""
    wrong = []
    if method and ALIASES.get(method, method) != setup.method:
        wrong.append(Problem("METHOD", f"but {where} is a run of {setup.method}; leave it empty, its sidecar knows"))
    if alpha is not None and alpha != setup.options.get("alpha"):
        told = setup.options.get("alpha")
        theirs = f"was trained with alpha {told:g}" if told else "has no alpha"
        wrong.append(Problem("LORA_ALPHA", f"but {where} {theirs}; leave it empty, its sidecar knows"))
    if wrong:
        raise Problems(*wrong)


def must_be_one_compressed_run(checkpoints: Sequence[Found]) -> None:
    """Problems where MERGE_BASE=quantised means nothing."""
    first = checkpoints[0]
    if len(checkpoints) > 1:
        raise Problems(Problem("MERGE_BASE", "must be original where several checkpoints go into one result"))
    if not first.part.quantised:
        told = f"{project.shown(first.path)} was not trained on a compressed base"
        raise Problems(Problem("MERGE_BASE", f"must be original: {told}"))


def base_of(checkpoints: Sequence[Found], model_path: str, doubts: list[Callable[[], None]] | None = None) -> Path:
    """The one base of all of them. UserError where they have different ones, or nothing tells it. doubts: of bases.base_of."""
    doubts = doubts if len(checkpoints) == 1 else None
    bases_found = {}
    for one in checkpoints:
        if one.sidecar:
            bases_found[bases.base_of(one.sidecar, one.path, model_path, doubts)] = one
    contents = {one.sidecar["base_sha256"] for one in checkpoints if one.sidecar}
    if len(contents) > 1:
        first, second = list(bases_found.values())[:2] if len(bases_found) > 1 else checkpoints[:2]
        raise UserError(
            f"{project.shown(second.path)} was trained on {second.sidecar['base']}, {project.shown(first.path)} on "
            f"{first.sidecar['base']}: only runs on one base go together. Merge the first, and train the second on the result."
        )
    if bases_found:
        return next(iter(bases_found))
    models = [one.path for one in checkpoints if one.part.setup.method == "full"]
    if models and not model_path:  # whole models to be averaged: the first one gives names, shapes and formats
        return models[0]
    if not model_path:
        message = f"must name the base: {project.shown(checkpoints[0].path)} has no sidecar that says it"
        raise Problems(Problem("MODEL_PATH", message))
    return project.model_file(model_path)


def sources(checkpoints: Sequence[Found]) -> list[dict]:
    """What the result's sidecar says of its parts."""
    return [
        {
            "run": one.path.resolve().parent.name,
            "checkpoint": project.shown(one.path),
            "sha256": hashing.sha256(one.path),
        }
        for one in checkpoints
    ]
