"""A merge some rows at a time: what belongs to these rows of a weight is cut out of the checkpoints, and the formulas are
asked for them alone.

So memory does not grow with the weight, and what is computed stays in the processor's cache.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from torch import Tensor

from rwkv_peft.adapters.specs import METHODS
from rwkv_peft.checkpoint.pth_rewrite import Change, RowwiseUpdate
from rwkv_peft.model.arch import Geometry

from . import fold
from .fold import MergeInput

# methods whose formula makes each row from the same row of the weight: leaf -> the axis that counts rows, where it has one
ROWS = {
    "lora": {"lora_B": 0},
    "dora": {"lora_B": 0, "lora_magnitude": 0},
    "pissa": {"lora_B": 0, "init_lora_B": 0},
    "miss": {"disha": 1},
    "bat": {},
}
# Bat works on square blocks of this many rows; PiSSA refuses a weight with fewer
TOGETHER = {"pissa": "rank", "bat": "rank"}


def by_rows(change: Change, parts: Sequence[MergeInput], weights: Sequence[float] | None, geometry: Geometry) -> Change:
    """The change of these parts, in turn or (with weights) averaged, made by rows where that is the same."""

    def cut_up(name: str):
        make = change(name)
        mine = [part for part in parts if fold.touches(part, name, geometry)]
        if make is None or not all(is_by_rows(part, name, geometry) for part in mine):
            return make

        def rows(tensor: Tensor, block: slice) -> Tensor:
            some = [cut(part, name, block) for part in parts]
            return (fold.average(some, weights, geometry) if weights else fold.in_turn(some, geometry))(name)(tensor)

        options = [part.setup.options.get(TOGETHER.get(part.setup.method, ""), 1) for part in mine]
        return RowwiseUpdate(rows, math.lcm(*options))

    return cut_up


def is_by_rows(part: MergeInput, name: str, geometry: Geometry) -> bool:
    compressed = part.quantised and name.removesuffix(".weight") in part.setup.compressed(geometry)
    return not compressed and (part.setup.method in ROWS or not METHODS[part.setup.method].wraps)


def cut(part: MergeInput, name: str, block: slice) -> MergeInput:
    """What the part has of these rows of a tensor, and nothing else."""
    layer, axes = name.removesuffix(".weight"), ROWS.get(part.setup.method, {})

    def some(leaf: str, tensor: Tensor) -> Tensor:
        return tensor.narrow(axes[leaf], block.start, block.stop - block.start) if leaf in axes else tensor

    tensors = {f"{layer}.{leaf}": some(leaf, tensor) for leaf, tensor in part.layer(name).items()}
    if name in part.tensors:
        tensors[name] = part.tensors[name][block] if part.tensors[name].dim() else part.tensors[name]
    leaves = {layer: part.leaves[layer]} if layer in part.leaves else {}
    return dataclasses.replace(part, tensors=tensors, start=tensors, leaves=leaves)
