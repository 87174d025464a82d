"""Layers on a frozen quantised weight. They keep codes only: what is dense lives as long as one matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Quantised
from .modes import quantise


class QuantLinear(nn.Module):
    """y = x W^T without a bias, in the dtype of x; the weight [out, in] is frozen and compressed (mode: a key of MODES)."""

    def __init__(self, weight: Tensor, mode: str):
        super().__init__()
        self.weight, self.mode = quantise(weight, mode), mode

    @property
    def out_features(self) -> int:
        """Outputs."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """Inputs."""
        return self.weight.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes of the weight."""
        return self.weight.bytes

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight that the layer multiplies by, [out, in]; float32, in which it is defined, unless dtype says otherwise."""
        return self.weight.dense(dtype or torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        return FrozenProduct.apply(x, self.weight)

    def extra_repr(self) -> str:
        """Return what repr adds."""
        return f"{self.in_features} -> {self.out_features}, {self.mode}"


class QuantEmbedding(nn.Module):
    """Rows of a frozen compressed weight [V, C]; only the rows that are asked for are ever dense."""

    def __init__(self, weight: Tensor, mode: str):
        super().__init__()
        self.weight, self.mode = quantise(weight, mode), mode

    @property
    def bytes(self) -> int:
        """Bytes of the weight."""
        return self.weight.bytes

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole weight [V, C]; float32 unless dtype says otherwise."""
        return self.weight.dense(dtype or torch.float32)

    on_host = False  # (it is small)

    def forward(self, ids: Tensor, dtype: torch.dtype, _device=None) -> Tensor:
        """Ids of any shape [...] -> [..., C]."""
        return self.weight.rows(ids.flatten(), dtype).view(*ids.shape, self.weight.shape[1])

    def extra_repr(self) -> str:
        """Return what repr adds."""
        return f"{self.weight.shape[0]} x {self.weight.shape[1]}, {self.mode}"


class FrozenProduct(torch.autograd.Function):
    """F.linear(x, W), where the backward pass dequantises W once more instead of keeping it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Quantised) -> Tensor:
        """Compute the outputs and save what the backward pass needs."""
        ctx.weight = weight
        return F.linear(x, weight.dense(x.dtype))

    @staticmethod
    def backward(ctx, dy: Tensor):
        """Return the gradients of the inputs."""
        return dy @ ctx.weight.dense(dy.dtype), None
