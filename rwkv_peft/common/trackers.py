"""Experiment trackers: open a run in wandb, tensorboard, swanlab or trackio. Nothing is sent unless a setting asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


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
