"""Exact resume, for Lightning: what a running trainer keeps in a snapshot, and how a new one goes on from there as if it had
never stopped.

A snapshot is always of a moment between two optimizer steps: a run that is stopped between the micro-batches of a step does that
step again. Where it lies in the data follows from the number of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import UserError
from . import snapshot
from .snapshot import Snapshot

Names = Callable[[], Mapping[str, nn.Parameter]]


def packed(optimizer: Optimizer, names: Mapping[str, nn.Parameter]) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """An optimizer's memory: tensors as PARAMETER/KEY, and by parameter what is no tensor. names: of all its parameters."""
    name_of = {id(parameter): name for name, parameter in names.items()}
    tensors, others = {}, {}
    for parameter, memory in optimizer.state.items():
        name = name_of[id(parameter)]
        for key, value in memory.items():
            if torch.is_tensor(value):
                tensors[f"{name}/{key}"] = value
            else:
                others.setdefault(name, {})[key] = value
    return tensors, others


def unpack(
    optimizer: Optimizer, names: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], others: Mapping[str, dict]
) -> None:
    """Give an optimizer the memory of another one of its kind."""
    memory: dict[str, dict[str, Any]] = {name: dict(values) for name, values in others.items()}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition("/")
        memory.setdefault(parameter, {})[key] = tensor.clone()
    number = {
        id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])
    }  # as torch counts them
    state = {number[id(names[name])]: values for name, values in memory.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class GoOn(pl.Callback):
    """Puts a trainer where a snapshot was taken. To be the first callback: others look where it stands.

    names: () -> the trained parameters, under their names in files. epoch_steps, accumulate: optimizer steps of an epoch, and
    micro-batches of a step. micro_batches: of an epoch, None for a stream.
    """

    def __init__(self, begin: Snapshot, names: Names, epoch_steps: int, accumulate: int, micro_batches: int | None):
        self.begin, self.names, self.micro_batches = begin, names, micro_batches
        self.epoch, step = divmod(begin.step, epoch_steps)
        self.first = step * accumulate  # micro-batch of the epoch

    def on_train_start(self, trainer, module) -> None:
        step = self.begin.step
        if trainer.strategy.broadcast(step) != step:
            raise UserError(f"process {trainer.global_rank} found another saved state than the first process did.")
        loops = trainer.fit_loop
        for progress in (loops.epoch_progress.total, loops.epoch_progress.current):
            progress.ready = progress.started = progress.processed = progress.completed = self.epoch
        done = loops.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        done.ready = done.completed = step
        [optimizer], [schedule] = trainer.optimizers, trainer.lr_scheduler_configs
        unpack(optimizer, self.names(), self.begin.tensors("optimizer"), self.begin.facts["optimizer"])
        schedule.scheduler.last_epoch = step
        for group, factor in zip(optimizer.param_groups, schedule.scheduler.base_lrs, strict=True):
            group["lr"] = factor * module.rate_of(step)
        if scaler := getattr(trainer.precision_plugin, "scaler", None):
            scaler.load_state_dict(self.begin.facts["scaler"])
        of_rank = {
            name.partition("/")[2]: tensor
            for name, tensor in self.begin.tensors("random").items()
            if name.startswith(f"{trainer.global_rank}/")
        }
        snapshot.set_random_state(of_rank, trainer.strategy.root_device)

    def on_train_epoch_start(self, trainer, module) -> None:
        if (
            self.micro_batches is not None
        ):  # Lightning counts the batches of an epoch from 0, wherever the loader begins
            left = self.first if trainer.current_epoch == self.epoch else 0
            trainer.fit_loop.max_batches = self.micro_batches - left


class Keep(pl.Callback):
    """Saves a snapshot every so many optimizer steps, and when `save` is called. To be the last callback.

    write: from parts and facts to a snapshot on the disk; None for a run that saves none. names: see GoOn. every: 0 for never by
    itself. epoch_steps: optimizer steps of an epoch. say: is told where one cannot be written, on a full disk: training goes on
    without it. saved: the step of the one that it goes on from.
    """

    def __init__(
        self,
        write: Callable[[Mapping[str, Mapping[str, Tensor]], dict], None] | None,
        names: Names,
        every: int,
        epoch_steps: int,
        say: Callable[[str], None],
        saved: int = -1,
    ):
        self.write, self.names, self.every, self.epoch_steps, self.say = write, names, every, epoch_steps, say
        self.step, self.saved = 0, saved

    def on_train_start(self, trainer, module) -> None:
        self.look(trainer)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            return
        self.look(trainer)
        # (not where an epoch ends: its checkpoint comes first, or a run that goes on from here would never write it)
        if self.every and self.step % self.every == 0 and self.step % self.epoch_steps:
            self.save(trainer)

    def on_train_epoch_end(self, trainer, module) -> None:
        if self.every and self.step and self.step % self.every == 0:
            self.save(trainer)

    def look(self, trainer) -> None:
        """Note what changes between here and the next step."""
        self.step = trainer.global_step
        self.random = snapshot.random_state(trainer.strategy.root_device)

    def save(self, trainer) -> None:
        """Of the last optimizer step that is done. To be called by all processes."""
        if self.write is None or (self.exact and trainer.world_size == 1):
            return
        random = {f"{trainer.global_rank}/{name}": state for name, state in self.random.items()}
        if trainer.world_size > 1:
            everyone: list[dict] = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(everyone, random)
            random = {name: state for one in everyone for name, state in one.items()}
        if trainer.is_global_zero:
            names = self.names()
            tensors, others = packed(trainer.optimizers[0], names)
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            facts = {"step": self.step, "optimizer": others, "scaler": scaler.state_dict() if scaler else None}
            try:
                self.write({"weights": names, "optimizer": tensors, "random": random}, facts)
                self.saved = self.step
            except (OSError, UserError) as error:
                self.say(f"careful   the state of step {self.step} could not be saved; training goes on. {error}")
        if trainer.world_size > 1:
            trainer.strategy.barrier()

    @property
    def exact(self) -> bool:
        """Whether a run that stops now can go on as if it had not."""
        return self.saved == self.step
