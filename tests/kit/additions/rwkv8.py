"""A version of RWKV that does not exist: RWKV-5 with other names for its token-shift mixes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import rwkv5
from .arch import Geometry
from .layers import matrix, own_parameters, vector
from .rwkv5 import ChannelMix, log_decay, new_sizes

if TYPE_CHECKING:
    from .init_weights import Recipe

__all__ = ["ChannelMix", "TimeMix", "initial_value", "new_sizes"]


class TimeMix(rwkv5.TimeMix):
    def make_mixes(self, geometry: Geometry) -> None:
        for letter in "kvrg":
            setattr(self, f"blend_{letter}", vector(geometry.n_embd))
        self.time_decay = matrix(geometry.n_head, geometry.head_size)

    def mixed(self, x: Tensor, shift: Tensor, s: Tensor, bounds) -> tuple[Tensor, ...]:
        p = own_parameters(self, x.dtype)
        r, k, v, g = self.ops.token_shift_mix(x, shift, [1 - p[f"blend_{letter}"] for letter in "rkvg"], bounds)
        return r, k, v, g, log_decay(self.time_decay, s)


def initial_value(recipe: Recipe, leaf: str, name: str, shape: tuple[int, ...]) -> Tensor | None:
    """A tensor of a new model; None for a name without a rule."""
    if leaf.startswith("blend_"):
        return torch.full(shape, 0.5)
    return rwkv5.initial_value(recipe, leaf, name, shape)
