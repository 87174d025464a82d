"""WKV-7 in parts of 32 tokens on a GPU's tensor cores (cuda/wkv7_chunked.cu), with gradients: for few heads and sequences.

Operands of products are rounded to tf32, sums are float32. Between forward and backward pass the same is kept as by the
recurrent kernels, every 64th state; while one layer's backward pass runs, 3 kB for each token and head of size 64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import build
from .workspace import EVERY, NAMES, Spans, on_device, remembered

PART = 32  # tokens of a part, as in wkv7_chunked.cu
SIZES = (16, 32, 64)  # head sizes; larger ones do not fit into shared memory
ROWS = 16  # rows of the state that a block carries
THREADS = 128  # of a block, as in tensor.h
CAPABILITY = (8, 0)  # GPUs from here on multiply in tf32

# so many heads x sequences to a multiprocessor keep it busy with the recurrent kernels (arithmetic, not measured: cuda/README.md)
BUSY = 4
HANDED = 48  # bytes handed on between kernels for each number of r, at most
SHARE = 0.05  # of the GPU's memory that they may take
WORTH = 256  # tokens of the longest sequence from which on it is worth the launches (likewise)


@remembered
def tables(spans: Spans, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the index tables of the chunked kernel.

    Returns:
        [parts, 3]: first token, the token after the last, and the index of the kept state before the part, or -1.
        [sequences, 2] and [chunks, 2]: the first part and the part after the last; chunks are from one kept state to the next.
    """
    parts: list[tuple[int, ...]] = []
    sequences: list[tuple[int, ...]] = []
    chunks: list[tuple[int, ...]] = []
    for begin, end in spans:
        first = len(parts)
        for at in range(begin, end, EVERY):
            chunks.append((len(parts), len(parts) + (2 if at + PART < end else 1)))
            parts.append((at, min(at + PART, end), len(chunks) - 1))
            if at + PART < end:
                parts.append((at + PART, min(at + EVERY, end), -1))
        sequences.append((first, len(parts)))
    return on_device(parts, device), on_device(sequences, device), on_device(chunks, device)


def possible(r: Tensor) -> bool:
    """Whether these inputs can be computed so."""
    able = r.is_cuda and torch.cuda.get_device_capability(r.device) >= CAPABILITY
    return able and r.dtype == torch.bfloat16 and r.shape[-1] in SIZES


def pays(r: Tensor, spans: Spans) -> bool:
    """Whether it is the quicker way for them. r: [T, H, N]."""
    if not possible(r):
        return False
    gpu = torch.cuda.get_device_properties(r.device)
    few = r.shape[1] * len(spans) < BUSY * gpu.multi_processor_count
    return few and max(end - begin for begin, end in spans) >= WORTH and r.numel() * HANDED < gpu.total_memory * SHARE


class Room:
    """How many bytes of shared memory the kernels ask for, by their arithmetic in wkv7_chunked.cu."""

    def __init__(self, size: int):
        line, square = size + 4, 2 * PART + 4
        self.prepare = 4 * (5 * PART * line + 2 * PART * square + PART * (PART + 4))
        self.carry = 4 * (4 * PART * line + ROWS * line + 2 * PART * 20)
        self.gradients = 4 * (8 * PART * line + 2 * PART * square + THREADS)


def forward(inputs: Sequence[Tensor], start: Tensor, spans: Spans, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """As wkv.forward7."""
    r, v = inputs[0], inputs[3]
    H, N = r.shape[1:]
    part, span, chunk = tables(spans, r.device)
    launch, name, room = build.launcher(r.device, N), NAMES[r.dtype], Room(N)
    prepared = asks, adds, keys = [start.new_empty(len(part), H, 2 * PART, N) for _ in range(3)]
    end = start.new_empty(len(part), H, N)
    launch(f"wkv7_chunked_prepare_{name}", (H, len(part)), (*inputs, *prepared, end, part, H), THREADS, room.prepare)
    y, last = torch.empty_like(r), torch.empty_like(start)
    kept = start.new_empty(len(chunk), H, N, N) if keep else None
    args = (v, asks, adds, keys, end, start, y, last, kept, part, span, 0, H)
    launch(f"wkv7_chunked_pass_{name}", (H * N // ROWS, len(span)), args, THREADS, room.carry)
    return y, last, kept


def backward(
    inputs: Sequence[Tensor], kept: Tensor, dy: Tensor, dlast: Tensor, spans: Spans
) -> tuple[list[Tensor], Tensor]:
    """As wkv.backward7."""
    r, w, k, v, a, b = inputs
    H, N = r.shape[1:]
    part, span, chunk = tables(spans, r.device)
    launch, name, room = build.launcher(r.device, N), NAMES[r.dtype], Room(N)
    asks, adds, keys, dadds = (kept.new_empty(len(part), H, 2 * PART, N) for _ in range(4))
    states, slopes = (kept.new_empty(len(part), H, N, N) for _ in range(2))
    end, ds0 = kept.new_empty(len(part), H, N), torch.empty_like(dlast)
    dw = torch.empty_like(w)
    dr, dk, dv, da, db = (torch.empty_like(r) for _ in range(5))
    launch(
        f"wkv7_chunked_prepare_{name}", (H, len(part)), (*inputs, asks, adds, keys, end, part, H), THREADS, room.prepare
    )
    args: tuple[build.Argument, ...] = (v, asks, adds, keys, end, kept, None, None, states, part, chunk, 1, H)
    launch(f"wkv7_chunked_pass_{name}", (H * N // ROWS, len(chunk)), args, THREADS, room.carry)
    args = (r, w, k, dy, a, b, asks, dadds, keys, part, H)
    launch(f"wkv7_chunked_prepareback_{name}", (H, len(part)), args, THREADS, room.prepare)
    args = (dy, asks, dadds, keys, end, dlast, dv, ds0, slopes, part, span, H)
    launch(f"wkv7_chunked_passback_{name}", (H * N // ROWS, len(span)), args, THREADS, room.carry)
    args = (*inputs, dy, adds, dadds, states, slopes, dr, dw, dk, da, db, part, H)
    launch(f"wkv7_chunked_gradients_{name}", (H, len(part)), args, THREADS, room.gradients)
    return [dr, dw, dk, dv, da, db], ds0
