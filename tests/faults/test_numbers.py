"""F13: at a random step a loss, a gradient or a weight is no number."""

import json
import random

import pytest
import torch
from helpers.kit import EVERYTHING, few
from helpers.training import run

from rwkv_peft.checkpoint import pth, train_state
from rwkv_peft.common.errors import UserError
from rwkv_peft.train.module import TrainingModule

STEPS = 8
COMMON = {
    "MINI_BSZ": "1", "EPOCH_STEPS": str(STEPS), "LR_INIT": "1e-3", "LR_FINAL": "1e-3", "SAVE_STEPS": "1", "KEEP_LAST": "1",
}  # fmt: skip


def broken(monkeypatch, what: str, at: int, bad: float) -> None:
    """In optimizer step `at`, from 1."""
    step, clip = TrainingModule.training_step, TrainingModule.configure_gradient_clipping
    calls = iter(range(1, 1000))

    def training_step(self, batch, index):
        self.number = next(calls)
        loss = step(self, batch, index)
        if what == "loss" and self.number == at:
            self.shares[-1] = self.shares[-1] * bad
            loss = loss * bad
        return loss

    def clipping(self, optimizer, **more):
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if what == "gradient" and self.number == at:
            parameters[0].grad.view(-1)[0] = bad
        clip(self, optimizer, **more)
        if what == "weight" and self.number == at:
            with torch.no_grad():
                parameters[-1].view(-1)[0] = bad

    monkeypatch.setattr(TrainingModule, "training_step", training_step)
    monkeypatch.setattr(TrainingModule, "configure_gradient_clipping", clipping)


@pytest.mark.smoke(1)
@pytest.mark.parametrize("seed", few(range(30 if EVERYTHING else 6), [0, 1]))
@pytest.mark.parametrize("what", ["loss", "gradient", "weight"])
def test_what_was_learnt_stays_sound(ready, monkeypatch, capsys, what, seed):
    rng = random.Random(seed)
    at, bad = rng.randrange(2, STEPS - 3), rng.choice([float("nan"), float("inf"), -float("inf")])
    mode = {"FINETUNE_MODE": rng.choice(["lora", "full", "state_tuning"])}
    broken(monkeypatch, what, at, bad)
    if what == "weight":
        # (an infinite decay gives finite losses: then the checkpoint is what is refused)
        with pytest.raises(
            UserError, match="NAN_LIMIT=3 steps in a row were left out|has become NaN or infinite"
        ) as reported:
            run(ready, **COMMON, **mode)
    else:
        run(ready, **COMMON, **mode)
    records = [json.loads(line) for line in (ready / "output/run/loss.jsonl").read_text().splitlines()]
    left_out = [r["step"] for r in records if r["skipped"]]
    if what != "weight":
        assert left_out == [at]
    elif "NAN_LIMIT" in str(reported.value):
        assert left_out == [at + 1, at + 2, at + 3]
    # the only state that is kept is of before
    result = train_state.latest_valid(ready / "output/run", print)
    assert result.step == (at - 1 if what == "weight" else STEPS)
    assert all(torch.isfinite(t).all() for t in result.tensors("weights").values())
    for file in (ready / "output/run").glob("*.pth"):
        assert all(torch.isfinite(t).all() for t in pth.load(file).values())
