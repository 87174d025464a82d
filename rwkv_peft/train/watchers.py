"""What watches a running training: other processes, the files of the run, signals."""

from __future__ import annotations

import contextlib
import os
import sys

from rwkv_peft.checkpoint import run_dir
from rwkv_peft.common.errors import ignore_closed_pipe
from rwkv_peft.distributed.watchdog import Watchdog

from .callbacks.loggers import RunLoggers
from .callbacks.signals import GracefulStop
from .context import RunContext, RunProgress, StepClock
from .run_files import RunFiles
from .setup import RunSetup


def start_watchers(run: RunSetup, loggers: RunLoggers, cleanup: contextlib.ExitStack) -> tuple[Watchdog, RunContext]:
    """Start the watchdog and the watch of the run's files, and make the context of the callbacks."""
    config, process, folder, watch = run.config, run.process, run.run_dir, run.watch

    def remove_partial_files() -> None:
        if process.is_main:
            run_dir.remove_partial_files(folder, run.owns_run_dir)

    parent = os.getppid() if process.spawned_by_us else None
    watchdog = Watchdog(
        process.rank, config.processes, config.gpu_count, parent, remove_partial_files, _print_error, watch.look
    )

    def leave() -> None:
        watchdog.leave()
        remove_partial_files()

    cleanup.callback(watchdog.leave)
    watch.before_exit += [watchdog.leave, remove_partial_files]
    watches_files = process.local == 0  # one process of each node
    if watches_files:
        cleanup.enter_context(watch.watching(loggers.log))
    files = RunFiles(watch, process.node if watches_files else None, watchdog.over.set)
    stop = GracefulStop(leave, process.is_main, lambda: run_dir.has_saved(folder), files)
    facts = run.state.facts if run.state else {}
    return watchdog, RunContext(
        folder,
        loggers.log,
        stop,
        run.owns_run_dir,
        StepClock(loggers.step_records[-1]["seconds"] if loggers.step_records else 0.0),
        RunProgress(facts.get("tokens", 0), facts.get("in_a_row", 0)),
    )


def _print_error(words: str) -> None:
    with ignore_closed_pipe():
        print(words, file=sys.stderr, flush=True)
