"""Mixtures of several files in one run (DATA_PATH="a:0.7 b:0.3"): their shares, and which file every row comes from.

Turns are drawn by earliest deadline: the j-th row of a source with share w must come at a position t with (j-1)/w < t
< j/w + 1. A plan that meets all deadlines always exists (Tijdeman, "The chairman assignment problem", 1980), and
earliest deadline first finds it. So after any number of rows, every source has had its share to within one row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

LONGEST_PERIOD = 100_000  # the schedule repeats after the sum of the weights as whole numbers
SHARE = re.compile(r":([+-]?(?:\d+\.?\d*|\.\d+))(?=\s|$)")


def parse_mixture(text: str) -> list[tuple[str, Fraction]]:
    """Parse names and weights of "a:0.7 b c:0.3" (the second name is "b c"). A single name without a weight has all.

    Raises:
        ValueError: it cannot be parsed; the message is for the user.
    """
    if not SHARE.search(text):
        return [(text, Fraction(1))]
    shares, at = [], 0
    for share in SHARE.finditer(text):
        name = text[at : share.start()].strip()
        if not name:
            raise ValueError(f'has a weight without a name before it (:{share[1]}); write "first:0.7 second:0.3"')
        weight = Fraction(share[1])
        if weight <= 0:
            raise ValueError(f"gives {name} the weight {share[1]}; it must be more than 0")
        shares.append((name, weight))
        at = share.end()
    if rest := text[at:].strip():
        raise ValueError(f'gives {rest} no weight; write "first:0.7 second:0.3"')
    names = [name for name, _ in shares]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"names {' and '.join(twice)} more than once; give each file one weight")
    if sum(integer_ratio([weight for _, weight in shares])) > LONGEST_PERIOD:
        raise ValueError("has weights with too many digits; three are enough")
    return shares


def integer_ratio(weights: Sequence[Fraction]) -> list[int]:
    """Return the smallest whole numbers with the same ratios."""
    bottom = math.lcm(*(weight.denominator for weight in weights))
    numbers = [int(weight * bottom) for weight in weights]
    top = math.gcd(*numbers)
    return [number // top for number in numbers]


def nearest_integer_ratio(weights: Sequence[float], total: int) -> list[int]:
    """Return whole numbers, none of them 0, with a sum of about `total` and nearly the ratios of the weights."""
    scale = total / sum(weights)
    return integer_ratio([Fraction(max(1, round(weight * scale))) for weight in weights])


class MixtureSchedule:
    """The source of each row of an endless stream.

    Args:
        weights: whole numbers, one per source; the schedule repeats after their sum.
    """

    def __init__(self, weights: Sequence[int]):
        self.weights, self.period = list(weights), sum(weights)
        done = [0] * len(weights)
        who, before = np.zeros(self.period, dtype=np.int32), np.zeros(self.period, dtype=np.int32)
        for place in range(self.period):
            source = min(
                (k for k, weight in enumerate(weights) if done[k] * self.period < (place + 1) * weight),
                key=lambda k: -(-(done[k] + 1) * self.period // weights[k]),
            )
            who[place], before[place] = source, done[source]
            done[source] += 1
        self.who, self.before = who, before

    def locate(self, number: int) -> tuple[int, int]:
        """Return source and row in that source of row `number`."""
        turn, place = divmod(number, self.period)
        source = int(self.who[place])
        return source, turn * self.weights[source] + int(self.before[place])

    def count(self, source: int, rows: int) -> int:
        """Return how many of the first `rows` rows are the source's."""
        turn, place = divmod(rows, self.period)
        return turn * self.weights[source] + int((self.who[:place] == source).sum())
