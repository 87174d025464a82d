"""A method on a model: what is wrapped, compressed and trained, what of it goes into files and comes back."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_peft.common.errors import UserError
from rwkv_peft.model.arch import STATE_NAME, Geometry, linear_layers, shapes, state_shapes, whole_tensors
from rwkv_peft.model.layers import Linear
from rwkv_peft.model.rwkv import RWKV, fresh_state, set_state
from rwkv_peft.quantize import QuantEmbedding, QuantLinear

from .base import Adapter, AnyLinear
from .deferred import Later
from .registry import ADAPTERS
from .specs import METHODS, PARTS

OPTIONAL = ("rslora", "niter", "shifts")  # sidecars of earlier versions do not say them


@dataclass(frozen=True)
class AdapterConfig:
    """What a run does to a model.

    method: of methods.METHODS. options: keyword arguments of its adapter, as sidecars keep them. parts: of methods.PARTS.
    quant: none or a mode of quantize; quant_parts: what of the base it compresses (att, ffn, emb, head); quant_kept: layers of
    these that it leaves as they are.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    dropout: float = 0.0
    quant: str = "none"
    quant_parts: tuple[str, ...] = ()
    quant_kept: tuple[str, ...] = ()

    def wrapped(self, geometry: Geometry) -> list[str]:
        """The linear layers that get an adapter."""
        return linear_layers(geometry, self.parts) if METHODS[self.method].wraps else []

    def whole(self, geometry: Geometry) -> list[str]:
        """Return the base's tensors that are trained whole, without those of LISA's layers (callbacks/lisa.py)."""
        return list(shapes(geometry)) if self.method == "full" else whole_tensors(geometry, self.parts)

    def states(self, geometry: Geometry) -> dict[str, Tensor]:
        """The states that are learnt, before the first step."""
        return fresh_state(geometry, self.options.get("shifts", False)) if self.method == "state" else {}

    def compressed(self, geometry: Geometry) -> set[str]:
        """The layers whose frozen weight is compressed."""
        if self.quant == "none":
            return set()
        parts = {*linear_layers(geometry, self.quant_parts), *({"emb", "head"} & set(self.quant_parts))}
        return parts - set(self.quant_kept)


def setup_of(sidecar: Mapping[str, Any], where: str) -> AdapterConfig:
    """How a checkpoint's run was set. UserError for a method that this version does not know."""
    name = sidecar["method"]
    if name not in METHODS:
        raise UserError(f"{where}: holds a {name} run, which this version does not know.")
    missing = [option for option in METHODS[name].options if option not in sidecar and option not in OPTIONAL]
    if missing:
        raise UserError(f"{where}: its sidecar does not say {', '.join(missing)}.")
    return AdapterConfig(name, {option: sidecar[option] for option in METHODS[name].options if option in sidecar})


def inject_adapters(
    model: RWKV,
    setup: AdapterConfig,
    keep: torch.dtype | None = None,
    start: Mapping[str, Tensor] | None = None,
    device: str | torch.device = "cpu",
    later: Later | None = None,
) -> dict[str, Tensor]:
    """Make a built model what the setup says, one layer after another.

    So mapped weights are read one at a time, and memory has the largest of them beside the result.

    Args:
        model: With the base's weights.
        setup: The method and its options.
        keep: The dtype of frozen weights that are not compressed; None leaves them as they are.
        start: For a resumed run, the tensors that adapters began with, by name (PiSSA).
        device: Where weights are decomposed and compressed, and then stay.
        later: If given, what becomes of frozen weights, and of those trained whole, is put here for `deferred.materialize`.

    Returns:
        What a run must keep beside its checkpoints, by name: empty but for PiSSA.
    """
    geometry = model.geometry
    # (a base may hold a learnt state: what is learnt begins there)
    own = {name: p.detach().clone() for name, p in model.named_parameters() if STATE_NAME.fullmatch(name)}
    states = {name: own.get(name, zero) for name, zero in setup.states(geometry).items()}
    return change_layers(
        model, setup, setup.wrapped(geometry), setup.whole(geometry), states, keep, start, device, later
    )


