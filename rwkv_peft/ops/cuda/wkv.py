"""The WKV recurrences on a GPU (cuda/wkv7.cu, cuda/wkv6.cu), with gradients: bfloat16 or float32 in memory, float32 inside.

For the backward pass the state before every 64th token is kept, 256 bytes for each token and head of size 64; the states
between are recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_peft.ops import torch_wkv6, torch_wkv7
from rwkv_peft.ops.kernel_call import recurrence

from . import build, wkv7_chunked, wkv7_onepass
from .workspace import NAMES, Spans, fits, format_of, tables


class Way(NamedTuple):
    """One of the ways of RWKV-7."""

    forward: Callable  # as forward7
    backward: Callable  # as backward7
    possible: Callable  # whether there are kernels for these inputs, r [T, H, N]
    pays: Callable  # whether it is quicker than those behind it for such inputs and the spans of their sequences


@dataclass(frozen=True)
class Recurrence7:
    """reference.wkv7 computed in float32, with gradients for all inputs and s0.

    It runs token by token, or (for bfloat16 inputs only, and with products in tf32) on tensor cores, whichever should be faster.

    Attributes:
        ways: The variants that may be taken beside token by token.
        always: Whether they are taken wherever there are kernels for them.
    """

    ways: tuple[Way, ...]
    always: bool = False

    def __call__(
        self, r, w, k, v, a, b, s0: Tensor | None = None, cu_seqlens: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the recurrence; arguments as reference.wkv7."""

        def kernel(r, *others):
            return WKV7.apply(r, *others, self.way(r, others[-1]))

        return recurrence(kernel, fits, torch_wkv7.wkv7, (r, w, k, v, a, b), s0, cu_seqlens)

    def way(self, r: Tensor, spans: Spans) -> Way:
        """The way for these inputs, [T, H, N]."""
        fitting = (way for way in self.ways if (way.possible(r) if self.always else way.pays(r, spans)))
        return next(fitting, TOKENS)


def forward7(inputs: Sequence[Tensor], start: Tensor, spans: Spans, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the last states, and if they are to be kept, the states that the backward pass needs.

    inputs: r w k v a b [T, H, N], w in float32; start: [S, H, N, N] float32; all contiguous.
    """
    r = inputs[0]
    H, N = r.shape[1:]
    span, chunk = tables(spans, r.device)
    y, last = torch.empty_like(r), torch.empty_like(start)
    kept = start.new_empty(len(chunk), H, N, N) if keep else None
    args = (*inputs, start, y, last, kept, span, int(keep), H)
    build.launcher(r.device, N)(f"wkv7_forward_{NAMES[r.dtype]}", (H, len(span)), args)
    return y, last, kept


def backward7(
    inputs: Sequence[Tensor], kept: Tensor, dy: Tensor, dlast: Tensor, spans: Spans
) -> tuple[list[Tensor], Tensor]:
    """Gradients of r w k v a b, and of the first states. dy: like r; dlast: like the states; contiguous."""
    r, w, k, v, a, b = inputs
    H, N = r.shape[1:]
    span, chunk = tables(spans, r.device)
    sums, dsums, dw = (torch.empty_like(w) for _ in range(3))
    dr, dk, dv, da, db = (torch.empty_like(r) for _ in range(5))
    ds0, behind = torch.empty_like(dlast), torch.empty_like(kept)
    launch, name = build.launcher(r.device, N), NAMES[r.dtype]
    launch(f"wkv7_again_{name}", (H, len(chunk)), (w, k, v, a, b, kept, sums, chunk, H))
    launch(f"wkv7_rows_{name}", (H, len(span)), (r, w, k, a, b, dy, dlast, dv, dsums, ds0, behind, span, H))
    args = (*inputs, dy, sums, dsums, kept, behind, dr, dw, dk, da, db, chunk, H)
    launch(f"wkv7_columns_{name}", (H, len(chunk)), args)
    return [dr, dw, dk, dv, da, db], ds0


TOKENS = Way(forward7, backward7, lambda _r: True, lambda _r, _spans: True)
PARTS = Way(wkv7_chunked.forward, wkv7_chunked.backward, wkv7_chunked.possible, wkv7_chunked.pays)
SINGLE = Way(wkv7_onepass.forward, wkv7_onepass.backward, wkv7_chunked.possible, wkv7_onepass.pays)
# the quickest first, where it pays
WAYS = {"in parts": PARTS, "in a single pass": SINGLE}


def among(ways: Sequence[str]) -> Recurrence7:
    """One that chooses between token by token and these of WAYS."""
    return Recurrence7(tuple(WAYS[name] for name in WAYS if name in ways))


def only(way: str) -> Recurrence7:
    """One that goes this way wherever it can."""
    return Recurrence7((WAYS[way],), always=True)


wkv7 = among(tuple(WAYS))


class WKV7(torch.autograd.Function):
    """Autograd node of `WKV7`."""

    @staticmethod
    def forward(ctx, r, w, k, v, a, b, s0, spans, way: Way):
        """Compute the outputs and save what the backward pass needs."""
        inputs = in_memory((r, w, k, v, a, b))
        y, last, kept = way.forward(inputs, s0.float().contiguous(), spans, any(ctx.needs_input_grad))
        ctx.save_for_backward(r, w, k, v, a, b, kept)
        ctx.spans, ctx.way, ctx.s0_dtype = spans, way, s0.dtype
        return y.to(r.dtype), last.to(s0.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        """Return the gradients of the inputs."""
        *given, kept = ctx.saved_tensors
        inputs = in_memory(given)
        dy, dlast = dy.to(inputs[0].dtype).contiguous(), dlast.float().contiguous()
        grads, ds0 = ctx.way.backward(inputs, kept, dy, dlast, ctx.spans)
        grads = (g.to(x.dtype) for g, x in zip(grads, given, strict=True))
        return *grads, ds0.to(ctx.s0_dtype), None, None


def in_memory(given: Sequence[Tensor]) -> list[Tensor]:
    """R w k v a b as the kernels read them."""
    kind = format_of(given[0])
    return [z.to(torch.float32 if number == 1 else kind).contiguous() for number, z in enumerate(given)]


def wkv6(r, w, k, v, u, s0: Tensor | None = None, cu_seqlens: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """reference.wkv6, computed in float32, with gradients for all inputs and s0."""
    return recurrence(WKV6.apply, fits, torch_wkv6.wkv6, (r, w, k, v, u), s0, cu_seqlens)


def wkv5(r, w, k, v, u, s0: Tensor | None = None, cu_seqlens: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """reference.wkv5, computed in float32, with gradients for all inputs and s0."""
    return recurrence(WKV6.apply, fits, torch_wkv6.wkv5, (r, w, k, v, u), s0, cu_seqlens)


class WKV6(torch.autograd.Function):
    """w: [T, H, N], or [H, N] for all tokens."""

    @staticmethod
    def forward(ctx, r, w, k, v, u, s0, spans):
        """Compute the outputs and save what the backward pass needs."""
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
    @once_differentiable
    def backward(ctx, dy, dend):
        """Return the gradients of the inputs."""
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
