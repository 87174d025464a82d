"""What is cheap to compute is computed again in the backward pass instead of being kept.

Inside `recomputing`, tensors that the listed operations made are not kept where autograd saves them: it keeps what they were
made from, which is saved anyway, and makes them again, by the same functions, when their gradients are due. So the
results are the same to the last bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class RecomputeNode:
    """Outputs of a function that can be had again. inputs: tensors, or (Made, index) of others, or anything else."""

    def __init__(self, function: Callable, inputs: Sequence[Any]):
        self.function, self.inputs = function, inputs
        self.uses = 0  # how often autograd will still ask
        self.outputs: Sequence[Tensor] | None = None

    def get(self, index: int) -> Tensor:
        if self.outputs is None:
            given = [
                x[0].again(x[1]) if isinstance(x, tuple) and isinstance(x[0], RecomputeNode) else x for x in self.inputs
            ]
            with torch.no_grad():
                made = self.function(*given)
            self.outputs = [made] if isinstance(made, Tensor) else made
        found = self.outputs[index]
        self.uses -= 1
        if self.uses <= 0:
            self.outputs = None
        return found

    def again(self, index: int) -> Tensor:
        """For another function's sake."""
        self.uses += 1
        return self.get(index)


class Recomputing:
    """What was made so far inside the block, by where it lies in memory: an alias holds the same numbers."""

    def __init__(self):
        self.known: dict[tuple, tuple[RecomputeNode, int]] = {}
        self.alive: list[Tensor] = []  # so that no other tensor comes to lie there

    def call(self, function: Callable, *inputs: Any):
        """function(*inputs), whose outputs need not be kept."""
        outputs = function(*inputs)
        sources = [self.known.get(place(x), x.detach()) if isinstance(x, Tensor) else x for x in inputs]
        made = RecomputeNode(function, sources)
        for index, output in enumerate([outputs] if isinstance(outputs, Tensor) else outputs):
            self.known[place(output)] = made, index
            self.alive.append(output)
        return outputs

    def pack(self, x: Tensor):
        found = self.known.get(place(x)) if x.is_contiguous() else None
        if found is None:
            return x
        found[0].uses += 1
        return *found, x.shape

    def unpack(self, kept):
        if isinstance(kept, Tensor):
            return kept
        made, index, shape = kept
        return made.get(index).view(shape)


def place(x: Tensor) -> tuple:
    return x.data_ptr(), x.numel(), x.dtype, x.device


active: list[Recomputing] = []


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """A block whose `cheap` calls are not kept."""
    active.append(Recomputing())
    try:
        with torch.autograd.graph.saved_tensors_hooks(active[-1].pack, active[-1].unpack):
            yield
    finally:
        done = active.pop()
        done.alive.clear()
        done.known.clear()


def recomputable(function: Callable, *inputs: Any):
    """function(*inputs): what it makes is not kept inside `recomputing`. Nothing in it may be random."""
    return active[-1].call(function, *inputs) if active and torch.is_grad_enabled() else function(*inputs)
