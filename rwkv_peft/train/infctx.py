"""infctx: any context in the memory of one chunk. The tokens of a micro-batch go through in chunks, with the state carried over.

    detach   a chunk begins with the state after the one before it, and gradients end at its bound
    full     gradients pass through the bound: the loss and gradients of the whole, whatever the chunk

Each chunk's gradients are made as soon as its loss is known, so its activations live no longer than that. `full` goes
through the chunks twice: forward for the states at their bounds, and backward from the last chunk to the first, each
from its kept state. It keeps one state per bound (and the RNG state: dropout has the same masks both times).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv_peft.model.rwkv import RWKV
from rwkv_peft.model.state import BlockState

MODES = ("detach", "full")
HALF_SCALE = 2.0**12  # gradients of float16 activations are made this much larger on their way


@dataclass(frozen=True)
class Chunk:
    """Tokens begin to end of the batch.

    Attributes:
        begin: The first token.
        end: The token after the last.
        bounds: Of the sequences among them, from 0.
        continues: Its first sequence began in the chunk before.
    """

    begin: int
    end: int
    bounds: tuple[int, ...]
    continues: bool


def cut(cu_seqlens: Sequence[int], size: int) -> list[Chunk]:
    """Return the tokens of sequences one after another in chunks of at most `size`.

    A sequence is cut at multiples of `size` from its own beginning, whatever is beside it: so the result does not
    depend on how rows are batched.
    """
    places, begin = [0], 0
    for first, end in zip(cu_seqlens, cu_seqlens[1:], strict=False):
        if end - begin > size and first > begin:  # it does not fit into what was begun
            places.append(first)
            begin = first
        while end - begin > size:
            begin += size
            places.append(begin)
    places.append(cu_seqlens[-1])
    chunks = []
    for begin, end in zip(places, places[1:], strict=False):
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
    """The sum of cross entropies of the targets, as a scalar whose backward pass fills in gradients that are known already.

    ids: int64 [1, T]; cu_seqlens: [S + 1] integers; positions, targets: int64 [R], which inputs count and what should
    follow them. size: tokens of a chunk. mode: detach or full.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    chunks = cut(cu_seqlens, size)

    def one(chunk: Chunk, carried: list[BlockState] | None) -> tuple[Tensor, list[BlockState]]:
        """A chunk's loss, and the state after its last sequence."""
        state = model.first_state(len(chunk.bounds) - 1)
        if carried is not None:
            state = [
                BlockState(*map(replace_first, s.tensors(), c.tensors())) for s, c in zip(state, carried, strict=True)
            ]
        x, after = model.features(ids[:, chunk.begin : chunk.end], state, chunk.bounds)
        mine = (positions >= chunk.begin) & (positions < chunk.end)
        rows = x[0].index_select(0, positions[mine] - chunk.begin)
        loss = model.ops.cross_entropy(rows, model.head_weight(), targets[mine])
        return loss, [BlockState(*(t[-1:] for t in s.tensors())) for s in after]

    return KnownGradients.apply(lambda: PASSES[mode](one, chunks, parameters, model.dtype), *parameters)


def replace_first(states: Tensor, first: Tensor) -> Tensor:
    """[S, ...] with another first row [1, ...]."""
    return torch.cat([first.to(states.dtype), states[1:]])


class KnownGradients(torch.autograd.Function):
    """A loss whose gradients were computed in the forward pass (by `run`, in pieces).

    Parameters are its inputs so that gradient hooks (accumulation, other processes) see their gradients.
    """

    @staticmethod
    def forward(ctx, run: Callable, *parameters: nn.Parameter) -> Tensor:
        """Compute the outputs and save what the backward pass needs."""
        with torch.enable_grad():
            loss, ctx.grads = run()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor):
        """Return the gradients of the inputs."""
        grads, ctx.grads = ctx.grads, None
        return None, *(g.mul_(dloss.to(g.dtype)) for g in grads)


