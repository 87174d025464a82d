"""A whole training step (forward, backward, clipping, optimizer) on random files of the field's sizes, beside its peers.

usage: python bench/step.py [--geometry 0.1b|0.4b|1.5b] [--ctx 512] [--batch 1] [--precision fp32|bf16]
                            [--method lora|full|state|none] [--rank 16] [--grad-cp 0|1|selective] [--op auto]
                            [--threads N] [--rounds 5] [--peers] [--json FILE]

Every implementation is a process of its own that loads the same file; their steps are interleaved. Every token is a target
(data with prompts has fewer, and ours then does less). Printed and, with --json, written as one object per line:

    tokens_per_s    batch * ctx over the median step's seconds
    peak_mb         largest resident set of the process, libraries included
    share_of_gemm   matrix products that the step cannot do without (two operations per weight and token forward, two more
                    backward for inputs, two more for each trained matrix) per second, over this machine's own rate: a
                    product of [1024, 4096] x [4096, 4096] in the same precision and threads, measured between the rounds

--peers: rwkvtune 0.1.0, rwkv7-hf 0.9.0 with peft, and the rwkv package's forward pass (which trains nothing) are installed
into bench/.venv-peers first (some GB) and run on the same file, rank, length and threads.
"""

from __future__ import annotations

import sys

sys.path[0] = __file__.rpartition("bench")[0]  # the kit, instead of this folder

# ruff: noqa: E402
import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from rwkv_peft import checkpoint
from rwkv_peft.adapters import attach
from rwkv_peft.data.loading import Batch
from rwkv_peft.machine import DTYPES
from rwkv_peft.model import arch
from rwkv_peft.model.arch import Geometry
from rwkv_peft.model.initial import initial_tensors, new_geometry
from rwkv_peft.model.rwkv import build
from rwkv_peft.ops import dispatch
from rwkv_peft.train import RECOMPUTE
from rwkv_peft.training.module import TrainingModule
from rwkv_peft.training.optim import parameter_groups

HERE = Path(__file__).resolve().parent
PARTS = ("att", "ffn")
GEOMETRIES = {
    "0.1b": new_geometry("x070", 12, 768, 65536),
    "0.4b": new_geometry("x070", 24, 1024, 65536),
    "1.5b": new_geometry("x070", 24, 2048, 65536),
}
GEMM = 1024, 4096, 4096


def setup_of(method: str, rank: int) -> attach.Setup:
    options = {"lora": {"rank": rank, "alpha": 2.0 * rank, "rslora": False}, "state": {"shifts": False}}
    return attach.Setup(method, options.get(method, {}), PARTS if method in ("lora", "full") else ())


def needed_flops(geometry: Geometry, method: str, rank: int) -> float:
    """Operations per token in matrix products, for all that a step must do: no recomputing, no products nobody needs."""
    sizes = arch.shapes(geometry)
    products = [s for n, s in sizes.items() if len(s) == 2 and n != "emb.weight" and not n.endswith("r_k")]
    forward = 2 * sum(a * b for a, b in products)
    if method == "none":
        return forward
    trained = 0.0
    if method == "full":
        trained = forward
    elif method == "lora":  # A and B: forward, backward to the inputs, and to themselves
        trained = 6 * sum(rank * sum(sizes[f"{layer}.weight"]) for layer in arch.linear_layers(geometry, PARTS))
    return 2 * forward + trained


