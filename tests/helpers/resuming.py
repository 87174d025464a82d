"""Runs that are interrupted, and the comparison of two runs bit by bit."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

from helpers import tiny
from helpers.training import run
from rwkv_peft.checkpoint import pth, train_state
from rwkv_peft.checkpoint.lazy_tensors import LazyTensors
from rwkv_peft.distributed.sharding import lazy_tensor
from rwkv_peft.train.callbacks import loggers

TIMES = ("tokens_per_s", "targets_per_s", "seconds")


class Killed(BaseException):
    pass


def interrupted(monkeypatch, root, at: int, how: str, name: str = "again", **settings) -> None:
    """A run that gets as far as step `at`: then it is killed, or reported to stop."""
    write = loggers.LossFile.__call__

    def write_and_end(self, record):
        write(self, record)
        if record.step == at:
            if how == "killed":
                raise Killed
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(loggers.LossFile, "__call__", write_and_end)
        with pytest.raises(Killed if how == "killed" else SystemExit):
            run(root, name, **settings)


def same(root, one: str, other: str, records: tuple[list, list]) -> None:
    """Every step, every file that has weights, and the optimizer's memory."""
    for a, b in zip(*records, strict=True):
        assert {k: v for k, v in a.items() if k not in TIMES} == {k: v for k, v in b.items() if k not in TIMES}
    folders = root / "output" / one, root / "output" / other
    files = [sorted(p.name for p in folder.glob("*.pth")) for folder in folders]
    assert files[0] == files[1]
    for file in files[0]:
        first, second = (pth.load(folder / file) for folder in folders)
        assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    last = [train_state.read_manifest(folder / "state" / train_state.state_names(folder)[-1]) for folder in folders]
    assert last[0].step == last[1].step and last[0].facts["tokens"] == last[1].facts["tokens"]
    for part in ("weights", "optimizer", "random"):
        first, second = (one.tensors(part) for one in last)
        assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first), part
    assert (
        last[0].facts["optimizer"] == last[1].facts["optimizer"] and last[0].facts["scaler"] == last[1].facts["scaler"]
    )


BASE = {
    "EPOCH_COUNT": "3",
    "EPOCH_STEPS": "4",
    "lora_dropout": "0.1",
    "LR_SCHEDULE": "cos",
    "LR_FINAL": "1e-3",
    "WARMUP_STEPS": "3",
    "KEEP_LAST": "2",
}


def records(root, name: str) -> list[dict]:
    return [json.loads(line) for line in (root / "output" / name / "loss.jsonl").read_text().splitlines()]


def saved(folder, step: int, keep: int = 1):
    """A state of so many steps, with little in it."""
    parts = {part: LazyTensors({"a": lazy_tensor(torch.arange(64.0))}) for part in train_state.PARTS}
    return train_state.save_state(folder, parts, tiny.state_facts(step), keep)
