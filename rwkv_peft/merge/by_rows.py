"""Merge some rows at a time: the formulas get only what the checkpoints have of these rows.

So memory does not grow with the weight, and intermediate values stay in the processor's cache.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from torch import Tensor

from rwkv_peft.adapters.registry import ADAPTERS
from rwkv_peft.checkpoint.pth_rewrite import RowwiseUpdate, TensorUpdate
from rwkv_peft.model.arch import Geometry

from . import fold
from .fold import MergeInput


def by_rows(
    change: TensorUpdate, parts: Sequence[MergeInput], weights: Sequence[float] | None, geometry: Geometry
) -> TensorUpdate:
    """The change of these parts, in turn or (with weights) averaged, made by rows where that is the same."""

    def cut_up(name: str):
        make = change(name)
        mine = [part for part in parts if fold.touches(part, name, geometry)]
        if make is None or not all(is_by_rows(part, name, geometry) for part in mine):
            return make

        def rows(tensor: Tensor, block: slice) -> Tensor:
            some = [cut(part, name, block) for part in parts]
            update = (fold.average(some, weights, geometry) if weights else fold.in_turn(some, geometry))(name)
            assert update is not None
            return update(tensor)

        return RowwiseUpdate(rows, math.lcm(*(rows_together(part) for part in mine)))

    return cut_up


def is_by_rows(part: MergeInput, name: str, geometry: Geometry) -> bool:
    """Return whether a checkpoint's change of a tensor can be made by rows."""
    compressed = part.quantised and name.removesuffix(".weight") in part.setup.compressed(geometry)
    return not compressed and row_axes(part) is not None


def row_axes(part: MergeInput) -> dict[str, int] | None:
    """The axis of the part's tensors that counts the weight's rows; {} for whole tensors, None where rows depend on others."""
    adapter = ADAPTERS.get(part.setup.method)
    return adapter.row_axes if adapter else {}


def rows_together(part: MergeInput) -> int:
    """How many rows the method works on at once."""
    adapter = ADAPTERS.get(part.setup.method)
    return part.setup.options.get(adapter.row_block, 1) if adapter else 1


def cut(part: MergeInput, name: str, block: slice) -> MergeInput:
    """What the part has of these rows of a tensor, and nothing else."""
    layer, axes = name.removesuffix(".weight"), row_axes(part) or {}

    def some(leaf: str, tensor: Tensor) -> Tensor:
        return tensor.narrow(axes[leaf], block.start, block.stop - block.start) if leaf in axes else tensor

    tensors = {f"{layer}.{leaf}": some(leaf, tensor) for leaf, tensor in part.layer(name).items()}
    if name in part.tensors:
        tensors[name] = part.tensors[name][block] if part.tensors[name].dim() else part.tensors[name]
    leaves = {layer: part.leaves[layer]} if layer in part.leaves else {}
    return dataclasses.replace(part, tensors=tensors, start=tensors, leaves=leaves)
