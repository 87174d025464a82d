"""The block operations in C++ (token_shift.cpp, wkv7_block.cpp, loss.cpp): block_ops.py and loss.py with gradients.

Each is one pass over the activations; what is cheap to recompute is not kept. Activations are float32 or bfloat16; other
formats, and shapes without a kernel, use the definition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_peft.ops import block_ops
from rwkv_peft.ops.block_ops import Where, Wkv7Inputs, Wkv7Params
from rwkv_peft.ops.kernel_call import unlearnt
from rwkv_peft.ops.reference import sequences

from . import decode7, lowrank_merge
from .build import function
from .wkv import LANES, NAMES, SIZES, backward7, forward7, pointer

READS = tuple(NAMES)
MOST_MIXES = 6
MOST_ROWS = 4  # of a product that is bound by reading the weight

decode_step = decode7.decode_step
fold = lowrank_merge.fold


def fits(x: Tensor) -> bool:
    """Return whether there is a kernel for these activations."""
    return x.dtype in NAMES and x.device.type == "cpu" and x.shape[-1] % LANES == 0


def kernel(name: str, x: Tensor, pointers: int, numbers: int):
    """Return a kernel for the dtype of x."""
    return function(f"{name}_{NAMES[x.dtype]}", pointers, numbers)


def token_shift_mix(x: Tensor, before: Tensor, shares: Sequence[Tensor], where: Where) -> list[Tensor]:
    """As block_ops.token_shift_mix."""
    if not fits(x) or len(shares) > MOST_MIXES:
        return block_ops.token_shift_mix(x, before, shares, where)
    sequences(1, len(x), where.cu_seqlens)
    if before.shape != (len(where.first), x.shape[1]) or any(share.shape != x.shape[1:] for share in shares):
        raise ValueError(f"{list(before.shape)} or a share does not go with x {list(x.shape)}")
    given = x, before.to(x.dtype), torch.stack(list(shares)).float(), where.host
    return list(Mixes.apply(*given) if torch.is_grad_enabled() else mixed(*(z.contiguous() for z in given)))


def mixed(x: Tensor, before: Tensor, shares: Tensor, bounds: Tensor) -> tuple[Tensor, ...]:
    """Return every mix of x and the token before it, without gradients."""
    out = [torch.empty_like(x) for _ in shares]
    slots = [*out, *[None] * (MOST_MIXES - len(out))]
    kernel("token_shift_forward", x, 10, 3)(
        *map(pointer, (x, before, shares, bounds, *slots)), *x.shape, len(shares), torch.get_num_threads()
    )
    return tuple(out)


class Mixes(torch.autograd.Function):
    """shares: [M, C], float32. Returns M tensors like x."""

    @staticmethod
    def forward(ctx, x, before, shares, bounds):
        """Compute the outputs and save what the backward pass needs."""
        x, before, shares = x.contiguous(), before.contiguous(), shares.contiguous()
        ctx.save_for_backward(x, before, shares)
        ctx.bounds = bounds
        return mixed(x, before, shares, bounds)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dout):
        """Return the gradients of the inputs."""
        x, before, shares = ctx.saved_tensors
        threads = torch.get_num_threads()
        slopes = [torch.zeros_like(x) if d is None else d.contiguous() for d in dout]
        slots = [*slopes, *[None] * (MOST_MIXES - len(dout))]
        dx, dbefore = torch.empty_like(x), torch.empty_like(before)
        dshares = shares.new_zeros(threads, *shares.shape) if ctx.needs_input_grad[2] else None
        kernel("token_shift_backward", x, 13, 3)(
            *map(pointer, (x, before, shares, ctx.bounds, *slots, dx, dbefore, dshares)),
            *(*x.shape, len(shares), threads),
        )
        return dx, dbefore, None if dshares is None else dshares.sum(0), None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """As block_ops.linear; a few rows without gradients take a kernel that reads narrow weights as they are."""
    rows = x.numel() // x.shape[-1]
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if learns or not 0 < rows <= MOST_ROWS or not fits(x) or weight.dtype not in NAMES or not weight.is_contiguous():
        return block_ops.linear(x, weight)
    given, y = x.float().contiguous(), torch.empty(*x.shape[:-1], len(weight))
    kernel("product", weight, 3, 3)(
        *map(pointer, (weight, given, y)), rows, x.shape[-1], len(weight), torch.get_num_threads()
    )
    return y.to(x.dtype)


def square_relu(x: Tensor) -> Tensor:
    """As block_ops.square_relu."""
    return SquareRelu.apply(x) if fits(x) else block_ops.square_relu(x)


class SquareRelu(torch.autograd.Function):
    """Autograd node of `SquareRelu`."""

    @staticmethod
    def forward(ctx, x):
        """Compute the outputs and save what the backward pass needs."""
        x = x.contiguous()
        y = torch.empty_like(x)
        kernel("square_relu", x, 2, 1)(pointer(x), pointer(y), x.numel(), torch.get_num_threads())
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """Return the gradients of the inputs."""
        [x] = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        kernel("square_relu_backward", x, 3, 1)(*map(pointer, (x, dy, dx)), x.numel(), torch.get_num_threads())
        return dx


def wkv7_block(
    wkv: Callable, x: Wkv7Inputs, own: Wkv7Params, s0: Tensor, where: Where, heads: int
) -> tuple[Tensor, Tensor]:
    """As block_ops.wkv7_block."""
    alike = all(z is None or z.dtype == x.r.dtype for z in x)  # a kernel cannot see what it is given
    if not fits(x.r) or not alike or x.r.shape[1] // heads not in SIZES:
        return block_ops.wkv7_block(wkv, x, own, s0, where, heads)
    T, C = x.r.shape
    spans = sequences(1, T, where.cu_seqlens)
    wide = [z for z in own if z.shape != (C,)] + [z for z in x if z is not None and z.shape != (T, C)]
    if wide or s0.shape != (len(spans), heads, C // heads, C // heads):
        raise ValueError(
            f"shapes do not go with {T} tokens of {C} channels in {heads} heads and {len(spans)} sequences"
        )
    return Wkv7Block.apply(*unlearnt(*x, *(z.float() for z in own), s0), where.cu_seqlens, heads)


class Wkv7Block(torch.autograd.Function):
    """Keeps what the layers gave, the recurrence's outputs and every 32nd state; the rest is made again."""

    @staticmethod
    def forward(ctx, r, w, k, v, a, g, mix, v_first, k_k, k_a, r_k, weight, bias, s0, cu_seqlens, heads):
        """Compute the outputs and save what the backward pass needs."""
        gates = [None if z is None else z.contiguous() for z in (r, w, k, v, a, mix, v_first)]
        own = [z.contiguous() for z in (k_k, k_a, r_k, weight, bias)]
        spans = tuple(zip(cu_seqlens, cu_seqlens[1:], strict=False))
        T, C = r.shape
        inputs = prepared(gates, own, heads)
        y, end, kept = forward7(inputs, s0.float().contiguous(), spans, any(ctx.needs_input_grad))
        out, g = torch.empty(r.shape, dtype=r.dtype), g.contiguous()
        kernel("behind7", out, 9, 3)(
            *map(pointer, (y, inputs[0], inputs[2], inputs[3], *own[2:], g, out)),
            *(T, heads, C // heads, torch.get_num_threads()),
        )
        ctx.save_for_backward(*gates, *own, g, y, kept)
        ctx.spans, ctx.heads, ctx.s0_dtype = spans, heads, s0.dtype
        ctx.set_materialize_grads(False)
        return out, end.to(s0.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dstate):
        """Return the gradients of the inputs."""
        saved = ctx.saved_tensors
        gates, own, (g, y, kept) = saved[:7], saved[7:12], saved[12:]
        heads, threads = ctx.heads, torch.get_num_threads()
        like, (T, C) = gates[0], gates[0].shape
        sizes = T, heads, C // heads, threads
        dout = torch.zeros_like(g) if dout is None else dout.contiguous()
        inputs = prepared(gates, own, heads)
        # gradients of k_k k_a r_k weight bias where they are wanted, of each thread's rows
        wanted = ctx.needs_input_grad[8:13]
        sums = [y.new_zeros(threads, C) if wish else None for wish in wanted]
        dy, dr, dk, dv = (torch.empty_like(z) for z in (y, *inputs[:3]))
        dg = torch.empty_like(g)
        kernel("behind7_backward", g, 17, 3)(
            *map(pointer, (y, inputs[0], inputs[2], inputs[3], *own[2:], g, dout, dy, dr, dk, dv, dg, *sums[2:])),
            *sizes,
        )
        dstate = None if dstate is None else dstate.float().contiguous()
        grads, ds0 = backward7(inputs, kept, dy, dstate, ctx.spans, (dr, dk, dv))
        out = [None if z is None else torch.empty_like(like) for z in gates]
        kernel("before7_backward", g, 24, 3)(*map(pointer, (*gates, *own[:2], *grads, *out, *sums[:2])), *sizes)
        tr, tw, tk, tv, ta, tmix, tfirst = out
        own_grads = (None if total is None else total.sum(0) for total in sums)
        return tr, tw, tk, tv, ta, dg, tmix, tfirst, *own_grads, ds0.to(ctx.s0_dtype), None, None


def prepared(gates: Sequence[Tensor | None], own: Sequence[Tensor], heads: int) -> list[Tensor]:
    """R w k v a b of the recurrence, float32 [T, H, N]."""
    r = gates[0]
    assert r is not None
    T, C = r.shape
    inputs = [torch.empty(T, heads, C // heads) for _ in range(6)]
    kernel("before7", r, 15, 3)(
        *map(pointer, (*gates, *own[:2], *inputs)), T, heads, C // heads, torch.get_num_threads()
    )
    return inputs


def cross_entropy_grad(logits: Tensor, targets: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """As block_ops.cross_entropy_grad."""
    if logits.dtype not in NAMES or logits.device.type != "cpu":
        return block_ops.cross_entropy_grad(logits, targets, wanted)
    if targets.shape != logits.shape[:1]:
        raise ValueError(f"{list(targets.shape)} targets for logits {list(logits.shape)}")
    if (
        len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]
    ):  # would write beside the logits
        raise IndexError(f"a target lies outside of the {logits.shape[1]} logits of its row")
    logits, targets, losses = logits.contiguous(), targets.long().contiguous(), torch.empty(len(logits))
    kernel("cross_entropy", logits, 3, 3)(
        *map(pointer, (logits, targets, losses)), *logits.shape, int(wanted), torch.get_num_threads()
    )
    return losses.sum(), logits if wanted else None
