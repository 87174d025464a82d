"""What it costs to look whether the files of a run are still what they were (rwkv_peft/common/file_watch.py).

usage: python bench/file_watch.py [--geometry tiny|0.1b|...] [--ctx 512] [--precision fp32] [--steps 40] [--save-steps 10]
                                  [--files 0] [--threads N] [--json FILE]

One LoRA run on a random file of that size, in this process. Printed: the processor's time of all looks of the thread, and all the
time of those before and after each save, for which the training waits, in per cent of the time of the steps.
--files: so many further small files to look at, as if a folder were streamed.
"""

from __future__ import annotations

import sys

sys.path[0] = __file__.rpartition("bench")[0]  # the kit, instead of this folder

# ruff: noqa: E402
import argparse
import json
import platform
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import torch

from bench.memory import SCRIPT, write_rows
from bench.step import GEOMETRIES
from rwkv_peft.checkpoint import pth
from rwkv_peft.cli import train
from rwkv_peft.common import paths as project
from rwkv_peft.common.file_watch import FileWatch
from rwkv_peft.config.shell import Script, parse_assignments
from rwkv_peft.config.train import TrainConfig
from rwkv_peft.model.init_weights import initial_tensors, new_geometry

MOST = 0.5  # per cent


def measured(folder: Path, given) -> dict:
    """Seconds of all steps, of looks by the thread, and of looks for saves; how many there were."""
    costs = {"thread": 0.0, "thread_looks": 0, "saves": 0.0, "save_looks": 0}
    look, add = FileWatch.look, FileWatch.add

    def timed(self, every: bool = True):
        main = threading.current_thread() is threading.main_thread()
        clock, kind = (time.perf_counter, "save") if main else (time.thread_time, "thread")
        began = clock()
        try:
            return look(self, every)
        finally:
            costs["saves" if main else "thread"] += clock() - began
            costs[f"{kind}_looks"] += 1

    def more(self, paths, stamps=None):
        add(self, [*paths, *sorted((folder / "many").iterdir())], stamps)

    project.ROOT, project.OUTPUT = folder, folder / "output"
    settings = {
        "MODEL_PATH": "base.pth", "DATA_PATH": "rows", "CTX_LEN": str(given.ctx), "LOSS_MASK": "pad", "MICRO_BSZ": "1",
        "MINI_BSZ": "1", "EPOCH_STEPS": str(given.steps), "EPOCH_COUNT": "1", "WARMUP_STEPS": "0", "RUN_NAME": "run",
        "PRECISION": given.precision, "FINETUNE_MODE": "lora", "MODEL_VERSION": "auto", "VAL_DATA": "none",
        "SAVE_STEPS": str(given.save_steps), "VOCABULARY": "own",  # (random ids)
    }  # fmt: skip
    with mock.patch.multiple(FileWatch, look=timed, add=more):
        train.command(Script(SCRIPT, parse_assignments(SCRIPT) | settings).read(TrainConfig), ["--new"])
    records = [json.loads(line) for line in (folder / "output/run/loss.jsonl").read_text().splitlines()]
    return costs | {"steps": records[-1]["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--geometry", default="0.1b")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-steps", type=int, default=10)
    parser.add_argument("--files", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("model", "data", "output", "many"):
            (folder / part).mkdir()
        for number in range(given.files):
            (folder / "many" / f"{number}.jsonl").write_text("{}\n" * 2000)
        write_rows(folder / "data" / "rows", given.steps * given.ctx)
        size = GEOMETRIES[given.geometry]
        geometry = new_geometry("x070", size.n_layer, size.n_embd, size.vocab_size)
        pth.save(folder / "model" / "base.pth", {n: t.bfloat16() for n, t in initial_tensors(geometry, 0).items()})
        costs = measured(folder, given)
    share = {kind: 100 * costs[kind] / costs["steps"] for kind in ("thread", "saves")}
    total = sum(share.values())
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"steps of {costs['steps']:.1f} s in all, a save every {given.save_steps} of {given.steps}")
    print(f"thread    {costs['thread_looks']} looks, {share['thread']:.4f} %")
    print(f"saves     {costs['save_looks']} looks, {share['saves']:.4f} %")
    print(f"share     {total:.4f} % of a step (at most {MOST} % is wanted)")
    if given.json:
        given.json.write_text(json.dumps(costs | {"geometry": given.geometry, "per_cent": total}))


if __name__ == "__main__":
    main()
