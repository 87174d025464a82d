"""The WKV recurrences, one token at a time, in float64: what every other backend must equal.

Shapes: B batch, T tokens, H heads, N head size, S sequences. A state is [H, N, N]: rows are values, columns are keys.
Sources: RWKV-LM/RWKV-v7/rwkv_v7_numpy.py, https://arxiv.org/abs/2503.14456 (wkv7); https://arxiv.org/abs/2404.05892
(wkv5 and wkv6, whose states are written there with rows and columns the other way round).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def wkv7(r, w, k, v, a, b, s0: Tensor | None = None, cu_seqlens: Sequence[int] | None = None, dtype=torch.float64):
    """y_t = S_t r_t,  S_t = S_{t-1} diag(exp(w_t)) + (S_{t-1} a_t) b_t^T + v_t k_t^T.

    r, w, k, v, a, b: [B, T, H, N]; w is the natural logarithm of the decay (at most 0).
    s0: state before the first token, [S, H, N, N], rows are values, columns are keys; None is zero.
    cu_seqlens: where sequences begin and the last one ends, [S + 1] integers on the host; needs B = 1. Without it every
    row of the batch is a sequence (S = B).
    Returns y [B, T, H, N] in the dtype of r, and the state after each sequence, [S, H, N, N] in the dtype of s0
    (float32 without one). Computes in dtype: other ones than float64 are for decoding, where there is one token and
    nothing to put in parallel, and show what a precision can give.
    """
    return recurrence(step7, (r, w, k, v, a, b), (), s0, cu_seqlens, dtype)


def wkv6(r, w, k, v, u, s0: Tensor | None = None, cu_seqlens: Sequence[int] | None = None, dtype=torch.float64):
    """y_t = S_{t-1} r_t + (sum_n r_t u k_t) v_t,  S_t = S_{t-1} diag(exp(w_t)) + v_t k_t^T.

    r, w, k, v: [B, T, H, N]; w is the natural logarithm of the decay: at most 0, without a lower bound, -inf included.
    u: [H, N], the bonus of the current token. The rest is as for wkv7.
    """
    return recurrence(step6, (r, w, k, v), (u,), s0, cu_seqlens, dtype)


def wkv5(r, w, k, v, u, s0: Tensor | None = None, cu_seqlens: Sequence[int] | None = None, dtype=torch.float64):
    """wkv6 with a decay that is the same for every token; w: [H, N], its natural logarithm."""
    return recurrence(step5, (r, k, v), (w, u), s0, cu_seqlens, dtype)


# One token: the state before it, its vectors [H, N], and the constants [H, N] -> its output [H, N], the state after it.


def step7(s, r, w, k, v, a, b):
    """One token of RWKV-7."""
    sa = torch.einsum("hvk,hk->hv", s, a)
    s = s * w.exp()[:, None, :] + sa[:, :, None] * b[:, None, :] + v[:, :, None] * k[:, None, :]
    return torch.einsum("hvk,hk->hv", s, r), s


def step6(s, r, w, k, v, u):
    """One token of RWKV-6."""
    y = torch.einsum("hvk,hk->hv", s, r) + (r * u * k).sum(-1, keepdim=True) * v
    return y, s * w.exp()[:, None, :] + v[:, :, None] * k[:, None, :]


def step5(s, r, k, v, w, u):
    """One token of RWKV-5."""
    return step6(s, r, w, k, v, u)


def recurrence(
    step: Callable, tokens: Sequence[Tensor], constants: Sequence[Tensor], s0, cu_seqlens, dtype
) -> tuple[Tensor, Tensor]:
    """A step for every token of every sequence. tokens: [B, T, H, N] each, the first is r; constants: [H, N] each."""
    r = tokens[0]
    batch, length, heads, size = r.shape
    spans = sequences(batch, length, cu_seqlens)
    rows = [x.reshape(batch * length, heads, size).to(dtype) for x in tokens]
    fixed = [x.to(dtype) for x in constants]
    out_dtype = torch.float32 if s0 is None else s0.dtype
    start = r.new_zeros(len(spans), heads, size, size, dtype=dtype) if s0 is None else s0.to(dtype)
    ys, states = [], []
    for i, (begin, end) in enumerate(spans):
        s = start[i]
        for t in range(begin, end):
            y, s = step(s, *(x[t] for x in rows), *fixed)
            ys.append(y)
        states.append(s)
    y = torch.stack(ys) if ys else rows[0].new_zeros(0, heads, size)
    return y.view(batch, length, heads, size).to(r.dtype), torch.stack(states).to(out_dtype)


def must_fit(
    tokens: Sequence[Tensor], constants: Sequence[Tensor], s0: Tensor | None, spans: Sequence[tuple[int, int]]
) -> None:
    """ValueError unless shapes are those of wkv7 and its kin. A kernel cannot see what it is given."""
    shape = tokens[0].shape
    wrong = [x.shape for x in tokens if x.shape != shape] + [x.shape for x in constants if x.shape != shape[2:]]
    if s0 is not None and s0.shape != (len(spans), shape[2], shape[3], shape[3]):
        wrong.append(s0.shape)
    if wrong:
        raise ValueError(f"{list(wrong[0])} does not go with [B, T, H, N] = {list(shape)} and {len(spans)} sequences")


def sequences(batch: int, tokens: int, cu_seqlens: Sequence[int] | None) -> list[tuple[int, int]]:
    """Begin and end of every sequence among batch * tokens tokens."""
    if cu_seqlens is None:
        return [(i * tokens, (i + 1) * tokens) for i in range(batch)]
    bounds = [int(c) for c in cu_seqlens]
    ordered = all(x < y for x, y in zip(bounds, bounds[1:], strict=False))
    if batch != 1 or len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != tokens or not ordered:
        raise ValueError(f"cu_seqlens must rise from 0 to T={tokens} with B=1, not {bounds[:4]}... with B={batch}")
    return list(zip(bounds, bounds[1:], strict=False))


# version -> its definition
DEFINITIONS: dict[str, Callable[..., Any]] = {"x070": wkv7, "x060": wkv6, "x052": wkv5}
