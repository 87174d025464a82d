"""Law 5 and the step itself: how a step is split changes nothing, frozen weights stay, every accepted setting runs."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.kit import few
from helpers.token_files import write
from helpers.training import run, tokenize

from rwkv_peft.checkpoint import pth
from rwkv_peft.cli import chat
from rwkv_peft.common import hardware, hashing
from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.common.file_watch import FileChanged
from rwkv_peft.config.train import TrainConfig
from rwkv_peft.text import tokenizer
from rwkv_peft.train.module import TrainingModule


def close(a: dict, b: dict, tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.smoke(1)
@pytest.mark.parametrize("dataload", few(["pack", "pad", "only", "get", "concat"], ["pack", "pad"]))
def test_batch_8_is_4_times_2_accumulated(ready, dataload):
    """Also where the last step of the epoch is short, and rows have different numbers of trained tokens."""
    settings = {"DATALOAD": dataload, "CTX_LEN": "96", "EPOCH_COUNT": "2"}
    if dataload == "concat":
        settings |= {"DATALOAD": "pack", "PACK": "concat", "CTX_LEN": "24"}
    whole, losses = run(ready, "whole", MICRO_BSZ="6", MINI_BSZ="1", **settings)
    for micro, mini in ((3, 2), (2, 3), (1, 6)):
        split, again = run(ready, f"split{micro}", MICRO_BSZ=str(micro), MINI_BSZ=str(mini), **settings)
        close(split, whole, 2e-5)
        assert [r["targets"] for r in again] == [r["targets"] for r in losses]
        assert [r["loss"] for r in again] == pytest.approx([r["loss"] for r in losses], rel=1e-5)


@pytest.mark.slow
def test_packed_rows_train_like_rows_of_their_own(ready):
    """One step over all rows: the same sum of gradients, whatever the layout."""
    settings = {"CTX_LEN": "96", "MICRO_BSZ": "100"}
    results = [run(ready, mode, DATALOAD=mode, **settings) for mode in ("pack", "pad", "only")]
    for tensors, records in results[1:]:
        close(tensors, results[0][0], 2e-5)
        assert records[0]["loss"] == pytest.approx(results[0][1][0]["loss"], rel=1e-6)
        assert records[0]["tokens"] == results[0][1][0]["tokens"]


def test_two_runs_with_one_seed_are_the_same_to_the_last_bit_and_another_seed_is_not(ready):
    settings = {"lora_dropout": "0.1", "EPOCH_COUNT": "2"}
    first, second = run(ready, "a", **settings)[0], run(ready, "b", **settings)[0]
    other = run(ready, "c", SEED="7", **settings)[0]
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)


def test_lora_saves_only_what_it_trained_and_full_saves_a_whole_model(ready):
    lora, _ = run(ready, "lora", lora_parts="att,ln")
    assert {n.rpartition(".")[2] for n in lora} == {"lora_A", "lora_B", "weight", "bias"}
    assert lora["blocks.0.att.key.lora_A"].shape == (4, 32) and lora["blocks.0.att.key.lora_B"].shape == (32, 4)
    assert not any("ffn.key" in n or "emb" in n for n in lora)
    full, _ = run(ready, "full", FINETUNE_MODE="full", LR_INIT="1e-3")
    base = pth.load(ready / "model" / "tiny.pth")
    assert {n: (t.shape, t.dtype) for n, t in full.items()} == {n: (t.shape, t.dtype) for n, t in base.items()}
    assert not torch.equal(full["emb.weight"], base["emb.weight"])
    assert not torch.equal(full["blocks.1.att.w0"], base["blocks.1.att.w0"])


def test_the_base_file_is_never_touched(ready):
    before = (ready / "model" / "tiny.pth").read_bytes()
    run(ready, "full", FINETUNE_MODE="full")
    assert (ready / "model" / "tiny.pth").read_bytes() == before


@pytest.mark.pictures
def test_the_sidecar_says_what_merging_needs(ready):
    run(ready)
    sidecar = json.loads((ready / "output/run/rwkv-0.json").read_text())
    wanted = {"method", "rank", "alpha", "base", "base_sha256", "geometry", "epoch", "step", "versions"}
    assert wanted <= sidecar.keys()
    assert (sidecar["method"], sidecar["rank"], sidecar["alpha"], sidecar["base"]) == ("lora", 4, 8.0, "tiny.pth")
    assert sidecar["base_sha256"] == hashing.sha256(ready / "model" / "tiny.pth")
    settings = json.loads((ready / "output/run/run.json").read_text())
    assert settings["CTX_LEN"] == 64 and settings["OP"] == "cpu" and settings["RUN_NAME"] == "run"
    assert {f.metadata["var"] for f in dataclasses.fields(TrainConfig)} == settings.keys()
    assert (ready / "output/run/loss.png").read_bytes().startswith(b"\x89PNG")
    assert (ready / "output/latest").resolve() == ready / "output/run"


def test_the_rate_in_the_log_is_the_schedule_over_the_whole_run(ready):
    settings = {"LR_SCHEDULE": "linear", "LR_INIT": "1e-3", "LR_FINAL": "1e-4", "MICRO_BSZ": "1", "MINI_BSZ": "2"}
    _, records = run(ready, DATALOAD="only", EPOCH_COUNT="2", **settings)
    rates = [r["lr"] for r in records]
    assert len(rates) == 8 and rates[0] == 1e-3 and rates[-1] == 1e-4
    assert rates == pytest.approx([1e-3 + (1e-4 - 1e-3) * i / 7 for i in range(8)])


def test_the_first_loss_is_that_of_the_base_on_the_trained_tokens(ready):
    _, records = run(ready, DATALOAD="only", MICRO_BSZ="8", DATA_SHUFFLE="0")
    from rwkv_peft.data.binidx import Reader

    ids, roles = Reader(ready / "data/chat"), Reader(ready / "data/chat.roles")
    total = count = 0
    model = tiny.model()
    for i in range(len(ids)):
        row = torch.from_numpy(ids.row(i).astype("int64"))
        trained = torch.from_numpy((roles.row(i) == 4)[1:])
        losses = torch.nn.functional.cross_entropy(model(row[None, :-1])[0][0], row[1:], reduction="none")
        total += losses[trained].sum().item()
        count += int(trained.sum())
    assert records[0]["targets"] == count
    assert records[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_going_on_from_a_checkpoint_starts_with_its_weights(ready):
    first, _ = run(ready, "first", EPOCH_COUNT="3")
    again, records = run(ready, "again", lora_load="output/first/rwkv-2.pth", LR_INIT="0", LR_FINAL="0")
    assert all(torch.equal(first[n], again[n]) for n in first)
    fresh, other = run(ready, "fresh", LR_INIT="0", LR_FINAL="0")
    assert records[0]["loss"] < other[0]["loss"]


@pytest.mark.smoke(1)
@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"lora_r": "8"}, "lora_r", "must be 4, as output/first/rwkv-0.pth was trained"),
        ({"lora_alpha": "16"}, "lora_alpha", "must be 8, as output/first/rwkv-0.pth was trained"),
        ({"MODEL_PATH": "other.pth"}, "MODEL_PATH", "was trained on tiny.pth, not on other.pth"),
        ({"lora_load": "output/first/rwkv-9.pth"}, "lora_load", "has no rwkv-9.pth"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(ready, changes, name, words):
    run(ready, "first")
    tiny.save_model(ready / "model" / "other.pth", seed=1)
    with pytest.raises(SettingErrors) as result:
        run(ready, "again", **({"lora_load": "output/first/rwkv-0.pth"} | changes))
    assert {p.name: p.message for p in result.value.problems}[name].count(words)


WAYS = {
    "pack": {}, "concat": {"DATALOAD": "pack", "PACK": "concat"}, "bucket": {"MICRO_BSZ": "auto"}, "pad": {}, "only": {},
    "get": {}, "magic": {"DATALOAD": "get", "MAGIC_PRIME": "1", "CTX_LEN": "32"},
}  # fmt: skip
MASKS = ["qa", "last", "pad", "none", "se"]
MATRIX = few(
    [*itertools.product(WAYS, MASKS, ["lora"]), *itertools.product(WAYS, ["qa"], ["full"])],
    [
        *itertools.product(WAYS, ["qa"], ["lora"]),
        *itertools.product(["pack"], MASKS, ["lora"]),
        ("magic", "qa", "full"),
    ],
)


@pytest.mark.smoke
@pytest.mark.parametrize(("dataload", "mask", "mode"), MATRIX)
def test_every_way_to_batch_works_with_every_mask_and_method(ready, dataload, mask, mode):
    settings = {"DATALOAD": dataload, "CTX_LEN": "48"} | WAYS[dataload]
    if mask == "se":
        settings |= {"MASK_START": "Assistant:", "MASK_END": r"\n\n"}
    _, records = run(ready, LOSS_MASK=mask, FINETUNE_MODE=mode, GRAD_CP="1", **settings)
    assert sum(r["targets"] for r in records) > 0
    assert all(math.isfinite(r["loss"]) for r in records if r["targets"])


@pytest.mark.smoke(1)
@pytest.mark.parametrize(
    ("dataload", "overlong"), [("pack", "truncate"), ("bucket", "truncate-left"), ("pad", "drop"), ("only", "split")]
)
def test_every_way_with_long_rows_works(ready, dataload, overlong):
    _, records = run(ready, CTX_LEN="24", OVERLONG=overlong, **({"DATALOAD": dataload} | WAYS[dataload]))
    assert all(math.isfinite(r["loss"]) for r in records)


def test_rows_in_buckets_train_like_rows_of_one_length(ready):
    """One step over all rows that are in one bucket, however much is filled up."""
    bucket = {"DATALOAD": "bucket", "MICRO_BSZ": "auto", "TRAIN_LENGTHS": "96", "TRAIN_BATCH_SIZES": "8"}
    filled, first = run(ready, "bucket", **bucket)
    plain, second = run(ready, "only", DATALOAD="only", MICRO_BSZ="8")
    close(filled, plain, 2e-5)
    assert [r["targets"] for r in first] == [r["targets"] for r in second]
    split, third = run(ready, "split", **(bucket | {"TRAIN_BATCH_SIZES": "2", "MINI_BSZ": "4"}))
    close(split, plain, 2e-5)
    assert [r["targets"] for r in third] == [r["targets"] for r in second]


def test_se_trains_what_roles_say_where_the_markers_are_those_of_the_layout(ready):
    settings = {"DATALOAD": "only", "MICRO_BSZ": "8"}
    roles, first = run(ready, "qa", **settings)
    markers, second = run(ready, "se", LOSS_MASK="se", MASK_START="Assistant:", MASK_END=r"\n\n", **settings)
    assert [r["targets"] for r in first] == [r["targets"] for r in second]
    assert all(torch.equal(roles[n], markers[n]) for n in roles)
    _, third = run(ready, "more", LOSS_MASK="se", MASK_START="Assistant:", MASK_END=r"\n\nUser", **settings)
    assert third[0]["targets"] == first[0]["targets"] + 2  # the word User itself, before the second turns


def test_a_worker_changes_nothing(ready):
    settings = {"EPOCH_COUNT": "3", "MICRO_BSZ": "1"}
    alone, _ = run(ready, "alone", NUM_WORKERS="0", **settings)
    helped, _ = run(ready, "helped", NUM_WORKERS="1", **settings)
    assert all(torch.equal(alone[n], helped[n]) for n in alone)


@pytest.mark.smoke(1)
@pytest.mark.parametrize("dataload", few(WAYS, ["pack", "bucket", "get"]))
def test_a_mixture_trains_in_every_way(ready, dataload):
    said = tokenizer.encode("User: Say no.\n\nAssistant: No, no, no, never ever.")
    write(ready / "data" / "my no", [np.array([*said, 0])] * 8)  # without roles: found by its headings
    settings = {"DATALOAD": dataload, "CTX_LEN": "24"} | WAYS[dataload]
    _, records = run(ready, "mix", DATA_PATH="chat:3 my no:1.0", EPOCH_COUNT="2", **settings)
    assert all(math.isfinite(r["loss"]) for r in records if r["targets"])
    given = json.loads((ready / "output/mix/run.json").read_text())
    assert given["DATA_PATH"] == "chat:3 my no:1.0"


@pytest.mark.smoke(2)
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("op", few(["torch", "reference"], ["torch"]))
def test_every_precision_method_and_operator_learns(ready, precision, mode, op):
    rate = "1e-2" if mode == "lora" else "2e-3"
    settings = {"PRECISION": precision, "FINETUNE_MODE": mode, "OP": op, "LR_INIT": rate, "CTX_LEN": "48"}
    _, records = run(ready, EPOCH_COUNT="4", MICRO_BSZ="4", **settings)
    assert records[-1]["loss"] < records[0]["loss"]


@pytest.mark.smoke(3)
@pytest.mark.parametrize(
    "settings",
    [
        {"EPOCH_STEPS": "3", "EPOCH_COUNT": "5"},
        {"EPOCH_STEPS": "40", "EPOCH_COUNT": "1"},  # more than the rows of one pass
        {"MICRO_BSZ": "100"},
        {"MICRO_BSZ": "1", "MINI_BSZ": "3"},
        {"GRAD_CLIP": "0", "WEIGHT_DECAY": "0.1"},
        {"EMB_FINETUNE": "1"},
        {"lora_parts": "ffn"},
        {"lora_parts": "att,ffn,time,ln"},
        {"DATA_SHUFFLE": "0"},
        {"MICRO_BSZ": "auto", "CTX_LEN": "auto"},
        {"CTX_LEN": "1", "LOSS_MASK": "pad"},
        {"STRATEGY": "single"},
        {"N_LAYER": "2", "EMBD_SIZE": "32", "VOCAB_SIZE": "65536", "MODEL_VERSION": "v7"},
    ],
)
def test_other_settings_work(ready, settings):
    _, records = run(ready, **settings)
    assert all(math.isfinite(r["loss"]) for r in records)


@pytest.mark.smoke(3)
@pytest.mark.parametrize(
    ("settings", "rows", "name", "words"),
    [
        ({"CTX_LEN": "2"}, tiny.CHATS, "CTX_LEN", "2 tokens end before any answer begins"),
        (
            {"CTX_LEN": "2", "OVERLONG": "drop"},
            tiny.CHATS,
            "CTX_LEN",
            "OVERLONG=drop leaves out every row of plain.bin",
        ),
        (
            {"DATALOAD": "bucket", "MICRO_BSZ": "auto", "TRAIN_LENGTHS": "16", "OVERLONG": "drop"},
            tiny.CHATS[4:5],
            "TRAIN_LENGTHS",
            "is too short: OVERLONG=drop leaves out every row",
        ),
        (
            {"DATALOAD": "get", "MAGIC_PRIME": "1", "CTX_LEN": "200"},
            tiny.CHATS,
            "MAGIC_PRIME",
            "needs 3 windows or more; plain.bin has 1 window of CTX_LEN=200 tokens. Use 0",
        ),
        (
            {"LOSS_MASK": "se", "MASK_START": "Q:", "MASK_END": "A:"},
            tiny.CHATS,
            "MASK_START",
            "is nowhere in plain.bin",
        ),
        (
            {"LOSS_MASK": "se", "MASK_START": "User:", "MASK_END": "A:"},
            tiny.CHATS,
            "MASK_END",
            "is nowhere behind a MASK_START in plain.bin",
        ),
        ({}, [{"text": "plain"}], "LOSS_MASK", "no row of plain.bin has an Assistant turn. Use LOSS_MASK=pad"),
    ],
)
def test_data_without_anything_to_train_are_refused(ready, settings, rows, name, words):
    tokenize(tiny.write_jsonl(ready / "data" / "plain.jsonl", rows))
    with pytest.raises(SettingErrors) as result:
        run(ready, DATA_PATH="plain", **settings)
    assert words in {p.name: p.message for p in result.value.problems}[name]


@pytest.mark.smoke(1)
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_run_that_becomes_nan_stops_with_words_and_saves_nothing_of_it(ready, capsys, mode):
    with pytest.raises(
        UserError, match=r"NAN_LIMIT=3 steps in a row were left out.*LR_INIT is too high|has become NaN"
    ):
        run(ready, FINETUNE_MODE=mode, LR_INIT="1e9", LR_FINAL="1e9", GRAD_CLIP="0", EPOCH_COUNT="30", EPOCH_SAVE="30")
    assert not list((ready / "output/run").glob("*.pth")) and (ready / "output/run/loss.png").is_file()
    capsys.readouterr()
    chat.command(chat.ChatConfig("", "", "rwkv-world", "auto", "", 5, 0.0, 1.0, 0, 0, "fp32"), ["--diagnose", "run"])
    said = capsys.readouterr().out
    assert "output/run has saved no checkpoint" in said and "verdict   the learning rate is too high" in said
    log = (ready / "output/run/loss.jsonl").read_text()
    assert "NaN" not in log
    # its name is free, and its log stays
    run(ready, FINETUNE_MODE=mode, EPOCH_COUNT="1")
    assert (ready / "output/run/loss-before.jsonl").read_text() == log
    assert "an earlier run of this name saved nothing; its log is" in capsys.readouterr().out


def with_nan_in(monkeypatch, steps):
    """From 1, and with one micro-batch a step."""
    summed, calls = TrainingModule.summed_loss, iter(range(1, 1000))
    monkeypatch.setattr(
        TrainingModule,
        "summed_loss",
        lambda self, batch: summed(self, batch) * (torch.nan if next(calls) in steps else 1.0),
    )


@pytest.mark.smoke(1)
@pytest.mark.parametrize("optim", ["adamw", "adafactor", "lion8bit"])
def test_a_step_without_a_number_is_left_out_and_changes_nothing(ready, monkeypatch, capsys, optim):
    common = {
        "OPTIM": optim,
        "MINI_BSZ": "1",
        "EPOCH_STEPS": "6",
        "LR_INIT": "1e-3",
        "LR_FINAL": "1e-3",
        "KEEP_LAST": "1",
    }
    with monkeypatch.context() as patched:
        with_nan_in(patched, {6})  # the last one
        weights, records = run(ready, "with", **common)
    before, _ = run(ready, "five", **{**common, "EPOCH_STEPS": "5"})
    assert weights.keys() == before.keys() and all(torch.equal(weights[n], before[n]) for n in weights)
    assert [r["skipped"] for r in records] == [False] * 5 + [True]
    assert records[-1]["loss"] is None and records[-1]["grad_norm"] is None
    said = capsys.readouterr().out
    assert (
        "warning   step 6: its loss is nan (micro-batch 5: 'User: " in said
        and "left out, 1 of NAN_LIMIT=3 in a row" in said
    )


def test_a_run_of_which_every_step_was_left_out_is_no_success(ready, monkeypatch):
    with_nan_in(monkeypatch, {1, 2})
    with pytest.raises(
        UserError, match=r"All 2 steps were left out, so nothing was learnt. No step .* LR_INIT is not the cause"
    ):
        run(ready, MINI_BSZ="1", EPOCH_STEPS="2", NAN_LIMIT="3")


def test_a_state_is_learnt_from_the_one_that_the_base_holds(ready, capsys):
    settings = {"FINETUNE_MODE": "state_tuning", "LR_INIT": "1", "EPOCH_STEPS": "2", "MINI_BSZ": "1"}
    learnt, _ = run(ready, "first", **settings)
    base = pth.load(ready / "model" / "tiny.pth")
    pth.save(ready / "model" / "with.pth", {**base, **learnt})
    state = [name for name in learnt if name.endswith("time_state")]
    capsys.readouterr()
    further, records = run(
        ready, "second", **settings | {"MODEL_PATH": "with.pth", "LR_INIT": "1e-6", "LR_FINAL": "1e-6"}
    )
    assert "the base holds a learnt state: what is learnt goes on from it" in capsys.readouterr().out
    assert all(torch.allclose(further[name], learnt[name], atol=1e-4) for name in state)
    assert not any(torch.equal(further[name], learnt[name]) for name in state)
    _, others = run(ready, "third", MODEL_PATH="with.pth", EPOCH_STEPS="2", MINI_BSZ="1")
    assert others[0]["loss"] == pytest.approx(records[0]["loss"], rel=1e-5)
    assert "the base holds a learnt state: texts begin with it" in capsys.readouterr().out


def test_so_many_steps_in_a_row_end_the_training_and_the_batch_is_named(ready, monkeypatch):
    with_nan_in(monkeypatch, {2, 4, 5})
    common = {"MINI_BSZ": "1", "EPOCH_STEPS": "8", "NAN_LIMIT": "2"}
    with pytest.raises(
        UserError, match=r"NAN_LIMIT=2 steps in a row were left out. The last, step 5: its loss is nan \(micro-batch 4"
    ):
        run(ready, **common)
    records = [json.loads(line) for line in (ready / "output/run/loss.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["skipped"]] == [2, 4, 5]


def test_the_last_answer_of_a_window_is_the_last_of_its_whole_document(ready):
    from rwkv_peft.data.binidx import Reader
    from rwkv_peft.data.dataset import TokenDataset
    from rwkv_peft.data.token_source import TokenSource
    from rwkv_peft.text import tokenizer

    text = "User: one\n\nAssistant: FIRST ANSWER here it is\n\nUser: two\n\nAssistant: LAST"
    tokenize(tiny.write_jsonl(ready / "data" / "w.jsonl", [{"text": text}]))
    prefix = ready / "data" / "w"
    source = TokenSource(Reader(prefix), Reader(f"{prefix}.roles"), 65536)
    data = TokenDataset([source], "get", "last", 6, "truncate", 1, True)
    said = sorted(
        tokenizer.decode(tokens[1:][weights > 0].tolist()).strip()
        for i in range(data.rows)
        for tokens, weights in data.row(i)
    )
    assert "".join(said) == "LAST"
    trained = sum(int(w.sum()) for i in range(data.rows) for _, w in data.row(i))
    assert trained == data.facts().targets


def test_a_full_run_whose_base_is_replaced_saves_nothing(ready, monkeypatch):
    """A checkpoint of it is a changed copy of the base, and its sidecar names the base."""
    from rwkv_peft.train.callbacks.metrics import MetricsCallback

    original = MetricsCallback.on_train_start

    def replaced(self, *arguments):
        tiny.save_model(ready / "model" / "other.pth", shape=tiny.geometry(1, 32, 64, 16))
        (ready / "model" / "other.pth").replace(ready / "model" / "tiny.pth")
        return original(self, *arguments)

    monkeypatch.setattr(MetricsCallback, "on_train_start", replaced)
    with pytest.raises(FileChanged, match="model/tiny.pth: became shorter since this run began"):
        run(ready, FINETUNE_MODE="full")
    assert not list((ready / "output/run").glob("rwkv-*"))


def test_the_precision_follows_the_processor():
    assert hardware.cpu_has_bf16("flags\t\t: fpu avx2 amx_bf16 amx_tile")
    assert hardware.cpu_has_bf16("flags\t\t: fpu avx512_bf16")
    assert hardware.cpu_has_bf16("Features\t: fp asimd bf16 i8mm")
    assert not hardware.cpu_has_bf16("flags\t\t: fpu avx2 avx512f")
    assert not hardware.cpu_has_bf16("nothing")
    intel, amd = (
        "vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512_bf16",
        "vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512_bf16",
    )
    assert not hardware.cpu_gains_by_bf16(intel) and hardware.cpu_gains_by_bf16(f"{intel} amx_bf16 amx_tile")
    assert hardware.cpu_gains_by_bf16(amd) and not hardware.cpu_gains_by_bf16("flags\t\t: fpu avx2 avx512f")


@pytest.mark.smoke(3)
@pytest.mark.parametrize(
    ("settings", "name", "words"),
    [
        ({"FINETUNE_MODE": "bat", "disha_r": "5"}, "disha_r", "must divide 32, to cut a layer into square blocks"),
        ({"FINETUNE_MODE": "pissa", "pissa_r": "33"}, "pissa_r", "must be 32 or less"),
        ({"FINETUNE_MODE": "peft", "PEFT_CONFIG": "no.json"}, "PEFT_CONFIG", "there is no such file"),
        (
            {"FINETUNE_MODE": "pissa", "pissa_load": "no.pth"},
            "pissa_load",
            "no.pth: there is no such run or checkpoint",
        ),
        ({"FINETUNE_MODE": "pissa", "pissa_init": "no.pth"}, "pissa_init", "no.pth: there is no such file"),
        ({"MODEL_VERSION": "v6"}, "MODEL_VERSION", "but model/tiny.pth has v7; use auto"),
    ],
)
def test_what_does_not_go_with_the_base_is_reported_before_anything_is_loaded(ready, settings, name, words):
    with pytest.raises(SettingErrors) as result:
        run(ready, "never", **settings)
    assert words in {p.name: p.message for p in result.value.problems}[name]
    assert not (ready / "output" / "never").exists()


@pytest.mark.slow
def test_a_pissa_run_resumes_only_with_what_it_began_with(ready):
    settings = {"FINETUNE_MODE": "pissa", "pissa_r": "4"}
    run(ready, "first", **settings)
    (ready / "output/first/init_pissa.pth").rename(ready / "output/moved.pth")
    with pytest.raises(SettingErrors, match="init_pissa.pth: there is no such file; name it with pissa_init"):
        run(ready, "again", pissa_load="first", **settings)
    tensors, _ = run(ready, "again", pissa_load="first", pissa_init="moved.pth", LR_INIT="0", LR_FINAL="0", **settings)
    first = pth.load(ready / "output/first/rwkv-0.pth")
    assert all(torch.equal(tensors[n], first[n]) for n in first)
    # and another run may begin from the same decomposition
    run(ready, "new", pissa_init="moved.pth", **settings)
    begun, moved = (pth.load(ready / "output" / name) for name in ("new/init_pissa.pth", "moved.pth"))
    assert all(torch.equal(begun[n], moved[n]) for n in moved)
    # but what another run began with is refused, though it has the same shapes
    run(ready, "other", SEED="7", **settings)
    other = pth.load(ready / "output/other/init_pissa.pth")
    pth.save(ready / "output/swapped.pth", {n: t + 1 for n, t in other.items()})
    with pytest.raises(SettingErrors, match="pissa_init: .*swapped.pth: is not what .* began with"):
        run(ready, "bad", pissa_load="first", pissa_init="swapped.pth", **settings)
