"""The kernels and whole training steps on one NVIDIA GPU, in one table. bench/gpu.sh runs it on a bare machine.

usage: python bench/gpu.py [--minutes 7] [--quick] [--json FILE]

Printed, with GPU, driver and versions:
    the rate of a large bfloat16 product, and of a copy from the GPU's memory to itself (bytes read and written)
    the recurrences, forward and backward, OP=cuda beside OP=fla, if that is installed, and OP=torch: ms, ns for each token and
    head, memory above the inputs, error, share of the copy's rate if a token and head were 3.1 KB (inputs, outputs, gradients:
    research/kernels.md 2.1)
    LoRA (rank 16), full and state steps of random 0.1B to 2.9B files, some on a compressed base: tokens/s, peak memory, share of
    the product's rate (see bench/step.py); one with and without CUDA graphs; rwkvtune beside some, if it is installed and runs
It begins nothing new after --minutes. --quick: the smallest of each; with --device cpu it only shows that the program works.
"""

from __future__ import annotations

import sys

sys.path[0] = __file__.rpartition("bench")[0]  # the kit, instead of this folder

# ruff: noqa: E402
import argparse
import functools
import gc
import importlib.util
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from bench.step import GEOMETRIES, HERE, Child, Ended, Ours, median_seconds, needed_flops, telling
from rwkv_peft.checkpoint import pth
from rwkv_peft.model.init_weights import initial_tensors
from rwkv_peft.ops import dispatch, fla, kernel_check
from rwkv_peft.ops.cuda import build as cuda_build
from rwkv_peft.train.cuda_graphs import MIN_OCCURRENCES, Graphs

WKV = [(1, 1024, 12), (1, 4096, 32), (8, 1024, 32), (8, 4096, 64)]  # sequences, tokens of each, heads
# geometry, method, compressed base, tokens of a row, rows: what the targets are about first, then all sizes
STEPS = [
    ("0.1b", "lora", "none", 1024, 1),
    *(("1.5b", "lora", quant, 1024, 1) for quant in ("none", "nf4", "int8")),
    ("1.5b", "lora", "none", 4096, 1),
    *((name, "lora", "none", ctx, batch) for name in GEOMETRIES for ctx, batch in ((1024, 8), (4096, 1), (4096, 8))),
    *((name, method, "none", 4096, 1) for name in ("0.1b", "0.4b", "1.5b") for method in ("full", "state")),
    *((name, "lora", "none", 1024, 1) for name in ("0.4b", "2.9b")),
    *(("2.9b", "lora", quant, 1024, 1) for quant in ("nf4", "int8")),
]
BESIDE = STEPS[0], STEPS[1]  # what rwkvtune does too
REPEATED = (STEPS[0],)  # what may wait for the host: with and without CUDA graphs
FAULTS = RuntimeError, cuda_build.KernelUnavailable, fla.KernelUnavailable, Ended
BYTES = 3100  # of a token and head of size 64, forward and backward


