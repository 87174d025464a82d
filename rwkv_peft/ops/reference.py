"""The WKV-7 recurrence, one token at a time, in float64: what every other backend must equal.

Shapes: B batch, T tokens, H heads, N head size, S sequences.
Source: RWKV-LM/RWKV-v7/rwkv_v7_numpy.py; https://arxiv.org/abs/2503.14456.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def wkv7(r, w, k, v, a, b, s0: Tensor | None = None, cu_seqlens: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """y_t = S_t r_t,  S_t = S_{t-1} diag(exp(w_t)) + (S_{t-1} a_t) b_t^T + v_t k_t^T.

    r, w, k, v, a, b: [B, T, H, N]; w is the natural logarithm of the decay (at most 0).
    s0: state before the first token, [S, H, N, N], rows are values, columns are keys; None is zero.
    cu_seqlens: where sequences begin and the last one ends, [S + 1] integers on the host; needs B = 1. Without it every
    row of the batch is a sequence (S = B).
    Returns y [B, T, H, N] in the dtype of r, and the state after each sequence, [S, H, N, N] in the dtype of s0
    (float32 without one). Computes in float64.
    """
    return recurrence(r, w, k, v, a, b, s0, cu_seqlens, torch.float64)


def recurrence(r, w, k, v, a, b, s0, cu_seqlens, dtype) -> tuple[Tensor, Tensor]:
    """wkv7 in any dtype; also what decoding uses, where there is one token and nothing to put in parallel."""
    batch, tokens, heads, size = r.shape
    spans = sequences(batch, tokens, cu_seqlens)
    rows = [x.reshape(batch * tokens, heads, size).to(dtype) for x in (r, w, k, v, a, b)]
    out_dtype = torch.float32 if s0 is None else s0.dtype
    start = r.new_zeros(len(spans), heads, size, size, dtype=dtype) if s0 is None else s0.to(dtype)
    ys, states = [], []
    for i, (begin, end) in enumerate(spans):
        s = start[i]  # [H, N, N]
        for t in range(begin, end):
            rt, wt, kt, vt, at, bt = (x[t] for x in rows)  # [H, N]
            sa = torch.einsum("hvk,hk->hv", s, at)
            s = s * wt.exp()[:, None, :] + sa[:, :, None] * bt[:, None, :] + vt[:, :, None] * kt[:, None, :]
            ys.append(torch.einsum("hvk,hk->hv", s, rt))
        states.append(s)
    y = torch.stack(ys) if ys else rows[0].new_zeros(0, heads, size)
    return y.view(batch, tokens, heads, size).to(r.dtype), torch.stack(states).to(out_dtype)


def sequences(batch: int, tokens: int, cu_seqlens: Sequence[int] | None) -> list[tuple[int, int]]:
    """Begin and end of every sequence among batch * tokens tokens."""
    if cu_seqlens is None:
        return [(i * tokens, (i + 1) * tokens) for i in range(batch)]
    borders = [int(c) for c in cu_seqlens]
    ordered = all(x < y for x, y in zip(borders, borders[1:], strict=False))
    if batch != 1 or len(borders) < 2 or borders[0] != 0 or borders[-1] != tokens or not ordered:
        raise ValueError(f"cu_seqlens must rise from 0 to T={tokens} with B=1, not {borders[:4]}... with B={batch}")
    return list(zip(borders, borders[1:], strict=False))
