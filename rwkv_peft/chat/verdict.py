"""What the numbers of a run show: a learning rate too high or too low, underfitting, overfitting, or none of these.

Every finding includes the numbers that it rests on. A difference counts if it is larger than chance: larger than SURE
standard errors between samples of such rows or steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rwkv_peft.common.formatting import plural

SURE = 2.5  # standard errors
MANY = 0.01  # of the steps: if more had a loss that is not finite, it was no accident
SELDOM = 4.0  # standard errors between the lowest and the highest of many
WINDOWS = 20  # windows of the loss curve
LEAST = 5  # steps of a window
RISE = 0.05  # of the lowest loss so far: a larger rise is not noise
FLAT = 0.02  # of the base's loss: a smaller gain on trained rows is hardly any
STILL = 0.1  # of all that the loss has fallen: if the last quarter of the steps brought more, it was still falling
HALF = 0.5  # of the gain on trained rows: if held-out rows gain less, rows were memorized
FAR = 4.0  # loss per token: a probability of 1 in 55; no text in a language that a model knows is so hard
BY_HEART = 0.1  # loss per token of a memorized row ...
NEW = 0.5  # ... and at least of the base, or it was known before


class RowLosses(NamedTuple):
    """Losses of rows under the base model and the tuned model.

    Attributes:
        targets: loss tokens of each row [N].
        base: sums of the losses under the base [N].
        tuned: sums of the losses under the tuned model [N].
    """

    targets: np.ndarray
    base: np.ndarray
    tuned: np.ndarray

    @property
    def losses(self) -> tuple[float, float]:
        """Loss per token, of the base and of the tuned model."""
        whole = max(float(self.targets.sum()), 1.0)
        return float(self.base.sum()) / whole, float(self.tuned.sum()) / whole

    @property
    def change(self) -> str:
        """The loss per token of both, in words."""
        before, after = self.losses
        return f"{after:.3f} instead of {before:.3f}"

    @property
    def gain(self) -> tuple[float, float]:
        """How much lower the loss has become, and the standard error of that."""
        before, after = self.losses
        gained, rows = before - after, len(self.targets)
        if rows < 2:
            return gained, float("inf")
        rest = self.base - self.tuned - gained * self.targets
        return gained, float(np.sqrt((rest**2).sum() * rows / (rows - 1)) / self.targets.sum())

    @property
    def memorized(self) -> np.ndarray:
        """Which rows are memorized, and were not before, bool [N]."""
        return (self.tuned < BY_HEART * self.targets) & (self.base > NEW * self.targets)


class Finding(NamedTuple):
    """What a run shows. what: too high, too low, underfit, overfit, fits, unknown, unfinished; words: the sentence."""

    what: str
    words: str


BLANK = "\u00a0"  # in commands, which must not be broken over lines; printed as a blank


class RunFacts(NamedTuple):
    """What is known of a run.

    Attributes:
        trained: rows that it was trained on; None for none.
        held_out: held-out rows; None for none.
        sources: (name, trained rows, held-out rows or None) of each file, if there are several.
        losses: of its steps.
        skipped: steps that were left out.
        validations: of the run, (step, loss).
        rate: LR_INIT.
        kept: the command that uses its best checkpoint, "" if none was kept.
        all_seen: whether it has gone through all its rows: else some of `trained` are new to it.
        left: steps that it still has to do.
        patience: whether VAL_PATIENCE has ended it.
        answers: how many questions of trained rows were answered as expected, and how many were asked.
        usual: the highest usual learning rate.
    """

    trained: RowLosses | None
    held_out: RowLosses | None
    sources: Sequence[tuple[str, RowLosses, RowLosses | None]]
    losses: np.ndarray
    skipped: int
    validations: Sequence[tuple[int, float]]
    rate: float
    kept: str = ""
    all_seen: bool = True
    left: int = 0
    patience: bool = False
    answers: tuple[int, int] = (0, 0)
    usual: float = float("inf")

    @property
    def whose(self) -> str:
        """The rows that a finding rests on."""
        if not self.trained:
            return "held-out rows"
        return "the rows that it was trained on" if self.all_seen else "rows of its files"

    @property
    def rows(self) -> RowLosses | None:
        """The rows that a finding rests on, None if there are none."""
        return self.trained or self.held_out


def judge(run: RunFacts) -> list[Finding]:
    """Return the findings in the order in which to fix them. Never empty."""
    high = find_too_high(run)
    low = [] if run.left else [one for one in (find_too_low(run), find_underfit(run), find_high_loss(run)) if one][:1]
    findings = [high] if high else low
    findings += [one for one in (find_overfit(run),) if one]
    if run.left:
        return [describe_unfinished(run), *findings]
    if not run.held_out and run.trained and not findings:
        words = (
            f"on its own rows the loss is {run.trained.change}{describe_answers(run)}. {describe_memorized(run)}What it says to "
            "others cannot be told without held-out rows: VALID_PERCENT in make_tokenize.sh sets some aside, or VAL_DATA in "
            "training.sh names them"
        )
        return [Finding("unknown", words)]
    return findings or [describe_fit(run)]


def describe_unfinished(run: RunFacts) -> Finding:
    """Report a run that has steps left."""
    done = len(run.losses) + run.skipped
    words = (
        f"it is not finished: {run.left:,} of its {done + run.left:,} steps are left; ./training.sh, as it was, goes on"
    )
    return Finding("unfinished", words)


def mean_curve(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split the losses into at most WINDOWS consecutive windows: the mean of each, and its standard error."""
    count = min(WINDOWS, len(losses) // LEAST)
    if count < 2:
        return np.zeros(0), np.zeros(0)
    cut = np.array_split(losses, count)
    # half of the squared differences of neighbours: a falling loss is not noise
    noise = [np.sqrt((np.diff(piece) ** 2).mean() / 2 / len(piece)) for piece in cut]
    # the error of few steps may be small by chance
    return np.array([piece.mean() for piece in cut]), np.maximum(noise, np.median(noise))


def find_too_high(run: RunFacts) -> Finding | None:
    """Report a learning rate that is too high."""
    fix = f"take a third of LR_INIT={run.rate:g}, and GRAD_CLIP=1; ./training.sh --find-lr tells what the settings bear"
    steps = len(run.losses) + run.skipped
    if run.skipped > MANY * steps:
        many = f"{run.skipped} of its {steps} steps came to no number and were left out"
        return Finding("too high", f"the learning rate is too high, or a setting is extreme: {many}. {fix}")
    means, errors = mean_curve(run.losses)
    worst: tuple[float, int, int] | None = None
    for i in range(1, len(means)):
        low = int(means[:i].argmin())
        rise = float(means[i] - means[low])
        chance = SELDOM * float(np.hypot(errors[i], errors[low]))
        if rise > max(RISE * means[low], chance, worst[0] if worst else 0.0):
            worst = rise, low, i
    if worst:
        _, low, i = worst
        back = means[i:].min() < (means[i] + means[low]) / 2
        share = f"between {(low + 1) / len(means):.0%} and {(i + 1) / len(means):.0%} of the run"
        rose = f"{share} the loss rose from {means[low]:.3f} to {means[i]:.3f}"
        ending = f"and came down again to {means[i:].min():.3f}: it oscillates" if back else "and never came back"
        return Finding("too high", f"the learning rate is too high: {rose} {ending}. {fix}")
    if (rows := run.rows) and not rows.gain[0] > -FLAT * rows.losses[0]:  # also for NaN
        words = f"{run.whose} are worse than before: loss {rows.change}"
        return Finding("too high", f"the learning rate is too high, or a setting is extreme: {words}. {fix}")
    return None


def find_too_low(run: RunFacts) -> Finding | None:
    """Report a learning rate that is too low."""
    rows = run.rows
    if not rows or abs(rows.gain[0]) >= FLAT * rows.losses[0]:
        return None
    words = f"it has hardly learnt anything: of {run.whose} the loss is {rows.change}"
    fix = f"take ten times LR_INIT={run.rate:g} (./training.sh --find-lr tells what the settings bear), or many more steps"
    return Finding("too low", f"the learning rate is too low, or the run too short: {words}. {fix}")


def find_underfit(run: RunFacts) -> Finding | None:
    """Report a loss that was still falling at the end."""
    means, errors = mean_curve(run.losses)
    if len(means) < 4:
        return None
    quarter = max(1, len(means) // 4)
    last, whole = float(means[-1 - quarter] - means[-1]), float(means[0] - means[-1])
    if whole <= 0 or last < STILL * whole or last < SURE * float(np.hypot(errors[-1], errors[-1 - quarter])):
        return None
    if is_memorized(run):
        return None
    falling = f"still falling at the end, by {last:.3f} over the last quarter of the steps and {whole:.3f} in all"
    more = "a larger VAL_PATIENCE" if run.patience else "a larger EPOCH_COUNT"
    fix = f"Take {more}, or a higher LR_INIT (or LR_FINAL)"
    return Finding("underfit", f"underfit: the loss was {falling}. {fix}")


def find_high_loss(run: RunFacts) -> Finding | None:
    """Report a high remaining loss, whatever was gained."""
    rows = run.rows
    if not rows or not rows.losses[1] > FAR:
        return None
    before, after = rows.losses
    guessed = f"as if each token were guessed among {np.exp(after):,.0f}"
    if run.rate > run.usual:
        words = f"LR_INIT={run.rate:g} is far above what is usual ({run.usual:g} at most)"
        words += f", and of {run.whose} the loss is {after:.3f}"
        fix = "Take a tenth of it or less; ./training.sh --find-lr tells what the settings bear"
        return Finding("too high", f"the learning rate is too high: {words}, {guessed}. {fix}")
    left = f"of {run.whose} the loss is still {after:.3f} ({before:.3f} before), {guessed}"
    fixes = [
        f"another LR_INIT than {run.rate:g} (./training.sh --find-lr tells what the settings bear)",
        *([] if run.patience else ["a larger EPOCH_COUNT"]),
        "more rows",
        "or a base that knows the language (and its template, PROMPT_TYPE)",
    ]
    fix = f"Take {', '.join(fixes)}"
    return Finding("underfit", f"underfit: {left}. {fix}")


def is_memorized(run: RunFacts) -> bool:
    """Return whether held-out rows gain much less than those that were trained, or lose."""
    if not run.trained or not run.held_out or not run.all_seen:
        return False
    (own, own_error), (other, other_error) = run.trained.gain, run.held_out.gain
    return own - other > SURE * float(np.hypot(own_error, other_error)) and other < HALF * own


def find_overfit(run: RunFacts) -> Finding | None:
    """Report memorized rows, or a validation loss that rises again."""
    fix = "Take fewer epochs, a smaller rank or rate, more dropout or WEIGHT_DECAY, or more rows"
    words = ""
    if run.trained and run.held_out and is_memorized(run):
        own, other = run.trained.gain[0], run.held_out.gain[0]
        share = f"of the {own:.3f} that it gained on its own rows"
        words = f"on held-out rows it has gained {other:.3f} {share} ({max(0.0, other / own):.0%})"
        if other <= 0:
            words = f"held-out rows have gained nothing ({other:+.3f}), its own {own:.3f}"
        if -other > SURE * run.held_out.gain[1]:
            worse = f"held-out rows are worse than before (loss {run.held_out.change})"
            words = f"{worse}, its own have gained {own:.3f}"
    if len(run.validations) > 2:
        best = min(run.validations, key=lambda look: look[1])
        end = run.validations[-1]
        if end[0] > best[0] and end[1] - best[1] > RISE * best[1]:
            words += ("; " if words else "") + (
                f"the validation was best, {best[1]:.3f}, at step {best[0]}, and is {end[1]:.3f} at the end"
            )
            fix = (
                f"{run.kept.replace(' ', BLANK)} takes the checkpoint of that step"
                if run.kept
                else "KEEP_BEST=1 keeps the best checkpoint, VAL_PATIENCE=3 ends a run in time; or take fewer epochs"
            )
    return Finding("overfit", f"overfit: {words}. {describe_memorized(run)}{fix}") if words else None


def describe_memorized(run: RunFacts) -> str:
    """Return which part of the data was memorized most; "" if there is no such part."""
    gaps = [(own.gain[0] - held_out.gain[0], name) for name, own, held_out in run.sources if held_out]
    words = ""
    if len(gaps) > 1:
        gap, name = max(gaps)
        words = f"Most of it in {name}, whose own rows gained {gap:.3f} more than its held-out ones. "
    if run.trained and (known := run.trained.memorized).any():
        words += (
            f"{known.sum()} of {len(known)} rows that were looked at are known by heart (loss below {BY_HEART:g}). "
        )
    return words


def describe_fit(run: RunFacts) -> Finding:
    """Report that nothing is wrong."""
    rows = run.rows
    if not rows:
        return Finding("fits", "the loss has not risen on the way; there were no rows to look at")
    words = f"of {run.whose} the loss is {rows.change}"
    if run.held_out and run.trained:
        words += f", and held-out rows have gained {run.held_out.gain[0]:.3f} beside {run.trained.gain[0]:.3f}"
    return Finding("fits", f"neither underfit nor overfit: {words}{describe_answers(run)}")


def describe_answers(run: RunFacts) -> str:
    """Return what the answers to questions of trained rows show beside the losses."""
    right, asked = run.answers
    if not asked or not run.all_seen:
        return ""
    more = "" if right == asked else ": to have them by heart takes more epochs, a larger rank or a higher rate"
    return f"; of {plural(asked, 'question')} of trained rows, {right or 'none'} had the expected answer word for word{more}"
