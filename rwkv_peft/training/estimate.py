"""Memory a run will need, from the sizes alone. A rough estimate, shown before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping

TRAINED_BYTES = 16  # float32 weight, gradient and two moments of Adam
BLOCK_VALUES = 34  # activations [T, C] that a block keeps for its backward pass, in the working dtype
WKV_FLOATS = 26  # [T, C] in float32 that the chunked WKV keeps and makes on the way
LOGITS_BYTES = 3 * (16 << 20)  # a chunk of logits, its softmax and slope
OVERHEAD = {"cuda": 700 << 20, "cpu": 600 << 20}  # libraries, CUDA context


def memory_bytes(
    shapes: Mapping[str, tuple[int, ...]],
    trained: int,
    tokens: int,
    n_layer: int,
    n_embd: int,
    itemsize: int,
    grad_cp: bool,
    full: bool,
    device: str,
    mapped: int = 0,
    compressed: int = 0,
) -> int:
    """Peak bytes on the device.

    shapes: all tensors of the base that are not compressed. trained: number of trained values. tokens: of one micro-batch
    (infctx: of one chunk). itemsize: bytes of a value in the working dtype. mapped: bytes of the base's file that stay in
    host memory beside converted weights. compressed: bytes of those that are.
    """
    frozen = 0 if full else sum(math.prod(s) for s in shapes.values()) * itemsize
    casts = trained * itemsize if full and itemsize < 4 else 0
    block = tokens * n_embd * (BLOCK_VALUES * itemsize + WKV_FLOATS * 4)
    kept = n_layer * tokens * n_embd * 2 * itemsize + block if grad_cp else n_layer * block
    return frozen + casts + trained * TRAINED_BYTES + kept + LOGITS_BYTES + OVERHEAD[device] + mapped + compressed
