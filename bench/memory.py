"""Peak memory of a training step by geometry, method, GRAD_CP and context, beside the estimate that --dry-run prints.

usage: python bench/memory.py [--geometry 0.1b,0.4b] [--methods lora,full,dora,...] [--grad-cp 0,selective,1] [--ctx 512,2048]
                              [--precision bf16,fp32] [--optim adamw] [--op auto] [--version x070] [--json FILE]

Every point is a process of its own that loads a random file of that size and makes two steps; its peak is the largest
resident set, libraries and the mapped file included, which is what a user sees. Printed: measured, estimated, and by how
much the estimate is off; at the end the largest of these.
"""

from __future__ import annotations

import sys

sys.path[0] = __file__.rpartition("bench")[0]  # the kit, instead of this folder

# ruff: noqa: E402
import argparse
import itertools
import json
import math
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

from bench.step import GEOMETRIES, Ours, setup_of
from rwkv_peft import checkpoint
from rwkv_peft.adapters import attach
from rwkv_peft.machine import DTYPES
from rwkv_peft.methods import OPTIMS
from rwkv_peft.model import arch
from rwkv_peft.model.initial import initial_tensors, new_geometry
from rwkv_peft.ops import dispatch
from rwkv_peft.training.estimate import memory_bytes

RANK = 16


def geometry_of(name: str, version: str):
    size = GEOMETRIES[name]
    return new_geometry(version, size.n_layer, size.n_embd, size.vocab_size)


def estimate(geometry, method: str, optim: str, grad_cp: str, ctx: int, precision: str, op: str) -> float:
    """MB, from what the plan of a run would know."""
    setup, shapes = setup_of(method, RANK), arch.shapes(geometry)
    trained = attach.count_trained(geometry, setup)
    largest = max((math.prod(shapes[name]) for name in setup.whole(geometry)), default=0)
    sizes = shapes, trained, ctx, geometry, DTYPES[precision].itemsize
    return memory_bytes(*sizes, grad_cp, setup.method, "cpu", op, OPTIMS[optim], largest) / 2**20


def child(point: dict) -> None:
    """Two steps in this process; prints its peak in MB."""
    torch.manual_seed(0)
    GEOMETRIES[point["geometry"]] = geometry_of(point["geometry"], point["version"])
    ours = Ours(SimpleNamespace(**point, batch=1, rank=RANK), point["path"])
    ours.step()
    ours.step()
    print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024)


def measured(point: dict) -> float:
    command = [sys.executable, __file__, "--point", json.dumps(point)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": sys.path[0]})
    if done.returncode:
        sys.exit(f"{point} ended with {done.returncode}\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


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
    parser.add_argument("--json", type=Path)
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point:
        return child(given.point)
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, LoRA of rank {RANK}, 1 row"
    )
    print(f"{'':44} {'measured':>9} {'estimate':>9} {'off by':>7}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.geometry:
            geometry, path = geometry_of(name, given.version), Path(folder) / f"{name}.pth"
            checkpoint.save(path, {n: t.bfloat16() for n, t in initial_tensors(geometry, 0).items()})
            for precision, method, optim, ctx, cp in itertools.product(
                given.precision, given.methods, given.optim, given.ctx, given.grad_cp
            ):
                point = {
                    "geometry": name, "precision": precision, "method": method, "ctx": int(ctx), "grad_cp": cp,
                    "op": given.op, "version": given.version, "optim": optim,
                }  # fmt: skip
                found = measured({**point, "path": str(path)})
                op = dispatch.choose(given.op, given.version).name
                meant = estimate(geometry, method, optim, cp, int(ctx), precision, op)
                rows.append({**point, "measured_mb": found, "estimated_mb": meant})
                where = f"{name} {precision} {method} {optim} {ctx} GRAD_CP={cp}"
                print(f"{where:44} {found:9.0f} {meant:9.0f} {100 * (meant / found - 1):+6.0f}%", flush=True)
            path.unlink()
    worst = max(rows, key=lambda row: abs(row["estimated_mb"] / row["measured_mb"] - 1))
    print(f"largest difference: {100 * (worst['estimated_mb'] / worst['measured_mb'] - 1):+.0f} %")
    if given.json:
        given.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