def put(model: nn.Module, name: str, tensor: Tensor, learns: bool) -> None:
    """Make a tensor the model's parameter of this name."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=learns))


def change_layers(
    model: RWKV, setup: AdapterConfig, wrapped, whole, states, keep, start, device, later: Later | None = None
) -> dict[str, Tensor]:
    """adapt, with the layers to be wrapped, the tensors trained whole and the learnt states given by name."""
    model.requires_grad_(False)
    for name in whole:
        weight = model.get_parameter(name)
        if later is None:
            put(model, name, weight.detach().float(), True)
        else:
            later[name] = weight.requires_grad_().detach().float
    set_state(model, states)
    begun: dict[str, Tensor] = {}
    wrapped, compressed = set(wrapped), setup.compressed(model.geometry)
    for name in (*linear_layers(model.geometry, PARTS), "head", "emb"):
        if name not in wrapped and name not in compressed:
            continue
        module: Any = model.get_submodule(name)
        mode = setup.quant if name in compressed else None
        file = module.weight.detach()
        # a wider copy of what the file has can be made from what the adapter holds, as of any other weight
        copied = later is not None and mode is None and not takes_part(setup) and widens(file, keep)
        wraps = setup if name in wrapped else None
        begins = initial_tensors(setup, name, start) if wraps else {}
        made = whole_layer(wraps, module, name, mode, None if copied else keep, device, begins)
        model.set_submodule(name, made)
        own = made.begun() if wraps else {}
        begun |= {f"{name}.{leaf}": tensor for leaf, tensor in own.items()}
        if later is not None and not copied:
            # its adapter may have looked at what is frozen; that is let go until its turn
            module.weight = nn.Parameter(file, requires_grad=False)
            inner = f"{name}.linear" if wraps else name
            model.set_submodule(inner, module)
            later[inner] = functools.partial(frozen_part, setup, module, name, mode, keep, device, own)
        give_back_freed()
    for name, weight in list(model.named_parameters()) if keep is not None else ():
        alone = later is None or name.removesuffix(".weight") not in later
        if alone and not weight.requires_grad and not name.endswith("_state") and weight.dtype != keep:
            if later is not None:
                later[name] = functools.partial(weight.to, keep)
            else:
                put(model, name, weight.to(keep), False)
    return begun


def widens(weight: Tensor, keep: torch.dtype | None) -> bool:
    """Whether nothing of a weight is lost in this dtype."""
    return keep is not None and torch.promote_types(weight.dtype, keep) == keep


def give_back_freed() -> None:
    """Return freed memory to the system.

    Between a layer's results malloc would keep the holes of intermediate values: PiSSA on 0.4B took 1,194 MB for results of
    630 (bench/load.py).
    """
    with contextlib.suppress(OSError, AttributeError):  # glibc has it, and glibc needs it
        ctypes.CDLL(None).malloc_trim(0)


def takes_part(setup: AdapterConfig) -> bool:
    """Whether the method's adapters take a part out of the weights that they wrap."""
    return METHODS[setup.method].wraps and ADAPTERS[setup.method].changes_base


def whole_layer(setup: AdapterConfig | None, linear: AnyLinear, name: str, mode, keep, device, start) -> Any:
    """A layer with its adapter, if there is a setup, and its weight as it is kept. start: see `make`."""
    if setup is None:
        return frozen(linear, name, mode, keep, device)
    if not takes_part(setup):
        return make(setup, frozen(linear, name, mode, keep, device), start)
    assert isinstance(linear, Linear), "it is compressed after the adapter has taken its part"
    linear.weight = nn.Parameter(linear.weight.detach().to(device), requires_grad=False)
    adapter = make(setup, linear, start)
    adapter.linear = frozen(adapter.linear, name, mode, keep, device)  # what is left of it
    return adapter


def frozen_part(setup: AdapterConfig, linear: AnyLinear, name: str, mode, keep, device, start) -> Any:
    """The frozen layer inside of `whole_layer`, once more. start: what its adapter began with."""
    if start and takes_part(setup):
        return whole_layer(setup, linear, name, mode, keep, device, start).linear
    return frozen(linear, name, mode, keep, device)


def make(setup: AdapterConfig, linear: AnyLinear, start: Mapping[str, Tensor] | None = None) -> Adapter:
    """Return an adapter of the setup's method on a layer. start: for a resumed run, what it began with, by leaf."""
    more: dict[str, Any] = {"dropout": setup.dropout} if METHODS[setup.method].dropout else {}
    more |= {"start": start} if start else {}
    return ADAPTERS[setup.method](linear, **setup.options, **more)


