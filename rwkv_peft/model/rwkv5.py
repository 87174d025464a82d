"""RWKV-5.2 time mix and channel mix (https://arxiv.org/abs/2404.05892). Names are the checkpoint's own.

Shapes: T tokens of all sequences behind one another, S sequences, C channels, H heads, N head size (C = H * N).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arch import Geometry
from .layers import GroupNorm, Linear, matrix, own_parameters, vector
from .state import SeqBounds

if TYPE_CHECKING:
    from .init_weights import Recipe

# exp(-exp(5)) is 0 in float32; what is larger would only make infinities on the way
LARGEST_DECAY = 5.0


def log_decay(raw: Tensor, like: Tensor) -> Tensor:
    """The logarithm of the decay exp(-exp(raw)), in the state's precision: near 1 a bfloat16 decay has only a few values."""
    return -torch.exp(raw.to(like.dtype).clamp(max=LARGEST_DECAY))


class TimeMix(nn.Module):
    """The time mix of RWKV-5."""

    def __init__(self, geometry: Geometry, layer: int, ops):
        super().__init__()
        C, H, N = geometry.n_embd, geometry.n_head, geometry.head_size
        self.heads, self.size, self.ops = H, N, ops
        self.make_mixes(geometry)
        self.time_faaaa = matrix(H, N)  # what the current token's key counts more than earlier ones
        self.receptance, self.key, self.value, self.gate, self.output = (Linear(C, C) for _ in range(5))
        self.ln_x = GroupNorm(H, C, eps=64e-5)  # the trainer's ln_x(y / 8) with 1e-5

    def make_mixes(self, geometry: Geometry) -> None:
        """Make the parameters of token shift and decay."""
        C = geometry.n_embd
        self.time_mix_k, self.time_mix_v, self.time_mix_r, self.time_mix_g = (vector(C) for _ in range(4))
        self.time_decay = matrix(geometry.n_head, geometry.head_size)

    def mixed(self, x: Tensor, shift: Tensor, s: Tensor, bounds: SeqBounds) -> tuple[Tensor, ...]:
        """Inputs of receptance, key, value and gate, each [T, C], and the log decay as the wkv function takes it."""
        p = own_parameters(self, x.dtype)
        r, k, v, g = self.ops.token_shift_mix(x, shift, [1 - p["time_mix_" + m] for m in "rkvg"], bounds)
        return r, k, v, g, log_decay(self.time_decay, s)

    def forward(self, x: Tensor, v_first: None, shift: Tensor, s: Tensor, bounds: SeqBounds):
        """x: [T, C]; v_first: unused before RWKV-7; shift: [S, C]; s: [S, H, N, N].

        Returns y [T, C], v_first, and the state after each sequence: shift [S, C], s [S, H, N, N].
        """
        heads = lambda z: z.view(1, len(x), self.heads, self.size)  # noqa: E731
        xr, xk, xv, xg, w = self.mixed(x, shift, s, bounds)
        r, k, v, g = self.receptance(xr), self.key(xk), self.value(xv), F.silu(self.gate(xg))
        bonus = self.time_faaaa.to(x.dtype)
        y, s = self.ops.wkv(heads(r), w, heads(k), heads(v), bonus, s, bounds.cu_seqlens)
        y = self.ln_x(y.reshape(len(x), -1))
        return self.output(y * g), v_first, x[bounds.last], s


class ChannelMix(nn.Module):
    """The channel mix of RWKV-5."""

    def __init__(self, geometry: Geometry, ops):
        super().__init__()
        self.ops = ops
        C, F_ = geometry.n_embd, geometry.dim_ffn
        self.make_mixes(C)
        self.key, self.receptance, self.value = Linear(C, F_), Linear(C, C), Linear(F_, C)

    def make_mixes(self, channels: int) -> None:
        """Make the parameters of token shift."""
        self.time_mix_k, self.time_mix_r = vector(channels), vector(channels)

    def shares(self, dtype: torch.dtype) -> list[Tensor]:
        """How much of the token before the inputs of key and receptance have."""
        p = own_parameters(self, dtype)
        return [1 - p["time_mix_k"], 1 - p["time_mix_r"]]

    def forward(self, x: Tensor, shift: Tensor, bounds: SeqBounds) -> tuple[Tensor, Tensor]:
        """x: [T, C]; shift: [S, C]. Returns y [T, C] and the shift after each sequence [S, C]."""
        xk, xr = self.ops.token_shift_mix(x, shift, self.shares(x.dtype), bounds)
        k = self.ops.square_relu(self.key(xk))
        return torch.sigmoid(self.receptance(xr)) * self.value(k), x[bounds.last]


def gated_width(width: int) -> int:
    """The inner width of the channel mix that the official trainer gives a new model of RWKV-5 and -6."""
    return int(width * 3.5) // 32 * 32


def new_sizes(layers: int, width: int) -> dict[str, int]:
    """The sizes that the official trainer gives a new model: fields of Geometry."""
    return {"dim_ffn": gated_width(width)}


def initial_value(recipe: Recipe, leaf: str, name: str, shape: tuple[int, ...]) -> Tensor | None:
    """Return a tensor of a new model; None for a name without a rule.

    Source: RWKV_Tmix_x052, its channel mix and generate_init_weight of RWKV-v5/src/model.py.
    """
    if leaf.startswith("time_mix_"):
        return recipe.part**recipe.rest if ".ffn." in name else shift_mix(recipe, leaf[-1])
    return initial_value_of_both(recipe, leaf, name, shape)


def initial_value_of_both(recipe: Recipe, leaf: str, name: str, shape) -> Tensor | None:
    """What RWKV-5 and -6 have in common."""
    if leaf == "time_decay":
        return -6 + 5 * recipe.along ** (0.7 + 1.3 * recipe.depth)
    if leaf == "time_faaaa":
        return recipe.depth * (1 - recipe.along) + ((recipe.n + 1) % 3 - 1) * 0.1
    if name.endswith(("output.weight", "ffn.value.weight", "ffn.receptance.weight")):
        return torch.zeros(shape)
    if leaf == "weight":
        return recipe.orthogonal(shape, 0.1 if name.endswith(("att.key.weight", "att.gate.weight")) else 1.0)
    return None


def shift_mix(recipe: Recipe, letter: str) -> Tensor:
    """How much of the current token each channel takes, in RWKV-5's sense (time_mix; RWKV-6's time_maa is 1 less it)."""
    power = {"r": 0.5, "g": 0.5}.get(letter, 1.0)
    return recipe.part ** (power * recipe.rest) + (0.3 * recipe.depth if letter == "v" else 0.0)
