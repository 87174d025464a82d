"""Small parts that every block is made of. A module computes in the dtype of its input, whatever its weights are kept in:
frozen weights may be bfloat16 and trained ones float32 in the same layer.

Shapes: T tokens of all sequences behind one another, C channels, S sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .state import Borders


class Linear(nn.Module):
    """y = x W^T without a bias; weight [out, in] as in the file."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class LayerNorm(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.bias.to(x.dtype), eps=1e-5)


class GroupNorm(nn.Module):
    """Layer norm over each head of [T, C]."""

    def __init__(self, groups: int, channels: int, eps: float):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def token_shift(x: Tensor, before: Tensor, borders: Borders) -> Tensor:
    """What stood one token earlier: x moved by one, and at each sequence's first token what was carried in.

    x: [T, C]; before: [S, C]. Returns [T, C].
    """
    return F.pad(x[:-1], (0, 0, 1, 0)).index_copy(0, borders.first, before.to(x.dtype))
