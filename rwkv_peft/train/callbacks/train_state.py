"""Exact resume, for Lightning: saves train states, and puts a new trainer where one was saved.

A train state is always of a moment between two optimizer steps: a run that is stopped between the micro-batches of a step does
that step again. Its place in the data follows from the number of the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from rwkv_peft.checkpoint import train_state
from rwkv_peft.checkpoint.lazy_tensors import LazyTensors
from rwkv_peft.checkpoint.train_state import TrainState
from rwkv_peft.common.errors import UserError, describe_nonfatal
from rwkv_peft.common.file_watch import FileChanged
from rwkv_peft.distributed.lightning_private import set_epoch_batches, set_progress
from rwkv_peft.distributed.sharding import gather_to_main, lazy_tensor
from rwkv_peft.train.context import RunContext
from rwkv_peft.train.module import TrainingModule

Names = Callable[[], Mapping[str, nn.Parameter]]
WriteState = Callable[[Mapping[str, LazyTensors], dict], None]


class ResumeCallback(pl.Callback):
    """Puts a trainer where a train state was saved. To be the first callback: others read its progress.

    Args:
        begin: the train state.
        names: returns the trained parameters, by their names in files.
        epoch_steps: optimizer steps of an epoch.
        accumulate: micro-batches of an optimizer step.
        micro_batches: of an epoch, None for a stream.
        loaded: is called when nothing more is read of the train state.
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

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Restore progress, optimizer state, learning rates, RNG states and the gradient scale."""
        assert isinstance(module, TrainingModule)
        step = self.begin.step
        if trainer.strategy.broadcast(step) != step:
            raise UserError(f"process {trainer.global_rank} found another saved state than the first process did.")
        set_progress(trainer, self.epoch, step)
        [optimizer], [schedule] = trainer.optimizers, trainer.lr_scheduler_configs
        scheduler = schedule.scheduler
        assert isinstance(scheduler, LambdaLR)
        with train_state.explain_mismatch(self.begin):
            state = self.begin.tensors("optimizer"), self.begin.facts["optimizer"]
            module.spread.load_optimizer_state(optimizer, self.names(), *state)
            self.restore_rng_state(trainer)
        scheduler.last_epoch = step
        for group, factor in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = factor * module.rate_of(step)
        if scaler := getattr(trainer.precision_plugin, "scaler", None):
            with train_state.explain_mismatch(self.begin):
                scaler.load_state_dict(self.begin.facts["scaler"])

    def restore_rng_state(self, trainer: pl.Trainer) -> None:
        """Restore the RNG states of this process."""
        of_rank = {
            name.partition("/")[2]: tensor
            for name, tensor in self.begin.tensors("random").items()
            if name.startswith(f"{trainer.global_rank}/")
        }
        if of_rank:  # (else there were fewer processes: this one's seed stays)
            train_state.set_rng_state(of_rank, trainer.strategy.root_device)
        self.loaded()

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Set how many micro-batches the epoch has: the loader begins in the middle of the first one."""
        if self.micro_batches is not None:
            done = self.first if trainer.current_epoch == self.epoch else 0
            set_epoch_batches(trainer, self.micro_batches - done)


class TrainStateCallback(pl.Callback):
    """Saves a train state every so many optimizer steps, and when `save` is called. To be the last callback.

    Args:
        write: writes a train state, from tensors by part and facts; None for a run that saves none.
        names: returns the trained parameters, by their names in files.
        every: optimizer steps between two, 0 to save only when `save` is called.
        epoch_steps: optimizer steps of an epoch.
        saved: the step of the train state from which the run resumed, -1 for none.
        after_save: is called by all processes after each train state of `every`, and again where a run resumes from it: it may
            have been killed between the two.
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

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Note the progress, and repeat `after_save` where the run resumes from a train state of `every`."""
        self.note_progress(trainer)
        if self.write is not None and self.every and self.step and self.step % self.every == 0:
            assert isinstance(module, TrainingModule)
            self.after_save(trainer, module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Save after an optimizer step that is due."""
        if trainer.global_step == self.step:
            return
        self.note_progress(trainer)
        # (not where an epoch ends: its checkpoint comes first, or a run that resumes from here would never write it)
        if self.every and self.step % self.every == 0 and self.step % self.epoch_steps:
            self.save_step(trainer, module)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save if the last optimizer step of the epoch is due."""
        if self.every and self.step and self.step % self.every == 0:
            self.save_step(trainer, module)

    def save_step(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save a train state of `every`."""
        if self.write is not None:
            began = time.monotonic()
            self.save(trainer)
            assert isinstance(module, TrainingModule)
            self.after_save(trainer, module)
            self.context.clock.exclude(time.monotonic() - began)

    def note_progress(self, trainer: pl.Trainer) -> None:
        """Keep what changes between here and the next optimizer step."""
        self.step = trainer.global_step
        self.rng_state = train_state.get_rng_state(trainer.strategy.root_device)

    def save(self, trainer: pl.Trainer) -> None:
        """Save a train state of the last optimizer step that is done. To be called by all processes."""
        if self.write is None or (self.exact and trainer.world_size == 1):
            return
        self.context.stop.check_files(trainer)
        rng_state = {f"{trainer.global_rank}/{name}": state for name, state in self.rng_state.items()}
        if trainer.world_size > 1:
            of_ranks: list[dict] = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(of_ranks, rng_state)
            rng_state = {name: state for one in of_ranks for name, state in one.items()}
        module = trainer.lightning_module
        assert isinstance(module, TrainingModule)
        spread = module.spread
        spread.settle(module.model)
        parameters = self.names()  # (sharded again by now)
        tensors, others = spread.optimizer_state(trainer.optimizers[0], parameters)
        parts = {
            "weights": spread.weights(parameters),
            "optimizer": tensors,
            "random": {name: lazy_tensor(state) for name, state in rng_state.items()},
        }
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        facts = {"step": self.step, "optimizer": others, "scaler": scaler.state_dict() if scaler else None}
        with gather_to_main(
            parts, spread.is_state_sharded, trainer.is_global_zero, trainer.strategy.root_device
        ) as ready:
            try:
                if ready:
                    self.write(ready, facts)
                    self.saved = self.step
            except FileChanged:  # at the last moment: the check below raises it, in all processes
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
        """Whether a run that stops now resumes exactly where it is."""
        return self.saved == self.step
