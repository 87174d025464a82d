"""An adapter is a layer with a law: F.linear(x, merge(W)) == forward(x). Training uses the one, merging the other."""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_peft.model.layers import Linear
from rwkv_peft.quantize.linear import QuantLinear

AnyLinear = Linear | QuantLinear  # a layer that can be adapted, before and after its weight is compressed


class Adapter(nn.Module, abc.ABC):
    """A frozen linear layer and a small trained change to it.

    A subclass names its trained tensors in `tensors` and writes three things: their `shapes`; `forward`; and `merge`, a
    static function of tensors that gives the one matrix which would do the same. Trained tensors are float32; forward
    computes in the dtype of its input.

    The layer may be replaced by a quantised one after the adapter was made. So later code asks it for an output, or for
    `dense(dtype)`, never for its weight.
    """

    tensors: tuple[str, ...] = ()  # trained
    start: tuple[str, ...] = ()  # not trained, and impossible to recompute: a run keeps them in a file beside it
    # leaf -> its axis that counts the weight's rows, if `merge` makes each row from the same row of the weight; None if not
    row_axes: dict[str, int] | None
    row_block: str = ""  # the option that says how many rows `merge` works on together; "" for one
    no_peft: str = ""  # why there is no `to_peft`
    changes_base: bool = False  # __init__ takes a part out of the layer's weight, and forward puts it back

    def __init_subclass__(cls) -> None:
        """Refuse a class that does not say what merging by rows needs: a default would be wrong for some."""
        super().__init_subclass__()
        if not hasattr(cls, "row_axes"):
            raise TypeError(f"{cls.__module__}.{cls.__name__} lacks row_axes (see Adapter)")

    linear: AnyLinear

    def __init__(self, linear: AnyLinear):
        super().__init__()
        self.linear = linear

    @staticmethod
    @abc.abstractmethod
    def shapes(outputs: int, inputs: int, *args: Any, **options: Any) -> dict[str, tuple[int, ...]]:
        """Trained tensors of a layer of this size, by name. options: keyword arguments of __init__."""

    @classmethod
    def count(cls, outputs: int, inputs: int, **options: Any) -> int:
        """How many values are trained in a layer of this size."""
        return sum(math.prod(shape) for shape in cls.shapes(outputs, inputs, **options).values())

    @classmethod
    def starts(cls, **options: Any) -> tuple[str, ...]:
        """The start tensors of every layer with these options."""
        return cls.start

    @staticmethod
    def refusal(outputs: int, inputs: int, *args: Any, **options: Any) -> str:
        """Why these options do not fit a layer of this size, as what the first of them "must be ..."; empty if they do."""
        return ""

    @staticmethod
    @abc.abstractmethod
    def merge(weight: Tensor, tensors: dict[str, Tensor], sidecar: Mapping[str, Any]) -> Tensor:
        """The merged weight [out, in], in the dtype it was computed in: see `exact`.

        weight: the base's. tensors: this layer's trained and start tensors by name (lora_A, ...). sidecar: how the run
        was set, under the names of __init__.
        """

    @staticmethod
    def product(tensors: dict[str, Tensor], sidecar: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
        """B [out, r] and A [r, in], float32, where the merged weight is W + B A; None where it is another one."""
        return None

    @staticmethod
    def to_peft(tensors: dict[str, Tensor], sidecar: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The adapter that peft would have here: fields of adapter_config.json, and this layer's tensors by peft's names.

        Left as it is by adapters that peft has not got (`no_peft` says why).

        tensors: this layer's trained and start tensors, float32. UserError for tensors that peft cannot compute with.
        """
        raise NotImplementedError

    def begun(self) -> dict[str, Tensor]:
        """Copies of the start tensors. To be asked before the first training step."""
        return {}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What small sums about a weight or an input of this dtype are computed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def device_of(linear: nn.Module) -> torch.device:
    """Return the device of a layer's weight, whatever it is stored as."""
    return next(itertools.chain(linear.parameters(), linear.buffers())).device