class Sums:
    """The loss so far and the gradients so far."""

    def __init__(self, parameters: list[nn.Parameter], dtype: torch.dtype):
        self.parameters, self.scale = parameters, HALF_SCALE if dtype == torch.float16 else 1.0
        self.grads = [torch.zeros_like(p) for p in parameters]
        self.loss = torch.zeros(())

    def add(self, loss: Tensor, ends: list[tuple[Tensor, Tensor]], leaves: list[Tensor]) -> list[Tensor]:
        """Add the gradients of a chunk.

        Args:
            loss: Of the chunk.
            ends: States after it, with the gradients (already scaled) that come back for them.
            leaves: States it began from.

        Returns:
            The scaled gradients of the leaves.
        """
        self.loss = self.loss + loss.detach()
        outputs: list[tuple[Tensor, Tensor | None]] = [(loss * self.scale, None), *ends]
        outputs = [(o, g) for o, g in outputs if o.requires_grad]
        if not outputs:  # nothing trained has a part in this chunk
            return [torch.zeros_like(leaf) for leaf in leaves]
        gradients = torch.autograd.grad(
            [o for o, _ in outputs], [*self.parameters, *leaves], [g for _, g in outputs], materialize_grads=True
        )
        for total, g in zip(self.grads, gradients, strict=False):
            total.add_(g, alpha=1 / self.scale)
        return list(gradients[len(self.parameters) :])


def detached(states: list[BlockState]) -> list[BlockState]:
    """Return states without their history."""
    return [BlockState(*(t.detach() for t in s.tensors())) for s in states]


def pass_detach(one: Callable, chunks: list[Chunk], parameters: list, dtype) -> tuple[Tensor, list[Tensor]]:
    """Run the chunks with gradients that end at their bounds."""
    sums, carried = Sums(parameters, dtype), None
    for chunk in chunks:
        loss, after = one(chunk, carried if chunk.continues else None)
        sums.add(loss, [], [])
        carried = detached(after)
    return sums.loss, sums.grads


def pass_full(one: Callable, chunks: list[Chunk], parameters: list, dtype) -> tuple[Tensor, list[Tensor]]:
    """Run the chunks with gradients that pass through their bounds."""
    states, rng_states = Kept(len(chunks) - 1), Kept(len(chunks))  # states[i]: the state after chunk i
    carried = None
    with torch.no_grad():
        for i, chunk in enumerate(chunks):
            rng_states.keep(i, random_state(parameters))
            if i < len(chunks) - 1:
                carried = one(chunk, carried if chunk.continues else None)[1]
                states.keep(i, [t for s in carried for t in s.tensors()])
    sums, coming = Sums(parameters, dtype), None
    last: list[Tensor] = []
    for i, chunk in reversed(list(enumerate(chunks))):
        leaves = [t.clone().requires_grad_() for t in states[i - 1]] if chunk.continues else []
        start = [BlockState(*leaves[k : k + 3]) for k in range(0, len(leaves), 3)] or None
        set_random_state(rng_states[i], parameters)
        loss, after = one(chunk, start)
        last = last or random_state(parameters)
        ends = [t for s in after for t in s.tensors()]
        coming = sums.add(loss, list(zip(ends, coming, strict=True)) if coming else [], leaves)
    set_random_state(last, parameters)  # as after one pass through everything
    return sums.loss, sums.grads


class Kept:
    """Tensors of the same shapes for each of `count` chunks, in memory that is allocated once.

    Kept one by one, they would be in the gaps between what chunks allocate and free, which malloc could then not use
    again: even
    5 kB for each of 128 chunks made it take 650 MB where tensors are 40 (bench/infctx.py).
    """

    def __init__(self, count: int):
        self.count = count
        self.room: list[Tensor] = []

    def keep(self, i: int, tensors: list[Tensor]) -> None:
        """Copy the tensors of chunk i."""
        self.room = self.room or [t.new_empty(self.count, *t.shape) for t in tensors]
        for room, tensor in zip(self.room, tensors, strict=True):
            room[i].copy_(tensor)

    def __getitem__(self, i: int) -> list[Tensor]:
        return [room[i] for room in self.room]


PASSES = {"detach": pass_detach, "full": pass_full}


def random_state(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return the RNG states of the parameters' devices."""
    device = parameters[0].device
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_state(state: list[Tensor], parameters: list[nn.Parameter]) -> None:
    """Set the RNG states of the parameters' devices."""
    torch.set_rng_state(state[0].clone())  # torch crashes on a row of a larger tensor
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1].clone(), parameters[0].device)
