"""TRAIN_TYPE=infctx: any context in the memory of one chunk. The state is carried from chunk to chunk of a micro-batch.

    detach   a chunk begins with the state that the one before it left, and gradients end where it begins
    full     gradients continue into the chunk before: loss and gradients of the whole, whatever the size of chunks

Each chunk's gradients are computed as soon as its loss is known, so its activations live no longer than that. `full` goes
through the chunks twice: forward for the states between them, and backward from the last chunk to the first, each
from its saved state. It saves one state per chunk, and one RNG state, so that both passes draw the same dropout masks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv_peft.checkpoint.train_state import get_rng_state, set_rng_state
from rwkv_peft.model.rwkv import RWKV
from rwkv_peft.model.state import BlockState

MODES = ("detach", "full")
HALF_SCALE = 2.0**12  # gradients of float16 activations are scaled by this during the backward pass

# a chunk and the state that it begins with -> its loss, and the state after its last sequence
RunChunk = Callable[["Chunk", list[BlockState] | None], tuple[Tensor, list[BlockState]]]
LossAndGradients = tuple[Tensor, list[Tensor]]


@dataclass(frozen=True)
class Chunk:
    """Tokens `begin` to `end` of a micro-batch.

    Attributes:
        begin: index of the first token.
        end: index after the last token.
        cu_seqlens: where sequences begin and end in the chunk, from 0.
        continues: whether its first sequence began in the chunk before.
    """

    begin: int
    end: int
    cu_seqlens: tuple[int, ...]
    continues: bool


def split_chunks(cu_seqlens: Sequence[int], size: int) -> list[Chunk]:
    """Split concatenated sequences into chunks of at most `size` tokens.

    A sequence is split at multiples of `size` from its own beginning, whatever is beside it, so the result does not depend on
    how rows are batched.
    """
    bounds, begin = [0], 0
    for first, end in itertools.pairwise(cu_seqlens):
        if end - begin > size and first > begin:  # it does not fit into the chunk that was begun
            bounds.append(first)
            begin = first
        while end - begin > size:
            begin += size
            bounds.append(begin)
    bounds.append(cu_seqlens[-1])
    chunks = []
    for begin, end in itertools.pairwise(bounds):
        inside = [c - begin for c in cu_seqlens if begin < c < end]
        chunks.append(Chunk(begin, end, (0, *inside, end - begin), begin not in cu_seqlens))
    return chunks


def chunked_loss(
    model: RWKV,
    ids: Tensor,
    cu_seqlens: Sequence[int],
    positions: Tensor,
    targets: Tensor,
    size: int,
    mode: str,
) -> Tensor:
    """Return the sum of the cross entropies of the targets, [], whose gradients are computed by now.

    Args:
        model: the model.
        ids: int64 [1, T].
        cu_seqlens: [S + 1], where sequences begin and end.
        positions: int64 [R], the inputs after which targets follow.
        targets: int64 [R].
        size: tokens of a chunk.
        mode: detach or full.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    chunks = split_chunks(cu_seqlens, size)

    def run_chunk(chunk: Chunk, carried: list[BlockState] | None) -> tuple[Tensor, list[BlockState]]:
        state = model.first_state(len(chunk.cu_seqlens) - 1)
        if carried is not None:
            state = [
                BlockState(*map(_replace_first, s.tensors(), c.tensors())) for s, c in zip(state, carried, strict=True)
            ]
        x, after = model.features(ids[:, chunk.begin : chunk.end], state, chunk.cu_seqlens)
        inside = (positions >= chunk.begin) & (positions < chunk.end)
        rows = x[0].index_select(0, positions[inside] - chunk.begin)
        loss = model.ops.cross_entropy(rows, model.head_weight(), targets[inside])
        return loss, [BlockState(*(t[-1:] for t in s.tensors())) for s in after]

    run = _run_detach if mode == "detach" else _run_full
    return _KnownGradients.apply(lambda: run(run_chunk, chunks, parameters, model.dtype), *parameters)


def _replace_first(states: Tensor, first: Tensor) -> Tensor:
    # [S, ...] with another first row [1, ...]
    return torch.cat([first.to(states.dtype), states[1:]])


