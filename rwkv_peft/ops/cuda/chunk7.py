"""WKV-7 in parts of 32 tokens on a GPU's tensor cores (cuda/chunk7.cu), with gradients: for few heads and sequences.

Operands of products are rounded to tf32, sums are float32. Between forward and backward pass the same is kept as by the
recurrent kernels, every 64th state; while one layer's backward pass runs, 3 kB for each token and head of size 64.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import build
from .memory import EVERY, NAMES, Spans, format_of

PART = 32  # tokens of a part, as in chunk7.cu
SIZES = (16, 32, 64)  # head sizes; larger ones do not fit into shared memory
ROWS = 16  # rows of the state that a block carries
THREADS = 128  # of a block, as in tensor.h
CAPABILITY = (8, 0)  # GPUs from here on multiply in tf32

# so many heads x sequences to a multiprocessor keep it busy with the recurrent kernels (arithmetic, not measured: cuda/README.md)
BUSY = 4
WORTH = 256  # tokens of the longest sequence from which on it is worth the launches (likewise)


@functools.lru_cache(maxsize=8)
def tables(spans: Spans, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """[parts, 3]: first token, behind the last one, which kept state is the one before it, or -1. [sequences, 2] and [chunks, 2]:
    first part, behind the last one; chunks are from one kept state to the next."""
    parts, sequences, chunks = [], [], []
    for begin, end in spans:
        first = len(parts)
        for at in range(begin, end, EVERY):
            chunks.append((len(parts), len(parts) + (2 if at + PART < end else 1)))
            parts.append((at, min(at + PART, end), len(chunks) - 1))
            if at + PART < end:
                parts.append((at + PART, min(at + EVERY, end), -1))
        sequences.append((first, len(parts)))
    return tuple(torch.tensor(x, dtype=torch.int32, device=device) for x in (parts, sequences, chunks))


def possible(r: Tensor) -> bool:
    """Whether these inputs can be computed so."""
    able = r.is_cuda and torch.cuda.get_device_capability(r.device) >= CAPABILITY
    return able and r.dtype == torch.bfloat16 and r.shape[-1] in SIZES


def pays(r: Tensor, spans: Spans) -> bool:
    """Whether it is the quicker way for them. r: [T, H, N]."""
    if not possible(r):
        return False
    blocks = r.shape[1] * len(spans)
    return (
        max(end - begin for begin, end in spans) >= WORTH
        and blocks < BUSY * torch.cuda.get_device_properties(r.device).multi_processor_count
    )


class Room:
    """How many bytes of shared memory the kernels ask for, by their arithmetic in chunk7.cu."""

    def __init__(self, size: int):
        line, square = size + 4, 2 * PART + 4
        self.prepare = 4 * (5 * PART * line + 2 * PART * square + PART * (PART + 4))
        self.carry = 4 * (4 * PART * line + ROWS * line + 2 * PART * 20)
        self.gradients = 4 * (8 * PART * line + 2 * PART * square + THREADS)


class Chunked7(torch.autograd.Function):
    """As wkv.WKV7."""

    @staticmethod
    def forward(ctx, r, w, k, v, a, b, s0, spans):
        keep, kind = any(ctx.needs_input_grad), format_of(r)
        x = [z.to(torch.float32 if z is w else kind).contiguous() for z in (r, w, k, v, a, b)]
        start = s0.float().contiguous()
        H, N = r.shape[1:]
        part, span, chunk = tables(spans, r.device)
        launch, name, room = build.launcher(r.device, N), NAMES[kind], Room(N)
        prepared = asks, adds, keys = [start.new_empty(len(part), H, 2 * PART, N) for _ in range(3)]
        end = start.new_empty(len(part), H, N)
        launch(f"chunk7_prepare_{name}", (H, len(part)), (*x, *prepared, end, part, H), THREADS, room.prepare)
        y, last = torch.empty_like(x[0]), torch.empty_like(start)
        kept = start.new_empty(len(chunk), H, N, N) if keep else None
        args = (x[3], asks, adds, keys, end, start, y, last, kept, part, span, 0, H)
        launch(f"chunk7_pass_{name}", (H * N // ROWS, len(span)), args, THREADS, room.carry)
        ctx.save_for_backward(r, w, k, v, a, b, kept)
        ctx.spans, ctx.s0_dtype = spans, s0.dtype
        return y.to(r.dtype), last.to(s0.dtype)

    @staticmethod
    def backward(ctx, dy, dlast):
        *inputs, kept = ctx.saved_tensors
        w, kind = inputs[1], format_of(inputs[0])
        x = [z.to(torch.float32 if z is w else kind).contiguous() for z in inputs]
        r, w, k, v, a, b = x
        dy, dlast = dy.to(kind).contiguous(), dlast.float().contiguous()
        H, N = r.shape[1:]
        part, span, chunk = tables(ctx.spans, r.device)
        launch, name, room = build.launcher(r.device, N), NAMES[kind], Room(N)
        asks, adds, keys, dadds = (kept.new_empty(len(part), H, 2 * PART, N) for _ in range(4))
        states, slopes = (kept.new_empty(len(part), H, N, N) for _ in range(2))
        end, ds0 = kept.new_empty(len(part), H, N), torch.empty_like(dlast)
        dw = torch.empty_like(w)
        dr, dk, dv, da, db = (torch.empty_like(r) for _ in range(5))
        launch(f"chunk7_prepare_{name}", (H, len(part)), (*x, asks, adds, keys, end, part, H), THREADS, room.prepare)
        args = (v, asks, adds, keys, end, kept, None, None, states, part, chunk, 1, H)
        launch(f"chunk7_pass_{name}", (H * N // ROWS, len(chunk)), args, THREADS, room.carry)
        args = (r, w, k, dy, a, b, asks, dadds, keys, part, H)
        launch(f"chunk7_prepareback_{name}", (H, len(part)), args, THREADS, room.prepare)
        args = (dy, asks, dadds, keys, end, dlast, dv, ds0, slopes, part, span, H)
        launch(f"chunk7_passback_{name}", (H * N // ROWS, len(span)), args, THREADS, room.carry)
        args = (*x, dy, adds, dadds, states, slopes, dr, dw, dk, da, db, part, H)
        launch(f"chunk7_gradients_{name}", (H, len(part)), args, THREADS, room.gradients)
        grads = (dr, dw, dk, dv, da, db)
        return *(g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)), ds0.to(ctx.s0_dtype), None
