"""Something that is done before the first step and every so often, for what watches a training."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable

import pytorch_lightning as pl


class PeriodicCallback(pl.Callback, abc.ABC):
    """every: optimizer steps between two rounds, 0 for the ends of epochs; there is one at the end in any case. epoch_steps:
    optimizer steps of an epoch. last: the step of the last round that was done, -1 for none. interrupted: whether the training
    has been told to stop; agree: whether any process has, to be called by all. paused: is told how many seconds a round took.
    """

    def __init__(self, every: int, epoch_steps: int, last: int):
        self.every, self.epoch_steps, self.last = every, epoch_steps, last
        self.interrupted: Callable[[], bool] = lambda: False
        self.agree: Callable[[pl.Trainer], bool] = lambda trainer: False
        self.paused: Callable[[float], None] = lambda seconds: None

    @abc.abstractmethod
    def round(self, trainer, module) -> bool:
        """With the module as for use, nothing dropped: no random number of the training may be drawn. Returns whether it was
        done; a run that goes on from here does it then.
        """

    def begin(self, trainer, module) -> None:
        if self.last == trainer.global_step:
            return
        learning, began = module.training, time.monotonic()
        module.eval()
        try:
            done = self.round(trainer, module)
        finally:
            module.train(learning)
        if trainer.world_size > 1:  # not all take part in every round
            done = trainer.strategy.broadcast(done)
        self.paused(time.monotonic() - began)
        self.last = trainer.global_step if done else self.last
        trainer.should_stop = trainer.should_stop or not done

    def on_train_start(self, trainer, module) -> None:
        self.step = trainer.global_step
        if trainer.world_size > 1:  # (files of the run are the first process's)
            self.last = trainer.strategy.broadcast(self.last)
        if self.step % (self.every or self.epoch_steps) == 0:
            self.begin(trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        moved, self.step = trainer.global_step != self.step, trainer.global_step
        if moved and self.every and self.step % self.every == 0:
            self.begin(trainer, module)

    def on_train_epoch_end(self, trainer, module) -> None:
        # (what is told to stop in the last step of an epoch has finished it)
        finished = not trainer.should_stop or trainer.global_step % self.epoch_steps == 0
        if finished and (not self.every or trainer.current_epoch + 1 == trainer.max_epochs):
            self.begin(trainer, module)
