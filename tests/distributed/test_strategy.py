"""Law 5 and 6 over STRATEGY: however the processes share a training, its steps, results and states are the same."""

import importlib.util
import json
import shutil
import sys

import pytest
import torch
from helpers import tiny
from helpers.kit import EVERYTHING, Kit
from helpers.resuming import TIMES, records, same
from helpers.settings import problems
from helpers.training import FAST

from rwkv_peft.checkpoint import pth, train_state
from rwkv_peft.common.errors import SettingErrors
from rwkv_peft.config.strategies import STRATEGIES
from rwkv_peft.distributed import strategy

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
SPREAD = [word for word, row in STRATEGIES.items() if row.spread]


def asked(words):
    """Parameters for these strategies, those of a package that is not there to be skipped."""
    missing = pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")
    return [pytest.param(word, marks=missing if STRATEGIES[word].stage else ()) for word in words]


EVERY_STATE = {"SAVE_STEPS": "1", "KEEP_LAST": "9"}
CHECKS = {
    "VAL_DATA": "chat",
    "VAL_STEPS": "2",
    "SAMPLE_PROMPTS": "hi there|what",
    "SAMPLE_STEPS": "2",
    "SAMPLE_TOKENS": "8",
}
METHODS = {
    "lora": {"lora_dropout": "0.1", "GRAD_CP": "1"} | CHECKS,
    "full": {"FINETUNE_MODE": "full", "LR_INIT": "1e-3", "GRAD_CP": "selective"},
    "pissa": {"FINETUNE_MODE": "pissa", "pissa_r": "4", "lora_parts": "att,ffn,time,ln", "MODEL_PATH": "six.pth"}
    | {"EMB_FINETUNE": "1"},
    "nf4": {"QUANT": "nf4", "QUANT_PARTS": "att,ffn,emb,head", "PRECISION": "bf16", "OP": "torch"},
    "loha": {"FINETUNE_MODE": "peft", "PEFT_CONFIG": "loha.json"},
    "bucket": {"DATALOAD": "bucket", "MICRO_BSZ": "auto"},
    "several": {"MINI_BSZ": "2", "EPOCH_STEPS": "3"},  # the last step of an epoch has one micro-batch
}
WITH = {
    "lora": ("fsdp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"),
    "full": ("fsdp",),
}
if EVERYTHING:  # (a run takes 10 seconds)
    whole = [word for word in SPREAD if not STRATEGIES[word].offload]
    WITH = {method: whole if method in ("pissa", "nf4", "loha", "bucket") else SPREAD for method in METHODS}
