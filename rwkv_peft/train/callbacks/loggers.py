"""Who is told how a run goes: the terminal, the files of its folder, trackers. They are the first process's."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from rwkv_peft.checkpoint import run_dir, step_log
from rwkv_peft.common import hardware, paths
from rwkv_peft.common.atomic_io import write_json
from rwkv_peft.common.trackers import Tracker
from rwkv_peft.train.setup import RunSetup

from . import samples, validation
from .core import LossFile, Progress


@dataclass
class RunLoggers:
    """say: where words go. steps, looks: get the record of every optimizer step, and of every look at held-out rows. before:
    records of the steps that are done, where a run goes on; looked: of its looks. running: what a state must know of them all.
    """

    say: Callable[[str], None]
    looked: list[dict]
    before: list[dict] = field(default_factory=list)
    steps: list[Callable] = field(default_factory=list)
    looks: list[Callable[[dict], None]] = field(default_factory=list)
    running: Callable[[], dict] = dict


def null_loggers(run: RunSetup, say: Callable[[str], None]) -> RunLoggers:
    """For the other processes."""
    return RunLoggers(say, looked_before(run))


def looked_before(run: RunSetup) -> list[dict]:
    return validation.read(run.folder, run.found.step) if run.found else []


def open_loggers(run: RunSetup, cleanup: contextlib.ExitStack, say: Callable[[str], None]) -> RunLoggers:
    """Opens them all, after what an earlier start of the run has written behind the step that it goes on from is cut off."""
    config, found, folder = run.config, run.found, run.folder
    done, looked = found.step if found else 0, looked_before(run)
    before, mended = step_log.truncate_log(folder, done) if found else ([], False)
    gaps = step_log.find_gaps([record["step"] for record in before], done)
    for files in (validation, samples):
        files.cut(folder, found.step if found else -1)
    write_json(folder / "run.json", run.settings)
    run_dir.point_latest(folder)
    if not found and (folder / run_dir.BEFORE).exists():
        say(
            f"warning   an earlier run of this name saved nothing; its log is {paths.display_path(folder / run_dir.BEFORE)}"
        )
    if mended:
        words = f"had lines that are no records, or out of order; what it held before is kept as {step_log.DAMAGED}"
        say(f"warning   {paths.display_path(folder / step_log.FILE)} {words}")
    if missing := step_log.find_new_gaps(gaps, found.facts.get("gaps")) if found else []:
        say(f"warning   loss.jsonl has no record of {step_log.describe_gaps(missing)}; loss.png shows the gap")
    progress = Progress(run.steps, config.epoch_count, before, hardware.peak_memory, done)
    ours = functools.partial(run.in_use.is_there, folder)
    log = LossFile(folder / step_log.FILE, progress.say, ours)
    known = {"wandb": found.facts["wandb"], **found.facts.get("trackers", {})} if found else {}
    for one in (log, progress):
        cleanup.callback(one.close)
    trackers = []
    for name, group in config.trackers.items():
        trackers.append(Tracker(name, group, folder, run.settings, progress.say, known.get(name), done, ours))
        cleanup.callback(trackers[-1].close)

    def running() -> dict:
        log.sync()
        ids = {one.name: one.id for one in trackers}
        return {"wandb": ids.get("wandb"), "trackers": ids, "gaps": gaps}

    looks = [*(one.validation for one in trackers), validation.ValidFile(folder / validation.FILE, ours)]
    return RunLoggers(progress.say, looked, before, [log, progress, *trackers], looks, running)
