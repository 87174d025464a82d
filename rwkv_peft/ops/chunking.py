"""Cutting sequences of tokens into chunks of one length, and putting the results back: what the chunked forms share.

Letters: M chunks of all sequences, L tokens per chunk, T tokens of all sequences, H heads, N head size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Chunks:
    """Where the tokens of the sequences lie among M chunks of L. Sequences are whole chunks; the last is filled up."""

    length: int  # L
    count: int  # M
    gather: Tensor | None  # [M * L] the token at this place, or T for padding; None: tokens are in this order already
    scatter: Tensor | None  # [T] place of each token
    steps: list[Tensor]  # steps[j]: the j-th chunk of every sequence that has one
    active: list[Tensor]  # active[j]: those sequences


@functools.lru_cache(maxsize=8)  # every layer, and the backward pass, asks for the same one
def plan_chunks(spans: Sequence[tuple[int, int]], length: int, device) -> Chunks:
    """Cut sequences into chunks of `length` tokens.

    Args:
        spans: Begin and end of each sequence among T tokens.
        length: Tokens of a chunk; the last one of a sequence is padded.
        device: Of the index tensors.
    """
    counts = [-(-(end - begin) // length) for begin, end in spans]
    firsts, total = [], 0
    for count in counts:
        firsts.append(total)
        total += count
    gather = scatter = None
    if any((end - begin) % length for begin, end in spans):
        tokens = spans[-1][1]
        gather = torch.full((total * length,), tokens, dtype=torch.long)
        for (begin, end), first in zip(spans, firsts, strict=True):
            gather[first * length : first * length + end - begin] = torch.arange(begin, end)
        scatter = torch.empty(tokens, dtype=torch.long)
        filled = torch.nonzero(gather < tokens)[:, 0]
        scatter[gather[filled]] = filled
        gather, scatter = gather.to(device), scatter.to(device)
    active = [[i for i, count in enumerate(counts) if count > j] for j in range(max(counts))]
    steps = [torch.tensor([firsts[i] + j for i in who], device=device) for j, who in enumerate(active)]
    return Chunks(length, total, gather, scatter, steps, [torch.tensor(who, device=device) for who in active])


def to_chunks(x: Tensor, chunks: Chunks) -> Tensor:
    """[T, H, N] -> [M, H, L, N], a view where the tokens lie right already.

    Filling is zero, which leaves a state as it is (decay 1, nothing added).
    """
    if chunks.gather is not None:
        x = torch.cat([x, x.new_zeros(1, *x.shape[1:])]).index_select(0, chunks.gather)
    return x.reshape(chunks.count, chunks.length, *x.shape[1:]).transpose(1, 2)


class Tokens:
    """Collects [M, H, L, N] results as [T, H, N]: products are written where they belong, without a copy in between."""

    def __init__(self, chunks: Chunks):
        self.chunks = chunks

    def product(self, x: Tensor, y: Tensor, dtype) -> Tensor:
        """Return x * y, cast, in the order of tokens."""
        out = x.new_empty(self.chunks.count, self.chunks.length, x.shape[1], x.shape[3])
        torch.mul(x, y, out=out.transpose(1, 2))
        return self.finish(out, dtype)

    def copy(self, x: Tensor, dtype) -> Tensor:
        """Return x, cast, in the order of tokens."""
        return self.finish(x.transpose(1, 2), dtype)

    def finish(self, x: Tensor, dtype) -> Tensor:
        """Cast [M, L, ...] and drop the padding."""
        x = x.to(dtype).reshape(self.chunks.count * self.chunks.length, *x.shape[2:])
        return x if self.chunks.scatter is None else x.index_select(0, self.chunks.scatter)
