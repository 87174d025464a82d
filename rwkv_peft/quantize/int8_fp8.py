"""One byte per weight and one float32 scale per row (output channel), so that the row's largest weight gets the largest code.

    int8: weight = code * scale, code -127 .. 127 (symmetric: -128 is not used), scale = absmax / 127
    fp8:  the same with float8_e4m3fn for the code (3 bits of mantissa, up to 448) and scale = absmax / 448

A fixed scale of 1, as peers use for fp8, leaves weights below 2^-6 in e4m3's subnormal range: four times the error at
a deviation of 0.005 (research/peers-rwkv-peft.md §3.7).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .base import Quantised, check_finite, pieces, take

TINY = torch.finfo(torch.float32).tiny  # the scale of a row of zeros: 0 / TINY is 0


class Int8(Quantised):
    """codes [out, in] int8, scale [out, 1] float32."""

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor):
        super().__init__(weight.shape, weight.shape[1])
        scale, codes = row_scale(weight, 127), torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for part in pieces(weight):
            codes[part] = (weight[part].float() / scale[part]).round_().to(torch.int8)
        self.keep(codes=codes, scale=scale)

    def decode(self, rows: slice | Tensor, out: Tensor) -> None:
        """Write the rows' values to `out`."""
        torch.mul(take(self.codes, rows), take(self.scale, rows), out=out)


class Fp8(Quantised):
    """codes [out, in]: the bytes of float8_e4m3fn as uint8, which every operation and every backend takes; scale as above."""

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor):
        super().__init__(weight.shape, weight.shape[1])
        scale, codes = row_scale(weight, 448), torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        for part in pieces(weight):
            # the quotient may round to just above 448, beyond which e4m3fn has only NaN
            scaled = (weight[part].float() / scale[part]).clamp_(-448, 448)
            codes[part] = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
        self.keep(codes=codes, scale=scale)

    def decode(self, rows: slice | Tensor, out: Tensor) -> None:
        """Write the rows' values to `out`."""
        codes = take(self.codes, rows)
        # twice as fast as torch's conversion of float8 on a CPU
        values = fp8_values(codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)
        torch.mul(values, take(self.scale, rows), out=out)


def row_scale(weight: Tensor, largest: float) -> Tensor:
    """[out, 1] float32: absmax / largest. Raises UserError for NaN and infinity."""
    absmax = torch.zeros(weight.shape[0], 1, device=weight.device)
    for part in pieces(weight):
        absmax[part] = weight[part].float().abs().amax(1, keepdim=True)
    check_finite(absmax)
    return (absmax / largest).clamp_(min=TINY)


@functools.cache  # one small table per device
def fp8_values(device: torch.device) -> Tensor:
    """[256] float32: what each byte of float8_e4m3fn stands for."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)
