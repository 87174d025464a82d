"""Merging a LoRA and exporting the result, beside copying a file of that size: time and memory, interleaved in one run.

usage: python bench/merge.py [--geometry 0.4b] [--rank 64] [--rounds 3] [--dir FOLDER] [--json FILE]

Makes a bfloat16 RWKV-7 of that size and a LoRA on att, ffn and ln in a folder of its own (3.2 times the model's size, removed
at the end), then in turn: `cp` of the base; `cp` and an fsync of the copy, since a merge ends with one as well; ./merge.sh;
./merge.sh --export safetensors of what came out. Times are whole processes, imports and all checks included. Memory is the
largest resident set of the process, mapped files included, less that of one which does `import torch` and nothing else.
Where others use the machine, look at the processor's seconds: a copy waits for the disk, a merge for the processor.
"""

from __future__ import annotations

import sys

sys.path[0] = __file__.rpartition("bench")[0]  # the kit, instead of this folder

# ruff: noqa: E402
import argparse
import dataclasses
import json
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from rwkv_peft.checkpoint import pth
from rwkv_peft.common import hashing
from rwkv_peft.common.atomic_io import write_json
from rwkv_peft.model import arch
from rwkv_peft.model.arch import Geometry
from rwkv_peft.model.init_weights import new_geometry

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("att", "ffn", "ln")
RANKS = {"rank_w": 96, "rank_a": 96, "rank_v": 64, "rank_g": 320}
GEOMETRIES = {
    "0.1b": new_geometry("x070", 12, 768, 65536),
    "0.4b": new_geometry("x070", 24, 1024, 65536),
    "2.9b": dataclasses.replace(new_geometry("x070", 32, 2560, 65536), **RANKS),
}
SYNC = "import os, sys; os.fsync(os.open(sys.argv[1], os.O_RDONLY))"
# ./merge.sh in a project folder of its own; the words behind it are given
MERGE = """
import sys
sys.path[0] = sys.argv[1]
from pathlib import Path
from rwkv_peft.merge import write  # whatever looks for the kit's own files does so before the folder changes
from rwkv_peft.cli.merge import MergeConfig, command
from rwkv_peft.common import paths
paths.ROOT, paths.OUTPUT = Path(sys.argv[2]), Path(sys.argv[2]) / "output"
command(MergeConfig("", "", "original", "", "", ""), sys.argv[3:])
"""
# the largest resident set so far: what wait4 says of a child would begin with its parent's
PEAK = """
from pathlib import Path
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def make_base(path: Path, geometry: Geometry) -> None:
    """torch.save of tensors that are mapped from a file of noise: nothing of them has to be in memory at once."""
    shapes = arch.shapes(geometry)
    noise = path.with_name("noise")
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    with open(noise, "wb") as file:
        for begin in range(0, max(sizes.values()), 1 << 22):
            some = torch.randn(min(1 << 22, max(sizes.values()) - begin)) * 0.02
            file.write(some.bfloat16().view(torch.uint8).numpy().data)
    tensors = {
        name: torch.from_file(str(noise), shared=False, size=sizes[name], dtype=torch.bfloat16).view(shape)
        for name, shape in shapes.items()
    }
    torch.save(tensors, path)
    noise.unlink()


def make_run(folder: Path, base: Path, geometry: Geometry, rank: int) -> None:
    shapes, tensors = arch.shapes(geometry), {}
    for layer in arch.linear_layers(geometry, PARTS):
        outputs, inputs = shapes[f"{layer}.weight"]
        tensors[f"{layer}.lora_A"] = torch.randn(rank, inputs) * 0.02
        tensors[f"{layer}.lora_B"] = torch.randn(outputs, rank) * 0.02
    tensors |= {name: torch.randn(shapes[name]) for name in arch.whole_tensors(geometry, PARTS)}
    folder.mkdir(parents=True)
    time.sleep(hashing.SETTLED)
    content = hashing.fingerprint(base)
    pth.save(folder / "rwkv-0.pth", tensors)
    sidecar = {
        "method": "lora", "rank": rank, "alpha": float(rank), "base": base.name,
        "base_sha256": content["sha256"], "base_mark": content["mark"],
        "geometry": geometry.as_dict(), "epoch": 0, "step": 1,
    }  # fmt: skip
    write_json(folder / "rwkv-0.json", sidecar)


def measured(*command: str | Path) -> tuple[float, float, float]:
    """Seconds and processor seconds of a process, and the MB that it names last; its words are shown if it fails."""
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if done.returncode:
        sys.exit(f"{command[0]} ended with {done.returncode}:\n{done.stdout}")
    return seconds, worked, int(done.stdout.split()[-1]) / 1024 if done.stdout else 0.0


def turn(folder: Path, base: Path) -> dict[str, tuple[float, float, float]]:
    """One round. Whatever is measured finds the base in the page cache, and its target's name free."""
    copy, merged = folder / "copy.pth", folder / "merge" / "base-bench-0.pth"
    exported = merged.with_suffix(".st")
    figures = {}
    figures["cp"] = measured("cp", base, copy)
    measured(sys.executable, "-c", SYNC, copy)
    copy.unlink()
    begin = time.perf_counter()
    _, worked, _ = measured("cp", base, copy)
    with open(copy, "rb") as file:
        os.fsync(file.fileno())
    figures["cp, fsync"] = time.perf_counter() - begin, worked, 0.0
    copy.unlink()
    door = sys.executable, "-c", MERGE + PEAK, ROOT, folder
    figures["merge"] = measured(*door, "output/bench/rwkv-0.pth")
    figures["export .st"] = measured(*door, "--export", "safetensors", merged)
    for file in (merged, merged.with_suffix(".json"), exported):
        file.unlink()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--geometry", choices=GEOMETRIES, default="0.4b")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where to make the files; a temporary folder in output/ if left out")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    parent = given.dir or ROOT / "output"
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-merge-", dir=parent)).resolve()
    try:
        base = folder / "model" / "base.pth"
        for name in ("model", "merge"):
            (folder / name).mkdir()
        make_base(base, GEOMETRIES[given.geometry])
        make_run(folder / "output" / "bench", base, GEOMETRIES[given.geometry], given.rank)
        size = base.stat().st_size
        *_, bare = measured(sys.executable, "-c", "import torch" + PEAK)
        rounds = [turn(folder, base) for _ in range(given.rounds)]
    finally:
        shutil.rmtree(folder)
    print(
        f"{given.geometry}: {size / 1e9:.2f} GB of bfloat16, LoRA of rank {given.rank} on {', '.join(PARTS)}; "
        f"{os.cpu_count()} cores, torch {torch.__version__}, {given.rounds} interleaved rounds"
    )
    print(f"a process that imports torch and does nothing takes {bare:.0f} MB")
    print(
        f"{'':12} {'seconds (from to)':>24} {'x cp with fsync':>16} {'x cp':>6} {'processor s':>12} {'MB above torch':>15}"
    )
    report = {
        name: {
            "seconds": [r[name][0] for r in rounds],
            "processor": statistics.median(r[name][1] for r in rounds),
            "mb": max(r[name][2] for r in rounds),
        }
        for name in rounds[0]
    }
    plain, synced = (statistics.median(report[name]["seconds"]) for name in ("cp", "cp, fsync"))
    for name, row in report.items():
        middle = statistics.median(row["seconds"])
        spread = f"{middle:.2f} ({min(row['seconds']):.2f} to {max(row['seconds']):.2f})"
        memory = f"{row['mb'] - bare:15.0f}" if row["mb"] > bare else ""
        print(f"{name:12} {spread:>24} {middle / synced:16.2f} {middle / plain:6.2f} {row['processor']:12.1f} {memory}")
    if given.json:
        given.json.write_text(json.dumps({**vars(given), "bytes": size, "bare_mb": bare, "found": report}, default=str))


if __name__ == "__main__":
    main()
