"""The loss on held-out data while training: before the first step, then every so often. It changes nothing of the training."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytorch_lightning as pl
import torch

from rwkv_peft.checkpoint import run_dir, step_log
from rwkv_peft.common.atomic_io import appending, atomic_write
from rwkv_peft.data.dataset import Batch

from .periodic import PeriodicCallback

FILE = "valid.jsonl"  # in the run's folder: an object for every look


def read(folder: Path, last: int | None = None) -> list[dict]:
    """What a run has found so far, up to an optimizer step."""
    found = [record for _, record in step_log.read_lines(folder / FILE, is_look)]
    return [record for record in found if record and (last is None or record["step"] <= last)]


def is_look(record: dict) -> bool:
    """Whether an object is what a look at held-out data has found."""
    loss = record.get("loss", "none")
    return step_log.is_count(record.get("step")) and (loss is None or step_log.is_number(loss))


def cut(folder: Path, last: int) -> None:
    """Take from the file what came after an optimizer step."""
    if (folder / FILE).exists():
        content = "".join(json.dumps(record) + "\n" for record in read(folder, last))
        with atomic_write(folder / FILE) as file:
            file.write(content.encode())


def of_one_set(records: list[dict], data: str) -> list[dict]:
    """The looks at these data that came to a number."""
    return [record for record in records if record.get("data") == data and record["loss"] is not None]


def rounds_without_a_better(records: list[dict]) -> int:
    """How many looks there have been since the best one."""
    return len(records) - 1 - min(range(len(records)), key=lambda i: records[i]["loss"]) if records else 0


class Validate(PeriodicCallback):
    """batches: of this process; together those of all are the data, once. data: tells these data from others. patience: so many
    rounds without a better one end the training, 0 for never. sinks: get every record, on rank 0. before: records of a run that
    goes on. keep: saves what was trained, called by all processes where a round is the best so far; None for nothing. stopped:
    whether it has ended the training.
    """

    def __init__(
        self,
        batches: Callable[[], Iterable[Batch]],
        data: str,
        every: int,
        epoch_steps: int,
        patience: int,
        sinks: list[Callable[[dict], None]],
        say: Callable[[str], None],
        before: list[dict],
        keep: Callable[[pl.Trainer, pl.LightningModule], None] | None = None,
    ):
        mine = [record for record in before if record.get("data") == data]
        super().__init__(every, epoch_steps, mine[-1]["step"] if mine else -1)
        self.batches, self.data, self.patience, self.sinks, self.say = batches, data, patience, sinks, say
        self.records, self.others, self.stopped = of_one_set(before, data), bool(before) and not mine, False
        self.keep = keep

    def on_train_start(self, trainer, module) -> None:
        if trainer.world_size > 1:
            self.records, self.others = trainer.strategy.broadcast((self.records, self.others))
        super().on_train_start(trainer, module)
        if self.others:
            self.say("warning   VAL_DATA is not what it was: what is the best so far is counted anew")
            self.begin(trainer, module)

    @torch.no_grad()
    def round(self, trainer, module) -> bool:
        total, targets = 0.0, 0
        for batch in self.batches():
            if self.agree(trainer):
                return False
            moved = module.transfer_batch_to_device(batch, trainer.strategy.root_device, 0)
            total += float(trainer.strategy.validation_step(moved))
            targets += len(batch.targets)
        if trainer.world_size > 1:
            sums = torch.tensor([total, float(targets)], dtype=torch.float64).to(trainer.strategy.root_device)
            total, targets = (float(x) for x in trainer.strategy.reduce(sums, reduce_op="sum"))
        loss = total / max(targets, 1)
        sound = math.isfinite(loss)
        step = trainer.global_step
        record = {
            "step": step, "epoch": max(0, step - 1) // self.epoch_steps, "loss": loss if sound else None,
            "targets": int(targets), "data": self.data,
        }  # fmt: skip
        self.records += [record] if sound else []
        for sink in self.sinks if trainer.is_global_zero else ():
            sink(record)
        waited, best = rounds_without_a_better(self.records), self.best
        known = f"the best was {best['loss']:.4f} at step {best['step']}" if waited else "the best so far"
        words = f"step {step}{sound and f', {known}' or ''}" if step else "before training"
        try:
            if self.keep and sound and step and not waited:
                self.keep(trainer, module)
                words += f", kept as {run_dir.BEST}"
        finally:  # where the disk is full, the loss is told all the same
            self.say(f"validation loss {loss:.4f} ({words})")
        if sound and self.patience and waited >= self.patience:
            self.stopped = trainer.should_stop = True
            self.say(f"VAL_PATIENCE={self.patience}: no better validation for so many rounds; training ends here.")
        return True

    @property
    def best(self) -> dict | None:
        return min(self.records, key=lambda record: record["loss"], default=None)


class ValidFile:
    """valid.jsonl, on the disk before the state that follows. ours: whether its folder is still the run's own."""

    def __init__(self, path: Path, ours: Callable[[], bool] = lambda: True):
        self.path, self.ours = path, ours

    def __call__(self, record: dict) -> None:
        if not self.ours():
            return
        with appending(self.path, encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
