"""Cross entropy of a linear head, without ever holding the logits of more than a chunk of rows.

Letters: R rows whose target counts, C channels, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_VALUES = 1 << 22  # logits held at once (R * V): 16 MB in float32, small enough for malloc to use again


def naive_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The definition: the sum over rows of -log softmax(x W^T)[target], in float32."""
    return F.cross_entropy((x @ weight.T).float(), targets, reduction="sum")


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, chunk_values: int = CHUNK_VALUES) -> Tensor:
    """naive_cross_entropy in chunks; gradients are made on the way forward, and only those that are asked for.

    x: [R, C] rows that count (the others never reach the head); weight: [V, C]; targets: int64 [R].
    Returns the sum over rows, float32 scalar (float64 for float64 rows).
    """
    return LinearCrossEntropy.apply(x, weight, targets, chunk_values)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, chunk_values: int):
        need_x, need_weight = ctx.needs_input_grad[:2]
        dtype = torch.promote_types(x.dtype, torch.float32)
        head = weight.to(x.dtype)
        loss = torch.zeros((), dtype=dtype, device=x.device)
        dx = torch.empty_like(x) if need_x else None
        dweight = torch.zeros(weight.shape, dtype=dtype, device=x.device) if need_weight else None
        size = max(1, chunk_values // len(weight))
        for begin in range(0, len(x), size):
            rows, wanted = x[begin : begin + size], targets[begin : begin + size, None]
            logits = (rows @ head.T).to(dtype)
            log_sum = logits.logsumexp(-1, keepdim=True)
            loss += (log_sum - logits.gather(-1, wanted)).sum()
            if need_x or need_weight:
                # d loss / d logits = softmax - one-hot, in place of the logits
                probabilities = logits.sub_(log_sum).exp_()
                probabilities.scatter_add_(-1, wanted, torch.full_like(log_sum, -1.0))
                slope = probabilities.to(x.dtype)
                if need_x:
                    dx[begin : begin + size] = slope @ head
                if need_weight:
                    dweight += slope.T @ rows
        ctx.save_for_backward(*(t for t in (dx, dweight) if t is not None))
        ctx.need_x, ctx.need_weight, ctx.weight_dtype = need_x, need_weight, weight.dtype
        return loss

    @staticmethod
    def backward(ctx, dloss):
        saved = list(ctx.saved_tensors)
        dx = saved.pop(0).mul(dloss) if ctx.need_x else None
        dweight = saved.pop(0).mul(dloss).to(ctx.weight_dtype) if ctx.need_weight else None
        return dx, dweight, None, None
