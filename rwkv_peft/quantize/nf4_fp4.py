"""Four bits per weight: 16 levels, a scale for each block of 64 weights, and the scales themselves in 8 bits.

    weight = LEVELS[code] * scale          scale = DYNAMIC[scale_code] * scale_max + scale_mean

scale: the block's absmax. scale_max: one float32 for each GROUP of 256 scales; scale_mean: one for the whole weight, taken
off before, because absmaxes are all positive and much alike (double quantisation, QLoRA, https://arxiv.org/abs/2305.14314).
DYNAMIC has small steps near zero and large ones far from it (https://arxiv.org/abs/1511.04561). That makes
4 + 8/64 + 32/(64 * 256) = 4.127 bits per weight. A single outlier moves the mean and coarsens its group: in a weight of only
256 x 256 one of 1,000 deviations takes the error of the others from 9.2 to 9.5 %, one of 10,000 to 15 %.

Levels, blocks, arithmetic and the order of the two codes in a byte (the first in the high bits) are those of bitsandbytes,
so its kernels read our bytes. A row whose length is no multiple of 64 is filled up with zeros, so that blocks never run
over its end (bitsandbytes lets them): with a multiple of 64, as in every real model, the bytes are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Quantised, check_finite, pieces, take

BLOCK = 64
GROUP = 256

# level of each code. nf4: quantiles of the normal distribution, QLoRA, appendix E
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# fp4: a sign bit before three bits, in twelfths
FP4 = tuple(sign * twelfths / 12 for sign in (1, -1) for twelfths in (0, 0.0625, 8, 12, 4, 6, 2, 3))
NAMES = {NF4: "nf4", FP4: "fp4"}  # for bitsandbytes


class FourBit(Quantised):
    """codes [out, width / 2] uint8, scale_codes [out, width / 64] uint8, scale_max [groups] and scale_mean [1] float32."""

    codes: Tensor
    scale_codes: Tensor
    scale_max: Tensor
    scale_mean: Tensor

    def __init__(self, weight: Tensor, levels: tuple[float, ...]):
        outputs, inputs = weight.shape
        blocks = -(-inputs // BLOCK)
        super().__init__(weight.shape, blocks * BLOCK)
        self.levels, self.blocks = levels, blocks
        codes = torch.empty(outputs, self.width // 2, dtype=torch.uint8, device=weight.device)
        absmax = torch.empty(outputs, blocks, device=weight.device)
        for part in pieces(weight):
            values = F.pad(weight[part].float(), (0, self.width - inputs)).unflatten(1, (blocks, BLOCK))
            absmax[part] = values.abs().amax(-1)
            nearest = nearest_level(scaled(values, absmax[part].unsqueeze(-1)), levels).flatten(1)
            codes[part] = nearest[:, ::2] << 4 | nearest[:, 1::2]
        check_finite(absmax)
        scale_codes, scale_max, scale_mean = compress_scales(absmax)
        self.keep(codes=codes, scale_codes=scale_codes, scale_max=scale_max, scale_mean=scale_mean.view(1))

    def decode(self, rows: slice | Tensor, out: Tensor) -> None:
        """Write the rows' values to `out`."""
        codes = take(self.codes, rows)
        # one look-up gives the levels of both halves of a byte, as eight bytes that only look like an integer
        pairs = pairs_of_levels(self.levels, codes.device).index_select(0, codes.reshape(-1).int())
        values = pairs.view(torch.float32).view(-1, self.blocks, BLOCK)
        torch.mul(values, self.scale(rows).unsqueeze(-1), out=out.view(-1, self.blocks, BLOCK))

    def scale(self, rows: slice | Tensor) -> Tensor:
        """[n, blocks] float32."""
        codes = take(self.scale_codes, rows)
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=codes.device)
        group = (rows[:, None] * self.blocks + torch.arange(self.blocks, device=codes.device)) // GROUP
        return dynamic(codes.device)[codes.int()] * self.scale_max[group] + self.scale_mean

    @torch.no_grad()
    def dense(self, dtype: torch.dtype) -> Tensor:
        """As everywhere. On a GPU bitsandbytes' kernel does it, if it is there; this has not been run on a GPU yet."""
        if not self.codes.numel() or not (kernel := cuda_kernel(self.levels, self.device, dtype)):
            return super().dense(dtype)
        out = kernel(self.codes, self.scale(slice(0, self.shape[0])), self.levels, dtype)
        return out[:, : self.shape[1]].contiguous()


