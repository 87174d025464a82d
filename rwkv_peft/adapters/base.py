"""An adapter is a layer with a law: F.linear(x, merge(W)) == forward(x). Training uses the one, merging the other."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable

from torch import Tensor, nn


class Adapter(nn.Module, abc.ABC):
    """A frozen linear layer and a small trained change to it.

    A subclass names its trained tensors in `tensors` and writes two things: `forward`, and `merge`, a static function
    of tensors that gives the one matrix which would do the same.
    """

    tensors: tuple[str, ...] = ()

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    @staticmethod
    @abc.abstractmethod
    def merge(weight: Tensor, tensors: dict[str, Tensor], sidecar: dict) -> Tensor:
        """The merged weight [out, in], in the dtype it was computed in.

        weight: the base's. tensors: this layer's trained tensors by name (lora_A, ...). sidecar: how the run was set.
        """


def inject(model: nn.Module, names: Iterable[str], make: Callable[[nn.Module], Adapter]) -> None:
    """Replace the linear layers of these names by make(linear)."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, make(getattr(owner, leaf)))


def file_name(parameter: str) -> str:
    """The name that a model's parameter has in files: the frozen layer inside an adapter keeps its own."""
    return parameter.replace(".linear.", ".")
