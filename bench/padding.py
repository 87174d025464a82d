"""What filling up costs: useful tokens per second of DATALOAD=pad, bucket and pack, in real training steps.

usage: python bench/padding.py [--modes pad,bucket,pack] [--sets sample,long-tail] [--rows 400] [--median 120] [--sigma 1.0]
                               [--ctx 1024] [--mask qa] [--layers 4] [--width 256] [--rank 16] [--precision fp32]
                               [--grad-cp 0] [--threads N] [--rounds 3] [--json FILE]

Two sets of chats, tokenized by make_tokenize.sh's own code and planned by training.sh's, everything on auto but the mode:

    sample      data/sample.jsonl: short rows of like length, CTX_LEN=auto
    long-tail   --rows chats of log-normal lengths, half of them under --median tokens, cut at CTX_LEN=--ctx

A round is an epoch of every mode in turn, in an order of its own, with LoRA on one random RWKV-7 of this size (vocabulary
65536). Micro-batches are made within the time. Medians of the rounds:

    supervised   tokens that are learnt, per second
    real         all tokens of rows, per second: what is read as well as what is learnt
    filling      share of the inputs that are neither

Every mode trains the same tokens in an epoch, so the ratio of both is the same; it is of the medians. The head reads the
supervised tokens only. A small model has most of its work there, and a large one in the layers, which fillings go through
as well: with more layers the ratios rise.
"""

from __future__ import annotations

import sys

sys.path[0] = __file__.rpartition("bench")[
    0
]  # the kit, instead of this folder: tokenize.py here hides a module of Python's

# ruff: noqa: E402
import argparse
import contextlib
import io
import json
import platform
import random
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from bench.step import make_module
from rwkv_peft.adapters import inject
from rwkv_peft.common.hardware import DTYPES
from rwkv_peft.config.shell import Script, parse_assignments
from rwkv_peft.config.train import TrainConfig
from rwkv_peft.data.binidx import Reader
from rwkv_peft.model.init_weights import initial_tensors, new_geometry
from rwkv_peft.model.rwkv import build
from rwkv_peft.ops import dispatch
from rwkv_peft.preprocess.config import TokenizeConfig
from rwkv_peft.preprocess.tokenize import tokenize
from rwkv_peft.train.data_setup import TrainData, plan_run
from rwkv_peft.train.model_setup import RECOMPUTE

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 65536
PARTS = ("att", "ffn")
MODES = ("pad", "bucket", "pack", "only")
QUESTION = 0.25  # of a synthetic row
WORD = 1.2  # tokens of a word of data/sample.jsonl
LEAST = 8  # words of a synthetic row


def long_tail(path: Path, rows: int, median: float, sigma: float) -> None:
    """Chats of the words of data/sample.jsonl, as many as a log-normal distribution of tokens asks for."""
    rng = random.Random(0)
    words = (ROOT / "data" / "sample.jsonl").read_text(encoding="utf-8").replace('"', " ").split()
    words = [word for word in words if word.isascii() and word.isalpha()]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(rows):
            many = max(LEAST, round(rng.lognormvariate(np.log(median), sigma) / WORD))
            asked = max(2, round(QUESTION * many))
            row = {
                "prompt": " ".join(rng.choices(words, k=asked)),
                "completion": " ".join(rng.choices(words, k=many - asked)),
            }
            file.write(json.dumps(row) + "\n")


def tokenized(source: Path) -> Path:
    """The prefix of what make_tokenize.sh makes of a file."""
    script = ROOT / "make_tokenize.sh"
    values = parse_assignments(script) | {"WORKERS": "1"}
    with contextlib.redirect_stdout(io.StringIO()):
        tokenize(source, Script(script, values).read(TokenizeConfig), 1, True)
    return source.with_suffix("")


def planned(prefix: Path, mode: str, ctx_len: str, mask: str) -> TrainData:
    """What training.sh makes of the data."""
    script = ROOT / "training.sh"
    values = parse_assignments(script) | {"DATALOAD": mode, "CTX_LEN": ctx_len, "LOSS_MASK": mask}
    return plan_run(Script(script, values).read(TrainConfig), [(prefix, 1)], VOCAB, print)


