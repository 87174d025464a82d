"""Peak memory of ./training.sh by geometry, method, GRAD_CP and context, beside the estimate in its own plan.

usage: python bench/memory.py [--geometry 0.1b,0.4b] [--methods lora,full,state,dora,...] [--grad-cp 0,selective,1]
                              [--ctx 512,2048] [--precision bf16,fp32] [--optim adamw] [--op auto] [--version x070]
                              [--steps 4] [--json FILE]

Every point is a run of its own on a random file of that size, from the plan to the last checkpoint and loss.png, with packs of
rows of all lengths, one at a time. Its peak is the largest resident set, libraries and the mapped file included, which is what a
user sees. lora+ trains emb and head as well. Printed: measured, estimated, and by how much the estimate is off; at the end the
largest of these.
"""

from __future__ import annotations

import sys

sys.path[0] = __file__.rpartition("bench")[0]  # the kit, instead of this folder

# ruff: noqa: E402
import argparse
import itertools
import json
import os
import platform
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from bench.step import AS_RUN_SH, GEOMETRIES
from rwkv_peft.checkpoint import pth
from rwkv_peft.cli import train
from rwkv_peft.common import paths
from rwkv_peft.config.shell import Script, parse_assignments
from rwkv_peft.config.train import TrainConfig
from rwkv_peft.data.binidx import Writer
from rwkv_peft.model.init_weights import initial_tensors, new_geometry

RANK = 16
METHODS = {"dora": {"FINETUNE_MODE": "lora", "use_dora": "1"}, "lora+": {"FINETUNE_MODE": "lora", "EMB_FINETUNE": "1"}}
SCRIPT = paths.ROOT / "training.sh"


def write_rows(prefix: Path, tokens: int) -> None:
    """Random rows of 20 to 400 tokens."""
    rng = np.random.default_rng(0)
    with Writer(prefix, {"": np.uint16}) as writer:
        while tokens > 0:
            row = rng.integers(1, 65000, rng.integers(20, 400))
            writer.add({"": np.append(row, 0)})
            tokens -= len(row)
        writer.commit()


def child(point: dict) -> None:
    """A run in this process; prints its peak in MB."""
    paths.ROOT, paths.OUTPUT = Path(point["folder"]), Path(point["folder"]) / "output"
    rank = {name: str(RANK) for name in ("lora_r", "pissa_r", "disha_r")}
    settings = {
        "MODEL_PATH": f"{point['geometry']}.pth", "DATA_PATH": "rows", "CTX_LEN": str(point["ctx"]), "LOSS_MASK": "pad",
        "MICRO_BSZ": "1", "MINI_BSZ": "1", "EPOCH_STEPS": str(point["steps"]), "EPOCH_COUNT": "1", "WARMUP_STEPS": "0",
        "PRECISION": point["precision"], "GRAD_CP": point["grad_cp"], "OPTIM": point["optim"], "OP": point["op"],
        "FINETUNE_MODE": point["method"], "MODEL_VERSION": "auto", "VOCABULARY": "own",
    }  # fmt: skip
    values = parse_assignments(SCRIPT) | rank | settings | METHODS.get(point["method"], {})
    train.command(Script(SCRIPT, values).read(TrainConfig), ["--new"])
    print("peak", int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024)


def run(point: dict) -> tuple[float, float]:
    """Measured and estimated MB."""
    command = [sys.executable, __file__, "--point", json.dumps(point)]
    environment = AS_RUN_SH | os.environ | {"PYTHONPATH": sys.path[0]}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{point} ended with {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1]), 1024 * float(re.search(r"about ([\d.]+) GB", done.stdout)[1])


def main() -> None:
    words = lambda text: text.split(",")  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--geometry", type=words, default=["0.1b", "0.4b"])
    parser.add_argument("--methods", type=words, default=["lora", "full", "state"])
    parser.add_argument("--grad-cp", type=words, default=["0", "selective", "1"])
    parser.add_argument("--ctx", type=words, default=["512", "2048"])
    parser.add_argument("--precision", type=words, default=["bf16", "fp32"])
    parser.add_argument("--optim", type=words, default=["adamw"])
    parser.add_argument("--op", default="auto")
    parser.add_argument("--version", default="x070")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point:
        return child(given.point)
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, rank {RANK}, 1 row a step"
    )
    print(f"{'':44} {'measured':>9} {'estimate':>9} {'off by':>7}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("model", "data", "output"):
            (Path(folder) / name).mkdir()
        write_rows(Path(folder) / "data" / "rows", 2 * given.steps * max(map(int, given.ctx)))
        for name in given.geometry:
            size, path = GEOMETRIES[name], Path(folder) / "model" / f"{name}.pth"
            geometry = new_geometry(given.version, size.n_layer, size.n_embd, size.vocab_size)
            pth.save(path, {n: t.bfloat16() for n, t in initial_tensors(geometry, 0).items()})
            for precision, method, optim, ctx, cp in itertools.product(
                given.precision, given.methods, given.optim, given.ctx, given.grad_cp
            ):
                point = {
                    "geometry": name, "precision": precision, "method": method, "ctx": int(ctx), "grad_cp": cp,
                    "op": given.op, "optim": optim, "steps": given.steps,
                }  # fmt: skip
                peak, meant = run({**point, "folder": folder})
                rows.append({**point, "version": given.version, "measured_mb": peak, "estimated_mb": meant})
                where = f"{name} {precision} {method} {optim} {ctx} GRAD_CP={cp}"
                print(f"{where:44} {peak:9.0f} {meant:9.0f} {100 * (meant / peak - 1):+6.0f}%", flush=True)
            path.unlink()
    worst = max(rows, key=lambda row: abs(row["estimated_mb"] / row["measured_mb"] - 1))
    print(f"largest difference: {100 * (worst['estimated_mb'] / worst['measured_mb'] - 1):+.0f} %")
    if given.json:
        given.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
