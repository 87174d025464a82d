"""Held-out data: its loss is what the definition says, looking at it changes nothing of the training, and a run continues with
what it has seen."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny
from helpers.kit import few
from helpers.resuming import BASE, interrupted, same
from helpers.training import config, run, tokenize

from rwkv_peft.checkpoint import pth
from rwkv_peft.cli import train
from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.data.binidx import Reader
from rwkv_peft.text.roles import Role
from rwkv_peft.train.callbacks import validation
from rwkv_peft.train.callbacks.signals import GracefulStop
from rwkv_peft.train.context import RunContext
from rwkv_peft.train.module import TrainingModule

HELD_OUT = [
    {"text": "User: Sea?\n\nAssistant: Blue and wide."},
    {"text": "User: 夜？\n\nAssistant: 安静。"},
    {"text": "User: Count.\n\nAssistant: One, two, three, four, five."},
]
COMMON = {"EPOCH_COUNT": "2", "EPOCH_STEPS": "4", "MINI_BSZ": "1", "lora_dropout": "0.2", "VAL_DATA": "held"}


@pytest.fixture
def kept(ready):
    tokenize(tiny.write_jsonl(ready / "data" / "held.jsonl", HELD_OUT))
    return ready


def validations(root, name="run"):
    return [json.loads(line) for line in (root / "output" / name / validation.FILE).read_text().splitlines()]


def defined(root, tensors) -> float:
    """The mean loss of the targets that the assistant has said, every row alone."""
    shape = tiny.geometry()
    model = tiny.build(shape, tensors, tiny.ops(shape, "reference"))
    rows, roles, losses = Reader(root / "data" / "held"), Reader(root / "data" / "held.roles"), []
    for i in range(len(rows)):
        ids = torch.from_numpy(rows.row(i).astype("int64"))
        said = torch.from_numpy(roles.row(i) == Role.ASSISTANT)[1:]
        with torch.no_grad():
            logits, _ = model(ids[None, :-1])
        losses.append(F.cross_entropy(logits[0].double(), ids[1:], reduction="none")[said])
    return float(torch.cat(losses).mean())


@pytest.mark.smoke(1)
@pytest.mark.pictures
@pytest.mark.parametrize(
    "settings", [{}, {"DATALOAD": "bucket", "MICRO_BSZ": "auto"}, {"TRAIN_TYPE": "infctx", "CHUNK_CTX": "16"}], ids=str
)
def test_its_loss_is_that_of_every_row_alone_and_begins_with_the_base(kept, settings):
    weights, _ = run(
        kept, FINETUNE_MODE="full", LR_INIT="1e-3", LR_FINAL="1e-3", **{**COMMON, "EPOCH_COUNT": "1"}, **settings
    )
    first, last = validations(kept)
    assert first["step"] == 0 and last["step"] == 4
    assert first["loss"] == pytest.approx(defined(kept, pth.load(kept / "model" / "tiny.pth")), rel=1e-5)
    assert last["loss"] == pytest.approx(defined(kept, weights), rel=1e-5)
    assert (kept / "output/run/loss.png").stat().st_size > 1000


@pytest.mark.smoke(1)
@pytest.mark.parametrize(
    "settings", [{}, {"FINETUNE_MODE": "lisa", "lisa_r": "1", "lisa_k": "2", "lora_dropout": "0"}], ids=str
)
def test_looking_changes_nothing_of_the_training(kept, settings):
    a, with_validations = run(kept, "with", **{**COMMON, "VAL_STEPS": "3", **settings})
    b, without = run(kept, "without", **{**COMMON, "VAL_DATA": "none", **settings})
    assert [r["loss"] for r in with_validations] == [r["loss"] for r in without]
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert [r["step"] for r in validations(kept, "with")] == [0, 3, 6, 8]
    assert not (kept / "output/without" / validation.FILE).exists()


def test_auto_validations_at_what_make_tokenize_has_held_out(ready, capsys):
    rows = [{"text": f"User: {i}?\n\nAssistant: The number {i}."} for i in range(40)]
    tokenize(tiny.write_jsonl(ready / "data" / "many.jsonl", rows), VALID_PERCENT="25")
    run(ready, **{**COMMON, "VAL_DATA": "auto", "DATA_PATH": "many"})
    said = capsys.readouterr().out
    assert "valid     many.valid: " in said and "validation loss" in said and "(before training)" in said
    assert [r["step"] for r in validations(ready)] == [0, 4, 8]


@pytest.mark.smoke(1)
@pytest.mark.parametrize("at", few([2, 4, 6], [4]))
@pytest.mark.parametrize("steps", few(["0", "2"], ["2"]))
@pytest.mark.parametrize("how", ["killed", "told"])
def test_a_run_that_resumes_has_seen_what_one_that_never_stopped_has(kept, monkeypatch, at, steps, how):
    settings = {**BASE, "VAL_DATA": "held", "VAL_STEPS": steps, "SAVE_STEPS": "2"}
    _, whole = run(kept, "whole", **settings)
    interrupted(monkeypatch, kept, at, how, **settings)
    _, again = run(kept, "again", **settings)
    same(kept, "whole", "again", (whole, again))
    assert validations(kept, "again") == validations(kept, "whole")


def test_without_a_better_look_for_so_long_the_run_ends_and_is_finished(kept, monkeypatch, capsys):
    monkeypatch.setattr(validation, "rounds_without_a_better", lambda records: len(records) - 1)
    settings = {**COMMON, "EPOCH_COUNT": "9", "VAL_PATIENCE": "2", "KEEP_LAST": "1"}
    _, records = run(kept, "early", **settings)
    assert len(records) == 8 and (kept / "output/early/rwkv-1.pth").is_file()
    assert "VAL_PATIENCE=2: no better validation" in capsys.readouterr().out
    with pytest.raises(SettingErrors, match="has ended output/early at step 8"):
        run(kept, "early", **settings)
    capsys.readouterr()
    train.command(config(RUN_NAME="", **settings), [])
    said = capsys.readouterr().out
    assert (
        "new run   VAL_PATIENCE has ended output/early at step 8 of 36. RUN_NAME=early and a larger VAL_PATIENCE"
        in said
    )
    _, records = run(kept, "early", **{**settings, "VAL_PATIENCE": "3"})
    assert len(records) == 12


@pytest.mark.parametrize(
    "records, rounds", [([], 0), ([3.0], 0), ([3.0, 2.0], 0), ([2.0, 3.0, 2.5], 2), ([2.0, 2.0], 1)]
)
def test_rounds_are_counted_from_the_best_look(records, rounds):
    assert validation.rounds_without_a_better([{"loss": loss} for loss in records]) == rounds


@pytest.mark.parametrize("name, words", [("nothing", "there is no such file"), ("", "is empty")])
def test_held_out_data_that_are_not_there_are_named(kept, name, words):
    with pytest.raises(SettingErrors) as result:
        run(kept, **{**COMMON, "VAL_DATA": name})
    assert [(p.name, words in p.message) for p in result.value.problems] == [("VAL_DATA", True)]


def test_a_loss_without_a_number_is_null_and_ends_nothing(kept, monkeypatch):
    monkeypatch.setattr("rwkv_peft.checkpoint.base_model.check_model", lambda *_: None)  # which refuses such a base
    base = pth.load(kept / "model" / "tiny.pth")
    broken = {name: t.clone() for name, t in base.items()}
    broken["blocks.1.ffn.value.weight"][0, 0] = torch.nan
    pth.save(kept / "model" / "broken.pth", broken)
    with pytest.raises(Exception, match="NAN_LIMIT=3"):
        run(kept, **{**COMMON, "MODEL_PATH": "broken.pth", "VAL_STEPS": "1", "VAL_PATIENCE": "1"})
    assert [r["loss"] for r in validations(kept)] == [None, None, None]  # and NaN would be no JSON
    assert "NaN" not in (kept / "output/run" / validation.FILE).read_text()


def test_other_held_out_data_are_counted_again(kept, monkeypatch, capsys):
    tokenize(tiny.write_jsonl(kept / "data" / "others.jsonl", HELD_OUT[:1]))
    settings = {**BASE, "VAL_DATA": "held", "VAL_STEPS": "2", "SAVE_STEPS": "2", "VAL_PATIENCE": "9"}
    interrupted(monkeypatch, kept, 5, "killed", **settings)
    run(kept, "again", **{**settings, "VAL_DATA": "others"})
    assert "VAL_DATA is not what it was" in capsys.readouterr().out
    result = validations(kept, "again")
    assert [r["step"] for r in result] == [0, 2, 4, 4, 6, 8, 10, 12]
    assert len({r["data"] for r in result[:3]}) == len({r["data"] for r in result[3:]}) == 1


@pytest.mark.slow
def test_a_look_that_is_interrupted_is_made_when_the_run_resumes(kept, monkeypatch):
    settings = {**BASE, "VAL_DATA": "held", "VAL_STEPS": "3", "SAVE_STEPS": "0"}
    _, whole = run(kept, "whole", **settings)
    summed, looking = TrainingModule.summed_loss, []

    def loss(self, batch):
        if not self.training:
            looking.append(1)
            if len(looking) == 2:  # the second look: of step 3
                os.kill(os.getpid(), signal.SIGINT)
        return summed(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingModule, "summed_loss", loss)
        with pytest.raises(SystemExit):
            run(kept, "again", **settings)
    _, again = run(kept, "again", **settings)
    same(kept, "whole", "again", (whole, again))
    assert validations(kept, "again") == validations(kept, "whole")


def test_auto_leaves_out_what_has_nothing_to_learn_and_says_so(ready, capsys):
    rows = [{"text": f"User: {i}?\n\nAssistant: The number {i}."} for i in range(8)]
    tokenize(tiny.write_jsonl(ready / "data" / "many.jsonl", rows))
    tokenize(tiny.write_jsonl(ready / "data" / "many.valid.jsonl", [{"text": "nothing that anybody has said"}]))
    run(ready, **{**COMMON, "VAL_DATA": "auto", "DATA_PATH": "many"})
    assert "warning   many.valid is not looked at: " in capsys.readouterr().out


@pytest.mark.parametrize("name, words", [("none", "needs held-out data"), ("auto", "finds no NAME.valid")])
def test_patience_without_data_is_refused(ready, name, words):
    with pytest.raises(SettingErrors) as result:
        run(ready, **{**COMMON, "VAL_DATA": name, "VAL_PATIENCE": "2"})
    assert [(p.name, words in p.message) for p in result.value.problems] == [("VAL_PATIENCE", True)]


def test_what_was_trained_where_the_validation_was_best_is_kept_and_merged_by_its_name(kept, monkeypatch, capsys):
    """Also by a run that is killed behind it, and continues."""
    from rwkv_peft.common import paths
    from rwkv_peft.merge.inputs import checkpoint_files

    settings = {
        "VAL_DATA": "held", "KEEP_BEST": "1", "EPOCH_COUNT": "4", "LR_INIT": "0.4", "LR_FINAL": "0.4", "SAVE_STEPS": "1",
        "KEEP_LAST": "2", "EPOCH_STEPS": "2",
    }  # fmt: skip
    run(kept, "whole", **settings)
    folder = kept / "output/whole"
    validations = [json.loads(line) for line in (folder / "valid.jsonl").read_text().splitlines()]
    best = min(validations, key=lambda look: look["loss"])
    weights, epoch = (pth.load(folder / f"rwkv-{name}.pth") for name in ("best", best["epoch"]))
    assert 0 < best["step"] < 8 and all(torch.equal(weights[name], epoch[name]) for name in weights)
    said = capsys.readouterr().out
    assert "rwkv-best.pth holds it" in said and "next: ./merge.sh whole best " in said
    assert json.loads((folder / "rwkv-best.json").read_text())["step"] == best["step"]
    monkeypatch.setattr(paths, "ROOT", kept)
    assert checkpoint_files(["best"], "whole") == [folder / "rwkv-best.pth"]
    with pytest.raises(UserError, match="has no rwkv-best.pth; KEEP_BEST=1"):
        run(kept, "none", **settings | {"KEEP_BEST": "0"})
        checkpoint_files(["best"], "none")
    interrupted(monkeypatch, kept, best["step"] + 1, "killed", **settings)
    run(kept, "again", **settings)
    again = pth.load(kept / "output/again/rwkv-best.pth")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_the_best_is_called_kept_when_it_is_saved(monkeypatch):
    """And not where the disk is full."""
    from types import SimpleNamespace

    said, order = [], []

    def full(*_):
        raise OSError(28, "No space left on device")

    def look(keep):
        context = RunContext(Path(), lambda words: (said.append(words), order.append("said")), GracefulStop())
        one = validation.Validate(context, lambda: [], "x", 1, 1, save_best=keep)
        one.round(SimpleNamespace(world_size=1, global_step=3, is_global_zero=True), None)

    look(lambda *_: order.append("saved"))
    assert order == ["saved", "said"] and said[0].endswith("(step 3, the best so far, kept as rwkv-best.pth)")
    with pytest.raises(OSError, match="No space left"):
        look(full)
    assert said[1] == "validation loss 0.0000 (step 3, the best so far)"
