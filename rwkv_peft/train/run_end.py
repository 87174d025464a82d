"""The end of a training: exit codes of errors, and the last lines of a run that has ended or was stopped."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import pytorch_lightning as pl
import torch

from rwkv_peft.common.errors import EXIT_MEMORY, EXIT_PROCESS, UserError, exit_with, find_system_error

from . import report
from .callbacks.build import RunCallbacks
from .callbacks.metrics import explain_skipped
from .module import TrainingModule
from .setup import RunSetup


@contextlib.contextmanager
def handle_failures(run: RunSetup, callbacks: RunCallbacks) -> Iterator[None]:
    """Turn what ends a training too early into a message and an exit code."""
    try:
        yield
    except UserError:
        if run.process.is_main:
            callbacks.saver.plot(True)  # it shows more than words
        raise
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError) or isinstance(find_system_error(error), MemoryError):
            exit_with(report.advise_on_memory(dict(run.settings.values), error), EXIT_MEMORY)
        callbacks.watchdog.caused(error)
        if isinstance(error, torch.distributed.DistError):
            words = f"Training ends: the processes cannot reach one another ({str(error).partition(chr(10))[0]})."
            exit_with(f"{words} Look at what the others say, and start all of them again.", EXIT_PROCESS)
        raise


def report_end(
    run: RunSetup, callbacks: RunCallbacks, module: TrainingModule, trainer: pl.Trainer, seconds: float
) -> None:
    """Print where the results are and what to do with them.

    Args:
        run: what was trained.
        callbacks: of the run.
        module: that Lightning has trained.
        trainer: Lightning's trainer.
        seconds: duration of the training.

    Raises:
        UserError: all steps were skipped.
        SystemExit: the run was stopped, or this is not rank 0.
    """
    process, validation, context = run.process, callbacks.validation, callbacks.context
    received, steps, skipped = context.stop.received, trainer.global_step, context.progress.skipped_in_a_row
    if not process.is_main:
        if process.node and process.local == 0:
            how = "stopped" if received else "done"
            print(f"node {process.node}: {how}; node 0 has the results", flush=True)
        sys.exit(128 + received if received else 0)
    if 0 < steps <= skipped:
        words = "The only step was" if steps == 1 else f"All {steps} steps were"
        why = explain_skipped(module, steps, skipped, run.config.processes == 1)
        raise UserError(f"{words} left out, so nothing was learnt. {why}")
    is_complete = run.is_trained or steps == run.data.steps
    if run.config.streaming and not (is_complete or received or context.progress.ended_early):
        print(f"The stream ended after {steps} of MAX_STEPS={run.data.steps} steps.")
    report.report_result(
        run.method,
        run.run_dir,
        callbacks.saver.newest,
        validation.records if validation else [],
        callbacks.state.exact,
        is_complete,
        received,
        seconds,
    )
