"""The learning rate of every optimizer step. Pure functions, exact at both ends of the run.

Schedules take the progress `p` from 0 to 1, and the first and the last rate.
"""

from __future__ import annotations

import math

WSD_DECAY = 0.1  # share of the run in which wsd decays (MiniCPM, https://arxiv.org/abs/2404.06395)


def cos(p: float, first: float, last: float) -> float:
    """Half a cosine."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * p))


def linear(p: float, first: float, last: float) -> float:
    """A straight line."""
    return first + (last - first) * p


def exp(p: float, first: float, last: float) -> float:
    """Exponential decay."""
    return first * (last / first) ** p


def wsd(p: float, first: float, last: float) -> float:
    """Warm-up, stable, decay: constant, and linear in the last WSD_DECAY of the run."""
    return linear(max(0.0, (p - (1 - WSD_DECAY)) / WSD_DECAY), first, last)


def constant(p: float, first: float, last: float) -> float:
    """The first rate."""
    return first


SCHEDULES = {"cos": cos, "wsd": wsd, "exp": exp, "linear": linear, "constant": constant}


def learning_rate(step: int, steps: int, name: str, first: float, last: float, warmup: int) -> float:
    """Return the learning rate of an optimizer step.

    During the warm-up it rises in equal parts and reaches `first` at its last step. Then the schedule runs: it is exactly
    `first` where it begins and exactly `last` at step steps - 1.

    Args:
        step: from 0.
        steps: of the run.
        name: a key of SCHEDULES.
        first: the highest rate.
        last: the rate of the last step.
        warmup: optimizer steps of the warm-up.
    """
    if step < warmup:
        return first * (step + 1) / warmup
    begin = max(warmup - 1, 0)  # the warm-up's last step is the schedule's first
    progress = (step - begin) / (steps - 1 - begin) if steps - 1 > begin else 0.0
    if progress >= 1.0 and name != "constant":
        return last
    return SCHEDULES[name](progress, first, last)
