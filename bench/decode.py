"""Generating text on a CPU, one token at a time, beside the rwkv package: same file, same threads, interleaved.

usage: python bench/decode.py [--geometry 0.1b|0.4b] [--precision fp32|bf16] [--tokens 64] [--threads N] [--rounds 5]
                              [--json FILE]

Each is a process of its own. Printed: tokens per second, the prompt's tokens per second (512 at once), the largest resident
set, and the ratios. The peer's strategy is "cpu fp32" or "cpu bf16".
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
import tempfile
import time
from pathlib import Path

import torch

from bench.step import GEOMETRIES, Child
from rwkv_peft.checkpoint import pth
from rwkv_peft.common.hardware import DTYPES
from rwkv_peft.model.init_weights import initial_tensors
from rwkv_peft.model.rwkv import build, for_generating
from rwkv_peft.ops import dispatch

PROMPT = 512


def ours(path: str, given):
    geometry = GEOMETRIES[given.geometry]
    dtype = DTYPES[given.precision]
    model = for_generating(build(geometry, pth.load(path), dispatch.choose("auto", geometry.version), dtype))

    def read(ids: list[int], state):
        with torch.inference_mode():
            x, state = model.features(torch.tensor([ids]), state)
            return model.head(x[:, -1])[0], state

    return read


def package(path: str, given):
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
    from rwkv.model import RWKV

    model = RWKV(model=path.removesuffix(".pth"), strategy=f"cpu {given.precision}")
    return lambda ids, state: model.forward(ids, state)


def serve(given) -> None:
    torch.set_num_threads(given.threads)
    name, path = given.child
    read = {"ours": ours, "rwkv package": package}[name](path, given)
    prompt = torch.randint(1, 65000, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    logits, state = read(prompt, None)
    read([1], state)
    print(json.dumps({"implementation": name, "sum": float(logits.double().abs().sum())}), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        _, state = read(prompt, None)
        middle = time.perf_counter()
        for token in prompt[: given.tokens]:
            _, state = read([token], state)
        end = time.perf_counter()
        peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
        print(json.dumps({"prompt": middle - begin, "decode": end - middle, "peak_mb": peak}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--geometry", choices=GEOMETRIES, default="0.1b")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return serve(given)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base.pth"
        tensors = initial_tensors(GEOMETRIES[given.geometry], 0)
        pth.save(path, {n: t.bfloat16() for n, t in tensors.items()})
        command = [sys.executable, __file__, *sys.argv[1:], "--child"]
        children = [Child([*command, name, str(path)], given.threads) for name in ("ours", "rwkv package")]
        for _ in range(given.rounds):
            for child in children:
                child.step()
        for child in children:
            child.end()
    print(
        f"{given.geometry} {given.precision}: {platform.machine()}, {given.threads} threads, torch {torch.__version__}, "
        f"{given.rounds} interleaved rounds of {given.tokens} tokens"
    )
    rates = []
    for child in children:
        decode = [given.tokens / step["decode"] for step in child.steps]
        rates.append(statistics.median(decode))
        prompt = PROMPT / statistics.median(step["prompt"] for step in child.steps)
        print(
            f"  {child.about['implementation']:<13} {rates[-1]:7.1f} tokens/s ({min(decode):.1f} to {max(decode):.1f}), "
            f"prompt {prompt:7.0f} tokens/s, {child.steps[-1]['peak_mb']:.0f} MB"
        )
    print(f"ratio: ours generates {rates[0] / rates[1]:.2f} times as fast as the rwkv package")
    if given.json:
        given.json.write_text(json.dumps([{**child.about, "steps": child.steps} for child in children]))


if __name__ == "__main__":
    main()
