"""RWKV-7 time mix and channel mix (https://arxiv.org/abs/2503.14456). Names are the checkpoint's own.

Shapes: T tokens of all sequences behind one another, S sequences, C channels, H heads, N head size (C = H * N).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .arch import Geometry
from .layers import Affine, Linear, matrix, own_parameters, vector
from .state import SeqBounds

if TYPE_CHECKING:
    from .init_weights import Recipe


class TimeMix(nn.Module):
    """The time mix of RWKV-7."""

    def __init__(self, geometry: Geometry, layer: int, ops):
        super().__init__()
        C, H, N = geometry.n_embd, geometry.n_head, geometry.head_size
        self.heads, self.ops = H, ops
        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (vector(C) for _ in range(6))
        self.w0, self.w1, self.w2 = vector(C), matrix(C, geometry.rank_w), matrix(geometry.rank_w, C)
        self.a0, self.a1, self.a2 = vector(C), matrix(C, geometry.rank_a), matrix(geometry.rank_a, C)
        self.mixes_v_first = layer > 0
        if self.mixes_v_first:
            self.v0, self.v1, self.v2 = vector(C), matrix(C, geometry.rank_v), matrix(geometry.rank_v, C)
        self.g1, self.g2 = matrix(C, geometry.rank_g), matrix(geometry.rank_g, C)
        self.k_k, self.k_a, self.r_k = vector(C), vector(C), matrix(H, N)
        self.receptance, self.key, self.value, self.output = (Linear(C, C) for _ in range(4))
        self.ln_x = Affine(C)  # a norm over each head, which ops computes

    def forward(self, x: Tensor, v_first: Tensor | None, shift: Tensor, s: Tensor, bounds: SeqBounds):
        """x: [T, C]; v_first: the first layer's values [T, C], None in the first layer; shift: [S, C]; s: [S, H, N, N].

        Returns y [T, C], v_first, and the state after each sequence: shift [S, C], s [S, H, N, N].
        """
        p = own_parameters(self, x.dtype)
        xr, xw, xk, xv, xa, xg = self.ops.token_shift_mix(x, shift, [p["x_" + m] for m in "rwkvag"], bounds)
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        w = torch.tanh(xw @ p["w1"]) @ p["w2"] + p["w0"]
        a = (xa @ p["a1"]) @ p["a2"] + p["a0"]
        g = torch.sigmoid(xg @ p["g1"]) @ p["g2"]
        mix = (xv @ p["v1"]) @ p["v2"] + p["v0"] if self.mixes_v_first else None
        own = p["k_k"], p["k_a"], p["r_k"].view(-1), self.ln_x.weight.to(x.dtype), self.ln_x.bias.to(x.dtype)
        gates = r, w, k, v, a, g, mix, v_first if self.mixes_v_first else None
        y, s = self.ops.wkv7_block(gates, own, s, bounds, self.heads)
        return self.output(y), v_first if self.mixes_v_first else v, x[bounds.last], s


class ChannelMix(nn.Module):
    """The channel mix of RWKV-7."""

    def __init__(self, geometry: Geometry, ops):
        super().__init__()
        self.ops = ops
        self.x_k = vector(geometry.n_embd)
        self.key = Linear(geometry.n_embd, geometry.dim_ffn)
        self.value = Linear(geometry.dim_ffn, geometry.n_embd)

    def forward(self, x: Tensor, shift: Tensor, bounds: SeqBounds) -> tuple[Tensor, Tensor]:
        """x: [T, C]; shift: [S, C]. Returns y [T, C] and the shift after each sequence [S, C]."""
        [xk] = self.ops.token_shift_mix(x, shift, [own_parameters(self, x.dtype)["x_k"]], bounds)
        return self.value(self.ops.square_relu(self.key(xk))), x[bounds.last]


def rank(factor: float, width: int) -> int:
    """The official suggestion for the inner width of a low-rank part: factor * sqrt(width), in steps of 32."""
    return max(32, round(factor * width**0.5 / 32) * 32)


def new_sizes(layers: int, width: int) -> dict[str, int]:
    """The sizes that the official trainer gives a new model: fields of Geometry."""
    return {
        "dim_ffn": 4 * width, "rank_w": rank(2.5, width), "rank_a": rank(2.5, width),
        "rank_v": rank(1.7, width) if layers > 1 else 0, "rank_g": rank(5, width),
    }  # fmt: skip


def initial_value(recipe: Recipe, leaf: str, name: str, shape: tuple[int, ...]) -> Tensor | None:
    """Return a tensor of a new model; None for a name without a rule.

    Source: RWKV_Tmix_x070, RWKV_CMix_x070 and generate_init_weight of the official trainer.
    """
    N, n = recipe.geometry.head_size, recipe.n
    linear = recipe.along - 0.5
    inside = (n % N - (N - 1) / 2) / ((N - 1) / 2)  # -1 to 1 within each head
    zigzag = inside * inside.abs()
    mixes = {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}
    vectors = {
        "w0": -6 + 6 * recipe.along ** (1 + recipe.depth**0.3) + 0.5 + zigzag * 2.5,
        "a0": -0.19 + zigzag * 0.3 + linear * 0.4,
        "v0": 0.73 - linear * 0.4,
        "k_k": 0.71 - linear * 0.1,
        "k_a": torch.full_like(n, 1.02),
    }
    if name.endswith("ffn.x_k"):
        return 1.0 - recipe.part**recipe.rest**4
    if leaf in mixes:
        return 1.0 - recipe.part ** (mixes[leaf] * recipe.rest)
    if leaf in vectors:
        return vectors[leaf]
    if leaf == "r_k":
        return torch.full(shape, -0.04)
    if leaf in ("w1", "a1", "v1", "g1") or name.endswith(("output.weight", "ffn.value.weight")):
        return torch.zeros(shape)
    if leaf in ("w2", "a2", "v2", "g2"):
        return recipe.orthogonal(shape, 0.1)
    if leaf == "weight":
        small = 0.1 if name.endswith("att.key.weight") else 1.0
        return recipe.uniform(shape, small * 0.5 / math.sqrt(recipe.geometry.n_embd))
    return None
