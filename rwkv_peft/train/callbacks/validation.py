"""Validation: the loss on held-out data before the first step and every so often. It changes nothing of the training."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch

from rwkv_peft.checkpoint import run_dir, step_log
from rwkv_peft.common.atomic_io import atomic_write, open_append
from rwkv_peft.data.dataset import Batch
from rwkv_peft.train.context import RunContext
from rwkv_peft.train.module import TrainingModule

from .periodic import PeriodicCallback

FILE = "valid.jsonl"  # in the run's folder: one object per validation


def read(folder: Path, last: int | None = None) -> list[dict]:
    """Return the validations of a run so far.

    Args:
        folder: of the run.
        last: the last optimizer step, None for all.
    """
    records = [line.record for line in step_log.read_lines(folder / FILE, _is_record)]
    return [record for record in records if record and (last is None or record["step"] <= last)]


def _is_record(record: dict) -> bool:
    loss = record.get("loss", "none")
    return step_log.is_count(record.get("step")) and (loss is None or step_log.is_number(loss))


def truncate(folder: Path, last: int) -> None:
    """Remove the validations after an optimizer step from the file."""
    if (folder / FILE).exists():
        content = "".join(json.dumps(record) + "\n" for record in read(folder, last))
        with atomic_write(folder / FILE) as file:
            file.write(content.encode())


def of_one_set(records: list[dict], data: str | None) -> list[dict]:
    """Return the validations on one held-out set whose loss is a number.

    Args:
        records: of all validations.
        data: identifies the held-out set.
    """
    return [record for record in records if record.get("data") == data and record["loss"] is not None]


def rounds_without_a_better(records: list[dict]) -> int:
    """Return the number of validations since the best one."""
    return len(records) - 1 - min(range(len(records)), key=lambda i: records[i]["loss"]) if records else 0


class Validate(PeriodicCallback):
    """Compute the loss on held-out data.

    Args:
        context: of the run.
        batches: micro-batches of this rank; those of all ranks are the held-out set, once.
        data: identifies the held-out set.
        every: optimizer steps between two validations, 0 for the ends of epochs.
        epoch_steps: optimizer steps of an epoch.
        patience: so many validations without a better one end the training, 0 for never.
        sinks: get every record, on rank 0.
        before: records of a run that is resumed.
        save_best: is called by all ranks where a validation is the best so far; None for nothing.
    """

    def __init__(
        self,
        context: RunContext,
        batches: Callable[[], Iterable[Batch]],
        data: str,
        every: int,
        epoch_steps: int,
        patience: int = 0,
        sinks: Sequence[Callable[[dict], None]] = (),
        before: Sequence[dict] = (),
        save_best: Callable[[pl.Trainer, TrainingModule], None] | None = None,
    ):
        earlier = [record for record in before if record.get("data") == data]
        super().__init__(context, every, epoch_steps, earlier[-1]["step"] if earlier else -1)
        self.batches, self.data, self.patience, self.sinks = batches, data, patience, sinks
        self.records, self.has_other_data = of_one_set(list(before), data), bool(before) and not earlier
        self.save_best = save_best

    def on_train_start(self, trainer, module) -> None:
        """Validate before the first step, and again where the held-out set is another one."""
        if trainer.world_size > 1:
            self.records, self.has_other_data = trainer.strategy.broadcast((self.records, self.has_other_data))
        super().on_train_start(trainer, module)
        if self.has_other_data:
            self.context.log("warning   VAL_DATA is not what it was: what is the best so far is counted anew")
            self._begin(trainer, module)

    @torch.no_grad()
    def round(self, trainer, module) -> bool:
        """Validate once."""
        total, targets = 0.0, 0
        for batch in self.batches():
            if self.context.stop.agree(trainer):
                return False
            moved = module.transfer_batch_to_device(batch, trainer.strategy.root_device, 0)
            total += float(trainer.strategy.validation_step(moved))
            targets += len(batch.targets)
        if trainer.world_size > 1:
            sums = torch.tensor([total, float(targets)], dtype=torch.float64).to(trainer.strategy.root_device)
            sums = trainer.strategy.reduce(sums, reduce_op="sum")
            total, targets = float(sums[0]), int(sums[1])
        loss = total / max(targets, 1)
        is_finite = math.isfinite(loss)
        step = trainer.global_step
        record = {
            "step": step, "epoch": max(0, step - 1) // self.epoch_steps, "loss": loss if is_finite else None,
            "targets": targets, "data": self.data,
        }  # fmt: skip
        self.records += [record] if is_finite else []
        for sink in self.sinks if trainer.is_global_zero else ():
            sink(record)
        waited = rounds_without_a_better(self.records)
        words = f"step {step}" if step else "before training"
        if is_finite and step and waited:
            best = min(self.records, key=lambda record: record["loss"])
            words += f", the best was {best['loss']:.4f} at step {best['step']}"
        elif is_finite and step:
            words += ", the best so far"
        try:
            if self.save_best and is_finite and step and not waited:
                self.save_best(trainer, module)
                words += f", kept as {run_dir.BEST}"
        finally:  # where the disk is full, the loss is logged all the same
            self.context.log(f"validation loss {loss:.4f} ({words})")
        if is_finite and self.patience and waited >= self.patience:
            self.context.progress.ended_early = trainer.should_stop = True
            self.context.log(
                f"VAL_PATIENCE={self.patience}: no better validation for so many rounds; training ends here."
            )
        return True


class ValidFile:
    """valid.jsonl, on the disk before the training state that follows.

    Args:
        path: of the file.
        owns_run_dir: whether its folder is still the run's own.
    """

    def __init__(self, path: Path, owns_run_dir: Callable[[], bool] = lambda: True):
        self.path, self.owns_run_dir = path, owns_run_dir

    def __call__(self, record: dict) -> None:
        """Append a validation."""
        if not self.owns_run_dir():
            return
        with open_append(self.path, encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
