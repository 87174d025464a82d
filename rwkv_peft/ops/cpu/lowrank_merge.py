"""ops/lowrank_merge.py in C++ (cpu/lowrank_merge.cpp): the weight is read once, and the sum is rounded before it is written."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_peft.ops import lowrank_merge
from rwkv_peft.ops.lowrank_merge import QUESTIONS, Folded

from .build import function
from .wkv import pointer

COLUMNS = 64  # that the kernel takes at a time


def fits(weight: Tensor, x: Tensor) -> bool:
    """Return whether there is a kernel for this weight and these probes."""
    return weight.dtype == torch.bfloat16 and x.dtype == torch.float32 and weight.shape[1] % COLUMNS == 0


def fold(weight: Tensor, B: Tensor, A: Tensor, x: Tensor) -> Folded:
    """ops.lowrank_merge.fold, whose definition takes what has no kernel."""
    if not fits(weight, x):
        return lowrank_merge.fold(weight, B, A, x)
    (rows, inputs), rank = weight.shape, len(A)
    if B.shape != (rows, rank) or A.shape[1] != inputs or x.shape != (QUESTIONS, inputs):
        raise ValueError(f"{list(B.shape)}, {list(A.shape)} or {list(x.shape)} does not go with {list(weight.shape)}")
    weight, B, A, x = weight.contiguous(), B.float().contiguous(), A.float().contiguous(), x.contiguous()
    made, answers, squares = torch.empty_like(weight), torch.empty(2, QUESTIONS, rows), torch.empty(2, rows)
    function("fold_bfloat16", 7, 3)(
        *map(pointer, (weight, B, A, x, made, answers, squares)), rows, rank, inputs, torch.get_num_threads()
    )
    return Folded(made, answers[0], answers[1], squares)
