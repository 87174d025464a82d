"""The ways to compress a frozen weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Quantised
from .int8_fp8 import Fp8, Int8
from .nf4_fp4 import FP4, NF4, FourBit


@dataclass(frozen=True)
class Mode:
    """A compressed format."""

    says: str  # for people
    make: Callable[[Tensor], Quantised]


MODES = {
    "int8": Mode("8 bit integers, one scale per output channel", Int8),
    "nf4": Mode("4 bit, levels placed for normally distributed weights (QLoRA)", lambda weight: FourBit(weight, NF4)),
    "fp4": Mode("4 bit floating point", lambda weight: FourBit(weight, FP4)),
    "fp8": Mode("8 bit floating point (e4m3), one scale per output channel", Fp8),
}


@torch.no_grad()
def quantise(weight: Tensor, mode: str) -> Quantised:
    """Compress weight [out, in] of any floating dtype, on its own device, in float32, a piece of its rows at a time.

    mode: a key of MODES. Raises UserError("holds NaN or infinity"); the caller knows the tensor's name and puts it before.
    """
    return MODES[mode].make(weight)
