"""What the callbacks of one run share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .callbacks.signals import GracefulStop


class StepClock:
    """Time of the optimizer steps, without the time of saves, validations and samples between them.

    Args:
        seconds: duration of the run before it was resumed.
    """

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds

    def start(self) -> None:
        """Start the first step."""
        self.last = time.monotonic()
        self.begin = self.last - self.seconds

    def exclude(self, seconds: float) -> None:
        """Do not count the last seconds as part of the next step."""
        self.last += seconds

    def end_step(self) -> tuple[float, float]:
        """Return the seconds of the step that ends now, and of the whole run with all that was done between steps."""
        now = time.monotonic()
        taken, self.last = max(now - self.last, 1e-9), now
        return taken, now - self.begin


@dataclass
class RunProgress:
    """What a running training has come to.

    Attributes:
        tokens: inputs of all steps so far.
        skipped_in_a_row: optimizer steps that were skipped last, one after another.
        ended_early: VAL_PATIENCE has ended the run.
    """

    tokens: int = 0
    skipped_in_a_row: int = 0
    ended_early: bool = False


@dataclass(frozen=True)
class RunContext:
    """What the callbacks of one run share.

    Attributes:
        run_dir: folder of the run.
        log: prints a message, above the progress bar. Does nothing on other ranks than 0.
        stop: whether the run must stop, agreed on by all ranks.
        owns_run_dir: whether the folder of that name is still the run's own.
        clock: time of the steps.
        progress: counters that go into the training state.
    """

    run_dir: Path
    log: Callable[[str], None]
    stop: GracefulStop
    owns_run_dir: Callable[[], bool] = lambda: True
    clock: StepClock = field(default_factory=StepClock)
    progress: RunProgress = field(default_factory=RunProgress)