def initial_tensors(setup: AdapterConfig, layer: str, start: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """What the adapter of a layer began with, by leaf."""
    leaves = ADAPTERS[setup.method].start
    known = start or {}
    return {leaf: known[f"{layer}.{leaf}"] for leaf in leaves if f"{layer}.{leaf}" in known}


def frozen(module: Any, name: str, mode: str | None, keep: torch.dtype | None, device) -> Any:
    """The layer with its weight compressed, or converted to the dtype it is kept in. mode: of quantize, or None."""
    weight = module.weight.detach()
    if mode is None:
        module.weight = nn.Parameter(weight if keep is None else weight.to(keep), requires_grad=False)
        return module
    try:
        return (QuantEmbedding if name == "emb" else QuantLinear)(weight.to(device), mode)
    except UserError as error:
        raise UserError(f"{name}.weight of the base: {error}. Take another copy of it; MODEL_PATH names it.") from None


def given(model: RWKV, setup: AdapterConfig) -> Callable[[str], bool]:
    """Return a function that says whether a parameter, by its name, is frozen and has the base's values.

    Such a parameter may have another dtype; it is not drawn, trained, compressed, or what an adapter has left of it.
    """
    known = set(shapes(model.geometry)) - {*trainable_params(model)}
    if takes_part(setup):
        known -= {f"{name}.weight" for name in setup.wrapped(model.geometry)}
    return lambda parameter: file_name(parameter) in known


def file_name(parameter: str) -> str:
    """The name that a model's parameter has in files: the frozen layer inside an adapter keeps its own."""
    return parameter.replace(".linear.", ".")


def trainable_params(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training changes, under the names it has in files."""
    return {file_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def load_trained(model: nn.Module, tensors: Mapping[str, Tensor], where: str, later: Later | None = None) -> None:
    """Put a checkpoint's tensors into the model. UserError unless names and shapes are exactly those that are trained."""
    load_into(trainable_params(model), tensors, where, later)


def load_into(
    wanted: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], where: str, later: Later | None = None
) -> None:
    """Put tensors into the parameters of their names, or into what these become later.

    Raises:
        UserError: names or shapes are not exactly those that are wanted.
    """
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
            if later and name in later:  # (only what is trained whole, which has the same name everywhere)
                later[name] = tensors[name].float
            else:
                parameter.copy_(tensors[name])


def attach_checkpoint(
    model: RWKV,
    tensors: Mapping[str, Tensor],
    setup: AdapterConfig,
    where: str,
    keep: torch.dtype | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> None:
    """Put a saved adapter on its base, as it was trained, without dropout. Its tensors' names say what it wraps."""
    layers, whole, states = sorted_by_place(tensors, model.geometry)
    known = {*shapes(model.geometry)}
    wanted = state_shapes(model.geometry)
    strange = [n for n in whole if n not in known] + [n for n in states if n not in wanted]
    strange += [
        f"{n} of shape {list(tensors[n].shape)}" for n in states if n in wanted and tensors[n].shape != wanted[n]
    ]
    if strange:
        raise UserError(f"{where}: does not fit its base, which has no {strange[0]}.")
    if layers and not METHODS[setup.method].wraps:
        raise UserError(f"{where}: holds adapters ({next(iter(layers))}), which a {setup.method} run has not.")
    lost = [n for n in layers if ADAPTERS[setup.method].changes_base and not initial_tensors(setup, n, start)]
    if lost:
        raise UserError(
            f"{where}: the file of what its adapters began with has nothing of {lost[0]}; it is another run's."
        )
    change_layers(model, setup, layers, whole, {n: tensors[n] for n in states}, keep, start, "cpu")
    load_trained(model, tensors, where)


def sorted_by_place(names: Iterable[str], geometry: Geometry) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """A checkpoint's names: those of adapters by their layer (the leaves), the base's tensors, and states."""
    linears = set(linear_layers(geometry, PARTS))
    layers: dict[str, list[str]] = {}
    whole: list[str] = []
    states: list[str] = []
    for name in names:
        layer, _, leaf = name.rpartition(".")
        if layer in linears and leaf != "weight":
            layers.setdefault(layer, []).append(leaf)
        else:
            (states if STATE_NAME.fullmatch(name) else whole).append(name)
    return layers, whole, states


def trained_shapes(geometry: Geometry, setup: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """What such a run trains, by its names in files, from the base's shapes alone; of LISA only what is always trained."""
    sizes = shapes(geometry)
    out = {name: sizes[name] for name in setup.whole(geometry)}
    out |= {name: tuple(tensor.shape) for name, tensor in setup.states(geometry).items()}
    known: dict[tuple[int, ...], dict[str, tuple[int, ...]]] = {}  # layers of one shape have adapters of one shape
    for layer in setup.wrapped(geometry):
        shape = sizes[f"{layer}.weight"]
        if shape not in known:
            known[shape] = ADAPTERS[setup.method].shapes(*shape, **setup.options)
        out |= {f"{layer}.{leaf}": size for leaf, size in known[shape].items()}
    return out


def count_trained(geometry: Geometry, setup: AdapterConfig) -> int:
    """How many values such a run trains at a time."""
    total = sum(math.prod(shape) for shape in trained_shapes(geometry, setup).values())
    if setup.method == "lisa":  # the blocks of one draw
        sizes, layers = shapes(geometry), linear_layers(geometry, setup.parts)
        per_block = sum(math.prod(sizes[f"{name}.weight"]) for name in layers) // geometry.n_layer
        total += per_block * min(setup.options["layers"], geometry.n_layer)
    return total
