"""What is sharded over the processes of a training, and how it is gathered for checkpoints, states and norms.

Files have whole tensors under their names, so they do not depend on how a run was sharded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from rwkv_peft.checkpoint.lazy_tensors import LazyTensor, LazyTensors
from rwkv_peft.config.strategies import Strategy

Parameters = Mapping[str, nn.Parameter]  # by their names in files

# whether a parameter, by its name in the model, is what the base's file has: all processes have the same file
Given = Callable[[str], bool]

ENOUGH = -1  # rank 0 needs no more tensors


def lazy_tensor(tensor: Tensor) -> LazyTensor:
    """A tensor of one process, or one that torch has cut (DTensor)."""
    own = tensor.detach()
    get = own.full_tensor if isinstance(own, DTensor) else tensor.detach
    return LazyTensor(tuple(tensor.shape), tensor.dtype, get)


def like(tensor: Tensor, example: Tensor) -> Tensor:
    """A whole tensor cut as another one is: each process takes its own part of what it has."""
    if not isinstance(example, DTensor):
        return tensor
    moved = tensor.to(example.to_local().device)
    return distribute_tensor(moved, example.device_mesh, example.placements, src_data_rank=None)


@contextlib.contextmanager
def gather_to_main(
    files: Mapping[str, Mapping[str, LazyTensor]], in_pieces: bool, first: bool, device: torch.device
) -> Iterator[Mapping[str, LazyTensors] | None]:
    """Let rank 0 read whole tensors while the other ranks help to gather them.

    To be entered by all processes, with the same names in the same order. On rank 0 it yields the tensors of one file after
    another, which any of its threads may read in any order; on the others None.

    Args:
        files: What the files have, by name.
        in_pieces: Whether anything is sharded.
        first: This is rank 0.
        device: Of the collective operations.
    """
    wholes = [tensor for file in files.values() for tensor in file.values()]
    number = {id(tensor): i for i, tensor in enumerate(wholes)}

    def announce(tensor: int) -> None:
        dist.broadcast(torch.tensor(tensor, device=device), 0)

    if first:
        announce_tensor = (lambda tensor: announce(number[id(tensor)])) if in_pieces else (lambda _: None)
        try:
            yield {name: LazyTensors(file, announce_tensor) for name, file in files.items()}
        finally:
            if in_pieces:
                announce(ENOUGH)
        return
    wanted = torch.tensor(ENOUGH, device=device)
    while in_pieces:
        dist.broadcast(wanted, 0)
        if int(wanted) == ENOUGH:
            break
        wholes[int(wanted)].get()
    yield None


@torch.no_grad()
def broadcast_params(parameters: Iterable[tuple[str, nn.Parameter]], given: Given, device: torch.device) -> None:
    """Give all processes the parameters of rank 0, on their device.

    What was drawn, decomposed or compressed may differ by a rounding between machines, and shards of different tensors
    do not fit together.
    """
    for name, parameter in parameters:
        if given(name):
            parameter.data = parameter.detach().to(device)
            continue
        sent = parameter.detach().to(device, copy=True)  # what is mapped from a file stays as it is
        dist.broadcast(sent, 0)
        parameter.data = sent


def grad_norm(gradients: Iterable[Tensor], in_pieces: bool) -> Tensor:
    """Return the gradient norm, float32 []. Summed in float64, so that it does not depend on the sharding.

    in_pieces: each process has parts of its own of all gradients.
    """
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    squares = torch.stack(torch._foreach_norm(local, 2, dtype=torch.float64)).square().sum()
    if in_pieces:
        dist.all_reduce(squares)
    return squares.sqrt().float()


def clip_grads(gradients: Iterable[Tensor], norm: Tensor, limit: float) -> None:
    """Scale gradients down to a length; 0 for no limit. The factor is that of torch.nn.utils.clip_grads_with_norm_."""
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    if limit:
        torch._foreach_mul_(local, torch.clamp(limit / (norm + 1e-6), max=1.0).to(local[0].device))


class Sharding:
    """How a training is distributed, where torch does it.

    On one process, on several with all that is trained on each (DDP), or sharded as DTensors (FSDP2).

    Args:
        strategy: Of STRATEGIES.
        several: There are several processes.
    """

    def __init__(self, strategy: Strategy, several: bool):
        self.strategy, self.several = strategy, several
        self.weights_in_pieces, self.memory_in_pieces = strategy.spread == "weights", bool(strategy.spread)

    def settle(self, model: nn.Module) -> None:
        """Let go of what is whole because the model was used last, before its parameters are asked for."""
        if isinstance(model, FSDPModule):
            model.reshard()

    def own_optimizer(self, groups: list[dict], betas: tuple[float, float], eps: float) -> Optimizer | None:
        """The optimizer that the strategy brings in place of OPTIM; None: it brings none."""
        return None

    def clip(self, parameters: list[nn.Parameter], limit: float) -> Tensor | None:
        """Scale the gradients down to a length (0: no limit); returns what it was, or None if it is not yet known."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not self.several:
            return nn.utils.clip_grad_norm_(parameters, limit or float("inf"))
        norm = grad_norm(gradients, self.weights_in_pieces)
        clip_grads(gradients, norm, limit)
        return norm

    def weights(self, parameters: Parameters) -> dict[str, LazyTensor]:
        """Return the trained weights, to be gathered when they are read."""
        return {name: lazy_tensor(p) for name, p in parameters.items()}

    def memory(self, optimizer: Optimizer, parameters: Parameters) -> tuple[dict[str, LazyTensor], dict[str, dict]]:
        """An optimizer's memory: tensors as PARAMETER/KEY, and by parameter what is no tensor."""
        name_of = {id(parameter): name for name, parameter in parameters.items()}
        tensors: dict[str, LazyTensor] = {}
        others: dict[str, dict] = {}
        for parameter, memory in optimizer.state.items():
            name = name_of[id(parameter)]
            for key, value in memory.items():
                if torch.is_tensor(value):
                    tensors[f"{name}/{key}"] = lazy_tensor(value)
                else:
                    others.setdefault(name, {})[key] = value
        return tensors, others

    def remember(
        self, optimizer: Optimizer, parameters: Parameters, tensors: Mapping[str, Tensor], others: Mapping[str, dict]
    ) -> None:
        """Give an optimizer the memory of another one of its kind. LookupError or ValueError for that of other parameters."""
        memory: dict[str, dict[str, Any]] = {name: dict(values) for name, values in others.items()}
        for name, tensor in tensors.items():
            parameter, _, key = name.rpartition("/")
            if key.startswith("exp_avg") and tensor.shape != parameters[parameter].shape:
                raise ValueError(f"{name} is {list(tensor.shape)} instead of {list(parameters[parameter].shape)}")
            # (a count of steps is no part of a parameter, and is not cut like one)
            cut = like(tensor, parameters[parameter]) if tensor.shape == parameters[parameter].shape else tensor
            memory.setdefault(parameter, {})[key] = cut.clone()
        if lacking := [name for name, values in memory.items() if "step" not in values]:
            raise ValueError(f"{lacking[0]}/step is missing")
        places = (p for group in optimizer.param_groups for p in group["params"])
        number = {id(p): i for i, p in enumerate(places)}  # as torch counts them
        state = {number[id(parameters[name])]: values for name, values in memory.items()}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