class Meter:
    """Times on a device: medians of some runs, after one that does not count, and the most memory that a run takes."""

    def __init__(self, device: str):
        self.device = device

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work, runs: int = 5) -> float:
        times = []
        for _ in range(runs + 1):
            self.wait()
            begin = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - begin)
        return statistics.median(times[1:])

    def begin_memory(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_mb(self) -> float:
        return torch.cuda.max_memory_allocated() / 1e6 if self.device == "cuda" else float("nan")


def product_rate(meter: Meter, size: int) -> float:
    x, y = (torch.randn(size, size, device=meter.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / meter.seconds(lambda: x @ y)


def copy_rate(meter: Meter, numbers: int) -> float:
    x = torch.empty(numbers, device=meter.device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / meter.seconds(lambda: y.copy_(x))


@functools.cache
def error_of(version: str, name: str, device: str) -> float:
    """Largest difference from the definition, of the norm of an output or a gradient, of bfloat16 inputs."""
    return kernel_check.check_against_reference(
        version, dispatch.every_way(version, device)[name], device, torch.bfloat16
    ).error


def wkv_row(meter: Meter, version: str, name: str, shape: tuple[int, int, int], copy: float) -> dict:
    batch, tokens, heads = shape
    some = [x.detach() for x in kernel_check.inputs(version, "random")]
    kinds = [torch.float32 if i == 1 or x.dim() == 2 else torch.bfloat16 for i, x in enumerate(some)]
    x = []
    for like, kind in zip(some, kinds, strict=True):
        sizes = (batch, tokens, heads, 64) if like.dim() == 4 else (heads, 64)
        drawn = torch.randn(sizes, device=meter.device) / 8
        x.append((-torch.exp(drawn - 1) if kind == torch.float32 and len(x) == 1 else drawn).to(kind).requires_grad_())
    s0 = torch.zeros(batch, heads, 64, 64, device=meter.device).requires_grad_()
    wkv = dispatch.every_way(version, meter.device)[name]
    error = error_of(version, name, meter.device)
    dy = torch.randn(batch, tokens, heads, 64, device=meter.device, dtype=torch.bfloat16)

    def step() -> None:
        y, _ = wkv(*x, s0)
        torch.autograd.grad(y, [*x, s0], dy)

    step()
    meter.begin_memory()
    before = meter.peak_mb()
    seconds = meter.seconds(step)
    each = seconds / (batch * tokens * heads)
    return {
        "what": "wkv", "version": version, "op": name, "B": batch, "T": tokens, "H": heads, "ms": 1e3 * seconds,
        "ns": 1e9 * each, "error": error, "mb": meter.peak_mb() - before, "share_of_copy": BYTES / each / copy,
    }  # fmt: skip


def step_row(
    meter: Meter, path: str, step: tuple[str, str, str, int, int], product: float, graphs: bool | None = None
) -> dict:
    """graphs: nothing is computed again, and CUDA graphs are taken or not."""
    name, method, quant, ctx, batch = step
    how = {
        "geometry": name,
        "precision": "bf16",
        "op": "auto",
        "grad_cp": "1" if graphs is None else "0",
        "method": method,
        "rank": 16,
        "quant": quant,
    }
    meter.begin_memory()
    ours = Ours(SimpleNamespace(**how, ctx=ctx, batch=batch), path, meter.device)
    if graphs:
        taken = ours.module.model.replay = Graphs(ours.module.model, print)
        for _ in range(MIN_OCCURRENCES):
            ours.step()
        if taken.off:
            raise RuntimeError("CUDA graphs are not used")
    seconds = meter.seconds(ours.step, 4)
    rate = batch * ctx / seconds
    ours.module.model.replay = None  # (it knows the model, which would stay)
    return {
        "what": "step", **how, "graphs": graphs, "op": ours.op, "ctx": ctx, "batch": batch, "tokens_per_s": rate,
        "peak_mb": meter.peak_mb(),
        "share_of_product": rate * needed_flops(GEOMETRIES[name], method, 16) / product,
    }  # fmt: skip


def peer_row(device: str, path: str, step: tuple[str, str, str, int, int]) -> dict:
    """rwkvtune on the same file and tokens, computing blocks again as ours does."""
    name, _, _, ctx, batch = step
    precision = "bf16" if device == "cuda" else "fp32"
    wishes = {"child": path, "ctx": ctx, "batch": batch, "rank": 16, "precision": precision, "threads": 1, "grad_cp": 1}
    command = [sys.executable, str(HERE / "peers" / "train_rwkvtune.py"), json.dumps(wishes | {"device": device})]
    peer = Child(command, 1, device)
    try:
        for _ in range(4):
            peer.step()
    finally:
        peer.end()
    rate = batch * ctx / median_seconds(peer.steps[1:])
    return {
        "what": "peer", **peer.about, "geometry": name, "ctx": ctx, "batch": batch, "tokens_per_s": rate,
        "peak_mb": peer.steps[-1]["peak_mb"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no GPU. --device cpu --quick shows that the program works.")
    began, meter, rows = time.monotonic(), Meter(given.device), []
    gpu = torch.cuda.get_device_name() if given.device == "cuda" else "a CPU"
    print(f"{gpu}, driver {kernel_check.driver() or '?'}, torch {torch.__version__}", flush=True)

    def report(row: dict, words: str) -> None:
        rows.append(row)
        print(words, flush=True)
        if given.json:
            given.json.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def attempt(what: object, row, words: str) -> None:
        """A row of the table, unless time is up; what does not fit is reported and left out."""
        if time.monotonic() - began > 60 * given.minutes:
            return
        try:
            values = row()
            report(values, words.format(**values))
        except FAULTS as error:
            print(f"left out: {what}: {str(error).splitlines()[0][:150]}", flush=True)
            meter.begin_memory()

    product = product_rate(meter, 512 if given.quick else 8192)
    copy = copy_rate(meter, 1 << (20 if given.quick else 30))
    words = f"product {product / 1e12:.1f} TFLOP/s bfloat16, copy {copy / 1e9:.0f} GB/s"
    report({"what": "rates", "gpu": gpu, "product": product, "copy": copy}, words)
    for version in dispatch.WKV:
        for shape in WKV[:1] if given.quick else WKV:
            for name in dispatch.every_way(version, given.device):
                if name == "reference":
                    continue
                attempt(
                    (version, name, shape),
                    lambda v=version, n=name, s=(1, 65, 2) if given.quick else shape: wkv_row(meter, v, n, s, copy),
                    "{version} OP={op:<21} B={B} T={T} H={H}: {ms:9.3f} ms  {ns:8.2f} ns a token and head  {mb:8.0f} MB  "
                    "{share_of_copy:.1%} of the copy  error {error:.1e}",
                )
    with tempfile.TemporaryDirectory() as folder:
        for step in [("0.1b", "lora", "none", 64, 1)] if given.quick else STEPS:
            if time.monotonic() - began > 60 * given.minutes:
                break
            path = Path(folder) / f"{step[0]}.pth"
            if not path.exists():
                pth.save(path, telling(initial_tensors(GEOMETRIES[step[0]], 0)))
            attempt(
                step,
                lambda s=step, p=str(path): step_row(meter, p, s, product),
                "{geometry} {method} bf16, base {quant}, OP={op} ctx {ctx} batch {batch}: {tokens_per_s:10,.0f} tokens/s  "
                "{peak_mb:8.0f} MB  "
                "{share_of_product:.1%} of the product's rate",
            )
            for graphs in (False, True) if step in REPEATED and given.device == "cuda" else ():
                attempt(
                    (step, "graphs"),
                    lambda s=step, p=str(path), g=graphs: step_row(meter, p, s, product, g),
                    "{geometry} {method} bf16, nothing computed again, CUDA graphs {graphs}: {tokens_per_s:10,.0f} tokens/s  "
                    "{peak_mb:8.0f} MB  {share_of_product:.1%} of the product's rate",
                )
            if importlib.util.find_spec("rwkvtune") and (step in BESIDE or given.quick):
                attempt(
                    ("rwkvtune", step),
                    lambda s=step, p=str(path): peer_row(given.device, p, s),
                    "rwkvtune {version} {geometry} lora ctx {ctx} batch {batch}: {tokens_per_s:10,.0f} tokens/s  "
                    "{peak_mb:8.0f} MB",
                )
    of = {(r["version"], r["B"], r["T"], r["H"], r["op"]): r["ms"] for r in rows if r["what"] == "wkv"}
    for (version, b, t, h, op), ms in of.items():
        for other in ("torch", "fla"):
            if op == "cuda" and (version, b, t, h, other) in of:
                ratio = of[version, b, t, h, other] / ms
                print(f"ratio: {version} B={b} T={t} H={h} OP={op} is {ratio:.1f} times as fast as OP={other}")
    ours = {
        (r["geometry"], r["ctx"], r["batch"]): r
        for r in rows
        if r["what"] == "step" and (r["method"], r["quant"], r["graphs"]) == ("lora", "none", None)
    }
    for peer in (r for r in rows if r["what"] == "peer"):
        mine = ours.get((peer["geometry"], peer["ctx"], peer["batch"]))
        if mine:
            ratio = mine["tokens_per_s"] / peer["tokens_per_s"]
            print(
                f"ratio: {peer['geometry']} lora ctx {peer['ctx']} batch {peer['batch']} is {ratio:.1f} times as fast as rwkvtune"
            )


if __name__ == "__main__":
    main()
