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
        """Return one of the outputs; recompute all of them at the first request."""
        if self.outputs is None:
            given = [
                x[0].again(x[1]) if isinstance(x, tuple) and isinstance(x[0], RecomputeNode) else x for x in self.inputs
            ]
            with torch.no_grad():
                made = self.function(*given)
            self.outputs = [made] if isinstance(made, Tensor) else made
        output = self.outputs[index]
        self.uses -= 1
        if self.uses <= 0:
            self.outputs = None
        return output

    def again(self, index: int) -> Tensor:
        """Return an output that another function needs; it is still to be asked for."""
        self.uses += 1
        return self.get(index)


class Recomputing:
    """The tensors made so far inside the context, by their address: an alias has the same numbers."""

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
        """Replace a tensor that can be recomputed by its node."""
        known = self.known.get(place(x)) if x.is_contiguous() else None
        if known is None:
            return x
        known[0].uses += 1
        return *known, x.shape

    def unpack(self, kept):
        """Return the tensor of a packed value."""
        if isinstance(kept, Tensor):
            return kept
        made, index, shape = kept
        return made.get(index).view(shape)


def place(x: Tensor) -> tuple:
    """Return what identifies the memory of a tensor."""
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
