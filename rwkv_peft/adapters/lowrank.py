"""linear(x) + scale * (dropout(x) A^T) B^T as one autograd node.

No gradient is computed for the frozen weight. It keeps only the input, which recomputation may make again, and
dropout's mask, one byte per value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def lora_linear(linear: nn.Module, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """Return linear(x) + scale * (dropout(x) A^T) B^T in the dtype of x.

    Args:
        linear: Frozen, with .dense(dtype), its weight [out, in].
        x: [..., in].
        A: [r, in].
        B: [out, r].
        scale: Of the change.
        dropout: The share of x that A does not see.
    """
    if not torch.is_grad_enabled():  # the layer may have a quicker way for a few rows
        z = F.dropout(x, dropout) if dropout else x
        return linear(x) + scale * F.linear(F.linear(z, A.to(x.dtype)), B.to(x.dtype))
    return LoraLinear.apply(x.reshape(-1, x.shape[-1]), A, B, scale, dropout, linear).view(*x.shape[:-1], -1)


class LoraLinear(torch.autograd.Function):
    """Autograd node of `LoraLinear`."""

    @staticmethod
    def forward(ctx, x, A, B, scale, dropout, linear):
        """Compute the outputs and save what the backward pass needs."""
        a, b = A.to(x.dtype), B.to(x.dtype)
        z, seen = torch.native_dropout(x, dropout, True) if dropout else (x, None)
        inner = F.linear(z, a)
        y = F.linear(x, linear.dense(x.dtype))
        y.addmm_(inner, b.T, alpha=scale)
        ctx.save_for_backward(x, inner, a, b, seen)
        ctx.scale, ctx.linear, ctx.more, ctx.dtypes = scale, linear, 1 / (1 - dropout), (A.dtype, B.dtype)
        return y

    @staticmethod
    def backward(ctx, dy):
        """Return the gradients of the inputs."""
        x, inner, a, b, seen = ctx.saved_tensors
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        dinner = (dy @ b).mul_(ctx.scale)
        z = x if seen is None else (x * seen).mul_(ctx.more)
        dA = (dinner.T @ z).to(ctx.dtypes[0]) if need_A else None
        dB = (dy.T @ inner).mul_(ctx.scale).to(ctx.dtypes[1]) if need_B else None
        if not need_x:
            return None, dA, dB, None, None, None
        dx = dy @ ctx.linear.dense(dy.dtype)
        if seen is None:
            dx.addmm_(dinner, a)
        else:
            dx.add_((dinner @ a).mul_(seen), alpha=ctx.more)
        return dx, dA, dB, None, None, None
