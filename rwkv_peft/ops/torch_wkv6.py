"""WKV-6 in chunks, for decays without a lower bound. WKV-5 is the case of one decay for all tokens. Runs wherever torch does.

Inside a chunk, blocks of 1, 2, 4 ... tokens are joined with their neighbours; between chunks there is one step per chunk.

A token t sees an earlier token s of its chunk through the decays of the tokens strictly between them. Exactly one pair of
neighbouring blocks of b = 1, 2, 4 ... L/2 tokens has s in its first block and t in its second; there

    score[t, s] = Q_t . K_s    Q_t = r_t * the decays from the bound between the blocks up to t-1
                               K_s = k_s * the decays from s+1 up to that bound

Joining two blocks multiplies Q of the second by the whole decay of the first, K of the first by that of the second. So
every factor is a product of decays, in [0, 1]: nothing is divided, subtracted or taken out of a running sum, which a decay
of exp(-10000) would empty of digits; a decay of 0 gives zeros. After the last joining Q and K are what the state before
and after the chunk needs. The backward pass is the same tree from its root to the tokens, and its sums for w hold only
terms that do pass through w, so a strong decay among weak ones keeps its gradient exact too. With S the state [N, N]:

    Y = scores V + Q S^T        S' = S diag(decay of the chunk) + V^T K

Letters: M chunks of all sequences, L tokens per chunk, H heads, N head size, X = M * H; P pairs of blocks in a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .chunking import Chunks, Tokens, plan_chunks, to_chunks
from .reference import sequences

CHUNK = 32


def wkv6(r, w, k, v, u, s0: Tensor | None = None, cu_seqlens: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """reference.wkv6, computed in float32 (float64 for float64 inputs), with gradients for all inputs and s0."""
    batch, tokens, heads, size = r.shape
    spans = sequences(batch, tokens, cu_seqlens)
    dtype = torch.promote_types(r.dtype, torch.float32)
    if tokens == 1:  # decoding: nothing to put in parallel
        return reference.wkv6(r, w, k, v, u, s0, cu_seqlens, dtype)
    start = r.new_zeros(len(spans), heads, size, size, dtype=dtype) if s0 is None else s0
    flat = (x.reshape(batch * tokens, heads, size) for x in (r, w, k, v))
    y, end = ChunkedWKV6.apply(*flat, u, start, plan_chunks(tuple(spans), CHUNK, r.device))
    return y.view(batch, tokens, heads, size), end


def wkv5(r, w, k, v, u, s0: Tensor | None = None, cu_seqlens: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """reference.wkv5, as for wkv6; the gradient of w is summed over the tokens in the dtype of the computation."""
    return wkv6(r, w.to(torch.promote_types(r.dtype, torch.float32)).expand(r.shape), k, v, u, s0, cu_seqlens)


def halves(x: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """[X, L, N] -> the first and the second block of every pair of blocks of b, views [X, P, b, N]."""
    pairs = x.view(x.shape[0], -1, 2, b, x.shape[2])
    return pairs[:, :, 0], pairs[:, :, 1]


def meetings(scores: Tensor, b: int) -> Tensor:
    """The part of [X, L, L] where queries of second blocks meet keys of first ones, a view [X, P, b, b]."""
    p = scores.shape[1] // (2 * b)
    blocks = scores.view(-1, p, 2, b, p, 2, b)[:, :, 1, :, :, 0, :]  # [X, P, b, P, b]
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def flushed(x: Tensor) -> Tensor:
    """Set numbers that are too small to be normal to zero.

    Fast decays make many, and a CPU is slow with them: without this, decays around exp(-3) took 3.5 times as long as slow ones,
    with it 1.4 times.
    """
    return F.hardshrink(x, torch.finfo(x.dtype).tiny)


class Tree:
    """Joins the blocks of a chunk, from tokens to the whole.

    q, k: [X, L, N] with all decays from the start of the chunk, and to its end; whole: [X, 1, N] decay of the chunk.
    scores: [X, L, L], lower triangular. levels, if given, collects (b, q of second blocks, k of first blocks, decays of
    both), as they were before each joining.
    """

    def __init__(self, r: Tensor, w: Tensor, k: Tensor, bonus: Tensor, levels: list | None = None):
        X, L, N = r.shape
        self.q, self.k, self.whole = r.clone(), k.clone(), flushed(w.exp())
        self.scores = r.new_zeros(X, L, L)
        self.scores.diagonal(dim1=1, dim2=2).copy_((r * k).mul_(bonus).sum(2))
        b = 1
        while b < L:
            _, q2 = halves(self.q, b)
            k1, _ = halves(self.k, b)
            first, second = halves(self.whole, 1)  # [X, P, 1, N]
            meetings(self.scores, b).copy_(q2 @ k1.mT)
            if levels is not None:
                levels.append((b, q2.clone(), k1.clone(), first, second))
            q2.copy_(flushed(q2 * first))
            k1.copy_(flushed(k1 * second))
            self.whole = flushed(first * second).squeeze(2)
            b *= 2


def descend(levels: list, dq: Tensor, dk: Tensor, dscores: Tensor, dw: Tensor) -> Tensor:
    """Turns the gradients of q and k into those of r and k, in place and without the bonus's part.

    dw: [X, 1, N], gradient of the logarithm of whole. Returns the gradient of w, [X, L, N].
    """
    for b, q, k, first, second in reversed(levels):
        _, dq2 = halves(dq, b)
        dk1, _ = halves(dk, b)
        dq2 *= first
        dk1 *= second
        # what goes through a factor gives its logarithm gradient * value
        dw = torch.stack([dw + (dq2 * q).sum(2), dw + (dk1 * k).sum(2)], 2).flatten(1, 2)
        dmeet = meetings(dscores, b)
        dq2 += dmeet @ k
        dk1 += dmeet.mT @ q
    return dw


class ChunkedWKV6(torch.autograd.Function):
    """Autograd node of `ChunkedWKV6`."""

    @staticmethod
    def forward(ctx, r, w, k, v, u, s0, chunks: Chunks):
        """Compute the outputs and save what the backward pass needs."""
        dtype = torch.promote_types(r.dtype, torch.float32)
        rc, wc, kc, vc = (laid_out(x, chunks, dtype) for x in (r, w, k, v))
        tree = Tree(rc, wc, kc, bonus_of_chunks(u, chunks, dtype))
        VK = by_head(vc.mT @ tree.k, r)
        whole = by_head(tree.whole, r)
        state = s0.to(dtype).clone()
        starts = torch.empty_like(VK)  # state before each chunk [M, H, N, N]
        for step, who in zip(chunks.steps, chunks.active, strict=True):
            s = state[who]
            starts[step] = s
            state[who] = s * whole[step] + VK[step]
        y = torch.baddbmm(tree.scores @ vc, tree.q, starts.flatten(0, 1).mT)
        ctx.save_for_backward(r, w, k, v, u, starts)
        ctx.chunks, ctx.dtype, ctx.s0_dtype = chunks, dtype, s0.dtype
        return Tokens(chunks).copy(by_head(y, r), r.dtype), state.to(s0.dtype)

    @staticmethod
    def backward(ctx, dy, dstate):
        """Return the gradients of the inputs."""
        r, w, k, v, u, starts = ctx.saved_tensors
        chunks, dtype = ctx.chunks, ctx.dtype
        rc, wc, kc, vc, dY = (laid_out(x, chunks, dtype) for x in (r, w, k, v, dy))
        bonus = bonus_of_chunks(u, chunks, dtype)
        levels: list[Any] = []
        tree = Tree(rc, wc, kc, bonus, levels)
        dYQ = by_head(dY.mT @ tree.q, r)
        whole = by_head(tree.whole, r)
        dS = torch.empty_like(starts)  # gradient of the state after each chunk
        g = dstate.to(dtype).clone()
        for step, who in zip(reversed(chunks.steps), reversed(chunks.active), strict=True):
            ds = g[who]
            dS[step] = ds
            g[who] = ds * whole[step] + dYQ[step]
        dw = ((dS * starts).sum(2, keepdim=True) * whole).flatten(0, 1)
        starts, dS = starts.flatten(0, 1), dS.flatten(0, 1)
        dv = torch.baddbmm(tree.scores.mT @ dY, tree.k, dS.mT)
        dscores = dY @ vc.mT
        dr, dk = dY @ starts, vc @ dS
        dw = descend(levels, dr, dk, dscores, dw)
        dbonus = dscores.diagonal(dim1=1, dim2=2)[..., None]
        du = (rc * kc).mul_(dbonus).sum(1).view(chunks.count, *u.shape).sum(0)
        dr.addcmul_(kc * bonus, dbonus)
        dk.addcmul_(rc * bonus, dbonus)
        out = Tokens(chunks)
        grads = (out.copy(by_head(x, r), like.dtype) for x, like in ((dr, r), (dw, w), (dk, k), (dv, v)))
        return *grads, du.to(u.dtype), g.to(ctx.s0_dtype), None


def laid_out(x: Tensor, chunks: Chunks, dtype) -> Tensor:
    """[T, H, N] -> [X, L, N], contiguous; it may be x itself, so nothing is written into it."""
    return to_chunks(x, chunks).to(dtype).contiguous().flatten(0, 1)


def by_head(x: Tensor, r: Tensor) -> Tensor:
    """[X, ...] -> [M, H, ...]."""
    return x.unflatten(0, (-1, r.shape[1]))


def bonus_of_chunks(u: Tensor, chunks: Chunks, dtype) -> Tensor:
    """[H, N] -> [X, 1, N]."""
    return u.to(dtype).repeat(chunks.count, 1).unsqueeze(1)
