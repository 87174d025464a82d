"""Programs that show a run elsewhere: wandb, tensorboard, swanlab, trackio. One that does not start, or fails, says so once and
is left out: it never stops a training. Nothing is sent anywhere unless a setting asks for it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_peft.common.errors import pip_command
from rwkv_peft.common.formatting import first_line


class Opened(NamedTuple):
    """A run at a tracker. log: takes numbers by name, and the optimizer step. id: what it calls the run, to go on with it."""

    log: Callable[[dict[str, float], int], Any]
    close: Callable[[], Any]
    id: str | None = None


def open_wandb(project: str, folder: Path, settings: Mapping, earlier: str | None, step: int) -> Opened:
    import wandb

    more = {"id": earlier, "resume": "allow"} if earlier else {}
    run = wandb.init(project=project, name=folder.name, dir=str(folder), config=dict(settings), **more)
    return Opened(lambda numbers, at: run.log(numbers, step=at), run.finish, run.id)


def open_tensorboard(_project: str, folder: Path, settings: Mapping, earlier: str | None, step: int) -> Opened:
    from torch.utils.tensorboard import SummaryWriter

    # through the open folder: tensorboard opens its file by name for each write, and the name may then be another folder's
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    place = (
        f"/proc/self/fd/{handle}/tensorboard" if os.path.isdir(f"/proc/self/fd/{handle}") else folder / "tensorboard"
    )
    # purge_step: records after the step that this run resumes from do not count
    writer = SummaryWriter(str(place), purge_step=step + 1 if step else None)
    writer.add_text("settings", "\n".join(f"    {name}={value}" for name, value in settings.items()))

    def log(numbers: dict[str, float], at: int) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, at)
        writer.flush()

    def close() -> None:
        writer.close()
        os.close(handle)

    return Opened(log, close)


def open_swanlab(project: str, folder: Path, settings: Mapping, earlier: str | None, step: int) -> Opened:
    import swanlab

    more = {"id": earlier, "resume": "allow"} if earlier else {}
    there = str(folder / "swanlab")
    run = swanlab.init(project=project, name=folder.name, log_dir=there, config=dict(settings), **more)
    return Opened(lambda numbers, at: swanlab.log(numbers, step=at), swanlab.finish, run.id)


def open_trackio(project: str, folder: Path, settings: Mapping, earlier: str | None, step: int) -> Opened:
    import trackio

    # (its figures of processor and memory are not asked for)
    quiet = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
    trackio.init(project=project, name=folder.name, config=dict(settings), resume="allow", **quiet)
    return Opened(lambda numbers, at: trackio.log(numbers, step=at), trackio.finish, folder.name)


# name of a tracker, and of the folder that it may make in a run's -> what opens a run there
TRACKERS = {"wandb": open_wandb, "tensorboard": open_tensorboard, "swanlab": open_swanlab, "trackio": open_trackio}


class Tracker:
    """Hands the numbers of steps and looks to a tracker until it fails; then says so once and is quiet.

    name: a key of TRACKERS. project: where to put the run. earlier: its id there, if the run goes on, after `step` steps. ours:
    whether the run's folder, which some write to, is still its own.
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
        ours: Callable[[], bool] = lambda: True,
    ):
        self.name, self.warn, self.ours, self.opened = name, warn, ours, None
        try:
            with nobody_to_ask():
                self.opened = TRACKERS[name](project, folder, settings, earlier, step)
        except (Exception, SystemExit) as error:  # whatever a tracker does, it must not stop training
            cure = f" ({pip_command(name)})" if isinstance(error, ImportError) else ""
            self.warn(f"{name} did not start ({first_line(error)}){cure}; training goes on.")

    @property
    def id(self) -> str | None:
        return self.opened.id if self.opened else None

    def __call__(self, record) -> None:
        """record: callbacks.Record."""
        self.send({k: v for k, v in asdict(record).items() if v is not None and k != "step"}, record.step)

    def validation(self, record: dict) -> None:
        if record["loss"] is not None:
            self.send({"validation_loss": record["loss"]}, max(1, record["step"]))

    def send(self, numbers: dict, step: int) -> None:
        if self.ours():
            self.guarded(lambda: self.opened.log(numbers, step))

    def close(self) -> None:
        self.guarded(lambda: self.opened.close())

    def guarded(self, action: Callable[[], Any]) -> None:
        if self.opened is not None:
            try:
                action()
            except (Exception, SystemExit) as error:
                self.opened = None
                self.warn(f"{self.name} failed ({first_line(error)}); training goes on without it.")


@contextlib.contextmanager
def nobody_to_ask():
    """A tracker that wants a password or a choice gets no answer, and gives up: nobody sits before a training at night."""
    before = sys.stdin
    with open(os.devnull) as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = before
