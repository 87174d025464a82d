"""Experiment trackers: wandb, tensorboard, swanlab, trackio.

A tracker that does not start, or fails, is reported once and left out: it never stops a training. Nothing is sent anywhere
unless a setting asks for it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_peft.common.errors import pip_command
from rwkv_peft.common.formatting import first_line

from .metrics import StepMetrics


class TrackerRun(NamedTuple):
    """An open run of a tracker.

    Attributes:
        log: takes numbers by name, and the optimizer step.
        close: ends the run.
        id: name that the tracker gives the run, to resume it.
    """

    log: Callable[[dict[str, float], int], Any]
    close: Callable[[], Any]
    id: str | None = None


def _resume_options(earlier: str | None) -> dict[str, Any]:
    return {"id": earlier, "resume": "allow"} if earlier else {}


# (trackers are optional packages: each is imported where it is opened)


def open_wandb(project: str, folder: Path, settings: Mapping, earlier: str | None, step: int) -> TrackerRun:
    """Open a run in wandb."""
    import wandb

    config, more = dict(settings), _resume_options(earlier)
    run = wandb.init(project=project, name=folder.name, dir=str(folder), config=config, **more)
    return TrackerRun(lambda numbers, at: run.log(numbers, step=at), run.finish, run.id)


def open_tensorboard(_project: str, folder: Path, settings: Mapping, earlier: str | None, step: int) -> TrackerRun:
    """Open a folder tensorboard/ in the run's folder."""
    from torch.utils.tensorboard import SummaryWriter

    # through the open folder: tensorboard opens its file by name for each write, and the name may then be another folder's
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    place = Path(f"/proc/self/fd/{handle}")
    # purge_step: what an earlier start of this run has written after the resumed step does not count
    writer = SummaryWriter(
        str((place if place.is_dir() else folder) / "tensorboard"), purge_step=step + 1 if step else None
    )
    writer.add_text("settings", "\n".join(f"    {name}={value}" for name, value in settings.items()))

    def log(numbers: dict[str, float], at: int) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, at)
        writer.flush()

    def close() -> None:
        writer.close()
        os.close(handle)

    return TrackerRun(log, close)


def open_swanlab(project: str, folder: Path, settings: Mapping, earlier: str | None, step: int) -> TrackerRun:
    """Open a run in swanlab."""
    import swanlab

    config, more = dict(settings), _resume_options(earlier)
    run = swanlab.init(project=project, name=folder.name, log_dir=str(folder / "swanlab"), config=config, **more)
    return TrackerRun(lambda numbers, at: swanlab.log(numbers, step=at), swanlab.finish, run.id)


def open_trackio(project: str, folder: Path, settings: Mapping, earlier: str | None, step: int) -> TrackerRun:
    """Open a run in trackio."""
    import trackio

    # (its metrics of processor and memory are not wanted)
    quiet = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
    trackio.init(project=project, name=folder.name, config=dict(settings), resume="allow", **quiet)
    return TrackerRun(lambda numbers, at: trackio.log(numbers, step=at), trackio.finish, folder.name)


# name of a tracker, and of the folder that it may make in a run's -> what opens a run there
TRACKERS = {"wandb": open_wandb, "tensorboard": open_tensorboard, "swanlab": open_swanlab, "trackio": open_trackio}


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
