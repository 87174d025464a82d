"""RWKV-6 time mix and channel mix (https://arxiv.org/abs/2404.05892): RWKV-5 whose token-shift mixes and decays depend on
the text. Names are the checkpoint's own; shapes as in rwkv5."""

from __future__ import annotations

import torch
from torch import Tensor

from . import rwkv5
from .arch import Geometry
from .layers import matrix, own_parameters, vector
from .rwkv5 import log_decay
from .state import SeqBounds


class TimeMix(rwkv5.TimeMix):
    def make_mixes(self, geometry: Geometry) -> None:
        C, mix, w = geometry.n_embd, geometry.rank_mix, geometry.rank_w
        for letter in "xwkvrg":
            setattr(self, f"time_maa_{letter}", vector(C))
        self.time_maa_w1, self.time_maa_w2 = matrix(C, 5 * mix), matrix(5, mix, C)
        self.time_decay, self.time_decay_w1, self.time_decay_w2 = vector(C), matrix(C, w), matrix(w, C)

    def mixed(self, x: Tensor, shift: Tensor, s: Tensor, borders: SeqBounds) -> tuple[Tensor, ...]:
        p = own_parameters(self, x.dtype)
        xx = self.ops.token_shift(x, shift, borders) - x
        inner = torch.tanh(torch.addcmul(x, xx, p["time_maa_x"]) @ p["time_maa_w1"])  # [T, 5 * mix]
        more = torch.bmm(inner.view(len(x), 5, -1).transpose(0, 1), p["time_maa_w2"])  # [5, T, C]
        xw, xk, xv, xr, xg = (x + xx * (p["time_maa_" + m] + more[i]) for i, m in enumerate("wkvrg"))
        raw = p["time_decay"] + torch.tanh(xw @ p["time_decay_w1"]) @ p["time_decay_w2"]
        return xr, xk, xv, xg, log_decay(raw, s).view(1, len(x), self.heads, self.size)


class ChannelMix(rwkv5.ChannelMix):
    def make_mixes(self, channels: int) -> None:
        self.time_maa_k, self.time_maa_r = vector(channels), vector(channels)

    def shares(self, dtype: torch.dtype) -> list[Tensor]:
        p = own_parameters(self, dtype)
        return [p["time_maa_k"], p["time_maa_r"]]
