"""Memory and time of one training step on one long text: all at once, and with TRAIN_TYPE=infctx in both its ways.

usage: python bench/infctx.py [--lengths 4096,16384,65536] [--chunks 512,2048] [--modes none,detach,full]
                              [--layers 6] [--width 256] [--json FILE]

LoRA of rank 16 on a random RWKV-7 in float32, GRAD_CP=1, every token is a target, forward and backward without the
optimizer. Every point is two processes of its own, one thread, after a short step that loads what is loaded once:

    resident   the highest VmHWM of the step above the VmRSS before it, as a user would see it
    live       the same where malloc gives back every freed block at once (MALLOC_MMAP_THRESHOLD_): what tensors really hold
    states     full: what its kept states take by their sizes (one per chunk bound, and the generator's state), in float32

s/1k: processor seconds per 1,000 tokens, of rank 0 (so that other work on the machine counts little), and of
the second. Not run: TRAIN_TYPE=none above --most-at-once tokens.
"""

from __future__ import annotations

import sys

sys.path[0] = __file__.rpartition("bench")[
    0
]  # the kit, instead of this folder: tokenize.py here hides a module of Python's own

# ruff: noqa: E402
import argparse
import json
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

from rwkv_peft.adapters import inject
from rwkv_peft.model.arch import Geometry, state_shapes
from rwkv_peft.model.init_weights import initial_tensors, new_geometry
from rwkv_peft.model.rwkv import build
from rwkv_peft.ops import dispatch
from rwkv_peft.ops.loss import linear_cross_entropy
from rwkv_peft.train.infctx import MODES, chunked_loss

RANK = 16
RETURNS = str(1 << 16)  # bytes from which malloc maps a block of its own, and unmaps it when it is freed


def shape_of(given) -> Geometry:
    return new_geometry("x070", given.layers, given.width, given.vocab, 64)


def megabytes(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def point(given) -> dict:
    """One step in this process. given.point: words tokens, mode (none, detach or full) and chunk."""
    tokens, mode, chunk = int(given.point[0]), given.point[1], int(given.point[2])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = shape_of(given)
    ops = dispatch.choose("auto", shape.version)
    model = build(
        shape, initial_tensors(shape, 0), ops, recompute="blocks" if given.grad_cp else "nothing", keep=torch.float32
    )
    inject.inject_adapters(model, inject.AdapterConfig("lora", {"rank": RANK, "alpha": 2.0 * RANK}, ("att", "ffn")))
    ids = torch.randint(0, given.vocab, (1, tokens + 1))

    def step(count: int) -> float:
        positions, targets = torch.arange(count), ids[0, 1 : count + 1]
        if mode == "none":
            x, _ = model.features(ids[:, :count], cu_seqlens=(0, count))
            loss = linear_cross_entropy(x[0].index_select(0, positions), model.head_weight(), targets)
        else:
            loss = chunked_loss(model, ids[:, :count], (0, count), positions, targets, chunk, mode)
        (loss / count).backward()
        return float(loss.detach()) / count

    step(64)
    before = megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here
    begin = time.process_time()
    loss = step(tokens)
    return {"seconds": time.process_time() - begin, "peak": megabytes("VmHWM") - before, "loss": loss}


def in_a_process(given, tokens: int, mode: str, chunk: int, returns: bool) -> dict:
    sizes = [f"--{name}={getattr(given, name.replace('-', '_'))}" for name in ("layers", "width", "vocab", "grad-cp")]
    command = [sys.executable, __file__, *sizes, "--point", str(tokens), mode, str(chunk)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if returns:
        environment |= {"MALLOC_MMAP_THRESHOLD_": RETURNS, "MALLOC_TRIM_THRESHOLD_": RETURNS}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{tokens} tokens, {mode}, {chunk}: ended with {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def state_megabytes(given) -> float:
    """A state of one sequence, all layers, and the random generator's state."""
    values = sum(torch.Size(size).numel() for size in state_shapes(shape_of(given)).values())
    return (4 * values + torch.get_rng_state().nbytes) / 2**20


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=numbers, default=numbers("4096,16384,65536"))
    parser.add_argument("--chunks", type=numbers, default=numbers("512,2048"))
    parser.add_argument("--modes", default=",".join(("none", *MODES)))
    parser.add_argument("--most-at-once", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--grad-cp", type=int, choices=(0, 1), default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point:
        print(json.dumps(point(given)))
        return
    state = state_megabytes(given)
    print(
        f"{given.layers} layers, width {given.width}, vocabulary {given.vocab}, LoRA r={RANK}, float32, "
        f"GRAD_CP={given.grad_cp}; {platform.machine()}, 1 thread, torch {torch.__version__}; a state is {state:.2f} MB"
    )
    print(
        f"{'mode':<8} {'chunk':>6} {'tokens':>7} {'resident MB':>12} {'live MB':>8} {'states MB':>10} "
        f"{'s/1k':>6} {'live':>6} {'loss':>9}"
    )
    results = []
    modes = given.modes.split(",")
    ways = [(mode, chunk) for mode in modes for chunk in (given.chunks if mode != "none" else [0])]
    for mode, chunk in ways:
        for tokens in given.lengths:
            name = f"{mode:<8} {chunk or '-':>6} {tokens:7}"
            if mode == "none" and tokens > given.most_at_once:
                print(f"{name}      not run")
                continue
            plain, live = (in_a_process(given, tokens, mode, chunk, returns) for returns in (False, True))
            states = state * ((tokens - 1) // chunk) if mode == "full" else 0.0
            record = {"mode": mode, "chunk": chunk, "tokens": tokens, "resident": plain["peak"], "live": live["peak"]}
            record |= {"states": states, "loss": plain["loss"]}
            record |= {
                "seconds_per_1k": 1000 * plain["seconds"] / tokens,
                "live_seconds_per_1k": 1000 * live["seconds"] / tokens,
            }
            results.append(record)
            print(
                f"{name} {record['resident']:12.0f} {record['live']:8.0f} {states:10.1f} {record['seconds_per_1k']:6.2f} "
                f"{record['live_seconds_per_1k']:6.2f} {record['loss']:9.5f}",
                flush=True,
            )
    if given.json:
        given.json.write_text(json.dumps({**vars(given), "results": results}, default=str))


if __name__ == "__main__":
    main()
