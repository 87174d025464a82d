"""Base of callbacks that do something before the first step and every so often: validation, samples."""

from __future__ import annotations

import abc
import time

import pytorch_lightning as pl

from rwkv_peft.train.context import RunContext


class PeriodicCallback(pl.Callback, abc.ABC):
    """Do something before the first step, every so often, and at the end. Its time does not count as time of a step.

    Args:
        context: of the run.
        every: optimizer steps between two rounds, 0 for the ends of epochs.
        epoch_steps: optimizer steps of an epoch.
        last: step of the last round that was done, -1 for none.
    """

    def __init__(self, context: RunContext, every: int, epoch_steps: int, last: int):
        self.context, self.every, self.epoch_steps, self.last = context, every, epoch_steps, last

    @abc.abstractmethod
    def round(self, trainer, module) -> bool:
        """Do it, with the module in evaluation mode. It must not draw random numbers of the training.

        Returns:
            Whether it was done. If not, a run that is resumed from here does it.
        """

    def _begin(self, trainer, module) -> None:
        if self.last == trainer.global_step:
            return
        training, began = module.training, time.monotonic()
        module.eval()
        try:
            done = self.round(trainer, module)
        finally:
            module.train(training)
        if trainer.world_size > 1:  # not all ranks take part in every round
            done = trainer.strategy.broadcast(done)
        self.context.clock.exclude(time.monotonic() - began)
        self.last = trainer.global_step if done else self.last
        trainer.should_stop = trainer.should_stop or not done

    def on_train_start(self, trainer, module) -> None:
        """Do it before the first step."""
        self.step = trainer.global_step
        if trainer.world_size > 1:  # (only rank 0 reads files of the run)
            self.last = trainer.strategy.broadcast(self.last)
        if self.step % (self.every or self.epoch_steps) == 0:
            self._begin(trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        """Do it after every `every` optimizer steps."""
        is_new, self.step = trainer.global_step != self.step, trainer.global_step
        if is_new and self.every and self.step % self.every == 0:
            self._begin(trainer, module)

    def on_train_epoch_end(self, trainer, module) -> None:
        """Do it at the end of an epoch, and of the run."""
        # (a run that is stopped in the last step of an epoch has finished it)
        finished = not trainer.should_stop or trainer.global_step % self.epoch_steps == 0
        if finished and (not self.every or trainer.current_epoch + 1 == trainer.max_epochs):
            self._begin(trainer, module)
