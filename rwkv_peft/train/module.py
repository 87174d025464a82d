"""The training step: the sum of the cross entropies of trained targets, divided by their number in the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rwkv_peft.data.dataset import Batch
from rwkv_peft.distributed.sharding import Given, ShardableModule, Sharding
from rwkv_peft.model.rwkv import RWKV

from .infctx import chunked_loss
from .lr_schedule import learning_rate
from .optim import optimizer_of


class TrainingModule(ShardableModule):
    """What Lightning trains.

    Args:
        model: has all weights.
        groups: returns the optimizer's parameter groups, whose `lr` are factors.
        steps: optimizer steps of the whole run.
        spread: how the run is sharded.
        lr_schedule: a key of lr_schedule.SCHEDULES.
        lr_init: learning rate after the warm-up.
        lr_final: learning rate of the last step.
        warmup_steps: optimizer steps in which the rate rises to lr_init.
        betas: of AdamW.
        adam_eps: of AdamW.
        grad_clip: largest gradient norm, 0 for no limit.
        chunk_ctx: tokens of a chunk (infctx), None to take a micro-batch whole.
        infctx_grad: a mode of infctx.MODES.
        optim: a key of OPTIMS.
        settle: makes the parameters whose names begin with its argument, where that was deferred until they are sharded.
        given: returns whether a parameter, by its name in the model, is what the base's file has.
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
        self.model, self.groups, self.steps, self.spread = model, groups, steps, spread
        self.rate = (lr_schedule, lr_init, lr_final, warmup_steps)
        self.betas, self.adam_eps, self.grad_clip = betas, adam_eps, grad_clip
        self.chunk_ctx, self.infctx_grad, self.optim = chunk_ctx, infctx_grad, optim
        self.shares: list[Tensor] = []  # of the step's loss so far, one of each micro-batch of this process
        self.grad_norm = None
        self.settle, self.given = settle, given
        self.skipped = False

    def training_step(self, batch: Batch, _index: int) -> Tensor:
        """Return the loss of a micro-batch, times what Lightning divides it by."""
        loss = self.summed_loss(batch) / max(batch.step_targets, 1)
        self.shares.append(loss.detach())
        # Lightning divides by the number of accumulated batches and averages over ranks; the division is already done
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def validation_step(self, batch: Batch) -> Tensor:
        """Return the summed loss, through the strategy's wrapper."""
        return self.summed_loss(batch)

    def summed_loss(self, batch: Batch) -> Tensor:
        """Return the sum of the cross entropies of a micro-batch's targets, []."""
        if self.chunk_ctx:
            inputs = batch.ids, batch.cu_seqlens, batch.positions, batch.targets
            return chunked_loss(self.model, *inputs, self.chunk_ctx, self.infctx_grad)
        x, _ = self.model.features(batch.ids, cu_seqlens=batch.cu_seqlens, carry=False)
        rows = x[0].index_select(0, batch.positions)
        return self.model.ops.cross_entropy(rows, self.model.head_weight(), batch.targets)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients; skip the step if their norm is not finite."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = self.spread.clip(parameters, self.grad_clip)
        if norm is None:  # the strategy clips, and skips steps, by itself
            return
        self.grad_norm = norm
        # (with float16, the gradient scaler skips such steps, and lowers its scale until there are none)
        self.skipped = self.model.dtype != torch.float16 and not bool(torch.isfinite(self.grad_norm))
        if self.skipped:
            for parameter in parameters:  # optimizers ignore a parameter without one: weights and moments do not change
                parameter.grad = None

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimizer, and a schedule that multiplies the groups' factors."""
        fused = self.model.dtype != torch.float16
        optimizer = optimizer_of(self.spread, self.optim, self.groups(), self.betas, self.adam_eps, fused)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, self.rate_of), "interval": "step"},
        }

    def rate_of(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, from 0."""
        name, first, last, warmup = self.rate
        return learning_rate(step, self.steps, name, first, last, warmup)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, _index: int) -> Batch:
        """Return the batch on a device. Its ids stay on the host where the embedding does."""

        def move(x: Tensor) -> Tensor:
            pinned = x.pin_memory() if torch.device(device).type == "cuda" else x  # else the host waits for the copy
            return pinned.to(device, non_blocking=True)

        ids = batch.ids if self.model.emb.on_host else move(batch.ids)
        return replace(batch, ids=ids, positions=move(batch.positions), targets=move(batch.targets))
