"""Out-of-memory check: the largest micro-batch of a run is computed once, right after the first step.

A GPU that is too small for it fails in the first minute, not in the tenth hour. (On a host that is full, no error is raised:
the system kills programs.)
"""

from __future__ import annotations

import pytorch_lightning as pl

from rwkv_peft.checkpoint import train_state
from rwkv_peft.data.dataset import Batch

DEVICES = ("cuda",)  # types of devices that are checked


class OomCheck(pl.Callback):
    """Compute the largest micro-batch after the first step, when the optimizer has its memory. The training stays the same.

    Args:
        batch: with as many inputs as the largest one has, all of them with a loss.
    """

    def __init__(self, batch: Batch):
        self.batch = batch

    def on_train_start(self, trainer, module) -> None:
        """Decide whether to check."""
        # (DeepSpeed counts every backward pass as one of the training)
        self.is_due = trainer.strategy.root_device.type in DEVICES and not module.spread.strategy.stage
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        """Check after the first optimizer step."""
        if not self.is_due or trainer.global_step == self.step:
            return
        self.is_due, device = False, trainer.strategy.root_device
        rng_state = train_state.get_rng_state(device)
        module.summed_loss(module.transfer_batch_to_device(self.batch, device, 0)).backward()
        trainer.optimizers[0].zero_grad(set_to_none=True)
        train_state.set_rng_state(rng_state, device)
