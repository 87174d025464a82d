"""A run that is killed again and again beside one that went through: their losses, in one picture, and by how much they differ.

usage: python bench/resume.py [--kills 4] [--steps 400] [--method full] [--seed 0] [--picture FILE] [--json FILE]

A small random RWKV-7 learns data/sample.jsonl, in float32 on one thread. The second run gets a SIGKILL at random instants and is
started again each time, as a user would. Printed: where it was killed and where it went on, and the largest difference between
the two losses of a step; ratio is that of the time that both took, starts included.
"""

from __future__ import annotations

import sys

sys.path[0] = __file__.rpartition("bench")[0]  # the kit, instead of this folder

# ruff: noqa: E402
import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from bench.step import AS_RUN_SH, GEOMETRIES
from rwkv_peft.checkpoint import pth
from rwkv_peft.cli import train
from rwkv_peft.common import paths
from rwkv_peft.common.plotting import open_figure
from rwkv_peft.config.shell import Script, parse_assignments
from rwkv_peft.config.train import TrainConfig
from rwkv_peft.model.init_weights import initial_tensors
from rwkv_peft.preprocess.config import TokenizeConfig
from rwkv_peft.preprocess.tokenize import tokenize

EPOCHS = 4


def script(name: str) -> tuple[Path, dict[str, str]]:
    return paths.ROOT / name, parse_assignments(paths.ROOT / name)


def child(point: dict) -> None:
    path, values = script("training.sh")
    paths.ROOT, paths.OUTPUT = Path(point["folder"]), Path(point["folder"]) / "output"
    settings = {
        "MODEL_PATH": "base.pth", "DATA_PATH": "sample", "MODEL_VERSION": "auto", "FINETUNE_MODE": point["method"],
        "PRECISION": "fp32", "EPOCH_COUNT": str(EPOCHS), "EPOCH_STEPS": str(point["steps"] // EPOCHS), "SAVE_STEPS": "7",
        "MICRO_BSZ": "2", "CTX_LEN": "64", "LR_INIT": "3e-3", "LR_FINAL": "3e-4", "WARMUP_STEPS": "0", "VAL_DATA": "none",
        "RUN_NAME": point["name"],
    }  # fmt: skip
    train.command(Script(path, values | settings).read(TrainConfig), [])


def start(point: dict) -> subprocess.Popen:
    environment = AS_RUN_SH | os.environ | {"PYTHONPATH": sys.path[0], "OMP_NUM_THREADS": "1"}
    words = [sys.executable, __file__, "--point", json.dumps(point)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process: subprocess.Popen) -> None:
    said = process.communicate()[0]
    if process.returncode:
        sys.exit(f"A run ended with {process.returncode}:\n{said[-2000:]}")


def records(folder: Path) -> list[dict]:
    """The whole lines of a run's log."""
    text = folder.joinpath("loss.jsonl").read_text() if (folder / "loss.jsonl").is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def killed_run(point: dict, kills: int, rng: random.Random) -> list[tuple[int, int]]:
    """Returns for each kill: the step in whose course it came, and the one that the run went on with."""
    folder, resumed = Path(point["folder"]) / "output" / point["name"], []
    for at in sorted(rng.sample(range(2, point["steps"] - 2), kills)):
        process = start(point)
        while process.poll() is None and len(records(folder)) < at:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        states = folder / "state"
        whole = [int(p.name[5:]) for p in states.glob("step-*")] if states.is_dir() else []
        resumed.append((len(records(folder)), max(whole, default=0) + 1))
        print(f"killed in step {resumed[-1][0] + 1}, goes on with step {resumed[-1][1]}", flush=True)
    finish(start(point))
    return resumed


def draw(path: Path, whole: list[dict], again: list[dict], kills: list[tuple[int, int]]) -> None:
    with open_figure(9, 5.6, (3, 1)) as (drawing, (axes, below)):
        drawing.set_layout_engine("constrained")
        axes.plot(
            [r["step"] for r in whole], [r["loss"] for r in whole], color="#9ec5e8", linewidth=5, label="went through"
        )
        axes.plot(
            [r["step"] for r in again],
            [r["loss"] for r in again],
            color="#1f5f99",
            linewidth=1,
            label="killed, and went on",
        )
        for number, (at, on) in enumerate(kills):
            for panel in (axes, below):
                panel.axvspan(on - 0.5, at + 1, color="#c9503c", alpha=0.35, linewidth=0)
            axes.axvline(at + 1, color="#c9503c", linewidth=1, label="" if number else "killed; red: done again")
        axes.set_title("One run of ./training.sh killed by SIGKILL, one that was not")
        axes.set(ylabel="loss per trained token")
        axes.legend(loc="upper right")
        axes.grid(alpha=0.25)
        below.plot(
            [r["step"] for r in whole],
            [b["loss"] - a["loss"] for a, b in zip(whole, again, strict=True)],
            color="#333333",
        )
        below.set(xlabel="optimizer step", ylabel="difference")
        below.set_ylim(-1e-6, 1e-6)
        below.grid(alpha=0.25)
        drawing.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--method", default="full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point:
        return child(given.point)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("model", "data", "output"):
            (Path(folder) / name).mkdir()
        shutil.copy(paths.ROOT / "data" / "sample.jsonl", Path(folder) / "data")
        path, values = script("make_tokenize.sh")
        with contextlib.redirect_stdout(io.StringIO()):
            tokenize(Path(folder) / "data" / "sample.jsonl", Script(path, values).read(TokenizeConfig), 1, True)
        pth.save(Path(folder) / "model" / "base.pth", initial_tensors(GEOMETRIES["tiny"], given.seed))
        point = {"folder": folder, "steps": given.steps, "method": given.method}
        seconds = []
        for name in ("whole", "again"):
            began = time.monotonic()
            if name == "whole":
                finish(start({**point, "name": name}))
            else:
                kills = killed_run({**point, "name": name}, given.kills, random.Random(given.seed))
            seconds.append(time.monotonic() - began)
        whole, again = (records(Path(folder) / "output" / name) for name in ("whole", "again"))
        if given.picture:
            draw(given.picture, whole, again, kills)
    off = max(abs(a["loss"] - b["loss"]) for a, b in zip(whole, again, strict=True))
    print(f"{len(whole)} steps each, {given.kills} kills: the losses differ by {off:g} at most")
    print(f"ratio of the time that both took {seconds[1] / seconds[0]:.2f}")
    if given.json:
        given.json.write_text(
            json.dumps({"steps": len(whole), "kills": kills, "largest_difference": off, "seconds": seconds})
        )
    if off:
        sys.exit("They should be the same to the last bit.")


if __name__ == "__main__":
    main()
