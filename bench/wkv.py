"""WKV-7 forward and backward: the chunked backend beside the naive loop with autograd, interleaved in one run.

usage: python bench/wkv.py [--threads N] [--tokens 512] [--heads 12] [--rounds 5] [--json FILE]

Prints for each implementation the median time, its spread (smallest to largest), and the error against the float64
reference; then the ratio of the medians. The peer is the recurrence in float32, one token at a time, differentiated by
autograd: the form that rwkvtune and RWKV-LM's demo run on a CPU.
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
from pathlib import Path

import torch

from rwkv_peft.ops import dispatch, reference


def inputs(tokens: int, heads: int, size: int = 64):
    shape = (1, tokens, heads, size)
    r, k, v = (torch.randn(shape) for _ in range(3))
    w = -0.6065306597126334 * torch.sigmoid(torch.randn(shape))
    kk = torch.nn.functional.normalize(torch.randn(shape), dim=-1)
    a = torch.sigmoid(torch.randn(shape))
    s0 = torch.zeros(1, heads, size, size)
    return [x.requires_grad_() for x in (r, w, k, v, -kk, kk * a, s0)]


def forward_and_backward(wkv, x, dy, ds):
    y, s = wkv(*x)
    return [y, s, *torch.autograd.grad([y, s], x, [dy.to(y.dtype), ds.to(s.dtype)])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    x = inputs(given.tokens, given.heads)
    dy, ds = torch.randn(x[0].shape), torch.randn(x[6].shape)
    candidates = {
        "naive loop + autograd": lambda *a: reference.recurrence(*a, None, torch.float32),
        **{f"OP={name}": f for name, f in dispatch.WKV7.items() if name != "reference"},
    }
    exact = forward_and_backward(reference.wkv7, x, dy, ds)
    errors, times = {}, {name: [] for name in candidates}
    for name, wkv in candidates.items():  # also the warm-up
        found = forward_and_backward(wkv, x, dy, ds)
        errors[name] = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))
    for _ in range(given.rounds):
        for name, wkv in candidates.items():
            begin = time.perf_counter()
            forward_and_backward(wkv, x, dy, ds)
            times[name].append(1e3 * (time.perf_counter() - begin))
    print(f"WKV-7 forward + backward with s0 and sT gradients, B=1 T={given.tokens} H={given.heads} N=64 float32")
    print(
        f"{platform.machine()}, {given.threads} threads, torch {torch.__version__}, {given.rounds} interleaved rounds"
    )
    medians = {name: statistics.median(t) for name, t in times.items()}
    for name, t in times.items():
        print(
            f"  {name:<24} {medians[name]:9.1f} ms  ({min(t):.1f} to {max(t):.1f})  largest relative error {errors[name]:.1e}"
        )
    peer = medians["naive loop + autograd"]
    for name in candidates:
        if name.startswith("OP="):
            print(f"ratio: {name} is {peer / medians[name]:.1f} times as fast as the naive loop")
    if given.json:
        given.json.write_text(
            json.dumps({"medians_ms": medians, "times_ms": times, "errors": errors, **vars(given)}, default=str)
        )


if __name__ == "__main__":
    main()
