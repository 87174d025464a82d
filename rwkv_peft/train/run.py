"""Training from a checked setup to the last line: load, connect, fit, report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from rwkv_peft.data.loader import end_workers, make_loader

from .callbacks.build import make_callbacks
from .callbacks.checkpoint import check_free_space
from .callbacks.loggers import open_loggers
from .model_setup import make_module, make_train_model
from .run_end import handle_failures, report_end
from .setup import RunSetup
from .trainer import make_trainer
from .watchers import start_watchers


def train(run: RunSetup, cleanup: contextlib.ExitStack, log: Callable[[str], None]) -> None:
    """Load the model, train it, and report the end.

    Args:
        run: what is trained.
        cleanup: gets what to do at the end of the training, also after an error.
        log: prints a message.

    Raises:
        UserError: a file, the data or the machine does not allow the training to continue.
        SystemExit: the run was stopped, or has ended on another rank than 0.
    """
    if run.process.is_main:
        check_free_space(run)
    with run.watch.explaining():
        model = make_train_model(run, cleanup, log)
        run.watch.must_be_unchanged()
    loggers = open_loggers(run, cleanup, log)
    watchdog, context = start_watchers(run, loggers, cleanup)
    callbacks = make_callbacks(run, model, loggers, context, watchdog)
    module, trainer = make_module(run, model), make_trainer(run, callbacks.ordered)
    epoch, first = (callbacks.resume.epoch, callbacks.resume.first) if callbacks.resume else (0, 0)
    loader = make_loader(run.data.train.batches(run.process.rank, first), run.settings.num_workers, epoch, first)
    cleanup.callback(end_workers, loader)
    began = time.monotonic()
    with (
        handle_failures(run, callbacks),
        context.stop.listening(),
        watchdog.replacing_lightnings_observer(),
        run.watch.explaining(),
    ):
        if not run.is_trained:
            trainer.fit(module, loader)
    cleanup.close()
    report_end(run, callbacks, module, trainer, time.monotonic() - began)
