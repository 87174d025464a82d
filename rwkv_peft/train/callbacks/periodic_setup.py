"""What a run looks at on its way: held-out rows, and its own answers."""

from __future__ import annotations

import functools

from rwkv_peft.checkpoint.base_template import find_base_template
from rwkv_peft.checkpoint.prompt_format import PromptFormat
from rwkv_peft.data.tokenized_files import common_form
from rwkv_peft.model.generate import likeliest_answer
from rwkv_peft.train.setup import RunSetup

from . import samples
from . import validation as validate
from .core import CheckpointCallback, GracefulStop, MetricsCallback
from .loggers import RunLoggers
from .periodic import PeriodicCallback


def make_validation(run: RunSetup, told: RunLoggers, save: CheckpointCallback) -> validate.Validate | None:
    """None where no rows are held out."""
    config, plan = run.config, run.plan
    if not run.held:
        return None
    return validate.Validate(
        functools.partial(run.held.batches, run.place.rank, plan.world),
        run.held.data,
        config.val_steps,
        plan.optimizer_steps,
        config.val_patience,
        told.looks,
        told.say,
        told.looked,
        save.best if config.keep_best else None,
    )


def make_periodic(
    run: RunSetup, told: RunLoggers, validation: validate.Validate | None, stop: GracefulStop, recorder: MetricsCallback
) -> list[PeriodicCallback]:
    """The validation and what comes beside it, in their order. stop: cuts them short. recorder: does not count their time."""
    config, rounds = run.config, [validation] if validation else []
    if run.questions:
        written = common_form(run.data.forms)
        form = (written and written.template) or find_base_template(run.base).template
        bos = run.data.bos == (1,)
        asked = PromptFormat(form, written.eot if written else "doc", bos, blank_lines=run.data.blank_lines)
        answer = functools.partial(say_after, asked, config.sample_tokens)
        where = run.folder / samples.FILE
        every = config.sample_steps, run.plan.optimizer_steps
        rounds.append(samples.Samples(where, run.questions, answer, *every, told.say))
        rounds[-1].ours = functools.partial(run.in_use.is_there, run.folder)
    for one in rounds:
        one.interrupted, one.agree, one.paused = lambda: bool(stop.received), stop.agree, recorder.leave_out
    return rounds


def say_after(asked: PromptFormat, most_tokens: int, model, question: str) -> str:
    return likeliest_answer(model, asked.template, question, most_tokens, asked.stop_tokens, asked.bos)
