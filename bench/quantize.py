"""Quantised frozen weights: size, error, and the time to make them dense again, beside bitsandbytes, interleaved in one run.

usage: python bench/quantize.py [--threads 1] [--outputs 2048] [--inputs 8192] [--dtype bfloat16] [--rounds 9] [--json FILE]

Prints for each mode the bits per weight (scales included), the relative error of a normally distributed bfloat16 weight, of
one with heavy tails (Student's t with 4 degrees of freedom) and of the outputs for normal inputs, the median time of
dense(dtype) and of the counterpart in bitsandbytes (for fp8, which it does not have: its 8 bit codes with a table, in
blocks of 64), their spread, and the ratio of the medians. Last the time to quantise and of the product with 1,024 tokens.
"""

from __future__ import annotations

import sys

sys.path[0] = __file__.rpartition("bench")[
    0
]  # the kit, instead of this folder: tokenize.py here hides a module of Python's own

# ruff: noqa: E402
import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from bitsandbytes import functional
from torch import Tensor

from rwkv_peft.quantize import MODES, QuantLinear

TOKENS = 1024


def by_bitsandbytes(weight: Tensor, mode: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """What makes bitsandbytes' own copy of the weight dense; it takes 4 bit apart in the dtype it was made from."""
    if mode in ("nf4", "fp4"):
        codes, state = functional.quantize_4bit(
            weight.to(dtype), blocksize=64, compress_statistics=True, quant_type=mode
        )
        return lambda: functional.dequantize_4bit(codes, state)
    if mode == "int8":
        codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
        return lambda: functional.int8_vectorwise_dequant(codes, scale).to(dtype)
    table = functional.create_fp8_map(signed=True, exponent_bits=4, precision_bits=3)
    codes, state = functional.quantize_blockwise(weight.to(dtype), code=table, blocksize=64)
    return lambda: functional.dequantize_blockwise(codes, state)


def error(rows: Tensor, exact: Tensor) -> float:
    return ((rows.double() - exact.double()).norm() / exact.double().norm()).item()


def milliseconds(run: Callable[[], Tensor]) -> float:
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--outputs", type=int, default=2048)
    parser.add_argument("--inputs", type=int, default=8192)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, given.dtype)
    shape = (given.outputs, given.inputs)
    weight = (torch.randn(shape) * 0.02).bfloat16()
    heavy = (torch.distributions.StudentT(4.0).sample(shape) * 0.01).bfloat16()
    x = torch.randn(64, given.inputs)
    rows, candidates = {}, {}
    for mode in MODES:
        begin = time.perf_counter()
        layer = QuantLinear(weight, mode)
        made = 1e3 * (time.perf_counter() - begin)
        rows[mode] = {
            "bits": 8 * layer.bytes / weight.numel(),
            "error": error(layer.dense(), weight),
            "heavy": error(QuantLinear(heavy, mode).dense(), heavy),
            "outputs": error(layer(x), F.linear(x, weight.float())),
            "quantise_ms": made,
        }
        candidates[mode, "ours"] = lambda layer=layer: layer.dense(dtype)
        candidates[mode, "theirs"] = by_bitsandbytes(weight, mode, dtype)
        rows[mode]["theirs_error"] = error(candidates[mode, "theirs"](), weight)
    tokens, dense = torch.randn(TOKENS, given.inputs, dtype=dtype), weight.to(dtype)
    candidates["product", "dense"] = lambda: F.linear(tokens, dense)
    times = {key: [] for key in candidates}
    for turn in range(given.rounds + 1):  # the first warms up
        for key, run in candidates.items():
            took = milliseconds(run)
            if turn:
                times[key].append(took)
    print(f"weight {given.outputs} x {given.inputs}, dense in {given.dtype}")
    print(
        f"{platform.machine()}, {given.threads} threads, torch {torch.__version__}, {given.rounds} interleaved rounds"
    )
    print(
        "mode  bits/weight  error: normal  heavy tails  outputs  (bitsandbytes normal)    dense ms (from to)"
        "        bitsandbytes ms (from to)  ratio  quantise ms"
    )
    for mode, row in rows.items():
        ours, theirs = times[mode, "ours"], times[mode, "theirs"]
        row["ratio"] = statistics.median(ours) / statistics.median(theirs)
        print(
            f"{mode:<5} {row['bits']:11.3f} {row['error']:14.4f} {row['heavy']:12.4f} {row['outputs']:8.4f} "
            f"{row['theirs_error']:22.4f} {statistics.median(ours):11.1f} ({min(ours):.1f} to {max(ours):.1f}) "
            f"{statistics.median(theirs):18.1f} ({min(theirs):.1f} to {max(theirs):.1f}) {row['ratio']:8.2f} "
            f"{row['quantise_ms']:12.0f}"
        )
    product = statistics.median(times["product", "dense"])
    print(f"the product of the dense weight with {TOKENS:,} tokens takes {product:.0f} ms")
    if given.json:
        named = {" ".join(key): values for key, values in times.items()}
        given.json.write_text(json.dumps({**vars(given), "found": rows, "times_ms": named}, default=str))


if __name__ == "__main__":
    main()
