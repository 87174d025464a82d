"""--find-lr and --find-batch: what is tried is what would run, what is advised follows from it, and nothing of a run is left."""

import contextlib
import json
import math

import pytest
import torch
from helpers import tiny
from helpers.training import config, run
from hypothesis import given
from hypothesis import strategies as st

from rwkv_peft.cli import train
from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.data.dataset import largest_batch
from rwkv_peft.distributed import launch
from rwkv_peft.train import lr_finder
from rwkv_peft.train.callbacks import oom_check


def curve(at: float, depth: float = 0.5):
    """Losses of rising rates: 3, down by `depth` until `at`, and up steeply behind it."""
    tried = lr_finder.rising_rates(lr_finder.LOWEST, lr_finder.HIGHEST)
    losses = []
    for rate in tried:
        losses.append(3 - depth / (1 + (at / 3 / rate) ** 2) + 2 * max(0.0, math.log10(rate / at)) ** 2)
        if lr_finder.has_diverged(losses):
            break
    return tried[: len(losses)], losses


@pytest.mark.parametrize("at", [1e-4, 1e-3, 1e-2])
def test_a_tenth_of_the_rate_with_the_lowest_loss_is_advised(at):
    tried, losses = curve(at)
    result = lr_finder.advise(tried, losses)
    assert at / 3 < result.lowest < at * 3 and result.take == float(f"{result.lowest / 10:.0e}") and not result.stable
    assert len(tried) < lr_finder.STEPS  # and no time is lost behind it


def test_where_nothing_is_learnt_nothing_is_advised_and_nan_ends_it():
    tried, losses = curve(1e-3, depth=0.0)
    assert lr_finder.advise(tried, losses).take is None
    assert lr_finder.has_diverged([3.0, 3.0, math.nan]) and lr_finder.has_diverged([3.0, math.inf])


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_what_is_tried_is_trained_as_a_run_would(ready, strategy):
    tiny.save_model(ready / "model" / "half.pth", dtype=torch.bfloat16)
    settings = {"FINETUNE_MODE": "full", "MODEL_PATH": "half.pth", "STRATEGY": strategy}
    with contextlib.ExitStack() as cleanup:
        tried = lr_finder.make_trial(config(**settings), launch.ProcessInfo(0, 0, 0, 1), cleanup)
        tried.step([largest_batch(8, 1)], 1e-4)
    assert {p.dtype for p in tried.module.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.pictures
def test_find_lr_takes_the_first_steps_of_a_run_and_leaves_no_run(ready, capsys, monkeypatch):
    settings = {"MICRO_BSZ": "1", "MINI_BSZ": "2", "EPOCH_STEPS": "4"}
    _, records = run(ready, "run", **settings)
    before = sorted(p.name for p in (ready / "output").iterdir())
    monkeypatch.setattr(lr_finder, "STEPS", 30)
    train.command(config(RUN_NAME="run2", **settings), ["--find-lr"])
    said = capsys.readouterr().out
    [curve_file] = (ready / "output").glob("find-lr-*.jsonl")
    tried = [json.loads(line) for line in curve_file.read_text().splitlines()]
    assert tried[0]["loss"] == pytest.approx(records[0]["loss"], rel=1e-5)
    assert "Begin with LR_INIT=" in said and "was" not in said.split("Begin with")[1].split(".")[0]
    left = {p.name for p in (ready / "output").iterdir()} - set(before)
    assert left == {curve_file.name, curve_file.with_suffix(".png").name}


@pytest.mark.smoke(1)
@pytest.mark.parametrize(
    "settings",
    [
        {"FINETUNE_MODE": "state_tuning"}, {"FINETUNE_MODE": "lisa", "lisa_r": "1"}, {"PRECISION": "fp16"},
        {"TRAIN_TYPE": "infctx", "CHUNK_CTX": "16"}, {"QUANT": "nf4", "OPTIM": "adafactor"},
    ],
)  # fmt: skip
def test_find_lr_goes_with(ready, capsys, monkeypatch, settings):
    monkeypatch.setattr(lr_finder, "STEPS", 6)
    train.command(config(**settings), ["--find-lr"])
    assert "rates from" in capsys.readouterr().out


def test_several_processes_are_refused(ready):
    with pytest.raises(SettingErrors, match="GPU_COUNT: must be 1 here; give MINI_BSZ the rest"):
        train.command(config(GPU_COUNT="2"), ["--find-lr"])


@given(largest=st.integers(0, 300), most=st.integers(1, 256))
def test_the_largest_that_fits_is_detected(largest, most):
    asked = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= largest

    assert lr_finder.find_largest(fits, most) == min(largest, most)
    assert len(asked) <= 2 * math.log2(most) + 2 and max(asked) <= most


def test_find_batch_tries_the_heaviest_batches_until_the_gpu_is_full(ready, capsys, monkeypatch):
    """Not run on a GPU: what a GPU would say is said in its place."""
    with pytest.raises(UserError, match="there is none here"):
        train.command(config(), ["--find-batch"])
    step = lr_finder.Trial.step

    def full(self, batches, rate):
        if batches[0].tokens > 5 * 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, batches, rate)

    trial = lr_finder.make_trial

    def on_a_gpu(*given):
        with monkeypatch.context() as patched:
            patched.setattr(lr_finder.hardware, "device_kind", lambda: "cpu")
            return trial(*given)

    monkeypatch.setattr(lr_finder.hardware, "device_kind", lambda: "cuda")
    monkeypatch.setattr(lr_finder, "make_trial", on_a_gpu)
    monkeypatch.setattr(lr_finder.Trial, "step", full)
    train.command(config(), ["--find-batch"])
    assert "The largest that fits is MICRO_BSZ=5." in capsys.readouterr().out


def test_the_heaviest_batch_trains_everything():
    batch = largest_batch(20, 3)
    assert batch.ids.shape == (1, 60) and batch.cu_seqlens == (0, 20, 40, 60) and batch.tokens == 60
    assert len(batch.targets) == 60 == batch.step_targets


def test_the_heaviest_batch_goes_through_behind_the_first_step_and_changes_nothing(ready, monkeypatch):
    settings = {"lora_dropout": "0.1", "MINI_BSZ": "2", "EPOCH_STEPS": "6", "EPOCH_COUNT": "2", "MICRO_BSZ": "1"}
    plain, records = run(ready, "plain", **settings)
    seen, summed = [], train_module().summed_loss

    def watched(self, batch):
        seen.append(batch.tokens)
        return summed(self, batch)

    monkeypatch.setattr(train_module(), "summed_loss", watched)
    monkeypatch.setattr(oom_check, "DEVICES", ("cpu",))
    same, again = run(ready, "same", **settings)
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    assert [r["loss"] for r in records] == [r["loss"] for r in again]
    assert seen[2] >= max(seen) and len(seen) == 12 + 1  # once, behind the two micro-batches of the first step


def train_module():
    from rwkv_peft.train.module import TrainingModule

    return TrainingModule
