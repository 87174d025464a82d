"""Exact resume for Lightning: what a running trainer saves, and how a new one resumes from it as if it had never stopped.

A saved state is always of a moment between two optimizer steps: a run that is stopped between the micro-batches of a
step does that step again. The number of the step determines its place in the data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import pytorch_lightning as pl
import torch
from torch import nn

from rwkv_peft.checkpoint import train_state
from rwkv_peft.checkpoint.lazy_tensors import LazyTensors
from rwkv_peft.checkpoint.train_state import TrainState
from rwkv_peft.common.errors import UserError, describe_nonfatal
from rwkv_peft.common.file_watch import FileChanged
from rwkv_peft.distributed.sharding import gather_to_main, lazy_tensor
from rwkv_peft.train.context import RunContext
from rwkv_peft.train.module import TrainingModule

Names = Callable[[], Mapping[str, nn.Parameter]]
WriteState = Callable[[Mapping[str, LazyTensors], dict], None]


class ResumeCallback(pl.Callback):
    """Puts a trainer where a state was saved. Must be the first callback: others read the trainer's step.

    Args:
        begin: The saved state.
        names: Returns the trained parameters under their names in files.
        epoch_steps: Optimizer steps of an epoch.
        accumulate: Micro-batches of a step.
        micro_batches: Of an epoch, None for a stream.
        loaded: Is called when nothing more is read of the state.
    """

    def __init__(
        self,
        begin: TrainState,
        names: Names,
        epoch_steps: int,
        accumulate: int,
        micro_batches: int | None,
        loaded: Callable[[], None] = lambda: None,
    ):
        self.begin, self.names, self.micro_batches, self.loaded = begin, names, micro_batches, loaded
        self.epoch, step = divmod(begin.step, epoch_steps)
        self.first = step * accumulate  # micro-batch of the epoch

    def on_train_start(self, trainer, module) -> None:
        """Load the state."""
        step = self.begin.step
        if trainer.strategy.broadcast(step) != step:
            raise UserError(f"process {trainer.global_rank} found another saved state than the first process did.")
        loops = trainer.fit_loop
        for progress in (loops.epoch_progress.total, loops.epoch_progress.current):
            progress.ready = progress.started = progress.processed = progress.completed = self.epoch
        done = loops.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        done.ready = done.completed = step
        [optimizer], [schedule] = trainer.optimizers, trainer.lr_scheduler_configs
        with train_state.explain_mismatch(self.begin):
            memory = self.begin.tensors("optimizer"), self.begin.facts["optimizer"]
            module.spread.remember(optimizer, self.names(), *memory)
            self.restore_random(trainer)
        schedule.scheduler.last_epoch = step
        for group, factor in zip(optimizer.param_groups, schedule.scheduler.base_lrs, strict=True):
            group["lr"] = factor * module.rate_of(step)
        if scaler := getattr(trainer.precision_plugin, "scaler", None):
            with train_state.explain_mismatch(self.begin):
                scaler.load_state_dict(self.begin.facts["scaler"])

    def restore_random(self, trainer) -> None:
        """The random numbers of this process go on as they were."""
        of_rank = {
            name.partition("/")[2]: tensor
            for name, tensor in self.begin.tensors("random").items()
            if name.startswith(f"{trainer.global_rank}/")
        }
        if of_rank:  # (else there were fewer processes: it draws again)
            train_state.set_rng_state(of_rank, trainer.strategy.root_device)
        self.loaded()

    def on_train_epoch_start(self, trainer, module) -> None:
        """Set the number of batches of the epoch: Lightning counts from 0, wherever the loader begins."""
        if (
            self.micro_batches is not None
        ):  # Lightning counts the batches of an epoch from 0, wherever the loader begins
            left = self.first if trainer.current_epoch == self.epoch else 0
            trainer.fit_loop.max_batches = self.micro_batches - left


class TrainStateCallback(pl.Callback):
    """Saves a snapshot every so many optimizer steps, and when `save` is called. To be the last callback.

    context: of the run; logs where a state cannot be written, on a full disk: training continues without it.
    write: from parts and facts to a snapshot on the disk; None for a run that saves none. names: see ResumeCallback. every: 0
    for never by itself. epoch_steps: optimizer steps of an epoch. after_save: is called by all processes after one of `every`,
    and again where a run is resumed from it: it may have been killed between the two. saved: the step of the one that it is
    resumed from.
    """

    def __init__(
        self,
        context: RunContext,
        write: WriteState | None,
        names: Names,
        every: int,
        epoch_steps: int,
        after_save: Callable[[pl.Trainer, TrainingModule], None],
        saved: int = -1,
    ):
        self.context, self.write, self.names, self.every, self.epoch_steps = context, write, names, every, epoch_steps
        self.after_save, self.step, self.saved = after_save, 0, saved

    def on_train_start(self, trainer, module) -> None:
        """Write the checkpoint that belongs to the resumed state: the run may have been killed between the two."""
        self.look(trainer)
        if self.write is not None and self.every and self.step and self.step % self.every == 0:
            self.after_save(trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        """Save if it is time."""
        if trainer.global_step == self.step:
            return
        self.look(trainer)
        # (not where an epoch ends: its checkpoint comes first, or a run that resumes from here would never write it)
        if self.every and self.step % self.every == 0 and self.step % self.epoch_steps:
            self.save_step(trainer, module)

    def on_train_epoch_end(self, trainer, module) -> None:
        """Save if it is time, after the epoch's checkpoint."""
        if self.every and self.step and self.step % self.every == 0:
            self.save_step(trainer, module)

    def save_step(self, trainer, module) -> None:
        """Save the state and its checkpoint."""
        if self.write is not None:
            began = time.monotonic()
            self.save(trainer)
            self.after_save(trainer, module)
            self.context.clock.exclude(time.monotonic() - began)

    def look(self, trainer) -> None:
        """Note what changes between here and the next step."""
        self.step = trainer.global_step
        self.random = train_state.get_rng_state(trainer.strategy.root_device)

    def save(self, trainer) -> None:
        """Of the last optimizer step that is done. To be called by all processes."""
        if self.write is None or (self.exact and trainer.world_size == 1):
            return
        self.context.stop.check_files(trainer)
        random = {f"{trainer.global_rank}/{name}": state for name, state in self.random.items()}
        if trainer.world_size > 1:
            everyone: list[dict] = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(everyone, random)
            random = {name: state for one in everyone for name, state in one.items()}
        spread = trainer.lightning_module.spread
        spread.settle(trainer.lightning_module.model)
        names = self.names()
        memory, others = spread.memory(trainer.optimizers[0], names)
        parts = {
            "weights": spread.weights(names),
            "optimizer": memory,
            "random": {n: lazy_tensor(t) for n, t in random.items()},
        }
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        facts = {"step": self.step, "optimizer": others, "scaler": scaler.state_dict() if scaler else None}
        with gather_to_main(
            parts, spread.memory_in_pieces, trainer.is_global_zero, trainer.strategy.root_device
        ) as ready:
            try:
                if ready:
                    self.write(ready, facts)
                    self.saved = self.step
            except FileChanged:  # in the last moment: reported with all the others
                pass
            except (OSError, UserError) as error:
                self.context.log(
                    f"warning   the state of step {self.step} could not be saved; training goes on. {describe_nonfatal(error)}"
                )
        self.context.stop.check_files(trainer)
        if trainer.world_size > 1:
            trainer.strategy.barrier()

    @property
    def exact(self) -> bool:
        """Whether a run that stops now can go on as if it had not."""
        return self.saved == self.step
