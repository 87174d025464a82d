"""A product of low rank folded into rows of a weight, and what proves it: what the sum and the rounded sum answer to a few
inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

QUESTIONS = 4  # inputs


class Folded(NamedTuple):
    """made: rows like the weight's. exact, rounded: answers [QUESTIONS, rows] of the sum before it was rounded, and of `made`.
    squares: the squared lengths of the rows of the weight and of the sum, [2, rows].
    """

    made: Tensor
    exact: Tensor
    rounded: Tensor
    squares: Tensor


def fold(weight: Tensor, B: Tensor, A: Tensor, x: Tensor) -> Folded:
    """Weight [rows, in] of any format; B [rows, r], A [r, in] and x [QUESTIONS, in] in the one that sums are to have. made is
    weight + B A in the weight's format.
    """
    before = weight.to(x.dtype)
    exact = torch.addmm(before, B, A)
    made = exact.to(weight.dtype)
    squares = torch.stack([before.square().sum(1), exact.square().sum(1)])
    return Folded(made, *(F.linear(x, w) for w in (exact, made.to(x.dtype))), squares)
