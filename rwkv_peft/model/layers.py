"""The small parts of every block.

A module computes in the dtype of its input, whatever its weights are stored as: frozen weights may be bfloat16 and trained
ones float32 in the same layer. Shapes: T tokens of all sequences one after another, C channels, S sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def plain_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T in the dtype of x."""
    return F.linear(x, weight.to(x.dtype))


class Linear(nn.Linear):
    """y = x W^T without a bias; weight [out, in] as in the file."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        self.product = plain_product  # or that of what the model computes with

    def reset_parameters(self) -> None:
        """Weights come from a file; drawing random ones first would only take time."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        return self.product(x, self.weight)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in]; what a quantised layer has to compute."""
        return self.weight.to(dtype or self.weight.dtype)


class Affine(nn.Module):
    """Weight and bias of a norm over C channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))


class LayerNorm(Affine):
    """Layer norm over the channels, eps 1e-5."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.bias.to(x.dtype), eps=1e-5)


class GroupNorm(Affine):
    """Layer norm over each head of [T, C]."""

    def __init__(self, groups: int, channels: int, eps: float):
        super().__init__(channels)
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        return F.group_norm(x, self.groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def vector(channels: int) -> nn.Parameter:
    """Return an empty parameter [1, 1, C]."""
    return nn.Parameter(torch.empty(1, 1, channels))


def matrix(*shape: int) -> nn.Parameter:
    """Return an empty parameter."""
    return nn.Parameter(torch.empty(*shape))


def own_parameters(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """A module's parameters that are not its layers', in the dtype it computes in; vectors [1, 1, C] as [C]."""
    out: dict[str, Tensor] = {}
    for name, own in module._parameters.items():  # (named_parameters takes ten times as long, at every token)
        if own is not None and not name.endswith("_state"):
            p = own if own.dtype == dtype else own.to(dtype)
            out[name] = p.view(-1) if p.dim() == 3 and p.shape[:2] == (1, 1) else p
    return out
