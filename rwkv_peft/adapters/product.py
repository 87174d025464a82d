"""linear(x) + scale * (z A^T) B^T as one step of autograd: nothing is computed for the frozen weight, nothing of its size is kept
beside the input, and the sums are made in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def low_rank(linear: nn.Module, x: Tensor, z: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """x: [..., in], and z, which is x or x after dropout; A: [r, in], B: [out, r]. linear: frozen, with .dense(dtype), its
    weight [out, in]. Computes in the dtype of x."""
    if not torch.is_grad_enabled():  # the layer may have a quicker way for a few rows
        return linear(x) + scale * F.linear(F.linear(z, A.to(x.dtype)), B.to(x.dtype))
    rows = x.reshape(-1, x.shape[-1])
    dropped = rows if z is x else z.reshape(rows.shape)
    return LowRank.apply(rows, dropped, A, B, scale, linear).view(*x.shape[:-1], -1)


class LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, A, B, scale, linear):
        a, b = A.to(x.dtype), B.to(x.dtype)
        inner = F.linear(z, a)
        y = F.linear(x, linear.dense(x.dtype))
        y.addmm_(inner, b.T, alpha=scale)
        ctx.save_for_backward(z, inner, a, b)
        ctx.scale, ctx.linear, ctx.same, ctx.dtypes = scale, linear, z is x, (A.dtype, B.dtype)
        return y

    @staticmethod
    def backward(ctx, dy):
        z, inner, a, b = ctx.saved_tensors
        need_x, need_z, need_A, need_B = ctx.needs_input_grad[:4]
        dinner = (dy @ b).mul_(ctx.scale)
        dA = (dinner.T @ z).to(ctx.dtypes[0]) if need_A else None
        dB = (dy.T @ inner).mul_(ctx.scale).to(ctx.dtypes[1]) if need_B else None
        dx = dy @ ctx.linear.dense(dy.dtype) if need_x else None
        if not ctx.same:
            return dx, dinner @ a if need_z else None, dA, dB, None, None
        if need_x:
            dx.addmm_(dinner, a)
        return dx, None, dA, dB, None, None
