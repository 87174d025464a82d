"""What GPU_COUNT, STRATEGY and PRECISION make of Lightning's Trainer."""

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

# what the libraries say of themselves
NOISE = ("FSDP2-wrapped module", r"`torch\.distributed\.\w+` is deprecated")
FP16_SCALE = 2.0**12  # the loss is a mean over tokens, so gradients are small; torch's own 2**16 overflows at first


class ScaledHalf(MixedPrecision):
    """fp16 with Lightning's gradient scaling, but without autocast: the model casts by itself, and WKV stays float32."""

    def forward_context(self):
        """Return a context that leaves dtypes as they are."""
        return contextlib.nullcontext()


def trainer_arguments(precision: str, gpu_count: int, nodes: int, word: str, grad_clip: float) -> tuple[dict, Sharding]:
    """Return the arguments of Lightning's Trainer that concern the machine, and how the training is distributed.

    The model casts by itself, so Lightning computes as it is; only fp16 needs more: its gradients would underflow.

    Args:
        precision: PRECISION.
        gpu_count: Processes of this machine.
        nodes: Machines.
        word: Of STRATEGIES.
        grad_clip: GRAD_CLIP.

    Raises:
        SettingErrors: this machine does not have what is asked for.
    """
    kind, strategy = device_kind(), STRATEGIES[word]
    wrong = []
    if kind == "cuda" and gpu_count > torch.cuda.device_count():
        wrong.append(SettingError("GPU_COUNT", f"is more than the {torch.cuda.device_count()} GPUs of this machine"))
    if precision == "fp16" and strategy.spread:
        wrong.append(
            SettingError(
                "STRATEGY", f"must be ddp with PRECISION=fp16, whose scaling {word} cannot do; use ddp, or bf16"
            )
        )
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    made: Any = "auto"
    plugins: list[Any] = []
    spread = Sharding(strategy, gpu_count * nodes > 1)
    for words in NOISE:
        warnings.filterwarnings("ignore", words)
    if word == "ddp":
        # (buffers are codes of compressed weights: they never change; gradients lie in what is sent, once)
        made = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    elif word == "fsdp":
        from .fsdp import FullyShard

        made = FullyShard()
    elif strategy.stage:
        try:
            with quietly():
                from .deepspeed import DeepSpeedZero, KeepDtypes, ZeroSharding
        except ImportError as error:
            words = f"needs a package that is missing ({error}): {pip_command('-r requirements.txt')}"
            wrong.append(SettingError("STRATEGY", words))
        else:
            made, plugins = DeepSpeedZero(strategy, grad_clip), [KeepDtypes("32-true")]
            spread = ZeroSharding(strategy, gpu_count * nodes > 1)
    if wrong:
        raise SettingErrors(*wrong)
    if precision == "fp16":
        scaler = torch.amp.GradScaler(kind, init_scale=FP16_SCALE)
        plugins = [ScaledHalf("16-mixed", kind, scaler)]
    accelerator = "gpu" if kind == "cuda" else "cpu"
    arguments = {
        "accelerator": accelerator,
        "devices": gpu_count,
        "num_nodes": nodes,
        "strategy": made,
        "plugins": plugins,
    }
    return arguments, spread


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """DeepSpeed warns of a missing GPU as soon as it is imported."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
