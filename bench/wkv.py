"""WKV forward and backward: the backends beside the naive loop with autograd, interleaved in one run.

usage: python bench/wkv.py [--version x070|x060|x052|all] [--threads N] [--tokens 512] [--heads 12] [--rounds 5] [--json FILE]

Prints for each version and implementation the median time, its spread (smallest to largest), and the error against the
float64 reference; then the ratio of the medians. The peer is the recurrence in float32, one token at a time,
differentiated by autograd: the form that rwkvtune and RWKV-LM's demo run on a CPU.
"""

from __future__ import annotations

import sys

sys.path[0] = __file__.rpartition("bench")[
    0
]  # the kit, instead of this folder: tokenize.py here hides a module of Python's own

# ruff: noqa: E402
import argparse
import functools
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from rwkv_peft.ops import dispatch

NAIVE = "naive loop + autograd"


def inputs7(shape):
    r, k, v = (torch.randn(shape) for _ in range(3))
    w = -0.6065306597126334 * torch.sigmoid(torch.randn(shape))
    kk = torch.nn.functional.normalize(torch.randn(shape), dim=-1)
    a = torch.sigmoid(torch.randn(shape))
    return [r, w, k, v, -kk, kk * a]


def inputs6(shape, decay_shape=None):
    """Logarithms of the decay from about -0.0003 to -10: the unbounded side of it costs time too."""
    r, k, v = (torch.randn(shape) for _ in range(3))
    return [r, -torch.exp(2 * torch.randn(decay_shape or shape) - 3), k, v, torch.randn(shape[2:])]


INPUTS = {"x070": inputs7, "x060": inputs6, "x052": lambda shape: inputs6(shape, shape[2:])}


def forward_and_backward(wkv, x, dy, ds):
    y, s = wkv(*x)
    return [y, s, *torch.autograd.grad([y, s], x, [dy.to(y.dtype), ds.to(s.dtype)])]


def compare(version: str, given) -> dict:
    torch.manual_seed(0)
    size = 64
    shape = (1, given.tokens, given.heads, size)
    x = [*INPUTS[version](shape), torch.zeros(1, given.heads, size, size)]
    x = [part.requires_grad_() for part in x]
    dy, ds = torch.randn(shape), torch.randn(x[-1].shape)
    backends = dispatch.available(version, "cpu")
    reference = backends.pop("reference")
    candidates = {
        NAIVE: functools.partial(reference, dtype=torch.float32),
        **{f"OP={name}": f for name, f in backends.items()},
    }
    exact = forward_and_backward(reference, x, dy, ds)
    errors, times = {}, {name: [] for name in candidates}
    for name, wkv in candidates.items():  # also the warm-up
        result = forward_and_backward(wkv, x, dy, ds)
        errors[name] = max(((a - b).norm() / b.norm()).item() for a, b in zip(result, exact, strict=True))
    for _ in range(given.rounds):
        for name, wkv in candidates.items():
            begin = time.perf_counter()
            forward_and_backward(wkv, x, dy, ds)
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {"medians_ms": {n: statistics.median(t) for n, t in times.items()}, "times_ms": times, "errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--version", choices=[*dispatch.WKV, "all"], default="all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"WKV forward + backward with s0 and sT gradients, B=1 T={given.tokens} H={given.heads} N=64 float32")
    print(
        f"{platform.machine()}, {given.threads} threads, torch {torch.__version__}, {given.rounds} interleaved rounds"
    )
    results = {}
    for version in dispatch.WKV if given.version == "all" else [given.version]:
        results[version] = result = compare(version, given)
        medians = result["medians_ms"]
        print(version)
        for name, t in result["times_ms"].items():
            print(
                f"  {name:<24} {medians[name]:9.1f} ms  ({min(t):.1f} to {max(t):.1f})"
                f"  largest relative error {result['errors'][name]:.1e}"
            )
        for name in medians:
            if name != NAIVE:
                ratio = medians[NAIVE] / medians[name]
                print(f"ratio: {version} {name} is {ratio:.1f} times as fast as the naive loop")
    if given.json:
        given.json.write_text(json.dumps({**vars(given), "results": results}, default=str))


if __name__ == "__main__":
    main()
