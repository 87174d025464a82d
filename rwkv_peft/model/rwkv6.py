"""RWKV-6 time mix and channel mix (https://arxiv.org/abs/2404.05892).

RWKV-5 whose token-shift mixes and decays depend on the text. Names are the checkpoint's own; shapes as in rwkv5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import rwkv5
from .arch import Geometry
from .layers import matrix, own_parameters, vector
from .rwkv5 import gated_width, initial_value_of_both, log_decay, shift_mix
from .state import SeqBounds

if TYPE_CHECKING:
    from .init_weights import Recipe

LARGE = 4096  # width from which new models have low-rank parts of twice the rank


class TimeMix(rwkv5.TimeMix):
    """The time mix of RWKV-6."""

    def make_mixes(self, geometry: Geometry) -> None:
        """Make the parameters of token shift and decay."""
        C, mix, w = geometry.n_embd, geometry.rank_mix, geometry.rank_w
        for letter in "xwkvrg":
            setattr(self, f"time_maa_{letter}", vector(C))
        self.time_maa_w1, self.time_maa_w2 = matrix(C, 5 * mix), matrix(5, mix, C)
        self.time_decay, self.time_decay_w1, self.time_decay_w2 = vector(C), matrix(C, w), matrix(w, C)

    def mixed(self, x: Tensor, shift: Tensor, s: Tensor, bounds: SeqBounds) -> tuple[Tensor, ...]:
        """As in RWKV-5; the log decay is [1, T, H, N]."""
        p = own_parameters(self, x.dtype)
        xx = self.ops.token_shift(x, shift, bounds) - x
        inner = torch.tanh(torch.addcmul(x, xx, p["time_maa_x"]) @ p["time_maa_w1"])  # [T, 5 * mix]
        more = torch.bmm(inner.view(len(x), 5, -1).transpose(0, 1), p["time_maa_w2"])  # [5, T, C]
        xw, xk, xv, xr, xg = (x + xx * (p["time_maa_" + m] + more[i]) for i, m in enumerate("wkvrg"))
        raw = p["time_decay"] + torch.tanh(xw @ p["time_decay_w1"]) @ p["time_decay_w2"]
        return xr, xk, xv, xg, log_decay(raw, s).view(1, len(x), self.heads, self.size)


class ChannelMix(rwkv5.ChannelMix):
    """The channel mix of RWKV-6."""

    def make_mixes(self, channels: int) -> None:
        """Make the parameters of token shift."""
        self.time_maa_k, self.time_maa_r = vector(channels), vector(channels)

    def shares(self, dtype: torch.dtype) -> list[Tensor]:
        """As in RWKV-5."""
        p = own_parameters(self, dtype)
        return [p["time_maa_k"], p["time_maa_r"]]


def new_sizes(layers: int, width: int) -> dict[str, int]:
    """The sizes that the official trainer gives a new model: fields of Geometry."""
    factor = 2 if width >= LARGE else 1
    return {"dim_ffn": gated_width(width), "rank_w": 64 * factor, "rank_mix": 32 * factor}


def initial_value(recipe: Recipe, leaf: str, name: str, shape: tuple[int, ...]) -> Tensor | None:
    """Return a tensor of a new model; None for a name without a rule.

    Source: RWKV_Tmix_x060, its channel mix and generate_init_weight of RWKV-v5/src/model.py.
    """
    if leaf in ("time_maa_w1", "time_decay_w1"):
        return torch.zeros(shape)
    if leaf in ("time_maa_w2", "time_decay_w2"):
        return recipe.uniform(shape, 0.01)
    if leaf.startswith("time_maa_"):
        return 1.0 - (recipe.part**recipe.rest if ".ffn." in name else shift_mix(recipe, leaf[-1]))
    return initial_value_of_both(recipe, leaf, name, shape)
