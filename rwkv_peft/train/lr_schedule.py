"""The learning rate of every optimizer step: pure functions, exact at both ends of the run."""

from __future__ import annotations

import math

WSD_DECAY = 0.1  # share of the run in which wsd goes down (MiniCPM, https://arxiv.org/abs/2404.06395)


def cos(p: float, first: float, last: float) -> float:
    """Cosine from first to last."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * p))


def linear(p: float, first: float, last: float) -> float:
    """Straight line from first to last."""
    return first + (last - first) * p


def exp(p: float, first: float, last: float) -> float:
    """Equal factors from first to last."""
    return first * (last / first) ** p


def wsd(p: float, first: float, last: float) -> float:
    """Constant, then a straight line to last in the end (warm-up, stable, decay)."""
    return linear(max(0.0, (p - (1 - WSD_DECAY)) / WSD_DECAY), first, last)


def constant(p: float, first: float, last: float) -> float:
    """First, all the time."""
    return first


SCHEDULES = {"cos": cos, "wsd": wsd, "exp": exp, "linear": linear, "constant": constant}


def learning_rate(step: int, steps: int, name: str, first: float, last: float, warmup: int) -> float:
    """The rate of optimizer step `step` (from 0) of `steps`.

    During `warmup` steps it rises in equal parts and reaches `first` with the last of them. Then the schedule runs:
    it is exactly `first` where it begins and exactly `last` at step steps - 1.
    """
    if step < warmup:
        return first * (step + 1) / warmup
    begin = max(warmup - 1, 0)  # the warm-up's last step is the schedule's first
    progress = (step - begin) / (steps - 1 - begin) if steps - 1 > begin else 0.0
    if progress >= 1.0:
        return SCHEDULES[name](1.0, first, last) if name == "constant" else last
    return SCHEDULES[name](progress, first, last)
