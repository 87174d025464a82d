"""WKV-7 in a single pass on a GPU's tensor cores (cuda/wkv7_onepass.cu), with gradients: for many heads and sequences.

Operands of products are rounded to tf32, sums are float32. Between forward and backward pass the same is kept as by the
recurrent kernels, every 64th state; while one layer's backward pass runs, up to 80 kB for each head (of size 64) of each
sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import build
from .wkv7_chunked import SHARE, THREADS, possible
from .workspace import EVERY, NAMES, Spans, tables

PART = 16  # tokens of a part, as in wkv7_onepass.cu
# both are arithmetic, not measured (cuda/README.md)
WORTH = 16  # tokens of a sequence, in the mean, from which on parts are full enough to pay
# capabilities of GPUs (A100; H100, H200) whose tensor cores are several times as quick in tf32 as the rest of them in float32.
# Those of consumers' are not; of newer ones these instructions' rate is not known to us
QUICK = ((8, 0), (9, 0))


def pays(r: Tensor, spans: Spans) -> bool:
    """Whether it is quicker than token by token. r: [T, H, N]."""
    if not possible(r) or torch.cuda.get_device_capability(r.device) not in QUICK or len(r) < WORTH * len(spans):
        return False
    _, H, N = r.shape
    scratch = 4 * len(spans) * H * steps_of(spans) * (N + PART) * N
    return scratch <= torch.cuda.get_device_properties(r.device).total_memory * SHARE


def steps_of(spans: Spans) -> int:
    """Parts whose states are made again at a time."""
    return min(EVERY // PART, -(-max(end - begin for begin, end in spans) // PART))


class Room:
    """How many bytes of shared memory the kernels ask for, by their arithmetic in wkv7_onepass.cu."""

    def __init__(self, size: int):
        line = size + 4
        common = 4 * PART * line + 2 * PART * (2 * PART + 4) + PART * (PART + 4) + size + THREADS
        self.forward = 4 * (common + 2 * PART * line + size * line)
        self.backward = 4 * (common + 4 * PART * line + size * line)


def forward(inputs: Sequence[Tensor], start: Tensor, spans: Spans, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """As wkv.forward7."""
    r = inputs[0]
    H, N = r.shape[1:]
    span, chunk = tables(spans, r.device)
    y, last = torch.empty_like(r), torch.empty_like(start)
    kept = start.new_empty(len(chunk), H, N, N) if keep else None
    args = (*inputs, start, y, last, kept, span, H)
    launch = build.launcher(r.device, N)
    launch(f"wkv7_onepass_forward_{NAMES[r.dtype]}", (H, len(span)), args, THREADS, Room(N).forward)
    return y, last, kept


def backward(
    inputs: Sequence[Tensor], kept: Tensor, dy: Tensor, dlast: Tensor, spans: Spans
) -> tuple[list[Tensor], Tensor]:
    """As wkv.backward7."""
    r, w = inputs[:2]
    H, N = r.shape[1:]
    span, _ = tables(spans, r.device)
    dw, ds0 = torch.empty_like(w), torch.empty_like(dlast)
    dr, dk, dv, da, db = (torch.empty_like(r) for _ in range(5))
    steps = steps_of(spans)
    states, solved = (kept.new_empty(len(span), H, steps, rows, N) for rows in (N, PART))
    args = (*inputs, dy, dlast, kept, dr, dw, dk, dv, da, db, ds0, states, solved, span, steps, H)
    launch = build.launcher(r.device, N)
    launch(f"wkv7_onepass_backward_{NAMES[r.dtype]}", (H, len(span)), args, THREADS, Room(N).backward)
    return [dr, dw, dk, dv, da, db], ds0
