"""Trackers as run loggers: one that does not start, or fails, is reported once and left out; it never stops a training."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from rwkv_peft.common.errors import pip_command
from rwkv_peft.common.formatting import first_line
from rwkv_peft.common.trackers import TRACKERS, TrackerRun

from .metrics import StepMetrics


class Tracker:
    """A run at a tracker: gets the metrics of steps and validations until it fails, which it reports once.

    Args:
        name: a key of TRACKERS.
        project: where to put the run.
        folder: of the run.
        settings: of the run, by their names in the script.
        warn: prints a message.
        earlier: its id there, if the run is resumed.
        step: the step after which it is resumed.
        owns_run_dir: whether the run's folder, which some trackers write to, is still its own.
    """

    def __init__(
        self,
        name: str,
        project: str,
        folder: Path,
        settings: Mapping,
        warn: Callable[[str], None],
        earlier: str | None = None,
        step: int = 0,
        owns_run_dir: Callable[[], bool] = lambda: True,
    ):
        self.name, self.warn, self.owns_run_dir = name, warn, owns_run_dir
        self.run: TrackerRun | None = None
        try:
            with no_stdin():
                self.run = TRACKERS[name](project, folder, settings, earlier, step)
        except (Exception, SystemExit) as error:  # whatever a tracker does, it must not stop training
            fix = f" ({pip_command(name)})" if isinstance(error, ImportError) else ""
            self.warn(f"{name} did not start ({first_line(error)}){fix}; training goes on.")

    @property
    def id(self) -> str | None:
        """Name that the tracker gives the run."""
        return self.run.id if self.run else None

    def __call__(self, record: StepMetrics) -> None:
        """Log a step."""
        self._log({k: v for k, v in asdict(record).items() if v is not None and k != "step"}, record.step)

    def log_validation(self, record: dict) -> None:
        """Log a validation."""
        if record["loss"] is not None:
            self._log({"validation_loss": record["loss"]}, max(1, record["step"]))

    def _log(self, numbers: dict[str, float], step: int) -> None:
        if self.run and self.owns_run_dir():
            self._try(self.run.log, numbers, step)

    def close(self) -> None:
        """End the run."""
        if self.run:
            self._try(self.run.close)

    def _try(self, action: Callable[..., object], *arguments: object) -> None:
        try:
            action(*arguments)
        except (Exception, SystemExit) as error:
            self.run = None
            self.warn(f"{self.name} failed ({first_line(error)}); training goes on without it.")


@contextlib.contextmanager
def no_stdin() -> Iterator[None]:
    """Let a tracker that asks for a password or a choice get no answer and give up: a training may run at night."""
    before = sys.stdin
    with open(os.devnull) as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = before
