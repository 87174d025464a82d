"""Training: load the model, put the callbacks together, let Lightning's trainer run, and report."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time

from rwkv_peft.checkpoint import run_dir
from rwkv_peft.common.errors import EXIT_MEMORY, EXIT_PROCESS, UserError, cause, exit_with, ignore_closed_pipe


def tell(words: str) -> None:
    with ignore_closed_pipe():
        print(words, file=sys.stderr, flush=True)


def only_first(*_) -> None:
    raise AssertionError("only the first process writes")


def train(run, cleanup: contextlib.ExitStack, say) -> None:
    """Load the model and train it. run: prepared.Prepared."""
    import torch

    from rwkv_peft.adapters import inject
    from rwkv_peft.checkpoint.lazy_tensors import LazyTensors
    from rwkv_peft.data.dataset import largest_batch
    from rwkv_peft.data.loader import end_workers, make_loader
    from rwkv_peft.distributed.watchdog import Watchdog
    from rwkv_peft.train import report
    from rwkv_peft.train.callbacks.checkpoint import CheckpointWriter, check_room
    from rwkv_peft.train.callbacks.core import CheckpointCallback, GracefulStop, MetricsCallback, why_no_number
    from rwkv_peft.train.callbacks.lisa import LisaResample
    from rwkv_peft.train.callbacks.loggers import null_loggers, open_loggers
    from rwkv_peft.train.callbacks.oom_check import OomCheck
    from rwkv_peft.train.callbacks.periodic_setup import make_periodic, make_validation
    from rwkv_peft.train.callbacks.train_state import ResumeCallback, TrainStateCallback
    from rwkv_peft.train.model_setup import make_module, make_train_model
    from rwkv_peft.train.run_files import RunFiles
    from rwkv_peft.train.trainer import make_trainer

    config, found, folder, plan = run.config, run.found, run.folder, run.plan
    first, rank, in_use = run.place.first, run.place.rank, run.in_use
    if first:
        check_room(run, inject.count_trained(run.geometry, run.setup))
    with in_use.explaining():
        learner = make_train_model(run, cleanup, say)
        in_use.must_be_unchanged()
    told = open_loggers(run, cleanup, say) if first else null_loggers(run, say)
    say = told.say

    ours = functools.partial(in_use.is_there, folder)
    tidy = functools.partial(run_dir.remove_partial_files, folder, ours) if first else lambda: None
    parent = os.getppid() if run.place.of_ours else None
    watch = Watchdog(rank, config.processes, config.gpu_count, parent, tidy, tell, in_use.look)
    cleanup.callback(watch.leave)
    in_use.before_leaving += [watch.leave, tidy]
    watches = run.place.local == 0  # for all processes of its machine
    if watches:
        cleanup.enter_context(in_use.watching(say))
    files = RunFiles(in_use, run.place.node if watches else None, watch.over.set)
    stop = GracefulStop(lambda: (watch.leave(), tidy()), first, lambda: run_dir.has_saved(folder), files)

    past = (told.before[-1]["seconds"] if told.before else 0.0, found.facts["tokens"]) if found else (0.0, 0)
    in_a_row = found.facts.get("in_a_row", 0) if found else 0
    recorder = MetricsCallback(told.steps, config.nan_limit, say, *past, in_a_row)

    def running() -> dict:
        ended = {"finished": True} if validation and validation.stopped else {}
        return {**ended, "tokens": recorder.seen, "in_a_row": recorder.in_a_row, **told.running()}

    results = CheckpointWriter(run, learner, running) if first else None
    write, keep_state = (results.write, results.keep_state) if results else (only_first, only_first)
    epoch_steps, trained = plan.optimizer_steps, learner.trained
    at = found.step if found else -1
    keep = TrainStateCallback(
        keep_state if config.keep_last else None, trained, config.save_steps, epoch_steps, say, at
    )
    ends = config.epoch_save, config.epoch_count, epoch_steps
    save = CheckpointCallback(*ends, folder, write, trained, keep.save, say, config.keep_last)
    keep.beside, keep.paused = save.of_step, recorder.leave_out
    save.ours = ours
    keep.unchanged = save.unchanged = stop.unchanged
    if run.missing and results:
        as_found = LazyTensors(run.spread.weights(trained()))
        save.newest = results.write(as_found, int(run.missing.stem.removeprefix("rwkv-")), True, found.step)
        say(f"saved {save.newest}, which was missing")
    go_on = None
    if found:
        of_epoch = None if config.streaming else len(run.data.batches(rank, 0))

        def loaded() -> None:
            files.look()
            in_use.release(found.stamps)

        go_on = ResumeCallback(found, trained, epoch_steps, plan.accumulate, of_epoch, loaded)
    resample = [LisaResample(learner.lisa, learner.groups)] if learner.lisa else []
    validation = make_validation(run, told, save)
    rounds = make_periodic(run, told, validation, stop, recorder)
    rows = run.data.most_sequences
    first_of_all = OomCheck(largest_batch(run.data.most_tokens // rows, rows))
    callbacks = [watch, *([go_on] if go_on else []), recorder, stop, first_of_all, *rounds, *resample, save, keep]
    module, trainer = make_module(run, learner), make_trainer(run, callbacks)
    epoch, begin = (go_on.epoch, go_on.first) if go_on else (0, 0)
    loader = make_loader(run.data.batches(rank, begin), run.workers, epoch, begin)
    cleanup.callback(end_workers, loader)
    began = time.monotonic()
    finished = found is not None and found.step == run.steps  # and only a checkpoint was missing
    try:
        with stop.listening(), watch.instead_of_lightnings(), in_use.explaining():
            if not finished:
                trainer.fit(module, loader)
    except UserError:
        if first:
            save.draw(True)  # which tells more than words
        raise
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError) or isinstance(cause(error), MemoryError):
            exit_with(report.out_of_memory(run.settings, error), EXIT_MEMORY)
        watch.caused(error)
        if isinstance(error, torch.distributed.DistError):
            words = f"Training ends: the processes cannot reach one another ({str(error).partition(chr(10))[0]})."
            exit_with(f"{words} Look at what the others say, and start all of them again.", EXIT_PROCESS)
        raise
    cleanup.close()
    if not first:
        if run.place.node and run.place.local == 0:
            how = "stopped" if stop.received else "done"
            print(f"node {run.place.node}: {how}; node 0 has the results", flush=True)
        sys.exit(128 + stop.received if stop.received else 0)
    if 0 < trainer.global_step <= recorder.in_a_row:
        steps = "The only step was" if trainer.global_step == 1 else f"All {trainer.global_step} steps were"
        why = why_no_number(module, trainer.global_step, recorder.in_a_row, config.processes == 1)
        raise UserError(f"{steps} left out, so nothing was learnt. {why}")
    complete = finished or trainer.global_step == run.steps
    early = validation is not None and validation.stopped
    if config.streaming and not complete and not stop.received and not early:
        print(f"The stream ended after {trainer.global_step} of MAX_STEPS={run.steps} steps.")
    looks = validation.records if validation else []
    spent = time.monotonic() - began
    report.finish(run.method, folder, save.newest, looks, keep.exact, complete, stop.received, spent)
