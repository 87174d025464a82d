"""The WKV recurrences on a GPU (cuda/wkv7.cu, cuda/wkv6.cu), with gradients: bfloat16 or float32 in memory, float32 inside.

For the backward pass the state before every 64th token is kept, 256 bytes for each token and head of size 64; what lies between
is computed again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import chunked, chunked6
from ..compiled import recurrence
from . import build, chunk7
from .chunk7 import Chunked7
from .memory import EVERY, NAMES, Spans, fits, format_of


@functools.lru_cache(maxsize=8)  # every layer, and the backward pass, asks for the same one
def tables(spans: Spans, device: torch.device) -> tuple[Tensor, Tensor]:
    """[sequences, 3]: first token, behind the last one, first chunk. [chunks, 3]: first token, behind the last one, sequence."""
    rows, chunks = [], []
    for number, (begin, end) in enumerate(spans):
        rows.append((begin, end, len(chunks)))
        chunks += [(at, min(at + EVERY, end), number) for at in range(begin, end, EVERY)]
    return torch.tensor(rows, dtype=torch.int32, device=device), torch.tensor(chunks, dtype=torch.int32, device=device)


def wkv7(r, w, k, v, a, b, s0: Tensor | None = None, cu_seqlens: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """reference.wkv7, computed in float32, with gradients for all inputs and s0: token by token, or in parts on tensor cores (of
    bfloat16 inputs only, with products in tf32), whichever should be quicker."""

    def quicker(r, *others):
        way = Chunked7 if chunk7.pays(r, others[-1]) else WKV7
        return way.apply(r, *others)

    return recurrence(quicker, fits, chunked.wkv7, (r, w, k, v, a, b), s0, cu_seqlens)


def recurrent7(
    r, w, k, v, a, b, s0: Tensor | None = None, cu_seqlens: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """wkv7, token by token."""
    return recurrence(WKV7.apply, fits, chunked.wkv7, (r, w, k, v, a, b), s0, cu_seqlens)


def chunked7(
    r, w, k, v, a, b, s0: Tensor | None = None, cu_seqlens: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """wkv7, in parts where this GPU has kernels for that."""
    way = Chunked7 if chunk7.possible(r) else WKV7
    return recurrence(way.apply, fits, chunked.wkv7, (r, w, k, v, a, b), s0, cu_seqlens)


class WKV7(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, w, k, v, a, b, s0, spans):
        keep, kind = any(ctx.needs_input_grad), format_of(r)
        x = [z.to(torch.float32 if z is w else kind).contiguous() for z in (r, w, k, v, a, b)]
        start = s0.float().contiguous()
        T, H, N = r.shape
        span, chunk = tables(spans, r.device)
        y, end = torch.empty_like(x[0]), torch.empty_like(start)
        kept = start.new_empty(len(chunk) if keep else 1, H, N, N)
        launch = build.launcher(r.device, N)
        launch(f"wkv7_forward_{NAMES[kind]}", (H, len(span)), (*x, start, y, end, kept, span, int(keep), H))
        ctx.save_for_backward(r, w, k, v, a, b, kept)
        ctx.spans, ctx.s0_dtype = spans, s0.dtype
        return y.to(r.dtype), end.to(s0.dtype)

    @staticmethod
    def backward(ctx, dy, dend):
        *inputs, kept = ctx.saved_tensors
        w, kind = inputs[1], format_of(inputs[0])
        r, w, k, v, a, b = (z.to(torch.float32 if z is w else kind).contiguous() for z in inputs)
        dy, dend = dy.to(kind).contiguous(), dend.float().contiguous()
        T, H, N = r.shape
        span, chunk = tables(ctx.spans, r.device)
        sums, dsums, dw = (torch.empty_like(w) for _ in range(3))
        dr, dk, dv, da, db = (torch.empty_like(r) for _ in range(5))
        ds0, behind = torch.empty_like(dend), torch.empty_like(kept)
        launch, name = build.launcher(r.device, N), NAMES[kind]
        launch(f"wkv7_again_{name}", (H, len(chunk)), (w, k, v, a, b, kept, sums, chunk, H))
        launch(f"wkv7_rows_{name}", (H, len(span)), (r, w, k, a, b, dy, dend, dv, dsums, ds0, behind, span, H))
        launch(
            f"wkv7_columns_{name}",
            (H, len(chunk)),
            (r, w, k, v, a, b, dy, sums, dsums, kept, behind, dr, dw, dk, da, db, chunk, H),
        )
        grads = (dr, dw, dk, dv, da, db)
        return *(g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)), ds0.to(ctx.s0_dtype), None


def wkv6(r, w, k, v, u, s0: Tensor | None = None, cu_seqlens: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """reference.wkv6, computed in float32, with gradients for all inputs and s0."""
    return recurrence(WKV6.apply, fits, chunked6.wkv6, (r, w, k, v, u), s0, cu_seqlens)


def wkv5(r, w, k, v, u, s0: Tensor | None = None, cu_seqlens: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """reference.wkv5, computed in float32, with gradients for all inputs and s0."""
    return recurrence(WKV6.apply, fits, chunked6.wkv5, (r, w, k, v, u), s0, cu_seqlens)


class WKV6(torch.autograd.Function):
    """w: [T, H, N], or [H, N] for all tokens."""

    @staticmethod
    def forward(ctx, r, w, k, v, u, s0, spans):
        keep, kind = any(ctx.needs_input_grad), format_of(r)
        x = [z.to(torch.float32 if z is w or z is u else kind).contiguous() for z in (r, w, k, v, u)]
        start = s0.float().contiguous()
        T, H, N = r.shape
        span, chunk = tables(spans, r.device)
        y, end = torch.empty_like(x[0]), torch.empty_like(start)
        kept = start.new_empty(len(chunk) if keep else 1, H, N, N)
        args = (*x, start, y, end, kept, span, int(keep), int(w.dim() == 3), H)
        build.launcher(r.device, N)(f"wkv6_forward_{NAMES[kind]}", (H, len(span)), args)
        ctx.save_for_backward(r, w, k, v, u, kept)
        ctx.spans, ctx.s0_dtype = spans, s0.dtype
        return y.to(r.dtype), end.to(s0.dtype)

    @staticmethod
    def backward(ctx, dy, dend):
        *inputs, kept = ctx.saved_tensors
        kind = format_of(inputs[0])
        r, k, v = (inputs[i].to(kind).contiguous() for i in (0, 2, 3))
        w, u = inputs[1].float().contiguous(), inputs[4].float().contiguous()
        dy, dend = dy.to(kind).contiguous(), dend.float().contiguous()
        T, H, N = r.shape
        span, chunk = tables(ctx.spans, r.device)
        each = int(w.dim() == 3)
        dr, dk, dv = (torch.empty_like(r) for _ in range(3))
        dw, du = w.new_empty(T, H, N), u.new_empty(len(chunk), H, N)
        ds0, behind = torch.empty_like(dend), torch.empty_like(kept)
        launch, name = build.launcher(r.device, N), NAMES[kind]
        launch(f"wkv6_rows_{name}", (H, len(span)), (r, w, k, u, dy, dend, dv, ds0, behind, span, each, H))
        launch(
            f"wkv6_columns_{name}",
            (H, len(chunk)),
            (r, w, k, v, u, dy, kept, behind, dr, dw, dk, du, chunk, each, H),
        )
        grads = dr, dw if each else dw.sum(0), dk, dv, du.sum(0)
        return *(g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)), ds0.to(ctx.s0_dtype), None
