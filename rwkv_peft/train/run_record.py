"""The settings of a run as they were resolved, and the sidecar of its checkpoints."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytorch_lightning
import torch

from rwkv_peft import __version__
from rwkv_peft.adapters.hf_peft import read_config
from rwkv_peft.adapters.specs import METHODS
from rwkv_peft.common import paths
from rwkv_peft.config.train import TrainConfig
from rwkv_peft.data.tokenized_files import common_form

if TYPE_CHECKING:
    from .setup import RunSetup


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run, with `auto` replaced by what it was resolved to.

    Attributes:
        config: the settings as the script has them.
        values: every setting by its name in the script, resolved, as run.json has them.
        num_workers: processes that load data.
        emb_on_host: the embedding stays in the host's memory.
    """

    config: TrainConfig
    values: Mapping[str, Any]
    num_workers: int
    emb_on_host: bool


def script_values(config: TrainConfig) -> dict[str, Any]:
    """Return the settings by their names in the script."""
    return {f.metadata["var"]: getattr(config, f.name) for f in dataclasses.fields(config)}


def options_of(config: TrainConfig) -> dict[str, Any]:
    """Return the settings of the run's method, under the names that its adapters and sidecars have for them."""
    values = script_values(config)
    options = {option: values[variable] for option, variable in METHODS[config.method].options.items()}
    if config.method == "peft":
        options["config"] = read_config(paths.resolve_path(config.peft_config, "."))
    return options


def describe_checkpoint(
    run: RunSetup, fingerprint: Mapping[str, Any], epoch: int, step: int, finished: bool
) -> dict[str, Any]:
    """Return the sidecar of a checkpoint, without what identifies files of the run.

    Args:
        run: what is trained.
        fingerprint: of the base's file.
        epoch: number of the epoch, from 0.
        step: optimizer steps so far.
        finished: the epoch is finished.
    """
    config, base, train, method = run.config, run.base, run.data.train, run.method
    form = common_form(train.forms)
    return {
        "method": config.method,
        **base.adapter.options,
        **({"dropout": script_values(config)[method.dropout]} if method.dropout else {}),
        **({"parts": list(config.parts)} if method.parts else {}),
        "base": base.path.name,
        "base_path": str(base.path.resolve()),
        "base_sha256": fingerprint["sha256"],
        "base_mark": fingerprint["mark"],
        "geometry": base.geometry.as_dict(),
        "quant": config.quantised,
        "quant_parts": list(config.quantised_parts),
        "precision": run.compute.precision,
        "epoch": epoch,
        "epoch_finished": finished,
        "step": step,
        "versions": {
            "kit": __version__,
            "torch": torch.__version__,
            "lightning": pytorch_lightning.__version__,
            "python": platform.python_version(),
        },
        "prompt_type": form.prompt_type if form else None,
        "eot": form.eot if form else None,
        "template": form.template.to_dict() if form and form.template else None,
        "quant_kept": list(base.adapter.quant_kept),
        "bos": train.bos[0] if len(train.bos) == 1 else None,
        "blank_lines": train.blank_lines,
    }


def format_setting(value: object) -> str:
    """Return a setting's value as the script has it."""
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:g}" if isinstance(value, float) else str(value)
