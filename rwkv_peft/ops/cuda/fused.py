"""The block operations on a GPU (cuda/wkv7_block.cu, cuda/token_shift.cu): the functions of block_ops.py with gradients.

Each is one pass over the activations; gradients of parameters are made only where they are wanted, and what is cheap to
recompute is not kept. Activations are float32 or bfloat16; other formats, and shapes without a kernel, use the definition.
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

from . import build, wkv
from .workspace import NAMES, SIZES, Spans

READS = block_ops.READS
decode_step, linear, fold = block_ops.decode_step, block_ops.linear, block_ops.fold

MOST_MIXES = 6
TOKENS = (
    32  # of a part, whose share of a parameter's gradient is a sum of its own; as in wkv7_block.cu and token_shift.cu
)
WARPS, THREADS = 4, 128  # of a block, as in device.h
ENTROPY_THREADS = 512  # of a block that has a row of logits, as in token_shift.cu
ANY = 64  # a head size, where none matters
ELEMENTS = 8  # of a thread, in what goes over numbers one by one


def parts(count: int, size: int) -> int:
    """Return how many parts of this size cover a count."""
    return -(-count // size)


def start(name: str, x: Tensor, grid: tuple[int, int], args: Sequence, size: int = ANY, threads: int = THREADS) -> None:
    """Start a kernel for the format of x."""
    build.launcher(x.device, size)(f"{name}_{NAMES[x.dtype]}", grid, args, threads)


def token_shift_mix(x: Tensor, before: Tensor, shares: Sequence[Tensor], where: Where) -> list[Tensor]:
    """As block_ops.token_shift_mix."""
    if x.dtype not in NAMES or len(shares) > MOST_MIXES or not len(x):
        return block_ops.token_shift_mix(x, before, shares, where)
    spans = tuple(sequences(1, len(x), where.cu_seqlens))
    if before.shape != (len(spans), x.shape[1]) or any(share.shape != x.shape[1:] for share in shares):
        raise ValueError(f"{list(before.shape)} or a share does not go with x {list(x.shape)}")
    return list(Mixes.apply(x, before.to(x.dtype), torch.stack(list(shares)).float(), spans))


class Mixes(torch.autograd.Function):
    """shares: [M, C], float32. Returns M tensors like x."""

    @staticmethod
    def forward(ctx, x, before, shares, spans: Spans):
        """Compute the outputs and save what the backward pass needs."""
        x, before, shares = x.contiguous(), before.contiguous(), shares.contiguous()
        (T, C), M = x.shape, len(shares)
        out = [torch.empty_like(x) for _ in shares]
        span, _ = wkv.tables(spans, x.device)
        args = (x, before, shares, *slots(out), span, len(spans), T, C, M)
        start("token_shift_forward", x, (parts(C, THREADS), parts(T, TOKENS)), args)
        ctx.save_for_backward(x, before, shares)
        ctx.spans = spans
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dout):
        """Return the gradients of the inputs."""
        x, before, shares = ctx.saved_tensors
        (T, C), M = x.shape, len(shares)
        slopes = [torch.zeros_like(x) if d is None else d.contiguous() for d in dout]
        dx, dbefore = torch.empty_like(x), torch.empty_like(before)
        dshares = shares.new_empty(parts(T, TOKENS), M, C) if ctx.needs_input_grad[2] else None
        span, _ = wkv.tables(ctx.spans, x.device)
        args = (x, before, shares, *slots(slopes), dx, dbefore, dshares, span, len(ctx.spans), T, C, M)
        start("token_shift_backward", x, (parts(C, THREADS), parts(T, TOKENS)), args)
        return dx, dbefore, None if dshares is None else dshares.sum(0), None


def slots(given: Sequence[Tensor]) -> list[Tensor | None]:
    """Fill up a list with None to the number of a kernel's arguments."""
    return [*given, *[None] * (MOST_MIXES - len(given))]


def square_relu(x: Tensor) -> Tensor:
    """As block_ops.square_relu."""
    return SquareRelu.apply(x) if x.dtype in NAMES and x.numel() else block_ops.square_relu(x)


def rows_of(x: Tensor) -> tuple[int, int]:
    """Return the number of rows of x, and their length."""
    return x.numel() // x.shape[-1], x.shape[-1]


class SquareRelu(torch.autograd.Function):
    """Autograd node of `SquareRelu`."""

    @staticmethod
    def forward(ctx, x):
        """Compute the outputs and save what the backward pass needs."""
        x = x.contiguous()
        y = torch.empty_like(x)
        start("token_shift_relu", x, (parts(x.numel(), THREADS * ELEMENTS), 1), (x, y, *rows_of(x)))
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """Return the gradients of the inputs."""
        [x] = ctx.saved_tensors
        dx = torch.empty_like(x)
        grid = parts(x.numel(), THREADS * ELEMENTS), 1
        start("token_shift_reluback", x, grid, (x, dy.contiguous(), dx, *rows_of(x)))
        return dx


