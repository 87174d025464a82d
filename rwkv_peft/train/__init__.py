"""./training.sh: fine-tune a model as the variables in the script say.

usage: ./training.sh [--dry-run] [--new] | --selftest

  --dry-run   check everything, print the plan and two samples with what is trained marked, and stop
  --new       begin a new run, also where the newest one was stopped and could go on
  --selftest  compare all that could compute on this machine (OP) with the definition, and stop
  --help      this text

The settings are the variables in the script itself, each with its explanation. Results go to output/<RUN_NAME>/:
  rwkv-N.pth + rwkv-N.json   what was trained, after epoch N (counted from 0), and how: ./merge.sh N folds it into the base
  loss.jsonl, loss.png       every optimizer step; run.json: the settings as they were resolved
  state/                     where the run is, so that it can go on

A run that was stopped or killed goes on when ./training.sh is run again: the one that RUN_NAME names, or if that is empty the
newest one, if its settings are those of the script. Steps, data and results are those of a run that was never stopped.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time

from .. import runs
from ..atomic import write_json
from ..config import RETIRED, TrainConfig
from ..errors import EXIT_MEMORY, UserError, leave
from ..shell_vars import enter
from ..words import did_you_mean
from .prepared import MAIN_PROCESS, RANK, header, prepare
from .record import script_values

SAMPLES = 2  # that a dry run shows
DEFAULT_TEMPLATE = "rwkv-world"  # where the data do not tell theirs
OPTIONS = ("--dry-run", "--new", "--selftest")


def main(arguments: list[str]) -> None:
    enter(arguments, __doc__, TrainConfig, command, RETIRED)


def command(config: TrainConfig, typed: list[str]) -> None:
    unknown = [word for word in typed if word not in OPTIONS]
    if unknown:
        meant = did_you_mean(unknown[0], OPTIONS)
        raise UserError(
            f"{unknown[0]}: is not an option{meant or '.'} There are {', '.join(OPTIONS)}; the settings are in the script "
            "itself. See ./training.sh --help"
        )
    if "--selftest" in typed:
        from .selftest import selftest

        return selftest()
    from .again import Moved

    while True:
        try:
            with contextlib.ExitStack() as cleanup:
                return run(config, "--dry-run" in typed, "--new" in typed, cleanup)
        except Moved:  # the run has gone on in the meantime, elsewhere
            continue


def run(config: TrainConfig, dry_run: bool, anew: bool, cleanup: contextlib.ExitStack) -> None:
    """anew: begin a new run, even if one could go on. cleanup: what to do whether training ends well or not."""
    # heavy imports come after the settings are known to be sound: a typo answers in a fraction of a second
    from ..training import report

    say = print if MAIN_PROCESS else lambda *_a, **_k: None
    prepared = prepare(config, dry_run, anew, cleanup, say)
    lines = header(prepared)
    if dry_run:
        lines = report.setting_lines(prepared.settings, script_values(config)) + lines
    say("\n".join(lines))
    if dry_run:
        report.print_samples(prepared.data.sequences(), SAMPLES)
        say("\nThis was a dry run: nothing was trained, nothing was written.")
    else:
        train(prepared, cleanup, say)


def only_first(*_) -> None:
    raise AssertionError("only the first process writes")


def train(run, cleanup: contextlib.ExitStack, say) -> None:
    """Load the model and train it. run: prepared.Prepared."""
    import warnings

    import pytorch_lightning as pl
    import torch

    from ..adapters import attach
    from ..data.workers import end_workers, make_loader
    from ..generate import likeliest_answer
    from ..templates.named import template
    from ..training import report, samples, validate
    from ..training.callbacks import LossFile, Progress, Save, StepRecorder, StopOnSignal, wandb_sink
    from ..training.lisa import Resample
    from ..training.module import TrainingModule
    from ..training.resume import GoOn, Keep
    from ..training.rounds import Rounds
    from .learner import make_learner
    from .results import Results, must_have_room

    config, found, folder, plan = run.config, run.found, run.folder, run.plan
    if MAIN_PROCESS:
        must_have_room(run, attach.count_trained(run.geometry, run.setup))
    learner = make_learner(run, cleanup, say)

    sinks, looks, tracker, results, before = [], [], None, None, []
    looked = validate.read(folder, found.step) if found else []
    if MAIN_PROCESS:
        before = runs.cut_log(folder, found.step) if found else []
        validate.cut(folder, found.step if found else -1)
        samples.cut(folder, found.step if found else -1)
        write_json(folder / "run.json", run.settings)
        runs.point_latest(folder)
        progress = Progress(run.steps, config.epoch_count, before)
        log = LossFile(folder / "loss.jsonl")
        sinks = [log, progress]
        if found and len(before) < found.step:
            say(
                f"careful   loss.jsonl has only {len(before)} of the {found.step} steps that are done; loss.png will show a gap"
            )
        for sink in sinks:
            cleanup.callback(sink.close)
        known = found.facts["wandb"] if found else None
        if config.wandb and (
            tracker := wandb_sink(config.wandb, folder.name, folder, run.settings, progress.say, known)
        ):
            sinks.append(tracker)
            looks.append(tracker.validation)
            cleanup.callback(tracker.close)
        say = progress.say

        def running() -> dict:
            log.sync()
            seen = {"tokens": recorder.seen, "in_a_row": recorder.in_a_row}
            ended = {"finished": True} if looking and looking.stopped else {}
            return {**ended, **seen, "wandb": tracker.run.id if tracker and tracker.run else None}

        results = Results(run, learner, running)
        looks.append(validate.ValidFile(folder / validate.FILE))
    stop = StopOnSignal(lambda: runs.abandon(folder) if MAIN_PROCESS else None)
    epoch_steps, trained = plan.optimizer_steps, learner.trained
    write, keep_state = (results.write, results.keep_state) if results else (only_first, only_first)
    at = found.step if found else -1
    keep = Keep(keep_state if config.keep_last else None, trained, config.save_steps, epoch_steps, say, at)
    save = Save(config.epoch_save, config.epoch_count, epoch_steps, folder, write, keep.save, say)
    if run.missing and results:
        save.newest = results.write(int(run.missing.stem.removeprefix("rwkv-")), True, found.step)
        say(f"saved {save.newest}, which was missing")
    known = (
        (before[-1]["seconds"] if before else 0.0, found.facts["tokens"], found.facts.get("in_a_row", 0))
        if found
        else ()
    )
    recorder = StepRecorder(sinks, config.nan_limit, say, *known)
    go_on = None
    if found:
        go_on = GoOn(found, trained, epoch_steps, plan.accumulate, None if config.streaming else plan.micro_batches)
    resample = [Resample(learner.lisa, learner.groups)] if learner.lisa else []
    looking = None
    if run.held:
        share = functools.partial(run.held.batches, RANK, plan.world)
        looking = validate.Validate(
            share, run.held.data, config.val_steps, epoch_steps, config.val_patience, looks, say, looked
        )
    rounds: list[Rounds] = [looking] if looking else []
    if run.questions:
        form = template(run.data.templates[0][0] if len(run.data.templates) == 1 else DEFAULT_TEMPLATE)
        where = folder / samples.FILE, run.questions, lambda m, q: likeliest_answer(m, form, q, config.sample_tokens)
        rounds.append(samples.Samples(*where, config.sample_steps, epoch_steps, say))
    for one in rounds:
        one.interrupted, one.paused = lambda: bool(stop.received), recorder.leave_out
    callbacks = [*([go_on] if go_on else []), recorder, stop, *rounds, *resample, save, keep]
    module = TrainingModule(
        learner.model,
        learner.groups(),
        run.steps,
        config.lr_schedule,
        config.lr_init,
        config.lr_final,
        config.warmup_steps,
        (config.beta1, config.beta2),
        config.adam_eps,
        config.grad_clip,
        config.chunk_ctx if config.train_type == "infctx" else None,
        config.infctx_grad,
        config.optim,
    )
    # Lightning's hints are about loggers and workers that we have settled; its errors come as exceptions
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.ERROR)
    trainer = pl.Trainer(
        **run.trainer,
        max_epochs=config.epoch_count,
        accumulate_grad_batches=config.mini_bsz,
        use_distributed_sampler=False,  # ours gives every rank its rows; Lightning's would shuffle them again
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    epoch, first = (go_on.epoch, go_on.first) if go_on else (0, 0)
    loader = make_loader(run.data.batches(RANK, first), run.workers, epoch, first)
    cleanup.callback(end_workers, loader)
    began = time.monotonic()
    finished = found is not None and found.step == run.steps  # and only a checkpoint was missing
    try:
        with stop.listening():
            if not finished:
                trainer.fit(module, loader)
    except RuntimeError as error:
        # torch's words for an empty host; a GPU has an exception of its own
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            leave(report.out_of_memory(run.settings, error), EXIT_MEMORY)
        raise
    cleanup.close()
    if not MAIN_PROCESS:
        return
    complete = finished or trainer.global_step == run.steps
    early = looking is not None and looking.stopped
    if config.streaming and not complete and not stop.received and not early:
        print(f"The stream ended after {trainer.global_step} of MAX_STEPS={run.steps} steps.")
    if looking and looking.best and not stop.received:
        report.best_look(looking.best, folder, save.newest)
    report.finish(run.method, folder, save.newest, keep.exact, complete, stop.received, time.monotonic() - began)