class _KnownGradients(torch.autograd.Function):
    """A loss whose gradients are computed in its forward pass, by `run`.

    The parameters are inputs so that what waits for their gradients (accumulation, DDP) gets them in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, run: Callable[[], LossAndGradients], *parameters: nn.Parameter) -> Tensor:
        with torch.enable_grad():
            loss, ctx.grads = run()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        return None, *(g.mul_(dloss.to(g.dtype)) for g in grads)


class _Sums:
    """The loss and the gradients so far."""

    def __init__(self, parameters: list[nn.Parameter], dtype: torch.dtype):
        device = parameters[0].device
        self.parameters, self.scale = parameters, HALF_SCALE if dtype == torch.float16 else 1.0
        self.grads = [torch.zeros_like(p) for p in parameters]
        self.loss = torch.zeros((), device=device)

    def add(self, loss: Tensor, ends: list[tuple[Tensor, Tensor]], leaves: list[Tensor]) -> list[Tensor]:
        """Add a chunk's loss and gradients; return the scaled gradients of `leaves`.

        Args:
            loss: of the chunk.
            ends: the states after the chunk, with their gradients, which are already scaled.
            leaves: the states that the chunk began with.
        """
        self.loss = self.loss + loss.detach()
        outputs: list[tuple[Tensor, Tensor | None]] = [(loss * self.scale, None), *ends]
        outputs = [(o, g) for o, g in outputs if o.requires_grad]
        if not outputs:  # no trained parameter takes part in this chunk
            return [torch.zeros_like(leaf) for leaf in leaves]
        grads = torch.autograd.grad(
            [o for o, _ in outputs], [*self.parameters, *leaves], [g for _, g in outputs], materialize_grads=True
        )
        for total, g in zip(self.grads, grads, strict=False):
            total.add_(g, alpha=1 / self.scale)
        return list(grads[len(self.parameters) :])


def _run_detach(
    run_chunk: RunChunk, chunks: list[Chunk], parameters: list[nn.Parameter], dtype: torch.dtype
) -> LossAndGradients:
    sums, carried = _Sums(parameters, dtype), None
    for chunk in chunks:
        loss, after = run_chunk(chunk, carried if chunk.continues else None)
        sums.add(loss, [], [])
        carried = [BlockState(*(t.detach() for t in s.tensors())) for s in after]
    return sums.loss, sums.grads


def _run_full(
    run_chunk: RunChunk, chunks: list[Chunk], parameters: list[nn.Parameter], dtype: torch.dtype
) -> LossAndGradients:
    device, carried = parameters[0].device, None
    states, rng_states = _TensorRows(len(chunks) - 1), _TensorRows(len(chunks))  # states[i]: after chunk i
    with torch.no_grad():
        for i, chunk in enumerate(chunks):
            rng_states.save(i, list(get_rng_state(device).values()))
            if i < len(chunks) - 1:
                carried = run_chunk(chunk, carried if chunk.continues else None)[1]
                states.save(i, [t for s in carried for t in s.tensors()])
    sums = _Sums(parameters, dtype)
    grads: list[Tensor] = []  # of the states after the chunk
    last: dict[str, Tensor] = {}  # the RNG state after the last chunk
    for i, chunk in reversed(list(enumerate(chunks))):
        leaves = [t.clone().requires_grad_() for t in states[i - 1]] if chunk.continues else []
        start = [BlockState(*leaves[k : k + 3]) for k in range(0, len(leaves), 3)] or None
        set_rng_state(dict(zip(get_rng_state(device), rng_states[i], strict=True)), device)
        loss, after = run_chunk(chunk, start)
        last = last or get_rng_state(device)
        ends = [t for s in after for t in s.tensors()]
        grads = sums.add(loss, list(zip(ends, grads, strict=True)) if grads else [], leaves)
    set_rng_state(last, device)  # as after one pass through everything
    return sums.loss, sums.grads


class _TensorRows:
    """Tensors of the same shapes for each of `count` chunks, in memory that is allocated once.

    One by one, they would be in the gaps between what chunks allocate and free, which malloc could then not use again: even
    5 kB for each of 128 chunks made it hold 650 MB where tensors are 40 (bench/infctx.py).
    """

    def __init__(self, count: int):
        self.count = count
        self.stacked: list[Tensor] = []

    def save(self, i: int, tensors: list[Tensor]) -> None:
        """Copy the tensors of chunk i."""
        self.stacked = self.stacked or [t.new_empty(self.count, *t.shape) for t in tensors]
        for stacked, tensor in zip(self.stacked, tensors, strict=True):
            stacked[i].copy_(tensor)

    def __getitem__(self, i: int) -> list[Tensor]:
        return [stacked[i] for stacked in self.stacked]