def cross_entropy_grad(logits: Tensor, targets: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """As block_ops.cross_entropy_grad."""
    if logits.dtype not in NAMES or not logits.is_contiguous() or not logits.numel():
        return block_ops.cross_entropy_grad(logits, targets, wanted)
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    args = (logits, targets.long().contiguous(), losses, logits.shape[1], int(wanted))
    start("token_shift_entropy", logits, (len(logits), 1), args, threads=ENTROPY_THREADS)
    return losses.sum(), logits if wanted else None


def wkv7_block(
    recurrence: Callable, x: Wkv7Inputs, own: Wkv7Params, s0: Tensor, where: Where, heads: int
) -> tuple[Tensor, Tensor]:
    """As block_ops.wkv7_block."""
    alike = all(z is None or z.dtype == x.r.dtype for z in x)  # a kernel cannot see what it is given
    T, C = x.r.shape
    ours = isinstance(recurrence, wkv.Recurrence7)
    if x.r.dtype not in NAMES or not alike or not T or C // heads not in SIZES or not ours:
        return block_ops.wkv7_block(recurrence, x, own, s0, where, heads)
    spans = tuple(sequences(1, T, where.cu_seqlens))
    wide = [z for z in own if z.shape != (C,)] + [z for z in x if z is not None and z.shape != (T, C)]
    if wide or s0.shape != (len(spans), heads, C // heads, C // heads):
        raise ValueError(
            f"shapes do not go with {T} tokens of {C} channels in {heads} heads and {len(spans)} sequences"
        )
    assert isinstance(recurrence, wkv.Recurrence7)
    way = recurrence.way(x.r.view(T, heads, C // heads), spans)
    return Wkv7Block.apply(*unlearnt(*x, *(z.float() for z in own), s0), spans, heads, way)


class Wkv7Block(torch.autograd.Function):
    """Keeps what the layers gave, the recurrence's outputs and every 64th state; the rest is made again."""

    @staticmethod
    def forward(ctx, r, w, k, v, a, g, mix, v_first, k_k, k_a, r_k, weight, bias, s0, spans, heads, way):
        """Compute the outputs and save what the backward pass needs."""
        gates = [None if z is None else z.contiguous() for z in (r, w, k, v, a, mix, v_first)]
        own, g = [z.contiguous() for z in (k_k, k_a, r_k, weight, bias)], g.contiguous()
        inputs = prepared(gates, own, heads)
        y, last, kept = way.forward(inputs, s0.float().contiguous(), spans, any(ctx.needs_input_grad))
        (T, H, N), out = y.shape, torch.empty(r.shape, dtype=r.dtype, device=r.device)
        args = (y, inputs[0], inputs[2], inputs[3], *own[2:], g, out, T, H)
        start("wkv7_block_behind", out, (parts(T, WARPS), H), args, N)
        ctx.save_for_backward(*gates, *own, g, y, kept)
        ctx.spans, ctx.heads, ctx.way, ctx.s0_dtype, ctx.s0_shape = spans, heads, way, s0.dtype, s0.shape
        ctx.set_materialize_grads(False)
        return out, last.to(s0.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlast):
        """Return the gradients of the inputs."""
        saved = ctx.saved_tensors
        gates, own, (g, y, kept) = saved[:7], saved[7:12], saved[12:]
        T, H, N = y.shape
        k_k, k_a, r_k, weight, bias = own
        dout = torch.zeros_like(g) if dout is None else dout.contiguous()
        dlast = kept.new_zeros(ctx.s0_shape) if dlast is None else dlast.float().contiguous()
        inputs = r, _, k, v, _, _ = prepared(gates, own, H)
        # gradients of k_k k_a r_k weight bias where they are wanted, of each part's rows
        wanted = ctx.needs_input_grad[8:13]
        sums = [kept.new_empty(parts(T, TOKENS), H * N) if wish else None for wish in wanted]
        grid = parts(T, TOKENS), H
        dy, dg = torch.empty_like(y), torch.empty_like(g)
        args = (y, r, k, v, r_k, weight, bias, g, dout, dy, dg, *sums[3:], T, H)
        start("wkv7_block_behindback", g, grid, args, N)
        grads, ds0 = ctx.way.backward(inputs, kept, dy, dlast, ctx.spans)
        out = [None if z is None else torch.empty_like(z) for z in gates]
        args = (*gates, k_k, k_a, r_k, *grads, g, dout, *out, *sums[:3], T, H)
        start("wkv7_block_beforeback", g, grid, args, N)
        tr, tw, tk, tv, ta, tmix, tfirst = out
        own_grads = (None if total is None else total.sum(0) for total in sums)
        return tr, tw, tk, tv, ta, dg, tmix, tfirst, *own_grads, ds0.to(ctx.s0_dtype), None, None, None


def prepared(gates: Sequence[Tensor | None], own: Sequence[Tensor], heads: int) -> list[Tensor]:
    """R w k v a b of the recurrence, [T, H, N]; w in float32."""
    r = gates[0]
    assert r is not None
    T, C = r.shape
    shape = T, heads, C // heads
    w = torch.empty(shape, dtype=torch.float32, device=r.device)
    k, v, a, b = (torch.empty(shape, dtype=r.dtype, device=r.device) for _ in range(4))
    args = (*gates, *own[:2], w, k, v, a, b, T, heads)
    start("wkv7_block_before", r, (parts(T, WARPS), heads), args, C // heads)
    return [r.view(shape), w, k, v, a, b]
