"""The arguments of Lightning's Trainer that follow from GPU_COUNT, STRATEGY and PRECISION."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy

from rwkv_peft.common.errors import SettingError, SettingErrors, pip_command
from rwkv_peft.common.hardware import device_kind
from rwkv_peft.config.strategies import STRATEGIES

from .sharding import Sharding

# warnings of the libraries that no user can act on
IGNORED_WARNINGS = ("FSDP2-wrapped module", r"`torch\.distributed\.\w+` is deprecated")
FP16_SCALE = 2.0**12  # the loss is a mean over tokens, so gradients are small; torch's own 2**16 overflows at first


class ScaledHalf(MixedPrecision):
    """fp16 with Lightning's gradient scaling, but without autocast: the model casts by itself, and WKV stays float32."""

    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        """Do nothing around the forward pass."""
        yield


def make_trainer_arguments(
    precision: str, gpu_count: int, nodes: int, name: str, grad_clip: float
) -> tuple[dict, Sharding]:
    """Return the arguments of Lightning's Trainer that concern the machine, and how the run is sharded.

    The model casts by itself, so Lightning needs no precision plugin except for fp16, whose gradients would underflow.

    Args:
        precision: fp32, tf32, bf16 or fp16.
        gpu_count: processes of a machine.
        nodes: machines.
        name: of STRATEGIES.
        grad_clip: largest gradient norm, 0 for no limit.

    Raises:
        SettingErrors: for what this machine does not have, or the strategy cannot do.
    """
    kind, strategy = device_kind(), STRATEGIES[name]
    wrong = []
    if kind == "cuda" and gpu_count > torch.cuda.device_count():
        wrong.append(SettingError("GPU_COUNT", f"is more than the {torch.cuda.device_count()} GPUs of this machine"))
    if precision == "fp16" and strategy.spread:
        wrong.append(
            SettingError(
                "STRATEGY", f"must be ddp with PRECISION=fp16, whose scaling {name} cannot do; use ddp, or bf16"
            )
        )
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    is_distributed = gpu_count * nodes > 1
    sharding = Sharding(strategy, is_distributed)
    arguments: dict[str, Any] = {
        "accelerator": "gpu" if kind == "cuda" else "cpu", "devices": gpu_count, "num_nodes": nodes,
        "strategy": "auto", "plugins": [],
    }  # fmt: skip
    for pattern in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", pattern)
    if name == "ddp":
        # buffers are codes of quantized weights, which never change; a view saves a copy of the gradients
        arguments["strategy"] = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    elif name == "fsdp":
        from .fsdp import FullyShard  # (here: FSDP is imported only where it is used, which keeps start-up fast)

        arguments["strategy"] = FullyShard()
    elif strategy.stage:
        try:
            with _disable_warnings():  # DeepSpeed warns of a missing GPU as soon as it is imported
                # here: DeepSpeed is an optional package
                from .deepspeed import DeepSpeedZero, KeepDtypes, ZeroSharding
        except ImportError as error:
            words = f"needs a package that is missing ({error}): {pip_command('-r requirements.txt')}"
            wrong.append(SettingError("STRATEGY", words))
        else:
            arguments["strategy"] = DeepSpeedZero(strategy, grad_clip)
            arguments["plugins"] = [KeepDtypes("32-true")]
            sharding = ZeroSharding(strategy, is_distributed)
    if wrong:
        raise SettingErrors(*wrong)
    if precision == "fp16":
        scaler = torch.amp.GradScaler(kind, init_scale=FP16_SCALE)
        arguments["plugins"] = [ScaledHalf("16-mixed", kind, scaler)]
    return arguments, sharding


@contextlib.contextmanager
def _disable_warnings() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
