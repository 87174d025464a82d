"""The heaviest micro-batch of a run goes through once, right behind the first step: a GPU that is too small for it says so in the
first minute, not in the tenth hour. (On a host that is full, no error comes: programs are ended.)
"""

from __future__ import annotations

import pytorch_lightning as pl

from rwkv_peft.checkpoint import train_state
from rwkv_peft.data.dataset import Batch

WHERE = ("cuda",)  # kinds of devices


class OomCheck(pl.Callback):
    """batch: of as many inputs as the largest has, all of them trained. Behind the first step, when the optimizer has its
    memory. Nothing of the training changes by it.
    """

    def __init__(self, batch: Batch):
        self.batch = batch

    def on_train_start(self, trainer, module) -> None:
        # (DeepSpeed counts every backward pass as the training's)
        self.due, self.step = (
            trainer.strategy.root_device.type in WHERE and not module.spread.strategy.stage,
            trainer.global_step,
        )

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if not self.due or trainer.global_step == self.step:
            return
        self.due, device = False, trainer.strategy.root_device
        dice = train_state.get_rng_state(device)
        module.summed_loss(module.transfer_batch_to_device(self.batch, device, 0)).backward()
        trainer.optimizers[0].zero_grad(set_to_none=True)
        train_state.set_rng_state(dice, device)
