"""What a run writes down about itself: its settings as they were resolved, and a sidecar beside every checkpoint."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path

from rwkv_peft.adapters.specs import METHODS
from rwkv_peft.common import paths
from rwkv_peft.config.train import TrainConfig
from rwkv_peft.model.arch import NUMBERS

from .data_setup import TrainData


def resolved(config: TrainConfig, op, precision, on_host, data: TrainData, plan, geometry, run_name, workers) -> dict:
    """run.json: every setting of the script by its name, with auto replaced by what it became."""
    became = {
        "RUN_NAME": run_name, "MODEL_VERSION": NUMBERS[geometry.version], "N_LAYER": geometry.n_layer,
        "EMBD_SIZE": geometry.n_embd, "VOCAB_SIZE": geometry.vocab_size, "CTX_LEN": data.ctx_len,
        "EPOCH_STEPS": plan.micro_batches, "MICRO_BSZ": plan.micro_bsz, "OP": op, "PRECISION": precision,
        "STRATEGY": config.strategy_name, "NUM_WORKERS": workers, "EMB_ON_CPU": str(int(on_host)),
    }  # fmt: skip
    if data.buckets:
        edges, sizes = data.buckets.edges, data.buckets.sizes
        became |= {
            "TRAIN_LENGTHS": " ".join(map(str, edges)), "TRAIN_BATCH_SIZES": " ".join(map(str, sizes)),
            "CTX_LEN": min(data.ctx_len, edges[-1]), "MICRO_BSZ": "auto",
        }  # fmt: skip
    return script_values(config) | became


def script_values(config: TrainConfig) -> dict:
    """The settings by their names in the script."""
    return {f.metadata["var"]: getattr(config, f.name) for f in dataclasses.fields(config)}


def options_of(config: TrainConfig) -> dict:
    """The settings of the run's method, under the names that its adapters and its sidecars have for them."""
    given = script_values(config)
    options = {option: given[variable] for option, variable in METHODS[config.method].options.items()}
    if config.method == "peft":
        from rwkv_peft.adapters.hf_peft import read_config

        options["config"] = read_config(paths.resolve_path(config.peft_config, "."))
    return options


def describe_run(
    config, geometry, options, base: Path, content: dict, precision, epoch: int, step: int, finished: bool
) -> dict:
    """The sidecar of a checkpoint. options: those of the method. content: of the base, by hashing.content."""
    import pytorch_lightning
    import torch

    from rwkv_peft import __version__

    method = METHODS[config.method]
    return {
        "method": config.method,
        **options,
        **({"dropout": script_values(config)[method.dropout]} if method.dropout else {}),
        **({"parts": list(config.parts)} if method.parts else {}),
        "base": base.name,
        "base_path": str(base.resolve()),
        "base_sha256": content["sha256"],
        "base_mark": content["mark"],
        "geometry": geometry.as_dict(),
        "quant": config.quantised,
        "quant_parts": list(config.quantised_parts),
        "precision": precision,
        "epoch": epoch,
        "epoch_finished": finished,
        "step": step,
        "versions": {
            "kit": __version__,
            "torch": torch.__version__,
            "lightning": pytorch_lightning.__version__,
            "python": platform.python_version(),
        },
    }
