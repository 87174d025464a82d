"""Host memory and time while a base is opened, wrapped and quantised, as training.sh does it before the first step.

usage: python bench/load.py [--layers 24] [--width 1024] [--methods lora,pissa] [--quants none,int8,nf4,fp4,fp8]
                            [--quant-parts att,ffn] [--dtype bfloat16] [--folder /tmp] [--json FILE]

Writes a random RWKV-7 of this size in bfloat16 (0.9 GB as shipped) and opens it again in a process for every point, one
thread, after a small piece of the same work that loads what is loaded once. All figures are MB of anonymous memory
(RssAnon of /proc/self/status, looked at every 2 ms): pages of the mapped file do not count, the kernel may drop them.

    result    the bytes of all tensors that do not lie in the mapped file: codes, scales, adapters, what PiSSA began with
    kept      RssAnon at the end, above what it was before: the result, and what malloc has not given back
    peak      the most on the way. more: peak - result, and how many times the largest weight in float32 that is

s: processor seconds. Pages of the file are read once before, so that the disk does not count.
"""

from __future__ import annotations

import sys

sys.path[0] = __file__.rpartition("bench")[
    0
]  # the kit, instead of this folder: tokenize.py here hides a module of Python's own

# ruff: noqa: E402
import argparse
import itertools
import json
import math
import os
import platform
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import nn

from rwkv_peft.adapters import inject
from rwkv_peft.adapters.specs import QUANTS
from rwkv_peft.checkpoint import base_model, pth
from rwkv_peft.model.arch import linear_layers, shapes
from rwkv_peft.model.init_weights import new_geometry
from rwkv_peft.model.rwkv import build
from rwkv_peft.ops import dispatch

SLEEP = 0.002


def anonymous() -> float:
    """MB of memory that belongs to no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no RssAnon")


class Highest(threading.Thread):
    """The most of `anonymous` from start() to end()."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.over = anonymous(), threading.Event()

    def run(self) -> None:
        while not self.over.wait(SLEEP):
            self.most = max(self.most, anonymous())

    def end(self) -> float:
        self.over.set()
        self.join()
        return max(self.most, anonymous())


def setup_of(given, method: str, quant: str) -> inject.AdapterConfig:
    options = {
        "lora": {"rank": given.rank, "alpha": 2.0 * given.rank},
        "pissa": {"rank": given.rank, "niter": given.niter},
    }
    parts = tuple(given.quant_parts.split(",")) if quant != "none" else ()
    return inject.AdapterConfig(method, options[method], ("att", "ffn"), quant=quant, quant_parts=parts)


def write(path: Path, layers: int, width: int, vocabulary: int) -> None:
    sizes = shapes(new_geometry("x070", layers, width, vocabulary, 64))
    pth.save(path, {name: (torch.randn(size) * 0.02).bfloat16() for name, size in sizes.items()})


def point(given) -> dict:
    """Open, wrap and quantise in this process. given.point: words file, method and quant."""
    path, setup = Path(given.point[0]), setup_of(given, *given.point[1:])
    torch.set_num_threads(1)
    dtype = getattr(torch, given.dtype)
    small = new_geometry("x070", 1, 64, 64, 64)
    ops = dispatch.choose("auto", small.version)
    tensors = {name: (torch.randn(size) * 0.02).bfloat16() for name, size in shapes(small).items()}
    inject.inject_adapters(build(small, tensors, ops, dtype), setup, dtype)
    before, watch = anonymous(), Highest()
    watch.start()
    begin = time.process_time()
    geometry = base_model.read_geometry(path)[1]
    tensors = pth.load(path)
    mapped = {t.data_ptr() for t in tensors.values()}
    model = build(geometry, tensors, ops, dtype)
    del tensors
    begun = inject.inject_adapters(model, setup, dtype)
    seconds = time.process_time() - begin
    peak, kept = watch.end() - before, anonymous() - before
    return {"peak": peak, "held": kept, "seconds": seconds, "result": result_bytes(model, begun, mapped) / 2**20}


def result_bytes(model: nn.Module, begun: dict, mapped: set[int]) -> int:
    ours = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers(), *begun.values())}
    return sum(size for place, size in ours.items() if place not in mapped)


def in_a_process(given, path: Path, method: str, quant: str) -> dict:
    names = ("rank", "niter", "quant-parts", "dtype")
    options = [f"--{name}={getattr(given, name.replace('-', '_'))}" for name in names]
    done = subprocess.run(
        [sys.executable, __file__, *options, "--point", str(path), method, quant],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        sys.exit(f"{method} {quant}: ended with {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def largest_worked_on(given) -> float:
    """MB of the largest weight that is wrapped or quantised, in float32."""
    geometry = new_geometry("x070", given.layers, given.width, given.vocab, 64)
    parts = set(given.quant_parts.split(","))
    names = [*linear_layers(geometry, ("att", "ffn")), *(parts & {"emb", "head"})]
    return max(4 * math.prod(shapes(geometry)[f"{name}.weight"]) for name in names) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--methods", default="lora,pissa")
    parser.add_argument("--quants", default=",".join(("none", *QUANTS)))
    parser.add_argument("--quant-parts", default="att,ffn")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--niter", type=int, default=4)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point:
        print(json.dumps(point(given)))
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    largest, results = largest_worked_on(given), []
    with tempfile.TemporaryDirectory(prefix="bench-load-", dir=given.folder) as folder:
        path = Path(folder) / "base.pth"
        write(path, given.layers, given.width, given.vocab)
        with open(path, "rb") as file:
            while file.read(1 << 24):
                pass
        print(
            f"{given.layers} layers, width {given.width}, a file of {path.stat().st_size / 1e6:.0f} MB, kept in {given.dtype}, "
            f"rank {given.rank}, QUANT_PARTS={given.quant_parts}; {platform.machine()}, 1 thread, torch {torch.__version__}"
        )
        print(f"the largest weight that is worked on: {largest:.1f} MB in float32")
        print(
            f"{'method':<6} {'quant':<5} {'result MB':>9} {'kept MB':>8} {'peak MB':>8} {'more MB':>8} {'largest':>8} {'s':>6}"
        )
        for method, quant in itertools.product(given.methods.split(","), given.quants.split(",")):
            record = in_a_process(given, path, method, quant)
            more = record["peak"] - record["result"]
            results.append({"method": method, "quant": quant, **record})
            print(
                f"{method:<6} {quant:<5} {record['result']:9.0f} {record['held']:8.0f} {record['peak']:8.0f} {more:8.0f} "
                f"{more / largest:7.1f}x {record['seconds']:6.1f}",
                flush=True,
            )
    if given.json:
        given.json.write_text(json.dumps({**vars(given), "largest": largest, "results": results}, default=str))


if __name__ == "__main__":
    main()
