"""RWKV-5.2 time mix and channel mix (https://arxiv.org/abs/2404.05892). Names are the checkpoint's own.

Shapes: T tokens of all sequences behind one another, S sequences, C channels, H heads, N head size (C = H * N).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arch import Geometry
from .layers import GroupNorm, Linear, matrix, own_parameters, vector
from .state import SeqBounds

# exp(-exp(5)) is 0 in float32; what is larger would only make infinities on the way
LARGEST_DECAY = 5.0


def log_decay(raw: Tensor, like: Tensor) -> Tensor:
    """The logarithm of the decay exp(-exp(raw)), in the state's precision: near 1 a bfloat16 decay has only a few values."""
    return -torch.exp(raw.to(like.dtype).clamp(max=LARGEST_DECAY))


class TimeMix(nn.Module):
    def __init__(self, geometry: Geometry, layer: int, ops):
        super().__init__()
        C, H, N = geometry.n_embd, geometry.n_head, geometry.head_size
        self.heads, self.size, self.ops = H, N, ops
        self.make_mixes(geometry)
        self.time_faaaa = matrix(H, N)  # what the current token's key counts more than earlier ones
        self.receptance, self.key, self.value, self.gate, self.output = (Linear(C, C) for _ in range(5))
        self.ln_x = GroupNorm(H, C, eps=64e-5)  # the trainer's ln_x(y / 8) with 1e-5

    def make_mixes(self, geometry: Geometry) -> None:
        C = geometry.n_embd
        self.time_mix_k, self.time_mix_v, self.time_mix_r, self.time_mix_g = (vector(C) for _ in range(4))
        self.time_decay = matrix(geometry.n_head, geometry.head_size)

    def mixed(self, x: Tensor, shift: Tensor, s: Tensor, borders: SeqBounds) -> tuple[Tensor, ...]:
        """Inputs of receptance, key, value and gate, each [T, C], and the log decay as the wkv function takes it."""
        p = own_parameters(self, x.dtype)
        r, k, v, g = self.ops.token_shift_mix(x, shift, [1 - p["time_mix_" + m] for m in "rkvg"], borders)
        return r, k, v, g, log_decay(self.time_decay, s)

    def forward(self, x: Tensor, v_first: None, shift: Tensor, s: Tensor, borders: SeqBounds):
        """x: [T, C]; v_first: unused before RWKV-7; shift: [S, C]; s: [S, H, N, N].

        Returns y [T, C], v_first, and the state after each sequence: shift [S, C], s [S, H, N, N].
        """
        heads = lambda z: z.view(1, len(x), self.heads, self.size)  # noqa: E731
        xr, xk, xv, xg, w = self.mixed(x, shift, s, borders)
        r, k, v, g = self.receptance(xr), self.key(xk), self.value(xv), F.silu(self.gate(xg))
        bonus = self.time_faaaa.to(x.dtype)
        y, s = self.ops.wkv(heads(r), w, heads(k), heads(v), bonus, s, borders.cu_seqlens)
        y = self.ln_x(y.reshape(len(x), -1))
        return self.output(y * g), v_first, x[borders.last], s


class ChannelMix(nn.Module):
    def __init__(self, geometry: Geometry, ops):
        super().__init__()
        self.ops = ops
        C, F_ = geometry.n_embd, geometry.dim_ffn
        self.make_mixes(C)
        self.key, self.receptance, self.value = Linear(C, F_), Linear(C, C), Linear(F_, C)

    def make_mixes(self, channels: int) -> None:
        self.time_mix_k, self.time_mix_r = vector(channels), vector(channels)

    def shares(self, dtype: torch.dtype) -> list[Tensor]:
        """How much of the token before the inputs of key and receptance have."""
        p = own_parameters(self, dtype)
        return [1 - p["time_mix_k"], 1 - p["time_mix_r"]]

    def forward(self, x: Tensor, shift: Tensor, borders: SeqBounds) -> tuple[Tensor, Tensor]:
        """x: [T, C]; shift: [S, C]. Returns y [T, C] and the shift after each sequence [S, C]."""
        xk, xr = self.ops.token_shift_mix(x, shift, self.shares(x.dtype), borders)
        k = self.ops.square_relu(self.key(xk))
        return torch.sigmoid(self.receptance(xr)) * self.value(k), x[borders.last]
