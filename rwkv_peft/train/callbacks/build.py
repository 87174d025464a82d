"""The callbacks of a run, in their order."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NoReturn

import pytorch_lightning as pl

from rwkv_peft.checkpoint.base_template import find_base_template
from rwkv_peft.checkpoint.prompt_format import PromptFormat
from rwkv_peft.data.dataset import Batches, largest_batch
from rwkv_peft.data.tokenized_files import common_form
from rwkv_peft.distributed.watchdog import Watchdog
from rwkv_peft.model.generate import likeliest_answer
from rwkv_peft.model.rwkv import RWKV
from rwkv_peft.train.context import RunContext
from rwkv_peft.train.model_setup import TrainModel
from rwkv_peft.train.setup import RunSetup

from .checkpoint import CheckpointCallback, CheckpointSaver, CheckpointWriter, WriteCheckpoint
from .lisa import LisaResample
from .loggers import RunLoggers
from .metrics import MetricsCallback
from .oom_check import OomCheck
from .samples import Samples
from .train_state import ResumeCallback, TrainStateCallback, WriteState
from .validation import Validate


@dataclass(frozen=True)
class RunCallbacks:
    """The callbacks of a run.

    Attributes:
        context: what they share.
        watchdog: ends the run where another process has ended.
        resume: puts the trainer where the state was saved; None for a new run.
        saver: of checkpoints.
        state: saves training states.
        validation: on held-out data, None without any.
        ordered: all of them, in the order in which Lightning calls them.
    """

    context: RunContext
    watchdog: Watchdog
    resume: ResumeCallback | None
    saver: CheckpointSaver
    state: TrainStateCallback
    validation: Validate | None
    ordered: list[pl.Callback]


def make_callbacks(
    run: RunSetup, model: TrainModel, loggers: RunLoggers, context: RunContext, watchdog: Watchdog
) -> RunCallbacks:
    """Make the callbacks of a run. Writes the checkpoint of the last finished epoch if a resumed run has lost it."""
    config, epoch_steps = run.config, run.plan.optimizer_steps
    write_checkpoint: WriteCheckpoint = _refuse
    write_state: WriteState = _refuse
    newest = None
    if run.process.is_main:
        writer = CheckpointWriter(run, model, functools.partial(_running_facts, context, loggers))
        write_checkpoint, write_state = writer.write, writer.write_state
        newest = writer.restore_missing(context.log)
    saver = CheckpointSaver(run, model, context, write_checkpoint, newest)
    state = TrainStateCallback(
        context,
        write_state if config.keep_last else None,
        model.trained,
        config.save_steps,
        epoch_steps,
        saver.save_step,
        run.state.step if run.state else -1,
    )
    resume = _make_resume(run, model, context)
    validation = _make_validation(run, loggers, saver, context)
    samples = _make_samples(run, context)
    rows = run.data.train.most_sequences
    ordered: list[pl.Callback | None] = [
        watchdog,
        resume,
        MetricsCallback(context, loggers.step_sinks, config.nan_limit),
        context.stop,
        OomCheck(largest_batch(run.data.train.most_tokens // rows, rows)),
        validation,
        samples,
        LisaResample(model.lisa, model.groups) if model.lisa else None,
        CheckpointCallback(saver, state),
        state,
    ]
    present = [callback for callback in ordered if callback]
    return RunCallbacks(context, watchdog, resume, saver, state, validation, present)


def _refuse(*_: object) -> NoReturn:
    raise AssertionError("only rank 0 writes")


def _running_facts(context: RunContext, loggers: RunLoggers) -> dict:
    """What a training state must know of the running training."""
    progress = context.progress
    ended = {"finished": True} if progress.ended_early else {}
    return {**ended, "tokens": progress.tokens, "in_a_row": progress.skipped_in_a_row, **loggers.state_facts()}


def _make_resume(run: RunSetup, model: TrainModel, context: RunContext) -> ResumeCallback | None:
    state, files = run.state, context.stop.files
    if not state:
        return None

    def release_state() -> None:
        if files:
            files.check()
        run.watch.release(state.stamps)

    plan, batches = run.plan, run.data.train.batches(run.process.rank, 0)
    micro_batches = len(batches) if isinstance(batches, Batches) else None
    return ResumeCallback(state, model.trained, plan.optimizer_steps, plan.accumulate, micro_batches, release_state)


def _make_validation(
    run: RunSetup, loggers: RunLoggers, saver: CheckpointSaver, context: RunContext
) -> Validate | None:
    config, plan, val = run.config, run.plan, run.data.val
    if not val:
        return None
    return Validate(
        context,
        functools.partial(val.batches, run.process.rank, plan.world),
        val.data,
        config.val_steps,
        plan.optimizer_steps,
        config.val_patience,
        loggers.val_sinks,
        loggers.val_records,
        saver.save_best if config.keep_best else None,
    )


def _make_samples(run: RunSetup, context: RunContext) -> Samples | None:
    config, train = run.config, run.data.train
    if not run.data.questions:
        return None
    form = common_form(train.forms)
    template = (form and form.template) or find_base_template(run.base.path).template
    bos = train.bos == (1,)
    prompt = PromptFormat(template, form.eot if form else "doc", bos, blank_lines=train.blank_lines)

    def answer(model: RWKV, question: str) -> str:
        return likeliest_answer(model, prompt.template, question, config.sample_tokens, prompt.stop_tokens, prompt.bos)

    return Samples(context, run.data.questions, answer, config.sample_steps, run.plan.optimizer_steps)
