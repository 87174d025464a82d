"""(IA)3: every output of a frozen layer times a trained number (https://arxiv.org/abs/2205.05638)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .base import Adapter, AnyLinear, device_of


class Ia3(Adapter):
    """gain [out], float32."""

    tensors = ("gain",)
    row_axes = {"gain": 0}
    no_peft = "peft keeps the gains of the channel mix on the other side of the matrix"

    def __init__(self, linear: AnyLinear, gain: float):
        super().__init__(linear)
        self.gain = nn.Parameter(torch.full((linear.out_features,), gain, device=device_of(linear)))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.gain.to(x.dtype)

    @staticmethod
    def shapes(outputs: int, inputs: int, **_: Any) -> dict[str, tuple[int, ...]]:
        return {"gain": (outputs,)}

    @staticmethod
    def merge(weight: Tensor, tensors: dict[str, Tensor], sidecar: Mapping[str, Any]) -> Tensor:
        return weight.float() * tensors["gain"][:, None]
