"""Checkpoints -> what becomes of each tensor of the base. The formulas are the adapters' own `merge`.

Several checkpoints are folded in turn, each into what the one before has made of the base, or averaged: the base and the
weighted mean of their changes. Sums are float32 whatever the base is kept in; rounding comes once, at the end.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_peft.adapters import inject
from rwkv_peft.adapters.base import compute_dtype
from rwkv_peft.adapters.inject import AdapterConfig
from rwkv_peft.adapters.registry import ADAPTERS
from rwkv_peft.adapters.specs import METHODS
from rwkv_peft.checkpoint.pth import TensorInfo
from rwkv_peft.checkpoint.pth_rewrite import TensorUpdate
from rwkv_peft.common.errors import UserError
from rwkv_peft.common.formatting import join_names, plural
from rwkv_peft.model.arch import Geometry, shapes, state_shapes
from rwkv_peft.model.layers import Linear
from rwkv_peft.quantize import quantise


@dataclass(frozen=True)
class MergeInput:
    """A checkpoint that goes into the result.

    where: the file, for messages. tensors: what was trained. start: what its adapters began with. quantised: fold into
    the weights as the run had them in memory, by the setup's quant, not into the original ones. leaves: by layer, what its
    adapter has; states: names of learnt states (both are filled in by `opened`).
    """

    where: str
    setup: AdapterConfig
    tensors: Mapping[str, Tensor]
    start: Mapping[str, Tensor] = field(default_factory=dict)
    quantised: bool = False
    leaves: Mapping[str, list[str]] = field(default_factory=dict)
    states: Sequence[str] = ()

    def layer(self, name: str) -> dict[str, Tensor]:
        """Trained and start tensors of the layer whose weight this is, by leaf; empty if it has no adapter."""
        layer = name.removesuffix(".weight")
        if layer not in self.leaves:
            return {}
        starts = ADAPTERS[self.setup.method].starts(**self.setup.options)
        trained = {leaf: self.tensors[f"{layer}.{leaf}"] for leaf in self.leaves[layer]}
        return trained | {leaf: self.start[f"{layer}.{leaf}"] for leaf in starts}

    def apply(self, name: str, weight: Tensor, first: Tensor) -> Tensor:
        """What becomes of a tensor of the base. weight: as it is by now, float32 or wider. first: as the base has it."""
        layer = self.layer(name)
        if layer:
            return ADAPTERS[self.setup.method].merge(weight, layer, self.setup.options)
        if name in self.tensors:
            trained = self.tensors[name].to(weight.dtype)
            return trained if weight is first else weight + (trained - first)
        return weight

    def compressed(self, name: str, weight: Tensor, geometry: Geometry) -> Tensor:
        """The weight as the run had it: compressed, and for adapters that take their part out first, without that part."""
        if name.removesuffix(".weight") not in self.setup.compressed(geometry):
            return weight
        kind, weight = weight.dtype, weight.float()  # as in training
        taken = torch.zeros(())
        layer = self.layer(name)
        if layer and ADAPTERS[self.setup.method].changes_base:
            linear: Any = Linear(weight.shape[1], weight.shape[0])
            linear.weight = nn.Parameter(weight, requires_grad=False)
            start = {leaf: layer[leaf] for leaf in ADAPTERS[self.setup.method].start}
            rest = inject.make(self.setup, linear, start).linear.dense(torch.float32).detach()
            taken, weight = weight - rest, rest
        return (quantise(weight, self.setup.quant).dense(torch.float32) + taken).to(kind)


def opened(part: MergeInput, base: Mapping[str, TensorInfo], geometry: Geometry) -> MergeInput:
    """The part with its tensors sorted. UserError if something in it has no place in the base, or it holds nothing."""
    layers, whole, states = inject.sorted_by_place(part.tensors, geometry)
    method, name, where = METHODS[part.setup.method], part.setup.method, part.where
    strange = [n for n in whole if n not in base or tuple(part.tensors[n].shape) != base[n].shape]
    strange += [n for n in states if tuple(part.tensors[n].shape) != state_shapes(geometry).get(n)]
    strange += list(layers) if layers and not method.wraps else []
    strange += states if states and name != "state" and not method.saves_model else []
    for layer, leaves in layers.items() if method.wraps else ():
        outputs, inputs = base[f"{layer}.weight"].shape
        rank = part.setup.options.get("rank")
        if rank and (refused := ADAPTERS[name].refusal(outputs, inputs, **part.setup.options)):
            raise UserError(
                f"{where}: does not fit the base: its rank, {rank}, {refused} ({layer} is {outputs} x {inputs})."
            )
        wanted = ADAPTERS[name].shapes(outputs, inputs, **part.setup.options)
        strange += [f"{layer}.{leaf}" for leaf in {*wanted, *leaves} if leaf not in wanted or leaf not in leaves]
        strange += [
            f"{layer}.{leaf} ({list(part.tensors[f'{layer}.{leaf}'].shape)} instead of {list(shape)})"
            for leaf, shape in wanted.items()
            if leaf in leaves and tuple(part.tensors[f"{layer}.{leaf}"].shape) != tuple(shape)
        ]
        starts = ADAPTERS[name].starts(**part.setup.options)
        lost = [leaf for leaf in starts if f"{layer}.{leaf}" not in part.start]
        if lost:
            raise UserError(
                f"{where}: what it began with is missing: {layer}.{lost[0]}. init_{name}.pth lies beside a run."
            )
    if strange:
        raise UserError(f"{where}: does not fit the base: {', '.join(strange[:4])}.")
    lost = [n for n in shapes(geometry) if n not in part.tensors] if method.saves_model else []
    if lost:
        words = f"lacks {join_names(lost, 3)}; it is another model, or damaged"
        raise UserError(f"{where}: does not fit the base: {words}.")
    if method.wraps and not layers:
        raise UserError(f"{where}: holds no adapter on any layer; it is no {method.words} checkpoint.")
    depth = {layer.split(".")[1] for layer in layers}
    if layers and len(depth) != geometry.n_layer:
        raise UserError(
            f"{where}: has adapters on {len(depth)} of the base's {geometry.n_layer} layers; it was trained on another base."
        )
    if not part.tensors:
        raise UserError(f"{where}: holds nothing.")
    if name == "state" and len([n for n in states if n.endswith("time_state")]) != geometry.n_layer:
        raise UserError(
            f"{where}: holds {plural(len(states), 'state')}; the base has {plural(geometry.n_layer, 'layer')}."
        )
    # (a sum is finite where all numbers are and small enough, and takes a tenth of the time)
    bad = [n for n, t in part.tensors.items() if not torch.isfinite(t.sum()) and not torch.isfinite(t).all()]
    if bad:
        raise UserError(f"{where}: {bad[0]} holds NaN or infinity; this training went wrong, take an earlier epoch.")
    return dataclasses.replace(part, leaves=layers, states=states)


def touches(part: MergeInput, name: str, geometry: Geometry) -> bool:
    """Whether the part changes a tensor of the base."""
    by_quant = part.quantised and name.removesuffix(".weight") in part.setup.compressed(geometry)
    return by_quant or name in part.tensors or name.removesuffix(".weight") in part.leaves


def in_turn(parts: Sequence[MergeInput], geometry: Geometry) -> TensorUpdate:
    """The change of several checkpoints, each folded into what the ones before it made."""

    def change(name: str):
        mine = [part for part in parts if touches(part, name, geometry)]
        if not mine:
            return None

        def made(base: Tensor) -> Tensor:
            if not base.is_floating_point():  # no weights, and no sums: the last one's
                return mine[-1].tensors[name]
            first = weight = base.to(compute_dtype(base.dtype))
            for part in mine:
                if part.quantised:
                    first = weight = part.compressed(name, weight, geometry)
                weight = part.apply(name, weight, first)
            return weight

        return made

    return change


def average(parts: Sequence[MergeInput], weights: Sequence[float], geometry: Geometry) -> TensorUpdate:
    """The base and the weighted mean of what the checkpoints change in it. weights: their shares, which sum to 1."""

    def change(name: str):
        if not any(touches(part, name, geometry) for part in parts):
            return None

        def made(base: Tensor) -> Tensor:
            if not base.is_floating_point():  # no weights, and no means: the first one's
                return next(part.tensors[name] for part in parts if name in part.tensors)
            first = base.to(compute_dtype(base.dtype))
            moved = torch.zeros_like(first)
            for part, share in zip(parts, weights, strict=True):
                moved += (part.apply(name, first, first) - first) * share
            return first + moved

        return made

    return change


def added(parts: Sequence[MergeInput], weights: Sequence[float] | None) -> dict[str, Tensor]:
    """Learnt states, which the base has not got: of the one part that has one, or their weighted mean."""
    having = [i for i, part in enumerate(parts) if part.states]
    if not having:
        return {}
    if weights is None and len(having) > 1:
        raise UserError(
            f"{parts[having[1]].where}: a text begins with one state, and {parts[having[0]].where} has one too."
        )
    if weights is not None and len(having) < len(parts):
        raise UserError(f"{parts[having[0]].where}: holds a state, and the others do not; they cannot be averaged.")
    shares = weights or [1.0] * len(parts)
    names = parts[having[0]].states
    if any(set(parts[i].states) != set(names) for i in having):
        raise UserError(f"{parts[having[0]].where}: learns other states than the others do (state_shifts).")
    return {n: functools.reduce(torch.add, [parts[i].tensors[n].float() * shares[i] for i in having]) for n in names}
