"""Memory a run will need, from the sizes alone, shown before anything is loaded. bench/memory.py holds it to what is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..model.arch import Geometry

MASTER_BYTES = 8  # of a trained value: float32 weight and gradient
CHUNK_ROWS = 1 << 24  # logits at once (ops.loss)
OVERHEAD = {"cuda": 700 << 20, "cpu": 480 << 20}  # libraries, CUDA context


@dataclass(frozen=True)
class Kept:
    """What one block keeps of a token, in values per channel: kept in the working dtype, of those the cheap ones that can be
    made again, and in float32. work: float32 values per channel while one block's gradients are made."""

    values: float
    cheap: float
    floats: float
    work: float


# (what computes, version) -> what it keeps, without the channel mix's inner values. C++: the inputs of two norms and what they
# make, of LoRA's layers and of around7, and a state for every 32 tokens; torch: what autograd keeps of unfused formulas
KEPT = {
    ("cpu", "x070"): Kept(17, 6, 3, 24),
    ("cpu", "x060"): Kept(36, 4, 6, 30),
    ("cpu", "x052"): Kept(20, 6, 6, 30),
    ("torch", "x070"): Kept(30, 6, 26, 42),
    ("torch", "x060"): Kept(36, 4, 26, 42),
    ("torch", "x052"): Kept(20, 6, 26, 42),
}


def memory_bytes(
    shapes: Mapping[str, tuple[int, ...]],
    trained: int,
    tokens: int,
    geometry: Geometry,
    itemsize: int,
    grad_cp: str,
    full: bool,
    device: str,
    op: str,
    moments: float = 8,
    mapped: int = 0,
    compressed: int = 0,
) -> int:
    """Peak bytes on the device.

    shapes: all tensors of the base that are not compressed. trained: number of trained values. tokens: of one micro-batch
    (infctx: of one chunk). itemsize: bytes of a value in the working dtype. grad_cp: 0, 1 or selective. op: what computes.
    moments: bytes that the optimizer keeps for a value. mapped: bytes of the base's file that stay in host memory beside
    converted weights. compressed: bytes of those that are.
    """
    channels, layers = geometry.n_embd, geometry.n_layer
    inner = geometry.dim_ffn / channels
    kept = KEPT[op if op == "cpu" else "torch", geometry.version]
    values, cheap = kept.values + 2 * inner, kept.cheap + inner
    frozen = 0 if full else sum(math.prod(s) for s in shapes.values()) * itemsize
    casts = trained * itemsize if full and itemsize < 4 else 0
    of_block = tokens * channels * (values * itemsize + kept.floats * 4)
    work = tokens * channels * kept.work * 4
    activations = {
        "0": layers * of_block,
        "selective": layers * (of_block - tokens * channels * cheap * itemsize),
        "1": layers * tokens * channels * 2 * itemsize + of_block,
    }[grad_cp]
    rows = min(tokens, max(1, CHUNK_ROWS // geometry.vocab_size))
    logits = rows * geometry.vocab_size * (itemsize if op == "cpu" else 8 + itemsize)
    learning = trained * (MASTER_BYTES + moments)
    return int(frozen + casts + learning + activations + work + logits + OVERHEAD[device] + mapped + compressed)
