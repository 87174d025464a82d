"""A whole training step (forward, backward, clipping, optimizer) on random files of the field's sizes, beside its peers.

usage: python bench/step.py [--geometry 0.1b|0.4b|1.5b] [--ctx 512] [--batch 1] [--precision fp32|bf16]
                            [--method lora|full|state|none] [--rank 16] [--grad-cp 0|1|selective] [--op auto]
                            [--threads N] [--rounds 5] [--peers] [--peer-rounds 2] [--json FILE]

Every implementation is a process of its own that loads the same file; their steps are interleaved. Every token is a target
(data with prompts has fewer, and ours then does less). Printed and, with --json, written as one object per line:

    tokens_per_s    batch * ctx over the median step's seconds
    peak_mb         largest resident set of the process, libraries included
    share_of_gemm   matrix products that the step cannot do without (two operations per weight and token forward, two more
                    backward for inputs, two more for each trained matrix) per second, over this machine's own rate: a
                    product of [1024, 4096] x [4096, 4096] in the same precision and threads, measured between the rounds

--peers: rwkvtune 0.1.0, rwkv7-hf 0.9.0 with peft, and the rwkv package's forward pass (which trains nothing) are installed
into bench/.venv-peers first (some GB; bench/peers/requirements.txt) and run on the same file, tokens, rank, length and
threads: a few further rounds of the kit and one of them in turn, one peer at a time, because each takes several times ours'
memory. A ratio is of the medians of these rounds. The loss of the first step must be the same for all of them.
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
from torch import Tensor

from bench.peers import protocol
from rwkv_peft.adapters import inject
from rwkv_peft.adapters.specs import METHODS, OPTIMS
from rwkv_peft.checkpoint import pth
from rwkv_peft.common.hardware import DTYPES
from rwkv_peft.config.strategies import STRATEGIES
from rwkv_peft.data.dataset import Batch
from rwkv_peft.distributed.sharding import Sharding
from rwkv_peft.model import arch
from rwkv_peft.model.arch import Geometry
from rwkv_peft.model.init_weights import initial_tensors, new_geometry
from rwkv_peft.model.rwkv import build
from rwkv_peft.ops import dispatch
from rwkv_peft.train.model_setup import RECOMPUTE
from rwkv_peft.train.module import TrainingModule
from rwkv_peft.train.optim import parameter_groups

HERE = Path(__file__).resolve().parent
PARTS = ("att", "ffn")
GEOMETRIES = {
    "tiny": new_geometry("x070", 2, 128, 65536),  # to try a benchmark with
    "0.1b": new_geometry("x070", 12, 768, 65536),
    "0.4b": new_geometry("x070", 24, 1024, 65536),
    "1.5b": new_geometry("x070", 24, 2048, 65536),
    "2.9b": new_geometry("x070", 32, 2560, 65536),
}
# what rwkv_peft/run.sh sets, for all alike
AS_RUN_SH = {"GOMP_SPINCOUNT": "5000", "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=4194304:glibc.malloc.hugetlb=1"}
GEMM = 1024, 4096, 4096
PEERS = {  # script -> precisions that it can train in on a CPU
    "train_rwkvtune.py": ("fp32",),
    "train_rwkv7_hf.py": ("fp32", "bf16"),
    "prefill_rwkv.py": ("fp32", "bf16"),
}
SAME_LOSS = 0.01  # of two implementations that compute the same


def setup_of(method: str, rank: int, quant: str = "none") -> inject.AdapterConfig:
    """method: a name in METHODS with what adapters need, or lora+, which trains emb and head as well."""
    lora = {"rank": rank, "alpha": 2.0 * rank, "rslora": False}
    options = {"lora": lora, "dora": lora, "miss": {"rank": rank}, "bat": {"rank": rank}, "state": {"shifts": False}}
    parts = (*PARTS, "emb", "head") if method == "lora+" else PARTS
    method = method.removesuffix("+")
    parts = parts if METHODS[method].parts or method == "full" else ()
    return inject.AdapterConfig(method, options.get(method, {}), parts, quant=quant, quant_parts=("att", "ffn"))


def needed_flops(geometry: Geometry, method: str, rank: int) -> float:
    """Operations per token in matrix products, for all that a step must do: no recomputing, no unneeded products."""
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

    def __init__(self, given, path: str, device: str = "cpu"):
        geometry = GEOMETRIES[given.geometry]
        dtype = DTYPES[given.precision]
        ops = dispatch.choose(given.op, geometry.version, device)
        self.op = ops.name
        model = build(geometry, pth.load(path), ops, dtype, RECOMPUTE[given.grad_cp])
        setup = setup_of(given.method, given.rank, getattr(given, "quant", "none"))
        inject.inject_adapters(model, setup, dtype, device=device)
        model.to(device)
        self.module = make_module(model, getattr(given, "optim", "adamw"))
        self.optimizer = self.module.configure_optimizers()["optimizer"]
        tokens = given.batch * given.ctx
        inputs, targets = protocol.tokens(given.batch, given.ctx, geometry.vocab_size)
        bounds = tuple(range(0, tokens + 1, given.ctx))
        ids, positions, targets = (
            x.to(device) for x in (inputs.reshape(1, -1), torch.arange(tokens), targets.flatten())
        )
        self.batch = Batch(ids, bounds, positions, targets, tokens, tokens)

    def step(self) -> float:
        loss = self.module.summed_loss(self.batch) / self.batch.step_targets
        loss.backward()
        self.module.configure_gradient_clipping(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def serve(given) -> None:
    """The child: two warm-up steps, then one step for every line that comes in."""

    def make():
        ours = Ours(given, given.child)
        return {"implementation": "ours", "op": ours.op}, ours.step

    protocol.serve(given.threads, make, 2)


class Ended(Exception):
    """A child has died; the message is the last it said."""


class Child:
    """A process that answers every line with one step's figures. What it says on stderr is kept for when it fails."""

    def __init__(self, command: list[str], threads: int, device: str = "cpu"):
        environment = AS_RUN_SH | os.environ | {"OMP_NUM_THREADS": str(threads)}
        environment |= {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True, env=environment
        )
        self.steps: list[dict] = []
        self.about = self.answer()

    def answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.said.seek(0)
        last = " / ".join(self.said.read().split("\n")[-4:]).strip(" /")  # the error and where it is from
        raise Ended(f"{self.process.args[1]} ended with code {self.process.wait()}: {last}")

    def step(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.steps.append(self.answer())

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.said.close()


def make_module(model, optim: str = "adamw") -> TrainingModule:
    """What is trained on a model, with an optimizer, on one process."""

    def groups() -> list[dict]:
        return parameter_groups(inject.trainable_params(model).items(), 0.0, arch.decays, lambda name: 1.0)

    rates = 100, Sharding(STRATEGIES["single"], False), "constant", 1e-5, 1e-5, 0
    return TrainingModule(model, groups, *rates, (0.9, 0.99), 1e-8, 1.0, optim=optim)


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


def telling(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A fresh model's tensors, changed so that a wrong layer shows in the loss: nothing is zero, and the head is loud."""
    for tensor in tensors.values():
        if tensor.dim() == 2 and not tensor.any():
            tensor.uniform_(-0.5, 0.5).div_(tensor.shape[-1] ** 0.5)
    tensors["head.weight"] *= 4
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def peers_python() -> str:
    """The Python of the peers' environment, which is made if it is not there or not as the requirements say."""
    folder, wanted = HERE / ".venv-peers", HERE / "peers" / "requirements.txt"
    python, stamp = folder / "bin" / "python", folder / "installed"
    if not (stamp.exists() and stamp.read_text() == wanted.read_text()):
        print(f"installing {wanted} into {folder} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        # torch alone and first, exactly pinned: what comes after it finds it and leaves it
        (torch_pin,) = [line for line in wanted.read_text().splitlines() if line.startswith("torch==")]
        for what in ([torch_pin], ["-r", wanted]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *what], check=True)
        stamp.write_text(wanted.read_text())
    return str(python)


def run_peers(given, base: Path, ours: Child, rates: list[float]) -> tuple[list[tuple[Child, list[dict]]], list[str]]:
    """Every peer beside ours: (peer, the kit's steps in its rounds), and what could not be run."""
    python, done, left_out = peers_python(), [], []
    wishes = {name: getattr(given, name) for name in ("ctx", "batch", "rank", "precision", "threads")}
    wishes |= {
        "child": str(base),
        "grad_cp": int(given.grad_cp),
        "vocab": GEOMETRIES[given.geometry].vocab_size,
        "device": "cpu",
    }
    for script, precisions in PEERS.items():
        if given.precision not in precisions:
            left_out.append(f"{script} has no {given.precision} on a CPU")
            continue
        try:
            peer = Child([python, str(HERE / "peers" / script), json.dumps(wishes)], given.threads)
            for _ in range(given.peer_rounds):
                rates.append(gemm_rate(DTYPES[given.precision]))
                ours.step()
                peer.step()
        except Ended as error:
            left_out.append(str(error))
            continue
        peer.end()
        done.append((peer, ours.steps[-given.peer_rounds :]))
    return done, left_out


def median_seconds(steps: list[dict]) -> float:
    return statistics.median(step["seconds"] for step in steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--geometry", choices=GEOMETRIES, default="0.1b")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--method", choices=("lora", "full", "state", "none"), default="lora")
    parser.add_argument("--optim", choices=OPTIMS, default="adamw")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--grad-cp", choices=RECOMPUTE, default="0")
    parser.add_argument("--op", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--peer-rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return serve(given)
    if given.peers and (given.method != "lora" or given.grad_cp == "selective"):
        parser.error("--peers compares --method lora, with --grad-cp 0 or 1")
    torch.set_num_threads(given.threads)
    geometry, dtype = GEOMETRIES[given.geometry], DTYPES[given.precision]
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.pth"
        torch.manual_seed(0)
        pth.save(base, telling(initial_tensors(geometry, 0)))
        own = [sys.executable, str(HERE / "step.py"), *sys.argv[1:], "--child", str(base)]
        try:
            ours = Child(own, given.threads)
        except Ended as error:
            sys.exit(str(error))
        rates = []
        for _ in range(given.rounds):
            rates.append(gemm_rate(dtype))
            ours.step()
        peers, left_out = run_peers(given, base, ours, rates) if given.peers else ([], [])
        ours.end()
    rate, tokens = statistics.median(rates), given.batch * given.ctx
    needed = needed_flops(geometry, given.method, given.rank) * tokens
    print(
        f"{given.geometry} {given.method} r={given.rank}, {given.batch} x {given.ctx} tokens, {given.precision}; "
        f"{platform.machine()}, {given.threads} threads, torch {torch.__version__}, {given.rounds} interleaved rounds"
    )
    print(f"matrix products: {rate / 1e9:,.0f} GF/s here; the step needs {needed / 1e9:,.0f} GF")
    rows = []
    for child, beside in [(ours, ours.steps), *peers]:
        times = [step["seconds"] for step in child.steps]
        middle = statistics.median(times)
        trains = child.about.get("trains", True)
        must = needed if trains else needed_flops(geometry, "none", given.rank) * tokens
        row = {
            **child.about,
            "tokens_per_s": tokens / middle,
            "peak_mb": child.steps[-1]["peak_mb"],
            "share_of_gemm": must / middle / rate,
            "ours_is_times_as_fast": middle / median_seconds(beside),
            "seconds": times,
            "loss": child.steps[-1]["loss"],
            **{k: v for k, v in vars(given).items() if k not in ("json", "child", "peers")},
        }
        rows.append(row)
        print(
            f"  {row['implementation']:<12} {middle:8.3f} s ({min(times):.3f} to {max(times):.3f}) "
            f"{row['tokens_per_s']:8.1f} tokens/s  {row['peak_mb']:7.0f} MB  {100 * row['share_of_gemm']:5.1f} % of matrix rate"
            f"  first loss {row['first_loss']:.5f}{'' if trains else '; forward only, trains nothing'}"
        )
    for row in rows[1:]:
        smaller = row["peak_mb"] / rows[0]["peak_mb"]
        print(
            f"ratio: ours is {row['ours_is_times_as_fast']:.1f} times as fast as {row['implementation']}, "
            f"and {smaller:.1f} times smaller"
        )
        if abs(row["first_loss"] / rows[0]["first_loss"] - 1) > SAME_LOSS:
            print(f"WARNING: the first losses of ours and {row['implementation']} differ: it does not compute the same")
        if row["torch"] != rows[0]["torch"]:
            print(f"WARNING: {row['implementation']} ran on torch {row['torch']}, ours on {rows[0]['torch']}")
    for why in left_out:
        print(f"left out: {why}")
    if given.json:
        with open(given.json, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
