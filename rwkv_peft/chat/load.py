"""Resolve the files of a chat, and load the model that they make."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from rwkv_peft.adapters import inject
from rwkv_peft.adapters.specs import METHODS
from rwkv_peft.checkpoint import base_model, pth, run_dir, sidecars
from rwkv_peft.common import hardware, paths
from rwkv_peft.common.errors import UserError
from rwkv_peft.common.file_watch import FileWatch
from rwkv_peft.common.formatting import did_you_mean, join_names
from rwkv_peft.export import EXPORTS
from rwkv_peft.model.arch import ARCHS, STATE_NAME
from rwkv_peft.model.rwkv import RWKV, build, for_generating
from rwkv_peft.ops import dispatch


@dataclass(frozen=True)
class Chosen:
    """The files of a chat.

    Attributes:
        model: the file of all weights.
        adapter: what is added to them, if anything.
        setup: the configuration of the adapter.
        sidecar: of the run, {} if there is none.
    """

    model: Path
    adapter: Path | None
    setup: inject.AdapterConfig
    sidecar: dict

    @property
    def name(self) -> str:
        """The files, for messages."""
        return paths.display_path(self.model) + (f" + {paths.display_path(self.adapter)}" if self.adapter else "")


def load_chat_model(
    config, base_was_named: bool, accept_edited: bool = False, in_use: FileWatch | None = None
) -> tuple[RWKV, str, dict]:
    """Load the model of a ChatConfig.

    Args:
        config: the settings.
        base_was_named: see `choose`.
        accept_edited: accept a sidecar that was edited.
        in_use: file watch that gets the files.

    Returns:
        The model, its name, and the sidecar of its run.
    """
    chosen = choose(config.model_path, config.adapter, base_was_named, accept_edited)
    if in_use:
        in_use.add(path for path in (chosen.model, chosen.adapter) if path)
    model = build_model(chosen.model, config.precision)
    attach_adapter(model, chosen)
    return prepare_model(model), chosen.name, chosen.sidecar


def choose(model_path: str, adapter_name: str, base_was_named: bool, accept_edited: bool = False) -> Chosen:
    """Resolve MODEL_PATH and ADAPTER to files.

    Args:
        model_path: MODEL_PATH.
        adapter_name: ADAPTER.
        base_was_named: --model was given beside an adapter, so it must be the adapter's base; else the sidecar says
            which is.
        accept_edited: accept a sidecar that was edited.
    """
    if adapter_name:
        adapter = find_adapter(adapter_name)
        if is_bare_state(adapter):  # a state from anywhere: nothing else is needed
            return Chosen(find_model(model_path), adapter, inject.AdapterConfig("state"), {})
        return choose_checkpoint(adapter, str(locate_model(model_path)) if base_was_named else "", accept_edited)
    if not model_path.strip():
        raise UserError("No model is named: give --model FILE or --adapter FILE, or MODEL_PATH in chat.sh.")
    model, sidecar = find_model(model_path), {}
    if sidecars.sidecar_path(model).is_file():  # a merged model
        with contextlib.suppress(UserError):
            sidecar = sidecars.read_sidecar(model, ("prompt_type",))
        sidecars.check_unedited(model, sidecar, accept_edited)
    return Chosen(model, None, inject.AdapterConfig("none"), sidecar)


def choose_checkpoint(adapter: Path, base: str, accept_edited: bool = False) -> Chosen:
    """Resolve a checkpoint that a run has written.

    Args:
        adapter: the checkpoint.
        base: path of its base, "" for the one in the sidecar.
        accept_edited: accept a sidecar that was edited.
    """
    base_model.check_sidecar_exists(adapter)
    sidecar = sidecars.read_sidecar(adapter, ("method", "base", "base_sha256"))
    setup = inject.setup_of(sidecar, paths.display_path(adapter))
    base_model.check_sidecar(adapter, sidecar, accept_edited)
    if METHODS[setup.method].saves_model:
        return Chosen(adapter, None, setup, sidecar)
    return Chosen(find_base(adapter, sidecar, base), adapter, setup, sidecar)


def find_base(adapter: Path, sidecar: dict, given: str) -> Path:
    """Find the base of a checkpoint."""
    return base_model.find_base_model(sidecar, adapter, given, option="./chat.sh --model FILE --adapter FILE")


def build_model(path: Path, precision: str) -> RWKV:
    """Load a model from its file, on the host. precision: PRECISION."""
    _, geometry = base_model.read_geometry(path)
    base_model.check_model(path, geometry)
    ops = dispatch.choose("auto", geometry.version, hardware.device_kind(), geometry.head_size)
    # where kernels read large matrices in their stored dtype, float32 costs no more than bfloat16 and rounds nothing
    exact = precision == "auto" and torch.bfloat16 in ops.reads
    dtype = torch.float32 if exact else hardware.DTYPES[hardware.resolve_precision(precision)]
    if ops.why and ops.name == "torch":
        print(f"OP=torch: {ops.why}", file=sys.stderr)
    return build(geometry, pth.load(path), ops, dtype)


def attach_adapter(model: RWKV, chosen: Chosen) -> None:
    """Attach the chosen adapter to its base."""
    if chosen.adapter:
        start = base_model.load_adapter_init(chosen.adapter, chosen.sidecar, chosen.setup.method)
        where = pth.load(chosen.adapter), chosen.setup, paths.display_path(chosen.adapter)
        inject.attach_checkpoint(model, *where, None, start)


def prepare_model(model: RWKV) -> RWKV:
    """Prepare a model for generation on its device."""
    return for_generating(model).to(torch.device(hardware.device_kind()))


def check_not_foreign(name: str) -> None:
    """Check that a name is not that of a file that ./merge.sh --export writes for another program.

    Raises:
        UserError: it is; the message names the file that it was made from.
    """
    for export in sorted(EXPORTS.values(), key=lambda one: -len(one.ending)):  # .bf16.gguf before .gguf
        if export.program and name.endswith(export.ending):
            stem = name.removesuffix(export.ending)
            raise UserError(f"{name}: ./chat.sh reads .pth, and this file is for {export.program}. Use {stem}.pth")


def locate_model(name: str) -> Path:
    """Return the path of a model, in model/ or merge/ or anywhere. It may not exist."""
    check_not_foreign(name)
    path = paths.resolve_model(name)
    merged = paths.resolve_path(name if name.endswith(".pth") else f"{name}.pth", "merge")
    return merged if merged.exists() and not path.exists() else path


def find_model(name: str) -> Path:
    """Return the path of a model that exists.

    Raises:
        UserError: there is none.
    """
    path = locate_model(name)
    if path.exists():
        return path
    if foreign := paths.explain_foreign_path(name):
        raise UserError(f"--model, or MODEL_PATH in chat.sh: {foreign}")
    if path.is_symlink():
        raise UserError(f"{name} (--model, or MODEL_PATH in chat.sh): {paths.describe_missing(path)}.")
    there = [name for folder in ("model", "merge") for name in paths.list_models(paths.ROOT / folder)]
    raise UserError(
        f"{name} (--model, or MODEL_PATH in chat.sh): there is no such model{did_you_mean(name, there) or '.'} "
        f"In model/ and merge/ there is: {join_names(there)}."
    )


def find_adapter(name: str) -> Path:
    """Resolve ADAPTER to a checkpoint (see run_dir.find).

    Raises:
        UserError: it is a whole model.
    """
    check_not_foreign(name)
    path = run_dir.find_checkpoint(name, places=("output", "merge"))
    holds = pth.read_header(path)
    if sidecars.sidecar_path(path).is_file():
        method = METHODS.get(sidecars.read_sidecar(path, ("method",))["method"])
        if method and method.saves_model:
            return path
    if "head.weight" in holds and any(arch.marker in holds for arch in ARCHS.values()):
        raise UserError(
            f"{paths.display_path(path)}: is a whole model, not an adapter. Use it with --model (MODEL_PATH)."
        )
    return path


def is_bare_state(path: Path) -> bool:
    """Return whether a file is a learnt state and nothing else, without a sidecar."""
    return not sidecars.sidecar_path(path).is_file() and all(map(STATE_NAME.fullmatch, pth.read_header(path)))
