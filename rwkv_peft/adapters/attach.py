"""A method on a model: what is wrapped, what is trained, what of it goes into files and comes back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..model.arch import LINEARS, whole_tensors
from .base import file_name, inject
from .registry import ADAPTERS


def adapt(model: nn.Module, method: str, parts: Iterable[str], rank: int, alpha: float, dropout: float) -> None:
    """Freeze the model; wrap the linears of att and ffn if they are among the parts, train the others whole in float32."""
    parts = tuple(parts)
    layers = [f"blocks.{i}.{x}" for i in range(len(model.blocks)) for part in parts for x in LINEARS.get(part, ())]
    whole = whole_tensors([n for n, _ in model.named_parameters()], parts)
    wrap(model, method, layers, whole, rank, alpha, dropout)


def wrap(model: nn.Module, method: str, layers, whole, rank: int, alpha: float, dropout: float) -> None:
    """Freeze the model; put adapters on these layers, and train these tensors whole in float32."""
    model.requires_grad_(False)
    for name in whole:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(model.get_parameter(name).detach().float()))
    inject(model, layers, lambda linear: ADAPTERS[method](linear, rank, alpha, dropout))


def train_everything(model: nn.Module) -> None:
    """FINETUNE_MODE=full: every weight, kept in float32 while it is trained."""
    for module in model.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, leaf, nn.Parameter(parameter.detach().float()))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training changes, under the names it has in files."""
    return {file_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def load_trained(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Put a checkpoint's tensors into the model. UserError unless names and shapes are exactly those that are trained."""
    wanted = trained(model)
    wrong = [f"{n} is missing" for n in wanted if n not in tensors]
    wrong += [f"{n} does not belong to this setting" for n in tensors if n not in wanted]
    wrong += [
        f"{n} is {list(t.shape)} instead of {list(wanted[n].shape)}"
        for n, t in tensors.items()
        if n in wanted and t.shape != wanted[n].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"{where}: does not fit (rank, parts and base must be those of its run): {'; '.join(wrong[:3])}{more}."
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])


def attach_checkpoint(model: nn.Module, tensors: Mapping[str, Tensor], sidecar: Mapping, where: str) -> None:
    """A saved adapter on its base, as it was trained, without dropout. What it wraps is told by its tensors' names."""
    leaves = ADAPTERS[sidecar["method"]].tensors
    layers = sorted({n.rpartition(".")[0] for n in tensors if n.rpartition(".")[2] in leaves})
    whole = [n for n in tensors if n.rpartition(".")[2] not in leaves]
    known = dict(model.named_parameters())
    strange = [n for n in (*(f"{layer}.weight" for layer in layers), *whole) if n not in known]
    if strange:
        raise UserError(f"{where}: does not fit its base, which has no {strange[0]}.")
    wrap(model, sidecar["method"], layers, whole, sidecar["rank"], sidecar["alpha"], dropout=0.0)
    load_trained(model, tensors, where)


def count_trained(shapes: Mapping[str, tuple[int, ...]], full: bool, parts: Iterable[str], rank: int) -> int:
    """How many values such a run trains, from the base's shapes alone."""
    if full:
        return sum(math.prod(s) for s in shapes.values())
    linears = tuple(f"{x}.weight" for part in parts for x in LINEARS.get(part, ()))
    wrapped = sum(rank * sum(shape) for name, shape in shapes.items() if linears and name.endswith(linears))
    return wrapped + sum(math.prod(shapes[n]) for n in whole_tensors(shapes, parts))
