"""What GPU_COUNT, STRATEGY and PRECISION make of Lightning's Trainer."""

from __future__ import annotations

import contextlib

import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy

from ..errors import Problem, Problems
from ..machine import device_kind

FP16_SCALE = 2.0**12  # the loss is a mean over tokens, so gradients are small; torch's own 2**16 overflows at first


class ScaledHalf(MixedPrecision):
    """fp16 with Lightning's gradient scaling, but without autocast: the model casts by itself, and WKV stays float32."""

    def forward_context(self):
        return contextlib.nullcontext()


def trainer_arguments(precision: str, gpu_count: int, strategy: str) -> dict:
    """The arguments of Lightning's Trainer that concern the machine.

    The model casts by itself, so Lightning computes as it is; only fp16 needs more: its gradients would underflow.
    """
    kind = device_kind()
    if kind == "cuda" and gpu_count > torch.cuda.device_count():
        raise Problems(Problem("GPU_COUNT", f"is more than the {torch.cuda.device_count()} GPUs of this machine"))
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    arguments = {
        "accelerator": "gpu" if kind == "cuda" else "cpu",
        "devices": gpu_count,
        # (buffers are codes of compressed weights: they never change)
        "strategy": DDPStrategy(broadcast_buffers=False) if gpu_count > 1 or strategy == "ddp" else "auto",
    }
    if precision == "fp16":
        scaler = torch.amp.GradScaler(kind, init_scale=FP16_SCALE)
        arguments["plugins"] = [ScaledHalf("16-mixed", kind, scaler)]
    return arguments