class Trainer:
    """One random model with its LoRA and optimizer, which all modes train in turn."""

    def __init__(self, given):
        geometry, dtype = new_geometry("x070", given.layers, given.width, VOCAB), DTYPES[given.precision]
        ops = dispatch.choose("auto", geometry.version)
        self.op = ops.name
        model = build(geometry, initial_tensors(geometry, 0), ops, dtype, RECOMPUTE[given.grad_cp])
        inject.inject_adapters(
            model, inject.AdapterConfig("lora", {"rank": given.rank, "alpha": 2.0 * given.rank}, PARTS), dtype
        )
        self.module = make_module(model)
        self.optimizer = self.module.configure_optimizers()["optimizer"]

    def step(self, batch) -> None:
        loss = self.module.summed_loss(batch) / max(batch.step_targets, 1)
        loss.backward()
        self.module.configure_gradient_clipping(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass
class Measurement:
    """Of one mode: per round seconds, inputs, real tokens, supervised tokens; micro-batches of the last."""

    seconds: list[float] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    real: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    steps: int = 0

    def epoch(self, trainer: Trainer, batches, number: int) -> None:
        inputs = real = supervised = 0
        begin = time.perf_counter()
        for i in range(number * len(batches), (number + 1) * len(batches)):
            batch = batches[i]
            trainer.step(batch)
            inputs += batch.ids.numel()
            real += batch.tokens
            supervised += len(batch.targets)
        self.seconds.append(time.perf_counter() - begin)
        self.inputs.append(inputs)
        self.real.append(real)
        self.supervised.append(supervised)
        self.steps = len(batches)

    def per_second(self, what: list[int]) -> float:
        return statistics.median(n / s for n, s in zip(what, self.seconds, strict=True))

    def figures(self) -> dict:
        rates = [n / s for n, s in zip(self.supervised, self.seconds, strict=True)]
        return {
            "supervised_tokens_per_s": self.per_second(self.supervised),
            "real_tokens_per_s": self.per_second(self.real),
            "share_of_filling": 1 - sum(self.real) / sum(self.inputs),
            "slowest": min(rates),
            "fastest": max(rates),
            "micro_batches": self.steps,
            "inputs": statistics.median(self.inputs),
            "seconds": self.seconds,
        }


def compare(name: str, prefix: Path, ctx_len: str, modes: list[str], trainer: Trainer, given) -> list[dict]:
    sizes = np.asarray(Reader(prefix).sizes)
    batches = {mode: planned(prefix, mode, ctx_len, given.mask).batches(0) for mode in modes}
    measurements = {mode: Measurement() for mode in modes}
    for made in batches.values():
        for i in range(min(2, len(made))):  # the warm-up
            trainer.step(made[i])
    for number in range(given.rounds):
        for mode in modes:
            measurements[mode].epoch(trainer, batches[mode], number)
    if len({of_mode.supervised[0] for of_mode in measurements.values()}) > 1:
        print("WARNING: the modes did not train the same tokens")
    half, most = np.percentile(sizes, [50, 99])
    print(f"{name}: {len(sizes)} rows, CTX_LEN={ctx_len}; half of them up to {half:.0f} tokens, "
          f"99 % up to {most:.0f}, the longest {sizes.max()}")  # fmt: skip
    rows = []
    for mode in modes:
        row = {"set": name, "mode": mode, **measurements[mode].figures()}
        rows.append(row)
        print(
            f"  {mode:<7} {row['supervised_tokens_per_s']:8.1f} supervised tokens/s ({row['slowest']:.1f} to "
            f"{row['fastest']:.1f})  {row['real_tokens_per_s']:8.1f} real tokens/s  {100 * row['share_of_filling']:5.1f} % "
            f"filling  {row['micro_batches']:4} micro-batches of {row['inputs'] / row['micro_batches']:.0f} inputs"
        )
    for row in rows[1:]:
        row["times_as_fast"] = row["supervised_tokens_per_s"] / rows[0]["supervised_tokens_per_s"]
        print(f"ratio: {row['mode']} is {row['times_as_fast']:.2f} times as fast as {rows[0]['mode']}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--modes", default="pad,bucket,pack", help=f"some of {', '.join(MODES)}; ratios are to the first"
    )
    parser.add_argument("--sets", default="sample,long-tail")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--median", type=float, default=120)
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--mask", choices=("none", "pad", "qa", "last"), default="qa")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--grad-cp", choices=RECOMPUTE, default="0")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    modes, sets = given.modes.split(","), given.sets.split(",")
    if set(modes) - set(MODES) or set(sets) - {"sample", "long-tail"}:
        parser.error(f"--modes takes some of {', '.join(MODES)}; --sets takes sample and long-tail")
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    trainer, rows = Trainer(given), []
    print(
        f"RWKV-7 of {given.layers} layers x {given.width}, LoRA r={given.rank}, {given.precision}, LOSS_MASK={given.mask}, "
        f"OP={trainer.op}; {platform.machine()}, {given.threads} threads, torch {torch.__version__}, "
        f"{given.rounds} interleaved rounds"
    )
    with tempfile.TemporaryDirectory(prefix="padding-") as folder:
        for name in sets:
            source = Path(folder) / f"{name}.jsonl"
            if name == "sample":
                shutil.copy(ROOT / "data" / "sample.jsonl", source)
            else:
                long_tail(source, given.rows, given.median, given.sigma)
            ctx_len = "auto" if name == "sample" else str(given.ctx)
            rows += compare(name, tokenized(source), ctx_len, modes, trainer, given)
    if given.json:
        settings = {k: v for k, v in vars(given).items() if k not in ("json", "modes", "sets")}
        with open(given.json, "a") as file:
            file.writelines(json.dumps(row | settings) + "\n" for row in rows)


if __name__ == "__main__":
    main()
