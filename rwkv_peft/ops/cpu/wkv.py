"""The WKV recurrences in C++ (cpu/wkv7.cpp, cpu/wkv6.cpp), with gradients; float32 inside, whatever goes in."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_peft.ops import torch_wkv6, torch_wkv7
from rwkv_peft.ops.kernel_call import recurrence

from .build import function

SIZES = (16, 32, 64, 128)  # head sizes that there are kernels for
LANES = 16  # kernels work on whole vectors
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}  # as the ends of the names of kernels that take both
EVERY = 32  # tokens from one kept state to the next: 512 bytes per token and head of size 64


@functools.lru_cache(maxsize=8)  # every layer, and the backward pass, asks for the same one
def kept_states(spans: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, int]:
    """Return the sequence bounds [S + 1], the index of each sequence's first kept state [S], and the number of kept states."""
    chunks = [-(-(end - begin) // EVERY) for begin, end in spans]
    firsts = [sum(chunks[:i]) for i in range(len(chunks))]
    return torch.tensor([0, *(end for _, end in spans)]), torch.tensor(firsts), sum(chunks)


def pointer(x: Tensor | None) -> int:
    """Return the address of a tensor's data, 0 for None."""
    return 0 if x is None else x.data_ptr()


def fits(r: Tensor) -> bool:
    """Whether there is a kernel for these inputs; for others there is the torch backend."""
    return r.numel() > 0 and r.shape[-1] in SIZES and r.dtype != torch.float64 and r.device.type == "cpu"


def plain(x: Tensor) -> Tensor:
    """Return a tensor as contiguous float32."""
    return x.float().contiguous()


def wkv7(r, w, k, v, a, b, s0: Tensor | None = None, cu_seqlens: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """reference.wkv7, computed in float32, with gradients for all inputs and s0."""
    return recurrence(WKV7.apply, fits, torch_wkv7.wkv7, (r, w, k, v, a, b), s0, cu_seqlens)


class WKV7(torch.autograd.Function):
    """Autograd node of `WKV7`."""

    @staticmethod
    def forward(ctx, r, w, k, v, a, b, s0, spans):
        """Compute the outputs and save what the backward pass needs."""
        y, end, kept = forward7([plain(x) for x in (r, w, k, v, a, b)], plain(s0), spans, any(ctx.needs_input_grad))
        ctx.save_for_backward(r, w, k, v, a, b, kept)
        ctx.spans, ctx.s0_dtype = spans, s0.dtype
        return y.to(r.dtype), end.to(s0.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        """Return the gradients of the inputs."""
        *inputs, kept = ctx.saved_tensors
        grads, ds0 = backward7([plain(x) for x in inputs], kept, plain(dy), plain(dstate), ctx.spans)
        return *(grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True)), ds0.to(ctx.s0_dtype), None


def forward7(x: Sequence[Tensor], s0: Tensor, spans, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the states behind the sequences, and the states kept for backward7. All float32 and contiguous."""
    where, firsts, count = kept_states(spans)
    T, H, N = x[0].shape
    y, end = torch.empty_like(x[0]), torch.empty_like(s0)
    kept = x[0].new_empty(count, H, N, N) if keep else None
    threads = torch.get_num_threads() if T > 1 else 1  # waking others takes longer than one token
    function("wkv7_forward", 12, 4)(
        *map(pointer, (*x, s0, y, end, kept, where, firsts)), len(spans), H, N, EVERY, threads
    )
    return y, end, kept


def backward7(
    x: Sequence[Tensor], kept: Tensor, dy: Tensor, dstate: Tensor | None, spans, more: Sequence[Tensor] = ()
) -> tuple[list[Tensor], Tensor]:
    """Gradients of the inputs, and of s0. more: what r, k and v get besides; the sums take its place."""
    where, firsts, _ = kept_states(spans)
    T, H, N = x[0].shape
    dr, dk, dv = more or (torch.empty_like(x[0]) for _ in range(3))
    dw, da, db = (torch.empty_like(x[0]) for _ in range(3))
    grads, ds0 = [dr, dw, dk, dv, da, db], x[0].new_empty(len(spans), H, N, N)
    function("wkv7_backward", 18, 5)(
        *map(pointer, (*x, kept, dy, dstate, *grads, ds0, where, firsts)),
        *(len(spans), H, N, EVERY, bool(more), torch.get_num_threads()),
    )
    return grads, ds0


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
        x, start = [plain(x) for x in (r, w, k, v, u)], plain(s0)
        where, firsts, count = kept_states(spans)
        T, H, N = r.shape
        y, end = torch.empty_like(x[0]), torch.empty_like(start)
        kept = x[0].new_empty(count, H, N, N) if any(ctx.needs_input_grad) else None
        function("wkv6_forward", 11, 5)(
            *map(pointer, (*x, start, y, end, kept, where, firsts)),
            *(len(spans), H, N, EVERY, H * N if w.dim() == 3 else 0, torch.get_num_threads()),
        )
        ctx.save_for_backward(r, w, k, v, u, kept)
        ctx.spans, ctx.s0_dtype = spans, s0.dtype
        return y.to(r.dtype), end.to(s0.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        """Return the gradients of the inputs."""
        *inputs, kept = ctx.saved_tensors
        x, dy, dstate = [plain(x) for x in inputs], plain(dy), plain(dstate)
        where, firsts, _ = kept_states(ctx.spans)
        T, H, N = dy.shape
        S, each = len(ctx.spans), x[1].dim() == 3
        dr, dw, dk, dv = (torch.empty_like(dy) for _ in range(4))
        du, ds0 = dy.new_empty(S, H, N), dy.new_empty(S, H, N, N)
        function("wkv6_backward", 16, 5)(
            *map(pointer, (*x, kept, dy, dstate, dr, dw, dk, dv, du, ds0, where, firsts)),
            *(S, H, N, EVERY, H * N if each else 0, torch.get_num_threads()),
        )
        grads = dr, dw if each else dw.sum(0), dk, dv, du.sum(0)
        return *(grad.to(y.dtype) for grad, y in zip(grads, inputs, strict=True)), ds0.to(ctx.s0_dtype), None