class Ours:
    """One training step of the kit, made of the parts that ./training.sh runs."""

    def __init__(self, given, path: str):
        geometry = GEOMETRIES[given.geometry]
        dtype = DTYPES[given.precision]
        ops = dispatch.choose(given.op, geometry.version)
        self.op = ops.name
        model = build(geometry, checkpoint.load(path), ops, dtype, RECOMPUTE[given.grad_cp])
        setup = setup_of(given.method, given.rank)
        attach.adapt(model, setup, dtype)
        groups = parameter_groups(attach.trained(model).items(), 0.0, arch.decays, lambda name: 1.0)
        self.module = TrainingModule(model, groups, 100, "constant", 1e-5, 1e-5, 0, (0.9, 0.99), 1e-8, 1.0)
        self.optimizer = self.module.configure_optimizers()["optimizer"]
        tokens = given.batch * given.ctx
        ids = torch.randint(1, geometry.vocab_size, (1, tokens + 1))
        borders = tuple(range(0, tokens + 1, given.ctx))
        self.batch = Batch(ids[:, :-1], borders, torch.arange(tokens), ids[0, 1:], tokens, tokens)

    def step(self) -> float:
        loss = self.module.summed_loss(self.batch) / self.batch.step_targets
        loss.backward()
        self.module.configure_gradient_clipping(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def serve(given) -> None:
    """The child: a warm-up step, then one step for every line that comes in."""
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    begin = time.perf_counter()
    ours = Ours(given, given.child)
    ours.step()
    ours.step()
    print(json.dumps({"implementation": "ours", "op": ours.op, "ready_s": time.perf_counter() - begin}), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        loss = ours.step()
        seconds = time.perf_counter() - begin
        peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
        print(json.dumps({"seconds": seconds, "peak_mb": peak, "loss": loss}), flush=True)


class Child:
    """A process that answers every line with one step's figures."""

    def __init__(self, command: list[str], threads: int):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "RWKV_DEVICE": "cpu"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.about = self.answer()
        self.steps: list[dict] = []

    def answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.process.args[:3]} ended without an answer")

    def step(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.steps.append(self.answer())

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def gemm_rate(dtype: torch.dtype) -> float:
    """Operations per second of one large product."""
    m, k, n = GEMM
    x, y = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        torch.nn.functional.linear(x, y)
        times.append(time.perf_counter() - begin)
    return 2 * m * k * n / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--geometry", choices=GEOMETRIES, default="0.1b")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--method", choices=("lora", "full", "state", "none"), default="lora")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--grad-cp", choices=RECOMPUTE, default="0")
    parser.add_argument("--op", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return serve(given)
    torch.set_num_threads(given.threads)
    geometry, dtype = GEOMETRIES[given.geometry], DTYPES[given.precision]
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.pth"
        torch.manual_seed(0)
        checkpoint.save(base, {n: t.bfloat16() for n, t in initial_tensors(geometry, 0).items()})
        own = [sys.executable, str(HERE / "step.py"), *sys.argv[1:], "--child", str(base)]
        children = [Child(own, given.threads)]
        rates = []
        for _ in range(given.rounds):
            rates.append(gemm_rate(dtype))
            for child in children:
                child.step()
        for child in children:
            child.end()
    rate, tokens = statistics.median(rates), given.batch * given.ctx
    needed = needed_flops(geometry, given.method, given.rank) * tokens
    print(
        f"{given.geometry} {given.method} r={given.rank}, {given.batch} x {given.ctx} tokens, {given.precision}; "
        f"{platform.machine()}, {given.threads} threads, torch {torch.__version__}, {given.rounds} interleaved rounds"
    )
    print(f"matrix products: {rate / 1e9:,.0f} GF/s here; the step needs {needed / 1e9:,.0f} GF")
    rows = []
    for child in children:
        times = [step["seconds"] for step in child.steps]
        middle = statistics.median(times)
        row = {
            **child.about,
            "tokens_per_s": tokens / middle,
            "peak_mb": child.steps[-1]["peak_mb"],
            "share_of_gemm": needed / middle / rate,
            "seconds": times,
            "loss": child.steps[-1].get("loss"),
            **{k: v for k, v in vars(given).items() if k not in ("json", "child", "peers")},
        }
        rows.append(row)
        print(
            f"  {row['implementation']:<12} {middle:8.3f} s ({min(times):.3f} to {max(times):.3f}) "
            f"{row['tokens_per_s']:8.1f} tokens/s  {row['peak_mb']:7.0f} MB  {100 * row['share_of_gemm']:5.1f} % of matrix rate"
        )
    for row in rows[1:]:
        ratio = rows[0]["tokens_per_s"] / row["tokens_per_s"]
        smaller = row["peak_mb"] / rows[0]["peak_mb"]
        print(f"ratio: ours is {ratio:.1f} times as fast as {row['implementation']}, and {smaller:.1f} times smaller")
    if given.json:
        with open(given.json, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
