"""WKV-7 in chunks of 32 tokens: matrix products inside a chunk, one step per chunk between them. Runs wherever torch does.

Inside a chunk the recurrence is a triangular system (WY form). With g the running sum of the log decays, and everything
scaled to the start of the chunk,

    Q = r e^g   A = a e^(g-w)   K = k e^-g   B = b e^-g   E = e^(g at the end)
    U = (I - tril(A B^T, -1))^-1 (A S^T + tril(A K^T, -1) V)
    Y = Q S^T + tril(Q K^T) V + tril(Q B^T) U        S' = (S + V^T K + U^T B) diag(E)

RWKV-7's decay is at least exp(-0.6065), so e^-g is at most e^19.4 in a chunk of 32: safe in float32 without any centring.
The inverse is computed by substitution, never from powers of the matrix: with repeated keys those grow like binomials
and cancel to noise. The backward pass is written by hand; it is the same algebra, transposed.

Letters: M chunks of all sequences, L tokens per chunk, H heads, N head size, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .chunking import Chunks, Tokens, plan_chunks, to_chunks
from .reference import sequences

CHUNK = 32


def wkv7(r, w, k, v, a, b, s0: Tensor | None = None, cu_seqlens: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """reference.wkv7, computed in float32 (float64 for float64 inputs), with gradients for all inputs and s0."""
    batch, tokens, heads, size = r.shape
    spans = sequences(batch, tokens, cu_seqlens)
    dtype = torch.promote_types(r.dtype, torch.float32)
    if tokens == 1:  # decoding: nothing to put in parallel
        return reference.wkv7(r, w, k, v, a, b, s0, cu_seqlens, dtype)
    start = r.new_zeros(len(spans), heads, size, size, dtype=dtype) if s0 is None else s0
    flat = (x.reshape(batch * tokens, heads, size) for x in (r, w, k, v, a, b))
    y, end = ChunkedWKV7.apply(*flat, start, plan_chunks(tuple(spans), CHUNK, r.device))
    return y.view(batch, tokens, heads, size), end


def unit_lower_inverse(m: Tensor) -> Tensor:
    """(I - m)^-1 for strictly lower triangular m [..., L, L], by substitution."""
    eye = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    return torch.linalg.solve_triangular(eye - m, eye.expand_as(m), upper=False, unitriangular=True)


class Scaling:
    """The decays of a chunk, from its start: up = e^g, down = e^-g, before = e^(g-w), all [M, H, L, N]."""

    def __init__(self, w: Tensor, dtype):
        self.up = torch.cumsum(w, -2, dtype=dtype).contiguous().exp_()
        self.down = self.up.reciprocal()
        self.end = self.up[..., -1:, :].contiguous()  # E

    def queries(self, r: Tensor, a: Tensor) -> Tensor:
        """[Q; A], [M, H, 2L, N]. The decay before a token is the one up to the token before it."""
        L = r.shape[-2]
        out = self.up.new_empty(*r.shape[:2], 2 * L, r.shape[3])
        torch.mul(r, self.up, out=out[..., :L, :])
        out[..., L, :] = a[..., 0, :]
        torch.mul(a[..., 1:, :], self.up[..., :-1, :], out=out[..., L + 1 :, :])
        return out

    def keys(self, k: Tensor, b: Tensor) -> Tensor:
        """[K; B], [M, H, 2L, N]."""
        L = k.shape[-2]
        out = self.up.new_empty(*k.shape[:2], 2 * L, k.shape[3])
        torch.mul(k, self.down, out=out[..., :L, :])
        torch.mul(b, self.down, out=out[..., L:, :])
        return out

    def before(self) -> Tensor:
        """Return the decays up to the token before each, [..., L, N]."""
        return torch.cat([torch.ones_like(self.end), self.up[..., :-1, :]], -2)


def causal_mask(length: int, like: Tensor) -> Tensor:
    """[2L, 2L]: a query row sees keys up to its own token, a row of A only earlier ones."""
    ones = torch.ones(length, length, dtype=like.dtype, device=like.device)
    return torch.cat([ones.tril().repeat(1, 2), ones.tril(-1).repeat(1, 2)])


class ChunkedWKV7(torch.autograd.Function):
    """Autograd node of `ChunkedWKV7`."""

    @staticmethod
    def forward(ctx, r, w, k, v, a, b, s0, chunks: Chunks):
        """Compute the outputs and save what the backward pass needs."""
        dtype = torch.promote_types(r.dtype, torch.float32)
        rc, wc, kc, vc, ac, bc = (to_chunks(x, chunks) for x in (r, w, k, v, a, b))
        vc = vc.to(dtype).contiguous()
        L = chunks.length
        scaling = Scaling(wc, dtype)
        qa, kb, decay = scaling.queries(rc, ac), scaling.keys(kc, bc), scaling.end
        scores = (qa @ kb.mT).mul_(causal_mask(L, qa))  # [[Mqk, Mqb], [Mak, Mab]]
        inverse = unit_lower_inverse(scores[..., L:, L:])
        B = kb[..., L:, :]
        W = inverse @ qa[..., L:, :]
        U = inverse @ (scores[..., L:, :L] @ vc)  # the part that does not depend on the state
        VK = vc.mT @ kb[..., :L, :]
        state = s0.to(dtype).clone()
        starts = torch.empty_like(VK)  # state before each chunk [M, H, N, N]
        for step, who in zip(chunks.steps, chunks.active, strict=True):
            s = state[who]
            starts[step] = s
            u = U[step] + W[step] @ s.mT
            U[step] = u
            state[who] = (s + VK[step] + u.mT @ B[step]) * decay[step]
        y = qa[..., :L, :] @ starts.mT
        y += scores[..., :L, :] @ torch.cat([vc, U], -2)
        ctx.save_for_backward(r, w, k, v, a, b, inverse, U, starts, state)
        ctx.chunks, ctx.dtype, ctx.s0_dtype = chunks, dtype, s0.dtype
        return Tokens(chunks).copy(y, r.dtype), state.to(s0.dtype)

    @staticmethod
    def backward(ctx, dy, dstate):
        """Return the gradients of the inputs."""
        r, w, k, v, a, b, inverse, U, starts, end = ctx.saved_tensors
        chunks, dtype = ctx.chunks, ctx.dtype
        L = chunks.length
        rc, wc, kc, vc, ac, bc, dY = (to_chunks(x, chunks) for x in (r, w, k, v, a, b, dy))
        vc, dY = vc.to(dtype), dY.to(dtype).contiguous()
        scaling = Scaling(wc, dtype)
        qa, kb, decay = scaling.queries(rc, ac), scaling.keys(kc, bc), scaling.end
        mask = causal_mask(L, qa)
        scores = (qa @ kb.mT).mul_(mask)
        Q, A, B = qa[..., :L, :], qa[..., L:, :], kb[..., L:, :]
        TB = inverse.mT @ B
        dZ = inverse.mT @ (scores[..., :L, L:].mT @ dY)  # the part that does not depend on later chunks
        dYQ = dY.mT @ Q
        dS = torch.empty_like(starts)  # gradient of (S + V^T K + U^T B) of each chunk, that is dS' diag(E)
        dEnd = torch.empty_like(decay)  # colsum(dS' * S'): what the decay of the whole chunk gets
        g, after = dstate.to(dtype).clone(), end.clone()
        for step, who in zip(reversed(chunks.steps), reversed(chunks.active), strict=True):
            dEnd[step] = (g[who] * after[who]).sum(-2, keepdim=True)
            ds = g[who] * decay[step]
            dS[step] = ds
            dz = dZ[step] + TB[step] @ ds.mT
            dZ[step] = dz
            g[who] = ds + dYQ[step] + dz.mT @ A[step]
            after[who] = starts[step]
        dYZ, VU = torch.cat([dY, dZ], -2), torch.cat([vc, U], -2)
        dscores = (dYZ @ VU.mT).mul_(mask)
        dqa = dscores @ kb
        dqa += dYZ @ starts
        dkb = dscores.mT @ qa
        dkb += VU @ dS
        dv = scores[..., :L].mT @ dYZ
        dv += kb[..., :L, :] @ dS.mT
        # back through the scaling: e^x passes on gradient * value; g is the running sum of w
        dqq, dkk = qa.mul_(dqa), kb.mul_(dkb)
        dge = dqq[..., L:, :]
        total = dqq[..., :L, :] + dge
        total -= dkk[..., :L, :]
        total -= dkk[..., L:, :]
        total[..., -1:, :] += dEnd
        dw = total.sum(-2, keepdim=True) - total.cumsum(-2) + total - dge  # sum over t >= s, less dge at s itself
        out, up, down = Tokens(chunks), scaling.up, scaling.down
        grads = (
            out.product(dqa[..., :L, :], up, r.dtype),
            out.copy(dw, w.dtype),
            out.product(dkb[..., :L, :], down, k.dtype),
            out.copy(dv, v.dtype),
            out.product(dqa[..., L:, :], scaling.before(), a.dtype),
            out.product(dkb[..., L:, :], down, b.dtype),
        )
        return *grads, g.to(ctx.s0_dtype), None
