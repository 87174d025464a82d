"""How weights and optimizer state are sharded, and how whole tensors are gathered: for checkpoints, states and gradient norms.

Files hold whole tensors under their names, so they do not depend on the strategy of the run that wrote them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from rwkv_peft.checkpoint.lazy_tensors import LazyTensor, LazyTensors
from rwkv_peft.config.strategies import Strategy
from rwkv_peft.model.rwkv import RWKV

Parameters = Mapping[str, nn.Parameter]  # by their names in files

# whether a parameter, by its name in the model, has the value of the base's file: all processes have the same file
Given = Callable[[str], bool]

END = -1  # rank 0 needs no more tensors


class ShardableModule(pl.LightningModule):
    """What strategies need of the module that Lightning trains.

    Attributes:
        model: has all weights.
        given: see Given.
        settle: makes the parameters whose names begin with a prefix, where that was deferred until they are sharded.
        grad_norm: of the last optimizer step, float32 [], before clipping.
        skipped: the last optimizer step changed nothing, because its gradient was not finite.
    """

    model: RWKV
    given: Given
    settle: Callable[[str], None]
    grad_norm: Tensor | None
    skipped: bool


def as_shardable(module: nn.Module | None) -> ShardableModule:
    """Return the module, whose type Lightning's annotations do not know."""
    assert isinstance(module, ShardableModule)
    return module


def lazy_tensor(tensor: Tensor) -> LazyTensor:
    """Return a lazy tensor of one process's tensor, or of one that torch has sharded (DTensor)."""

    def get() -> Tensor:
        detached = tensor.detach()
        return detached.full_tensor() if isinstance(detached, DTensor) else detached

    return LazyTensor(tuple(tensor.shape), tensor.dtype, get)


def _shard_like(tensor: Tensor, example: Tensor) -> Tensor:
    """Shard a whole tensor as `example` is: each process takes its own shard of the tensor that it has."""
    if not isinstance(example, DTensor):
        return tensor
    moved = tensor.to(example.to_local().device)
    return distribute_tensor(moved, example.device_mesh, example.placements, src_data_rank=None)


@contextlib.contextmanager
def gather_to_main(
    files: Mapping[str, Mapping[str, LazyTensor]], is_sharded: bool, is_main: bool, device: torch.device
) -> Iterator[Mapping[str, LazyTensors] | None]:
    """Gather the tensors of files on rank 0; the other processes take part until it has all, and get None.

    To be entered by all processes, with the same names in the same order. Rank 0 may ask for tensors in any order and in any
    of its threads, of one file after another.

    Args:
        files: the tensors of each file, by name.
        is_sharded: whether any of the tensors is.
        is_main: whether this is rank 0.
        device: where the processes communicate.
    """
    tensors = [tensor for file in files.values() for tensor in file.values()]
    index = {id(tensor): i for i, tensor in enumerate(tensors)}

    def announce(number: int) -> None:
        dist.broadcast(torch.tensor(number, device=device), 0)

    if is_main:
        before_get = (lambda tensor: announce(index[id(tensor)])) if is_sharded else (lambda _: None)
        try:
            yield {name: LazyTensors(file, before_get) for name, file in files.items()}
        finally:
            if is_sharded:
                announce(END)
        return
    wanted = torch.tensor(END, device=device)
    while is_sharded:
        dist.broadcast(wanted, 0)
        if int(wanted) == END:
            break
        tensors[int(wanted)].get()
    yield None


@torch.no_grad()
def broadcast_params(parameters: Iterable[tuple[str, nn.Parameter]], given: Given, device: torch.device) -> None:
    """Move parameters to the device, and replace those that the base's file does not have by the ones of rank 0.

    What was drawn, decomposed or quantized may differ by a rounding between machines, and shards of different tensors do not
    fit together.

    Args:
        parameters: with their names in the model.
        given: see Given.
        device: of this process.
    """
    for name, parameter in parameters:
        if given(name):
            parameter.data = parameter.detach().to(device)
            continue
        sent = parameter.detach().to(device, copy=True)  # a tensor that is mapped from a file must not change
        dist.broadcast(sent, 0)
        parameter.data = sent


def _local_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def grad_norm(gradients: Iterable[Tensor], is_sharded: bool) -> Tensor:
    """Return the 2-norm of all gradients, float32 []. The sum is float64, so it does not depend on how they are sharded.

    Args:
        gradients: of this process.
        is_sharded: whether each process has its own shards of all gradients.
    """
    squares = torch.stack(torch._foreach_norm(_local_tensors(gradients), 2, dtype=torch.float64)).square().sum()
    if is_sharded:
        dist.all_reduce(squares)
    return squares.sqrt().float()


