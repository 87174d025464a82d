"""Run loggers: console, JSONL files and experiment trackers. Only rank 0 writes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from rwkv_peft.checkpoint import run_dir, step_log
from rwkv_peft.common import hardware, paths
from rwkv_peft.common.atomic_io import open_append, write_json
from rwkv_peft.common.errors import UserError, describe_nonfatal, ignore_closed_pipe
from rwkv_peft.common.formatting import format_duration
from rwkv_peft.train.loss_plot import smoothing_window
from rwkv_peft.train.setup import RunSetup

from . import samples, validation
from .metrics import StepMetrics
from .trackers import Tracker


class Progress:
    """A bar with loss, learning rate, speed, memory and time left; about twenty plain lines where there is no terminal.

    The loss is the mean of the last twentieth of the run's steps (at least 5); loss.jsonl has every single one.

    Args:
        steps: optimizer steps of the run.
        epochs: epochs of the run.
        before: records of the steps before the run was resumed.
        memory: returns the peak memory in bytes, 0 where it is not known.
        done: optimizer steps before the run was resumed.
    """

    def __init__(
        self, steps: int, epochs: int, before: Sequence[dict] = (), memory: Callable[[], int] = lambda: 0, done: int = 0
    ):
        self.steps, self.epochs, self.memory = steps, epochs, memory
        # losses; their plain mean is the smooth line of loss.png
        losses = (record["loss"] for record in before if record["loss"] is not None)
        self.recent: deque[float] = deque(losses, maxlen=smoothing_window(steps))
        # step and second from which the time left is estimated
        self.done, self.spent = done, before[-1]["seconds"] if before else 0.0
        self.first = self.done + 1
        form = "{desc} |{bar:16}| {n_fmt}/{total_fmt}{postfix}"  # (tqdm adds a comma)
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=self.done, dynamic_ncols=True, bar_format=form)
        self.every = max(1, -(-steps // 20))

    def __call__(self, record: StepMetrics) -> None:
        """Show a step."""
        if record.loss is not None:
            self.recent.append(record.loss)
        loss = f"{sum(self.recent) / len(self.recent):.3f}" if self.recent else "-"
        # tokens/s: all inputs, and loss tokens
        speed = f"{record.tokens_per_s:,.0f} tokens/s ({record.targets_per_s:,.0f} trained)"
        speed += f"  {self.memory() / 2**30:.1f} GB" if self.memory() else ""
        if record.step == self.first:  # it prepares what the others use, so its time says nothing of theirs
            left, self.done, self.spent = "", record.step, record.seconds
        else:
            pace = (record.seconds - self.spent) / (record.step - self.done)
            left = format_duration((self.steps - record.step) * pace) + " left"
        numbers = f"loss {loss}  lr {record.lr:.2e}  {speed}"
        epoch = f"epoch {record.epoch + 1}/{self.epochs}"
        with ignore_closed_pipe():
            if self.bar:
                self.bar.set_description_str(f"{epoch}  {numbers}", refresh=False)
                self.bar.postfix = left
                self.bar.update(1)
            elif record.step == self.first or record.step % self.every == 0 or record.step == self.steps:
                print(f"{epoch}  step {record.step}/{self.steps}  {numbers}  {left}".rstrip(), flush=True)

    def log(self, message: str) -> None:
        """Print a message, above the bar."""
        with ignore_closed_pipe():
            if self.bar:
                self.bar.write(message)
            else:
                print(message, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        with ignore_closed_pipe():
            if self.bar:
                self.bar.close()


class LossFile:
    """loss.jsonl: one object per optimizer step, readable at any moment.

    Where an editor, or sed -i, has put another file in its place, or the file was removed, writing continues in the file of that
    name, after the records that this one lacks.

    Args:
        path: of the file.
        log: gets a warning about that, once.
        owns_run_dir: whether its folder is still the run's own.
    """

    def __init__(
        self,
        path: Path,
        log: Callable[[str], None] = lambda words: None,
        owns_run_dir: Callable[[], bool] = lambda: True,
    ):
        self.path, self.log, self.owns_run_dir = path, log, owns_run_dir
        self.warnings: set[str] = set()
        self.file = self._open()

    def _open(self, prepare: Callable[[IO[Any]], None] | None = None) -> IO[Any]:
        # (other programs may have written bytes into it that are no text)
        return open_append(self.path, "a+", prepare, encoding="utf-8", errors="surrogateescape")

    def _follow(self) -> None:
        """Open the file that has the name now."""
        if not self.owns_run_dir():
            return
        if not self.path.is_symlink() and run_dir.is_same_file(self.path, self.file.fileno()):
            return
        try:
            with contextlib.ExitStack() as failed:
                fresh = failed.enter_context(self._open(_lock))
                self.file.seek(0)
                fresh.write(step_log.missing_lines(self.path, self.file.read()))
                fresh.flush()
                failed.pop_all()
            self.file.close()
            self.file = fresh
            self._warn("was replaced or removed; it goes on, with the records that it lacked")
        except (OSError, UserError) as error:
            self._warn(f"cannot be gone on with, and training goes on. {describe_nonfatal(error)}")

    def _warn(self, words: str) -> None:
        if words not in self.warnings:
            self.warnings.add(words)
            self.log(f"warning   {paths.display_path(self.path)} {words}")

    def __call__(self, record: StepMetrics) -> None:
        """Append a step."""
        self._follow()
        self.file.write(json.dumps(asdict(record)) + "\n")
        self.file.flush()

    def sync(self) -> None:
        """Flush it to the disk: the state of a step is of no use without the record of that step."""
        self._follow()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _lock(file: IO[Any]) -> None:
    run_dir.lock_file(file)


@dataclass(frozen=True)
class RunLoggers:
    """What logs a run.

    Attributes:
        log: prints a message.
        val_records: validations before the run was resumed.
        step_records: records of the steps before that.
        step_sinks: get the metrics of every optimizer step.
        val_sinks: get the record of every validation.
        state_facts: returns what a training state must know of the loggers.
    """

    log: Callable[[str], None]
    val_records: list[dict]
    step_records: list[dict] = field(default_factory=list)
    step_sinks: list[Callable[[StepMetrics], None]] = field(default_factory=list)
    val_sinks: list[Callable[[dict], None]] = field(default_factory=list)
    state_facts: Callable[[], dict] = dict


def open_loggers(run: RunSetup, cleanup: contextlib.ExitStack, log: Callable[[str], None]) -> RunLoggers:
    """Open all loggers, after what an earlier start of the run has written after the resumed step is removed.

    Other ranks than 0 get loggers that write nothing.
    """
    state, folder = run.state, run.run_dir
    done = state.step if state else 0
    val_records = validation.read(folder, done) if state else []
    if not run.process.is_main:
        return RunLoggers(log, val_records)
    step_records, repaired = step_log.truncate_log(folder, done) if state else ([], False)
    gaps = step_log.find_gaps([record["step"] for record in step_records], done)
    for file in (validation, samples):
        file.truncate(folder, state.step if state else -1)
    write_json(folder / "run.json", run.settings.values)
    run_dir.point_latest(folder)
    if not state and (folder / run_dir.BEFORE).exists():
        log(
            f"warning   an earlier run of this name saved nothing; its log is {paths.display_path(folder / run_dir.BEFORE)}"
        )
    if repaired:
        words = f"had lines that are no records, or out of order; what it held before is kept as {step_log.DAMAGED}"
        log(f"warning   {paths.display_path(folder / step_log.FILE)} {words}")
    if missing := step_log.find_new_gaps(gaps, state.facts.get("gaps")) if state else []:
        log(f"warning   loss.jsonl has no record of {step_log.describe_gaps(missing)}; loss.png shows the gap")
    progress = Progress(run.data.steps, run.config.epoch_count, step_records, hardware.peak_memory, done)
    loss_file = LossFile(folder / step_log.FILE, progress.log, run.owns_run_dir)
    for logger in (loss_file, progress):
        cleanup.callback(logger.close)
    ids = {"wandb": state.facts["wandb"], **state.facts.get("trackers", {})} if state else {}
    trackers = []
    for name, project in run.config.trackers.items():
        values = run.settings.values
        tracker = Tracker(name, project, folder, values, progress.log, ids.get(name), done, run.owns_run_dir)
        trackers.append(tracker)
        cleanup.callback(tracker.close)

    def state_facts() -> dict:
        loss_file.sync()
        now = {tracker.name: tracker.id for tracker in trackers}
        return {"wandb": now.get("wandb"), "trackers": now, "gaps": gaps}

    val_file = validation.ValidFile(folder / validation.FILE, run.owns_run_dir)
    return RunLoggers(
        progress.log,
        val_records,
        step_records,
        [loss_file, progress, *trackers],
        [*(tracker.log_validation for tracker in trackers), val_file],
        state_facts,
    )