def scaled(values: Tensor, absmax: Tensor) -> Tensor:
    """Values / absmax, in -1 .. 1. Zeros stay zero; a product with the reciprocal, as bitsandbytes has it."""
    return values.mul(1 / absmax.clamp(min=1e-38)).clamp_(-1, 1)


def nearest_level(values: Tensor, levels: tuple[float, ...]) -> Tensor:
    """The code (uint8) of the nearest level for each value in -1 .. 1; half-way, the lower one's."""
    table = torch.tensor(levels, device=values.device)
    ordered, code = torch.sort(table, stable=True)
    place = torch.bucketize(values, (ordered[:-1] + ordered[1:]) / 2, out_int32=True)
    return code.to(torch.uint8)[place]


def compress_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """scale_codes as absmax [out, blocks], scale_max [groups], scale_mean []. Groups run over the ends of rows."""
    if not absmax.numel():
        return absmax.to(torch.uint8), absmax.new_zeros(0), absmax.new_zeros(())
    mean = absmax.double().mean().float()  # a sum of large float32 could overflow
    offsets = (absmax - mean).flatten()
    groups = F.pad(offsets, (0, -len(offsets) % GROUP)).view(-1, GROUP)
    largest = groups.abs().amax(1)
    table = dynamic(absmax.device)
    codes = torch.bucketize(scaled(groups, largest[:, None]), (table[:-1] + table[1:]) / 2, out_int32=True)
    return codes.to(torch.uint8).flatten()[: len(offsets)].view(absmax.shape), largest, mean


@functools.cache
def dynamic(device: torch.device) -> Tensor:
    """[256] float32, rising. Decade by decade from 1e-7 to 1, each with twice as many steps as the one before.

    A level is the middle of its step. 0 and 1 are levels too, -1 is not: it would be the 257th.
    """
    steps = []
    for bits in range(7):
        edges = torch.linspace(0.1, 1, 2**bits + 1)
        steps.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (bits - 6))
    positive = torch.cat(steps)
    return torch.cat([-positive, torch.tensor([0.0, 1.0]), positive]).sort().values.to(device)


@functools.cache
def pairs_of_levels(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """[256] int64: the two float32 levels that a byte stands for, side by side."""
    table, byte = torch.tensor(levels), torch.arange(256)
    return torch.stack([table[byte >> 4], table[byte & 15]], 1).view(torch.int64).flatten().to(device)


def by_bitsandbytes(codes: Tensor, scale: Tensor, levels: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """The weight [out, width] by bitsandbytes, from the same bytes and the scales in float32."""
    from bitsandbytes import functional

    state = functional.QuantState(
        absmax=scale.flatten(),
        shape=torch.Size((codes.shape[0], 2 * codes.shape[1])),
        dtype=dtype,
        blocksize=BLOCK,
        quant_type=NAMES[levels],
    )
    return functional.dequantize_4bit(codes.view(-1, 1), state)


@functools.cache
def cuda_kernel(levels: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """by_bitsandbytes, if it works on this device and gives what our own code gives on all 256 bytes."""
    if device.type != "cuda" or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(1, -1)
    ours = pairs_of_levels(levels, device).view(torch.float32).view(1, -1).to(dtype)
    try:
        theirs = by_bitsandbytes(codes, torch.ones(1, 512 // BLOCK, device=device), levels, dtype)
    except (ImportError, AttributeError, NotImplementedError, RuntimeError):
        # not installed, built for another CUDA, or out of memory: only speed is lost, the values are those of our own code
        return None
    return by_bitsandbytes if torch.allclose(theirs, ours, rtol=torch.finfo(dtype).eps, atol=1e-4) else None
