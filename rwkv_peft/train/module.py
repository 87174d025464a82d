"""The training step, for Lightning: sum of the cross entropy of trained targets, divided by their number in the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from rwkv_peft.data.dataset import Batch
from rwkv_peft.distributed.sharding import Given, Sharding
from rwkv_peft.model.rwkv import RWKV

from .infctx import chunked_loss
from .lr_schedule import learning_rate
from .optim import optimizer_of


class TrainingModule(pl.LightningModule):
    """The model as Lightning trains it.

    Args:
        model: An RWKV.
        groups: Returns the optimizer's parameter groups.
        steps: Optimizer steps of the whole run.
        spread: How the training is distributed.
        chunk_ctx: Tokens that go through at once (infctx), None for all of a micro-batch.
        infctx_grad: See infctx.py.
        optim: A key of specs.OPTIMS.
        settle: Makes the parameters whose names begin with its argument, where that was deferred until they are sharded.
        given: Returns whether a parameter, by its name in the model, is what the base's file has.
    """

    def __init__(
        self,
        model: RWKV,
        groups: Callable[[], list[dict]],
        steps: int,
        spread: Sharding,
        lr_schedule: str,
        lr_init: float,
        lr_final: float,
        warmup_steps: int,
        betas: tuple[float, float],
        adam_eps: float,
        grad_clip: float,
        chunk_ctx: int | None = None,
        infctx_grad: str = "detach",
        optim: str = "adamw",
        settle: Callable[[str], None] = lambda prefix: None,
        given: Given = lambda name: False,
    ):
        super().__init__()
        self.model: RWKV = model
        self.groups, self.steps, self.spread = groups, steps, spread
        self.rate = (lr_schedule, lr_init, lr_final, warmup_steps)
        self.betas, self.adam_eps, self.grad_clip = betas, adam_eps, grad_clip
        self.chunk_ctx, self.infctx_grad, self.optim = chunk_ctx, infctx_grad, optim
        self.shares: list[Tensor] = []  # of the step's loss so far, one of each micro-batch of this process
        self.grad_norm: Tensor | None = None
        self.settle, self.given = settle, given
        self.skipped = False  # the step changes nothing: its gradient is no number

    def training_step(self, batch: Batch, _index: int) -> Tensor:
        """Return the loss of a micro-batch, scaled for accumulation over processes."""
        loss = self.summed_loss(batch) / max(batch.step_targets, 1)
        self.shares.append(loss.detach())
        # Lightning divides by the number of accumulated batches and averages over ranks; the division is already done
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def validation_step(self, batch: Batch) -> Tensor:
        """Return the summed loss of a micro-batch."""
        return self.summed_loss(batch)

    def summed_loss(self, batch: Batch) -> Tensor:
        """The sum of the cross entropies of a micro-batch's targets."""
        if self.chunk_ctx:
            where = batch.ids, batch.cu_seqlens, batch.positions, batch.targets
            return chunked_loss(self.model, *where, self.chunk_ctx, self.infctx_grad)
        x, _ = self.model.features(batch.ids, cu_seqlens=batch.cu_seqlens, carry=False)
        rows = x[0].index_select(0, batch.positions)
        return self.model.ops.cross_entropy(rows, self.model.head_weight(), batch.targets)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip the gradients and keep their norm; drop them if it is no finite number."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = self.spread.clip(parameters, self.grad_clip)
        if norm is None:  # the strategy clips, and leaves steps out, by itself
            return
        self.grad_norm = norm
        # (float16 has a scale of its own, which finds such steps, leaves them out and shrinks until there are none)
        self.skipped = self.model.dtype != torch.float16 and not bool(torch.isfinite(self.grad_norm))
        if self.skipped:
            for parameter in parameters:  # optimizers pass over what has none: weights and moments stay as they are
                parameter.grad = None

    def configure_optimizers(self):
        """Make the optimizer and the schedule."""
        fused = self.model.dtype != torch.float16
        optimizer = optimizer_of(self.spread, self.optim, self.groups(), self.betas, self.adam_eps, fused)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, self.rate_of), "interval": "step"},
        }

    def rate_of(self, step: int) -> float:
        """The learning rate of optimizer step `step`, from 0."""
        name, first, last, warmup = self.rate
        return learning_rate(step, self.steps, name, first, last, warmup)

    def transfer_batch_to_device(self, batch: Batch, device, _index: int) -> Batch:
        """Copy a micro-batch, without waiting where the device allows it."""

        def move(x: Tensor) -> Tensor:
            pinned = x.pin_memory() if torch.device(device).type == "cuda" else x  # else the host waits for it
            return pinned.to(device, non_blocking=True)

        ids = batch.ids if self.model.emb.on_host else move(batch.ids)
        return replace(batch, ids=ids, positions=move(batch.positions), targets=move(batch.targets))
