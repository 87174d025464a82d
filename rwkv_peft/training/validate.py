"""The loss on held-out data while training: before the first step, then every so often. It changes nothing of the training."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ..atomic import writing
from ..data.loading import Batch
from .rounds import Rounds

FILE = "valid.jsonl"  # in the run's folder: an object for every look


def read(folder: Path, last: int | None = None) -> list[dict]:
    """What a run has found so far, up to an optimizer step; up to the first line that is not whole."""
    found: list[dict] = []
    if (folder / FILE).is_file():
        for line in (folder / FILE).read_bytes().splitlines():
            try:
                record = {"step": int((whole := json.loads(line))["step"]), "loss": float(whole["loss"]), **whole}
            except (ValueError, LookupError, TypeError):
                break
            if last is not None and record["step"] > last:
                break
            found.append(record)
    return found


def cut(folder: Path, last: int) -> list[dict]:
    """Take from the file what came after an optimizer step; returns what is left."""
    found = read(folder, last)
    if (folder / FILE).is_file():
        with writing(folder / FILE) as file:
            file.write("".join(json.dumps(record) + "\n" for record in found).encode())
    return found


def rounds_without_a_better(records: list[dict]) -> int:
    """How many looks there have been since the best one."""
    return len(records) - 1 - min(range(len(records)), key=lambda i: records[i]["loss"]) if records else 0


class Validate(Rounds):
    """batches: of this process; together those of all are the data, once. patience: so many rounds without a better one end the
    training, 0 for never. sinks: get every record, on rank 0. before: records of a run that goes on. stopped: whether it has
    ended the training.
    """

    def __init__(
        self,
        batches: Callable[[], Iterable[Batch]],
        every: int,
        epoch_steps: int,
        patience: int,
        sinks: list[Callable[[dict], None]],
        say: Callable[[str], None],
        before: list[dict],
    ):
        super().__init__(every, epoch_steps)
        self.batches, self.patience = batches, patience
        self.sinks, self.say, self.records = sinks, say, list(before)
        self.stopped = False

    @torch.no_grad()
    def round(self, trainer, module) -> None:
        total, targets = 0.0, 0
        for batch in self.batches():
            moved = module.transfer_batch_to_device(batch, trainer.strategy.root_device, 0)
            total += float(module.summed_loss(moved))
            targets += len(batch.targets)
        if trainer.world_size > 1:
            sums = torch.tensor([total, float(targets)], dtype=torch.float64).to(trainer.strategy.root_device)
            total, targets = (float(x) for x in trainer.strategy.reduce(sums, reduce_op="sum"))
        loss = total / max(targets, 1)
        record = {"step": trainer.global_step, "epoch": trainer.current_epoch, "loss": loss, "targets": int(targets)}
        self.records.append(record)
        waited = rounds_without_a_better(self.records)
        if trainer.is_global_zero:
            for sink in self.sinks:
                sink(record)
            best = "the best so far" if not waited else f"the best was {min(r['loss'] for r in self.records):.4f}"
            first = "before training" if not trainer.global_step else f"step {trainer.global_step}, {best}"
            self.say(f"validation loss {loss:.4f} ({first})")
        if self.patience and waited >= self.patience:
            self.stopped = trainer.should_stop = True
            self.say(f"VAL_PATIENCE={self.patience}: no better validation for so many rounds; training ends here.")


class ValidFile:
    """valid.jsonl, on the disk before the state that follows."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, record: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
