"""Cross entropy of a linear head, without ever holding the logits of more than a chunk of rows.

Letters: R rows whose target counts, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .block_ops import cross_entropy_grad

CHUNK_VALUES = (
    1 << 24
)  # logits in memory at once (R * V): 256 rows of 65,536. With 64 rows the products take 1.6 times as long


def naive_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The definition: the sum over rows of -log softmax(x W^T)[target], in float32."""
    return F.cross_entropy((x @ weight.T).float(), targets, reduction="sum")


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, slopes: Callable = cross_entropy_grad, chunk_values: int = CHUNK_VALUES
) -> Tensor:
    """naive_cross_entropy in chunks; gradients are made on the way forward, and only those that are asked for.

    x: [R, C] rows that count (the others never reach the head); weight: [V, C]; targets: int64 [R]. slopes: as
    block_ops.cross_entropy_grad.
    Returns the sum over rows, float32 scalar (float64 for float64 rows).
    """
    return LinearCrossEntropy.apply(x, weight, targets, slopes, chunk_values)


class LinearCrossEntropy(torch.autograd.Function):
    """Autograd node of `LinearCrossEntropy`."""

    @staticmethod
    def forward(ctx, x, weight, targets, slopes: Callable, chunk_values: int):
        """Compute the outputs and save what the backward pass needs."""
        need_x, need_weight = ctx.needs_input_grad[:2]
        dtype = torch.promote_types(x.dtype, torch.float32)
        head = weight.to(x.dtype)
        loss = torch.zeros((), dtype=dtype, device=x.device)
        dx = torch.empty_like(x) if need_x else None
        dweight = torch.zeros(weight.shape, dtype=dtype, device=x.device) if need_weight else None
        size = max(1, chunk_values // len(weight))
        logits = x.new_empty(min(size, len(x)), len(weight))
        for begin in range(0, len(x), size):
            rows = x[begin : begin + size]
            torch.mm(rows, head.T, out=logits[: len(rows)])
            more, slope = slopes(logits[: len(rows)], targets[begin : begin + size], need_x or need_weight)
            loss += more
            if dx is not None:
                torch.mm(slope, head, out=dx[begin : begin + size])
            if dweight is not None:
                dweight += slope.T @ rows
        ctx.save_for_backward(*(t for t in (dx, dweight) if t is not None))
        ctx.need_x, ctx.need_weight, ctx.weight_dtype = need_x, need_weight, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        """Return the gradients of the inputs."""
        saved = list(ctx.saved_tensors)
        dx = saved.pop(0).mul(dloss) if ctx.need_x else None
        dweight = saved.pop(0).mul(dloss).to(ctx.weight_dtype) if ctx.need_weight else None
        return dx, dweight, None, None, None
