"""Something that is done before the first step and every so often, for what watches a training."""

from __future__ import annotations

import abc

import pytorch_lightning as pl


class Rounds(pl.Callback, abc.ABC):
    """every: optimizer steps between two rounds, 0 for the ends of epochs. epoch_steps: optimizer steps of an epoch."""

    def __init__(self, every: int, epoch_steps: int):
        self.every, self.epoch_steps = every, epoch_steps

    @abc.abstractmethod
    def round(self, trainer, module) -> None:
        """With the module as for use, nothing dropped: no random number of the training may be drawn."""

    def begin(self, trainer, module) -> None:
        learning = module.training
        module.eval()
        try:
            self.round(trainer, module)
        finally:
            module.train(learning)

    def on_train_start(self, trainer, module) -> None:
        self.step = trainer.global_step
        if not self.step:
            self.begin(trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        moved, self.step = trainer.global_step != self.step, trainer.global_step
        if moved and self.every and self.step % self.every == 0:
            self.begin(trainer, module)

    def on_train_epoch_end(self, trainer, module) -> None:
        # (what is told to stop in the last step of an epoch has finished it)
        if not self.every and (not trainer.should_stop or trainer.global_step % self.epoch_steps == 0):
            self.begin(trainer, module)
