"""Add a low-rank product to rows of a weight, and compute what verifies it.

That is the answers of the sum, and of the rounded sum, to a few inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

QUESTIONS = 4  # inputs


class Folded(NamedTuple):
    """The result of a merge.

    Attributes:
        made: Rows like the weight's.
        exact: Answers [QUESTIONS, rows] of the sum before it was rounded.
        rounded: Answers [QUESTIONS, rows] of `made`.
        squares: The squared lengths of the rows of the weight and of the sum, [2, rows].
    """

    made: Tensor
    exact: Tensor
    rounded: Tensor
    squares: Tensor


def fold(weight: Tensor, B: Tensor, A: Tensor, x: Tensor) -> Folded:
    """Return weight + B A in the weight's format, and its answers.

    Args:
        weight: [rows, in], any format.
        B: [rows, r], in the format that sums are computed in.
        A: [r, in].
        x: [QUESTIONS, in].
    """
    before = weight.to(x.dtype)
    exact = torch.addmm(before, B, A)
    made = exact.to(weight.dtype)
    squares = torch.stack([before.square().sum(1), exact.square().sum(1)])
    return Folded(made, F.linear(x, exact), F.linear(x, made.to(x.dtype)), squares)