def clip_grads(gradients: Iterable[Tensor], norm: Tensor, limit: float) -> None:
    """Scale gradients down to a norm of `limit`, 0 for no limit. The factor is that of torch.nn.utils.clip_grads_with_norm_."""
    local = _local_tensors(gradients)
    if limit:
        torch._foreach_mul_(local, torch.clamp(limit / (norm + 1e-6), max=1.0).to(local[0].device))


class Sharding:
    """How a run is sharded, by torch alone: not at all, replicated (DDP), or as DTensors (FSDP2).

    Args:
        strategy: one of STRATEGIES.
        is_distributed: whether the run has several processes.
    """

    def __init__(self, strategy: Strategy, is_distributed: bool):
        self.strategy, self.is_distributed = strategy, is_distributed
        self.are_weights_sharded, self.is_state_sharded = strategy.spread == "weights", bool(strategy.spread)

    def settle(self, model: nn.Module) -> None:
        """Reshard weights that are whole since the model was last used, before its parameters are asked for."""
        if isinstance(model, FSDPModule):
            model.reshard()

    def own_optimizer(self, groups: list[dict], betas: tuple[float, float], eps: float) -> Optimizer | None:
        """Return the optimizer with which the strategy replaces OPTIM, or None if it does not."""
        return None

    def clip(self, parameters: list[nn.Parameter], limit: float) -> Tensor | None:
        """Scale gradients down to a norm of `limit`, 0 for no limit. Return the norm before, or None if it is not yet known."""
        if not self.is_distributed:
            return nn.utils.clip_grad_norm_(parameters, limit or float("inf"))
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = grad_norm(gradients, self.are_weights_sharded)
        clip_grads(gradients, norm, limit)
        return norm

    def weights(self, parameters: Parameters) -> dict[str, LazyTensor]:
        """Return whole weights, by the names of `parameters`."""
        return {name: lazy_tensor(p) for name, p in parameters.items()}

    def optimizer_state(
        self, optimizer: Optimizer, parameters: Parameters
    ) -> tuple[dict[str, LazyTensor], dict[str, dict]]:
        """Return an optimizer's state: whole tensors as PARAMETER/KEY, and the values that are no tensors, by parameter."""
        name_of = {id(parameter): name for name, parameter in parameters.items()}
        tensors: dict[str, LazyTensor] = {}
        others: dict[str, dict] = {}
        for parameter, state in optimizer.state.items():
            name = name_of[id(parameter)]
            for key, value in state.items():
                if torch.is_tensor(value):
                    tensors[f"{name}/{key}"] = lazy_tensor(value)
                else:
                    others.setdefault(name, {})[key] = value
        return tensors, others

    def load_optimizer_state(
        self, optimizer: Optimizer, parameters: Parameters, tensors: Mapping[str, Tensor], others: Mapping[str, dict]
    ) -> None:
        """Load the state that `optimizer_state` returned for an optimizer of the same kind.

        Args:
            optimizer: over the trained parameters.
            parameters: the trained parameters, by their names in files.
            tensors: whole, as PARAMETER/KEY.
            others: the values that are no tensors, by parameter.

        Raises:
            LookupError: if the state is that of other parameters.
            ValueError: if a tensor has another shape than its parameter, or is missing.
        """
        state_of: dict[str, dict[str, Any]] = {name: dict(values) for name, values in others.items()}
        for name, tensor in tensors.items():
            parameter, _, key = name.rpartition("/")
            if key.startswith("exp_avg") and tensor.shape != parameters[parameter].shape:
                raise ValueError(f"{name} is {list(tensor.shape)} instead of {list(parameters[parameter].shape)}")
            # AdamW's scalar `step` is not sharded
            shard = (
                _shard_like(tensor, parameters[parameter]) if tensor.shape == parameters[parameter].shape else tensor
            )
            state_of.setdefault(parameter, {})[key] = shard.clone()
        if incomplete := [name for name, values in state_of.items() if "step" not in values]:
            raise ValueError(f"{incomplete[0]}/step is missing")
        ordered = (p for group in optimizer.param_groups for p in group["params"])
        index = {id(p): i for i, p in enumerate(ordered)}  # as torch counts them
        state = {index[id(parameters[name])]: values for name, values in state_of.items()}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
