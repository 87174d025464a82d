"""RWKV-7 time mix and channel mix (https://arxiv.org/abs/2503.14456). Names are the checkpoint's own.

Shapes: T tokens of all sequences behind one another, S sequences, C channels, H heads, N head size (C = H * N).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arch import Geometry
from .layers import GroupNorm, Linear, matrix, own_parameters, token_shift, vector
from .state import Borders

LOG_DECAY_SCALE = -0.6065306597126334  # -exp(-1/2): no token's decay is below exp of this


class TimeMix(nn.Module):
    def __init__(self, geometry: Geometry, layer: int, wkv: Callable):
        super().__init__()
        C, H, N = geometry.n_embd, geometry.n_head, geometry.head_size
        self.heads, self.size, self.wkv = H, N, wkv
        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (vector(C) for _ in range(6))
        self.w0, self.w1, self.w2 = vector(C), matrix(C, geometry.rank_w), matrix(geometry.rank_w, C)
        self.a0, self.a1, self.a2 = vector(C), matrix(C, geometry.rank_a), matrix(geometry.rank_a, C)
        self.mixes_v_first = layer > 0
        if self.mixes_v_first:
            self.v0, self.v1, self.v2 = vector(C), matrix(C, geometry.rank_v), matrix(geometry.rank_v, C)
        self.g1, self.g2 = matrix(C, geometry.rank_g), matrix(geometry.rank_g, C)
        self.k_k, self.k_a, self.r_k = vector(C), vector(C), matrix(H, N)
        self.receptance, self.key, self.value, self.output = (Linear(C, C) for _ in range(4))
        self.ln_x = GroupNorm(H, C, eps=64e-5)  # 1e-5 * 8**2, as the base models were trained

    def forward(self, x: Tensor, v_first: Tensor | None, shift: Tensor, s: Tensor, borders: Borders):
        """x: [T, C]; v_first: the first layer's values [T, C], None in the first layer; shift: [S, C]; s: [S, H, N, N].

        Returns y [T, C], v_first, and the state after each sequence: shift [S, C], s [S, H, N, N].
        """
        p = own_parameters(self, x.dtype)
        T, H, N = len(x), self.heads, self.size
        xx = token_shift(x, shift, borders) - x
        xr, xw, xk, xv, xa, xg = (torch.addcmul(x, xx, p["x_" + m]) for m in "rwkvag")
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        # the logarithm of the decay, in float32: near 1 a bfloat16 decay has only a few values
        w = torch.tanh(xw @ p["w1"]) @ p["w2"] + p["w0"]
        w = LOG_DECAY_SCALE * torch.sigmoid(w.to(s.dtype))
        if self.mixes_v_first:
            v = v + (v_first - v) * torch.sigmoid((xv @ p["v1"]) @ p["v2"] + p["v0"])
        else:
            v_first = v
        a = torch.sigmoid((xa @ p["a1"]) @ p["a2"] + p["a0"])  # how much of the old value is replaced
        g = torch.sigmoid(xg @ p["g1"]) @ p["g2"]
        kk = F.normalize((k * p["k_k"]).view(T, H, N), dim=-1, eps=1e-12)
        k = k * (1 + (a - 1) * p["k_a"])
        heads = lambda z: z.view(1, T, H, N)  # noqa: E731
        y, s = self.wkv(heads(r), heads(w), heads(k), heads(v), -heads(kk), heads(kk) * heads(a), s, borders.cu_seqlens)
        y = self.ln_x(y.reshape(T, -1))
        bonus = (r.view(T, H, N) * k.view(T, H, N) * p["r_k"]).sum(-1, keepdim=True)
        y = y + (bonus * v.view(T, H, N)).view(T, -1)
        return self.output(y * g), v_first, x[borders.last], s


class ChannelMix(nn.Module):
    def __init__(self, geometry: Geometry):
        super().__init__()
        self.x_k = vector(geometry.n_embd)
        self.key = Linear(geometry.n_embd, geometry.dim_ffn)
        self.value = Linear(geometry.dim_ffn, geometry.n_embd)

    def forward(self, x: Tensor, shift: Tensor, borders: Borders) -> tuple[Tensor, Tensor]:
        """x: [T, C]; shift: [S, C]. Returns y [T, C] and the shift after each sequence [S, C]."""
        xx = token_shift(x, shift, borders) - x
        k = torch.relu(self.key(torch.addcmul(x, xx, own_parameters(self, x.dtype)["x_k"]))) ** 2
        return self.value(k), x[borders.last]
