"""Which files a talk is with, and the model they make."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import bases, checkpoint, machine, project, runs, sidecars
from ..adapters import attach
from ..errors import UserError
from ..file_watch import FileWatch
from ..methods import METHODS
from ..model.arch import ARCHS, STATE_NAME
from ..model.rwkv import RWKV, build, for_generating
from ..ops import dispatch
from ..words import did_you_mean, listed

# the endings of files for other programs -> what loads them
OTHERS = {".st": "Ai00 and web-rwkv", ".gguf": "llama.cpp", ".state": "Ai00", ".rwkvcpp.bin": "rwkv.cpp"}


@dataclass(frozen=True)
class Chosen:
    """model: the file of all weights. adapter: what is put on them, if anything, and setup: what it is. sidecar: what the run
    tells of itself, {} if nobody knows."""

    model: Path
    adapter: Path | None
    setup: attach.Setup
    sidecar: dict

    @property
    def name(self) -> str:
        return project.shown(self.model) + (f" + {project.shown(self.adapter)}" if self.adapter else "")


def load(
    config, base_was_named: bool, accept_edited: bool = False, in_use: FileWatch | None = None
) -> tuple[RWKV, str, dict]:
    """The model of a ChatConfig ready to talk, what to call it, and what its run tells of itself. in_use: gets its files."""
    chosen = choose(config.model_path, config.adapter, base_was_named, accept_edited)
    if in_use:
        in_use.add(path for path in (chosen.model, chosen.adapter) if path)
    model = built(chosen.model, config.precision)
    put_on(model, chosen)
    return ready(model), chosen.name, chosen.sidecar


def choose(model_path: str, adapter_name: str, base_was_named: bool, accept_edited: bool = False) -> Chosen:
    """MODEL_PATH and ADAPTER -> files. base_was_named: --model was typed beside an adapter: it must be the adapter's base. Else
    the sidecar says which. accept_edited: take a sidecar that was edited."""
    if adapter_name:
        adapter = adapter_file(adapter_name)
        if is_bare_state(adapter):  # a state from anywhere: nothing else has to be known
            return Chosen(model_or_merged(model_path), adapter, attach.Setup("state"), {})
        return of_run(adapter, str(model_place(model_path)) if base_was_named else "", accept_edited)
    if not model_path.strip():
        raise UserError("No model is named: give --model FILE or --adapter FILE, or MODEL_PATH in chat.sh.")
    model, sidecar = model_or_merged(model_path), {}
    if sidecars.path_of(model).is_file():  # a merged model
        with contextlib.suppress(UserError):
            sidecar = sidecars.read(model, ("prompt_type",))
        sidecars.must_be_unedited(model, sidecar, accept_edited)
    return Chosen(model, None, attach.Setup("none"), sidecar)


def of_run(adapter: Path, base: str, accept_edited: bool = False) -> Chosen:
    """A checkpoint that a run has written. base: where its base is said to be, "" if nobody says."""
    bases.must_not_lack_its_sidecar(adapter)
    sidecar = sidecars.read(adapter, ("method", "base", "base_sha256"))
    setup = attach.setup_of(sidecar, project.shown(adapter))
    bases.must_be_its_own(adapter, sidecar, accept_edited)
    if METHODS[setup.method].saves_model:
        return Chosen(adapter, None, setup, sidecar)
    return Chosen(base_of(adapter, sidecar, base), adapter, setup, sidecar)


def base_of(adapter: Path, sidecar: dict, given: str) -> Path:
    return bases.base_of(sidecar, adapter, given, cure="./chat.sh --model FILE --adapter FILE")


def built(path: Path, precision: str) -> RWKV:
    """A model from its file, on the host. precision: PRECISION."""
    _, geometry = bases.inspect(path)
    bases.must_be_sound_model(path, geometry)
    ops = dispatch.choose("auto", geometry.version, machine.device_kind(), geometry.head_size)
    # where large matrices are read as they are stored, float32 costs no more than bfloat16 and rounds nothing
    exact = precision == "auto" and torch.bfloat16 in ops.reads
    dtype = torch.float32 if exact else machine.DTYPES[machine.precision(precision)]
    if ops.why and ops.name == "torch":
        print(f"OP=torch: {ops.why}", file=sys.stderr)
    return build(geometry, checkpoint.load(path), ops, dtype)


def put_on(model: RWKV, chosen: Chosen) -> None:
    if chosen.adapter:
        start = bases.start_of(chosen.adapter, chosen.sidecar, chosen.setup.method)
        where = checkpoint.load(chosen.adapter), chosen.setup, project.shown(chosen.adapter)
        attach.attach_checkpoint(model, *where, None, start)


def ready(model: RWKV) -> RWKV:
    return for_generating(model).to(torch.device(machine.device_kind()))


def must_be_for_us(name: str) -> None:
    """UserError for a file that ./merge.sh --export writes for another program, with the name of what it was made of."""
    for ending, program in OTHERS.items():
        if name.endswith(ending):
            stem = name.removesuffix(ending).removesuffix(".bf16").removesuffix(".f32")
            raise UserError(f"{name}: ./chat.sh reads .pth, and this file is for {program}. Use {stem}.pth")


def model_place(name: str) -> Path:
    """Where a model lies, in model/ or merge/ or anywhere. May not exist."""
    must_be_for_us(name)
    path = project.model_file(name)
    merged = project.find(name if name.endswith(".pth") else f"{name}.pth", "merge")
    return merged if merged.exists() and not path.exists() else path


def model_or_merged(name: str) -> Path:
    path = model_place(name)
    if path.exists():
        return path
    if foreign := project.foreign_path(name):
        raise UserError(f"--model, or MODEL_PATH in chat.sh: {foreign}")
    if path.is_symlink():
        raise UserError(f"{name} (--model, or MODEL_PATH in chat.sh): {project.missing(path)}.")
    there = [name for folder in ("model", "merge") for name in project.models_in(project.ROOT / folder)]
    raise UserError(
        f"{name} (--model, or MODEL_PATH in chat.sh): there is no such model{did_you_mean(name, there) or '.'} "
        f"In model/ and merge/ there is: {listed(there)}."
    )


def adapter_file(name: str) -> Path:
    """ADAPTER -> the checkpoint (see runs.find). UserError if it is a model of its own."""
    must_be_for_us(name)
    path = runs.find(name, places=("output", "merge"))
    holds = checkpoint.describe(path)
    if sidecars.path_of(path).is_file():
        method = METHODS.get(sidecars.read(path, ("method",))["method"])
        if method and method.saves_model:
            return path
    if "head.weight" in holds and any(arch.marker in holds for arch in ARCHS.values()):
        raise UserError(f"{project.shown(path)}: is a whole model, not an adapter. Use it with --model (MODEL_PATH).")
    return path


def is_bare_state(path: Path) -> bool:
    """Whether a file holds a learnt state and nothing else, without a sidecar."""
    return not sidecars.path_of(path).is_file() and all(map(STATE_NAME.fullmatch, checkpoint.describe(path)))
