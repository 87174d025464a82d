"""LoRA: W + alpha/r * B A (https://arxiv.org/abs/2106.09685); rsLoRA: alpha/sqrt(r) (https://arxiv.org/abs/2312.03732)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .base import Adapter, AnyLinear, compute_dtype, device_of
from .lowrank import lora_linear


class Lora(Adapter):
    """lora_A [r, in], lora_B [out, r], float32. B starts at zero: a fresh adapter changes nothing."""

    tensors = ("lora_A", "lora_B")
    row_axes = {"lora_B": 0}

    def __init__(self, linear: AnyLinear, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__(linear)
        self.scale, self.dropout = scale(rank, alpha, rslora), dropout
        self.lora_A, self.lora_B = fresh_factors(linear, rank)

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted layer's output, [..., out]."""
        dropout = self.dropout if self.training else 0.0
        return lora_linear(self.linear, x, self.lora_A, self.lora_B, self.scale, dropout)

    @staticmethod
    def shapes(outputs: int, inputs: int, rank: int, **_: Any) -> dict[str, tuple[int, ...]]:
        """Return the trained tensors' shapes by name."""
        return {"lora_A": (rank, inputs), "lora_B": (outputs, rank)}

    @staticmethod
    def merge(weight: Tensor, tensors: dict[str, Tensor], sidecar: Mapping[str, Any]) -> Tensor:
        """Return the merged weight, [out, in]."""
        A, B = factors(weight, tensors)
        return torch.addmm(weight.to(A.dtype), B, A, alpha=scale_of(sidecar))

    @staticmethod
    def product(tensors: dict[str, Tensor], sidecar: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the factors of the change, B [out, r] and A [r, in]."""
        return tensors["lora_B"].float() * scale_of(sidecar), tensors["lora_A"].float()

    @staticmethod
    def to_peft(tensors: dict[str, Tensor], sidecar: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the settings and tensors that peft would have."""
        settings = {
            "peft_type": "LORA", "r": sidecar["rank"], "lora_alpha": sidecar.get("alpha"), "lora_dropout": 0.0,
            "init_lora_weights": True, "use_rslora": bool(sidecar.get("rslora", False)), "use_dora": False,
            "fan_in_fan_out": False,
        }  # fmt: skip
        return settings, {f"{leaf}.weight": tensors[leaf] for leaf in Lora.tensors}


def scale(rank: int, alpha: float, rslora: bool) -> float:
    """With alpha/r the change shrinks as r grows; with alpha/sqrt(r) it keeps its size."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def fresh_factors(linear: AnyLinear, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A as torch draws linear layers (by the global generator), B zero."""
    device = device_of(linear)
    A = nn.Parameter(torch.empty(rank, linear.in_features, dtype=torch.float32, device=device))
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return A, nn.Parameter(torch.zeros(linear.out_features, rank, dtype=torch.float32, device=device))


def scale_of(sidecar: Mapping[str, Any]) -> float:
    """Return the scale of the run that a sidecar describes."""
    return scale(sidecar["rank"], sidecar["alpha"], sidecar.get("rslora", False))


def factors(weight: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A and B as `exact` as sums with this weight deserve."""
    return tensors["lora_A"].to(compute_dtype(weight.dtype)), tensors["lora_B"].to(compute_dtype(weight.dtype))