CASES = [pytest.param(method, *one.values, marks=one.marks) for method in WITH for one in asked(WITH[method])]  # fmt: skip


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A kit with a run of each method by ddp, which has kept all its states."""
    kit = Kit(tmp_path_factory.mktemp("strategies") / "my kit")
    tiny.save_model(kit.root / "model" / "tiny.pth")
    tiny.save_model(kit.root / "model" / "six.pth", shape=tiny.geometry(version="x060"))
    (kit.root / "loha.json").write_text(json.dumps({"peft_type": "LOHA", "r": 4, "alpha": 8}))
    kit.data("chat.jsonl", *tiny.CHATS)
    kit.run("make_tokenize.sh", "chat.jsonl")
    return kit


def train(kit, name: str, strategy: str, **settings: str):
    common = FAST | EVERY_STATE | {"EPOCH_COUNT": "2", "GPU_COUNT": "2", "MICRO_BSZ": "1", "GRAD_CLIP": "1.0"}
    kit.set(to="x.sh", **common | {"STRATEGY": strategy, "RUN_NAME": name} | settings)
    return kit.run("x.sh", timeout=900)


def by_ddp(kit, method: str) -> str:
    """The name of a run of the method by two processes that share nothing but gradients."""
    if not (kit.root / "output" / method).exists():
        train(kit, method, "ddp", **METHODS[method])
    return method


def numbers(kit, name: str) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records(kit.root, name)]


def near(kit, one: str, other: str) -> None:
    """The same but for the rounding of sums in another order."""
    for a, b in zip(numbers(kit, one), numbers(kit, other), strict=True):
        assert a == pytest.approx(b, rel=2e-5), (a, b)
    first, second = (pth.load(kit.root / "output" / name / "rwkv-1.pth") for name in (one, other))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "strategy"), CASES)
def test_every_strategy_takes_the_same_steps(kit, method, strategy):
    """To the last bit, where nothing is summed in another order: with offloading another optimizer computes, and what is in
    pieces adds up the micro-batches of a step piece by piece."""
    result = STRATEGIES[strategy]
    ddp, name = by_ddp(kit, method), f"{method}-{strategy}"
    said = train(kit, name, strategy, **METHODS[method])
    assert "Warning" not in said.stderr and f"STRATEGY={strategy}" in said.stdout
    if result.offload or (method == "several" and strategy != "deepspeed_stage_1"):
        near(kit, ddp, name)
        return
    same(kit.root, ddp, name, (records(kit.root, ddp), records(kit.root, name)))
    folders = [kit.root / "output" / one for one in (ddp, name)]
    for file in ("valid.jsonl", "samples.md") if method == "lora" else ():
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", asked(SPREAD if EVERYTHING else ("deepspeed_stage_3",)))
def test_a_run_resumes_with_any_strategy(kit, strategy):
    """Its states do not report how it was spread: what ddp has saved continues, and is then what it would have become."""
    ddp, name = by_ddp(kit, "full"), f"on-{strategy}"
    output = kit.root / "output"
    shutil.copytree(output / ddp, output / name)
    for later in train_state.state_names(output / name)[1:]:
        shutil.rmtree(output / name / "state" / later)
    assert "at step 1 of 4" in train(kit, name, strategy, **METHODS["full"]).stdout
    if STRATEGIES[strategy].offload:
        near(kit, ddp, name)
    else:
        same(kit.root, ddp, name, (records(kit.root, ddp), records(kit.root, name)))


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(kit):
    """Of the same rows a step: two processes, then one, then two again; a number that makes other steps is refused."""
    ddp, name = by_ddp(kit, "full"), "numbers"
    output = kit.root / "output"
    shutil.copytree(output / ddp, output / name)
    for later in train_state.state_names(output / name)[1:]:
        shutil.rmtree(output / name / "state" / later)
    settings = METHODS["full"]
    kit.set(to="x.sh", **FAST | EVERY_STATE | {"EPOCH_COUNT": "2", "MICRO_BSZ": "1", "RUN_NAME": name} | settings)
    said = kit.run("x.sh", ok=False).stderr
    assert "at step 1 of 4 was begun with 2, which would be 1 now: set it back, or change MINI_BSZ" in said
    train(kit, name, "single", GPU_COUNT="1", MINI_BSZ="2", **settings)
    near(kit, ddp, name)
    for later in train_state.state_names(output / name)[3:]:
        shutil.rmtree(output / name / "state" / later)
    kit.set(script="x.sh", to="x.sh", GPU_COUNT="2", STRATEGY="ddp", EPOCH_COUNT="4")
    refused = kit.run("x.sh", ok=False).stderr
    assert "at step 3 of 4 was begun with 1, which would be 2 now: set it back, or change MINI_BSZ" in refused
    for later in train_state.state_names(output / name)[3:]:
        shutil.rmtree(output / name / "state" / later)
    assert "at step 3 of 4" in train(kit, name, "fsdp", **settings).stdout
    near(kit, ddp, name)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", asked(("fsdp", "deepspeed_stage_3") if EVERYTHING else ("deepspeed_stage_3",)))
def test_a_step_without_a_number_changes_nothing(kit, strategy):
    """A rate that breaks the weights in the first step: all others are left out, and the run ends."""
    name = f"broken-{strategy}"
    common = FAST | {"EPOCH_COUNT": "9", "GPU_COUNT": "2", "MICRO_BSZ": "1", "NAN_LIMIT": "2"}
    common |= {"LR_INIT": "1e30", "LR_FINAL": "1e30"}
    kit.set(to="x.sh", **common | {"STRATEGY": strategy, "RUN_NAME": name})
    assert "NAN_LIMIT=2 steps in a row were left out" in kit.run("x.sh", ok=False, timeout=900).stderr
    assert [record["skipped"] for record in records(kit.root, name)][-2:] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", asked(SPREAD if EVERYTHING else ("deepspeed_stage_2_offload",)))
def test_one_process_will_do(kit, strategy):
    one, name = "alone", f"alone-{strategy}"
    if not (kit.root / "output" / one).exists():
        train(kit, one, "single", GPU_COUNT="1")
    train(kit, name, strategy, GPU_COUNT="1")
    near(kit, one, name)


REFUSED = [
    ({"OPTIM": "lion", "STRATEGY": "fsdp"}, "OPTIM", "must be adamw with STRATEGY=fsdp"),
    ({"PRECISION": "fp16", "STRATEGY": "deepspeed_stage_2"}, "PRECISION", "must not be fp16 with STRATEGY=deepspeed_"),
    ({"FINETUNE_MODE": "state", "STRATEGY": "deepspeed_stage_3"}, "STRATEGY", "must be ddp with FINETUNE_MODE=state"),
    ({"TRAIN_TYPE": "infctx", "STRATEGY": "fsdp"}, "STRATEGY", "must be ddp or deepspeed_stage_1 or 2 with TRAIN_TYPE"),
    ({"FINETUNE_MODE": "lisa", "STRATEGY": "fsdp"}, "STRATEGY", "must be auto or single with FINETUNE_MODE=lisa"),
]


@pytest.mark.parametrize(("settings", "variable", "words"), REFUSED)
def test_what_cannot_be_spread_is_refused(settings, variable, words):
    assert words in problems(**settings)[variable]


@pytest.mark.parametrize("word", asked(word for word, row in STRATEGIES.items() if row.stage))
def test_frozen_weights_stay_what_they_are_under_deepspeed(word):
    """Lightning's own plugin makes them float32: twice the memory of a base in bf16."""
    [plugin] = strategy.make_trainer_arguments("bf16", 1, 1, word, 1.0)[0]["plugins"]
    assert plugin.convert_module(torch.nn.Linear(2, 2).bfloat16()).weight.dtype == torch.bfloat16


def test_a_missing_deepspeed_is_reported_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.delitem(sys.modules, "rwkv_peft.distributed.deepspeed", raising=False)
    with pytest.raises(SettingErrors, match="STRATEGY: needs a package that is missing .*requirements.txt"):
        strategy.make_trainer_arguments("fp32", 1, 1, "deepspeed_stage_2", 1.0)
