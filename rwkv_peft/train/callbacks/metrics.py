"""Metrics of every optimizer step, and the limit of skipped steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytorch_lightning as pl
import torch

from rwkv_peft.common.errors import EXIT_USER, UserError
from rwkv_peft.text import tokenizer
from rwkv_peft.train.context import RunContext
from rwkv_peft.train.module import TrainingModule

TOO_HIGH = (
    "LR_INIT is too high (take a third of it, and GRAD_CLIP=1; ./training.sh --find-lr tells what the settings bear), or "
    "another setting is extreme (lora_alpha, ADAM_EPS, WEIGHT_DECAY). What was saved before is whole."
)
# where no step has been taken, no learning rate can be the cause
NOT_BEGUN = "No step has been taken yet, so LR_INIT is not the cause: {}. What was saved before is whole."
NAMED = 3  # micro-batches of a skipped step that a message names
SPEED_STEPS = 10  # tokens/s is the mean of this many steps


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one optimizer step, as loss.jsonl has them."""

    step: int  # from 1
    epoch: int  # from 0, as in file names
    loss: float | None  # mean over loss tokens; None without any (DATALOAD=get), or where it is NaN or infinite
    lr: float
    grad_norm: float | None  # None where it is NaN or infinite
    tokens: int  # inputs, without padding
    targets: int  # loss tokens
    tokens_per_s: float
    targets_per_s: float
    seconds: float  # since training began
    skipped: bool = False  # its loss or gradient was NaN or infinite, and it changed nothing


class MetricsCallback(pl.Callback):
    """Make the metrics of every optimizer step on rank 0 and pass them to the sinks.

    Args:
        context: of the run. Its progress has the tokens and skipped steps before the first step.
        sinks: get the metrics of each step.
        limit: so many skipped steps in a row end the training.
    """

    def __init__(self, context: RunContext, sinks: Sequence[Callable[[StepMetrics], None]], limit: int):
        self.context, self.sinks, self.limit = context, sinks, limit
        self.beginnings: list[tuple[int, ...]] = []  # first tokens of the step's micro-batches

    def on_train_start(self, trainer, module) -> None:
        """Start the clock."""
        self.context.clock.start()
        self.step, self.tokens = trainer.global_step, 0
        self.recent: deque[tuple[float, int, int]] = deque(maxlen=SPEED_STEPS)  # seconds, tokens, loss tokens
        self.first_is_slow = True  # the first step prepares what the others use

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        """Make the metrics of an optimizer step after its last micro-batch."""
        self.tokens += batch.tokens
        self.beginnings.append(batch.beginning)
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        shares, beginnings = [float(share) for share in module.shares], self.beginnings
        module.shares, self.beginnings = [], []
        sums = torch.tensor([sum(shares), float(self.tokens)], dtype=torch.float64)
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums.to(trainer.strategy.root_device), reduce_op="sum").cpu()
        loss, tokens = float(sums[0]), int(sums[1])
        progress = self.context.progress
        self.tokens, progress.tokens = 0, progress.tokens + tokens
        skipped = module.skipped or not math.isfinite(loss)
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if skipped else 0
        taken, total = self.context.clock.end_step()
        self.recent.append((taken, tokens, batch.step_targets))
        if self.first_is_slow and len(self.recent) == 2:
            self.recent.popleft()
            self.first_is_slow = False
        seconds, inputs, targets = (sum(numbers) for numbers in zip(*self.recent, strict=True))
        if not trainer.is_global_zero:
            if progress.skipped_in_a_row >= self.limit:
                raise SystemExit(EXIT_USER)  # rank 0 prints the reason
            return
        # the scheduler has advanced already: its previous value is what this step used
        rate = module.rate_of(self.step - 1)
        norm = float(module.grad_norm)
        metrics = StepMetrics(
            self.step, trainer.current_epoch, loss if batch.step_targets and math.isfinite(loss) else None, rate,
            norm if math.isfinite(norm) else None, tokens, batch.step_targets, inputs / seconds, targets / seconds, total,
            skipped,
        )  # fmt: skip
        for sink in self.sinks:
            sink(metrics)
        if skipped:
            bad = [i for i, share in enumerate(shares) if not math.isfinite(share)]
            if not bad and not math.isfinite(loss):
                where = "in another process"
            else:
                where = name_micro_batches(beginnings, bad or [*range(len(shares))], batch_idx - len(shares) + 1)
            what = f"its loss is {loss}" if not math.isfinite(loss) else f"the length of its gradient is {norm}"
            self._report_skipped(f"step {self.step}: {what} ({where})", module, trainer.world_size == 1)

    def _report_skipped(self, words: str, module: TrainingModule, has_all_weights: bool) -> None:
        skipped = self.context.progress.skipped_in_a_row
        if skipped >= self.limit:
            steps = "step was" if self.limit == 1 else "steps in a row were"
            why = explain_skipped(module, self.step, skipped, has_all_weights)
            raise UserError(f"\nTraining stops: NAN_LIMIT={self.limit} {steps} left out. The last, {words}. {why}")
        self.context.log(f"warning   {words}: left out, {skipped} of NAN_LIMIT={self.limit} in a row")


def name_micro_batches(beginnings: Sequence[tuple[int, ...]], bad: Sequence[int], first: int) -> str:
    """Return the numbers and first words of micro-batches.

    Args:
        beginnings: first tokens of each micro-batch of the step.
        bad: which of them to name.
        first: number of the step's first micro-batch in its epoch.
    """
    names = ", ".join(f"micro-batch {first + i}: {tokenizer.decode(beginnings[i])!r} ..." for i in bad[:NAMED])
    return names + (", and others" if len(bad) > NAMED else "")


def explain_skipped(module: TrainingModule, step: int, skipped: int, has_all_weights: bool) -> str:
    """Return the probable reason why the last steps were skipped.

    Args:
        module: with the model.
        step: number of the last optimizer step.
        skipped: steps that were skipped last, one after another.
        has_all_weights: this process has all weights, not a shard of them.
    """
    if skipped < step:
        return TOO_HIGH
    model = module.model
    weights = model.named_parameters() if has_all_weights else ()
    bad = next((name for name, weight in weights if not bool(torch.isfinite(weight).all())), "")
    if model.dtype == torch.float16:
        where = f", as in {bad}" if bad else ""
        return NOT_BEGUN.format(f"numbers above 65,504 do not fit into PRECISION=fp16{where}; use bf16 or fp32")
    if bad:
        words = f"{bad} of the model holds NaN or infinity; take another base, or another file to begin with"
    else:
        words = "the model gives no number for these data, so its weights are too large or damaged; take another copy of the base"
    return NOT_BEGUN.format(words)
