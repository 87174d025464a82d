"""A checkpoint's tensors -> what becomes of each tensor of the base. The formulas are the adapters' own `merge`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rwkv_peft.adapters.registry import ADAPTERS
from rwkv_peft.checkpoint import Change, Stored
from rwkv_peft.errors import UserError


def fold(tensors: Mapping[str, Tensor], sidecar: dict, base: Mapping[str, Stored], where: str) -> Change:
    """The change for an adapter. UserError if something in it has no place in the base, or it holds nothing.

    Tensors named after an adapter (blocks.0.att.key.lora_A) change the weight of that layer; others replace the base's.
    """
    method = ADAPTERS[sidecar["method"]]
    layers: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf in method.tensors:
            layers.setdefault(layer + ".weight", {})[leaf] = tensor
        else:
            whole[name] = tensor
    strange = [n for n in (*layers, *whole) if n not in base]
    strange += [n for n, t in whole.items() if n in base and t.shape != base[n].shape]
    strange += [n for n, parts in layers.items() if set(parts) != set(method.tensors)]
    if strange:
        raise UserError(f"{where}: does not fit the base: {', '.join(strange[:4])}.")
    if not layers:
        raise UserError(f"{where}: holds no {', '.join(method.tensors)}; it is no {sidecar['method']} checkpoint.")
    ranks = {parts["lora_A"].shape[0] for parts in layers.values() if "lora_A" in parts}
    if ranks - {sidecar["rank"]}:
        raise UserError(f"{where}: has rank {sorted(ranks)} inside, but its sidecar says {sidecar['rank']}.")
    must_be_finite(tensors, where)

    def change(name: str):
        if name in layers:
            return lambda weight: method.merge(weight, layers[name], sidecar)
        if name in whole:
            return lambda _: whole[name]
        return None

    return change


def must_be_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    bad = [n for n, t in tensors.items() if not torch.isfinite(t).all()]
    if bad:
        raise UserError(f"{where}: {bad[0]} holds NaN or infinity; this training went wrong, take an earlier epoch.")


def replace(tensors: Mapping[str, Tensor], base: Mapping[str, Stored], where: str) -> Change:
    """The change for a full run: every tensor that it trained is replaced. UserError if the base has no place for one."""
    strange = [n for n, t in tensors.items() if n not in base or t.shape != base[n].shape]
    if strange:
        raise UserError(f"{where}: is no full run of this base: {', '.join(strange[:4])}.")
    must_be_finite(tensors, where)
    return lambda name: (lambda _: tensors[name]) if name in tensors else None
