"""What a run looks at on its way: held-out rows, and its own answers."""

from __future__ import annotations

import functools

from ..generate import likeliest_answer
from ..prompting import Prompting
from ..templates.of_base import known_by
from ..tokenized import common
from ..training import samples, validate
from ..training.callbacks import Save, StepRecorder, StopOnSignal
from ..training.rounds import Rounds
from .prepared import Prepared
from .told import Told


def make_validation(run: Prepared, told: Told, save: Save) -> validate.Validate | None:
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


def make_rounds(
    run: Prepared, told: Told, validation: validate.Validate | None, stop: StopOnSignal, recorder: StepRecorder
) -> list[Rounds]:
    """The validation and what comes beside it, in their order. stop: cuts them short. recorder: does not count their time."""
    config, rounds = run.config, [validation] if validation else []
    if run.questions:
        written = common(run.data.forms)
        form = (written and written.template) or known_by(run.base).template
        bos = run.data.bos == (1,)
        asked = Prompting(form, written.eot if written else "doc", bos, blank_lines=run.data.blank_lines)
        answer = functools.partial(say_after, asked, config.sample_tokens)
        where = run.folder / samples.FILE
        every = config.sample_steps, run.plan.optimizer_steps
        rounds.append(samples.Samples(where, run.questions, answer, *every, told.say))
        rounds[-1].ours = functools.partial(run.in_use.is_there, run.folder)
    for one in rounds:
        one.interrupted, one.agree, one.paused = lambda: bool(stop.received), stop.agree, recorder.leave_out
    return rounds


def say_after(asked: Prompting, most_tokens: int, model, question: str) -> str:
    return likeliest_answer(model, asked.template, question, most_tokens, asked.stop_tokens, asked.bos)
