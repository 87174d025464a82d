"""What watching a training costs: loss.jsonl, loss.png, wandb (offline), tensorboard and validation, beside a training without.

usage: python bench/watching.py [--geometry 0.1b] [--ctx 512] [--precision auto] [--steps 60] [--rounds 3] [--json FILE]

Two epochs of LoRA on a random file of that size, with a twentieth as many rows held out, which are looked at before training and
after each epoch, as VALID_PERCENT=5 has it. Each run is a process of its own; both kinds take turns. Their time is that from
the first step's beginning to the end of the run, trackers closed. Printed: seconds of each pair, and the median of their ratios.
"""

from __future__ import annotations

import sys

sys.path[0] = __file__.rpartition("bench")[0]  # the kit, instead of this folder

# ruff: noqa: E402
import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import torch

from bench.memory import SCRIPT, write_rows
from bench.step import AS_RUN_SH, GEOMETRIES
from rwkv_peft.checkpoint import pth
from rwkv_peft.cli import train
from rwkv_peft.common import paths
from rwkv_peft.config.shell import Script, parse_assignments
from rwkv_peft.config.train import TrainConfig
from rwkv_peft.model.init_weights import initial_tensors, new_geometry

MOST = 1.03  # what watching may cost


def child(point: dict) -> None:
    """A run in this process; prints how many seconds it took."""
    from rwkv_peft.train import report
    from rwkv_peft.train.callbacks import checkpoint, loggers

    paths.ROOT, paths.OUTPUT = Path(point["folder"]), Path(point["folder"]) / "output"
    settings = {
        "MODEL_PATH": "base.pth", "DATA_PATH": "rows", "CTX_LEN": str(point["ctx"]), "LOSS_MASK": "pad", "MICRO_BSZ": "1",
        "MINI_BSZ": "1", "EPOCH_STEPS": str(point["steps"]), "EPOCH_COUNT": "2", "WARMUP_STEPS": "0", "RUN_NAME": "",
        "PRECISION": point["precision"], "FINETUNE_MODE": "lora", "MODEL_VERSION": "auto", "VAL_DATA": "none",
        "VOCABULARY": "own",  # (random ids)
    }  # fmt: skip
    if point["watched"]:
        has_board = importlib.util.find_spec("tensorboard") is not None
        settings |= {"VAL_DATA": "held", "WANDB": "bench", "TENSORBOARD": str(int(has_board))}
    spent = []
    with mock.patch.object(report, "report_result", lambda *arguments: spent.append(arguments[-1])):
        nothing = mock.patch.multiple(checkpoint, draw_loss=lambda folder: None)
        silent = mock.patch.object(loggers.LossFile, "__call__", lambda self, record: None)
        if not point["watched"]:
            nothing.start()
            silent.start()
        train.command(Script(SCRIPT, parse_assignments(SCRIPT) | settings).read(TrainConfig), ["--new"])
    print("took", spent[0])


def run(point: dict) -> float:
    environment = AS_RUN_SH | os.environ | {"PYTHONPATH": sys.path[0], "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    command = [sys.executable, __file__, "--point", json.dumps(point)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{point} ended with {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
    return float(done.stdout.split("took")[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--geometry", default="0.1b")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--steps", type=int, default=60, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point:
        return child(given.point)
    board = "" if importlib.util.find_spec("tensorboard") else " (tensorboard is not installed: without it)"
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}{board}")
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("model", "data", "output"):
            (Path(folder) / name).mkdir()
        tokens = given.steps * given.ctx
        write_rows(Path(folder) / "data" / "rows", tokens)
        write_rows(Path(folder) / "data" / "held", tokens // 20)
        size = GEOMETRIES[given.geometry]
        geometry = new_geometry("x070", size.n_layer, size.n_embd, size.vocab_size)
        base = {n: t.bfloat16() for n, t in initial_tensors(geometry, 0).items()}
        pth.save(Path(folder) / "model" / "base.pth", base)
        point = {"folder": folder, "ctx": given.ctx, "steps": given.steps, "precision": given.precision}
        for number in range(given.rounds):
            kinds = (True, False) if number % 2 else (False, True)
            seconds = {watched: run({**point, "watched": watched}) for watched in kinds}
            pairs.append((seconds[False], seconds[True]))
            without, watched = pairs[-1]
            print(f"without {without:7.2f} s   watched {watched:7.2f} s   ratio {watched / without:.3f}", flush=True)
    ratio = statistics.median(watched / without for without, watched in pairs)
    print(f"median ratio {ratio:.3f} (at most {MOST} is wanted)")
    if given.json:
        given.json.write_text(json.dumps({"geometry": given.geometry, "pairs": pairs, "ratio": ratio}))


if __name__ == "__main__":
    main()
