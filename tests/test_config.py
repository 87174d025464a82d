"""What training.sh may say: cross-rules, and refusals by name of what is not built yet."""

import dataclasses

import pytest
from test_scripts import ROOT, shell_values

from rwkv_peft.config import RETIRED, TrainConfig
from rwkv_peft.errors import Problems
from rwkv_peft.shell_vars import Script

SHIPPED = shell_values(ROOT / "training.sh")


def problems(**changes) -> dict[str, str]:
    try:
        Script(ROOT / "training.sh", SHIPPED | changes).read(TrainConfig, RETIRED)
    except Problems as found:
        return {p.name: p.message for p in found.problems}
    return {}


REFUSED = [(f.metadata["var"], value) for f in dataclasses.fields(TrainConfig) for value in f.metadata.get("later", {})]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_a_value_to_come_is_refused_by_name_and_told_what_there_is(name, value):
    assert "is not part of this version yet; it has" in problems(**{name: value})[name]


@pytest.mark.parametrize(
    "name", [f.metadata["var"] for f in dataclasses.fields(TrainConfig) if f.metadata["only_empty"]]
)
def test_a_variable_to_come_must_stay_empty(name):
    assert "leave it empty" in problems(**{name: "64"})[name]


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"FINETUNE_MODE": "full", "EMB_FINETUNE": "1"}, "EMB_FINETUNE", "must be 0 with FINETUNE_MODE=full"),
        ({"FINETUNE_MODE": "full", "lora_load": "x.pth"}, "lora_load", 'must be "" with FINETUNE_MODE=full'),
        ({"LR_SCHEDULE": "exp", "LR_FINAL": "0"}, "LR_FINAL", "must be more than 0 with LR_SCHEDULE=exp"),
        ({"lora_parts": "att,atn"}, "lora_parts", "must be words of att, ffn, time, ln"),
        ({"lora_parts": "ln"}, "lora_parts", "must name att or ffn"),
        ({"RUN_NAME": "a/b"}, "RUN_NAME", "plain folder name"),
        ({"RUN_NAME": "latest"}, "RUN_NAME", "plain folder name"),
        ({"RUN_NAME": ".."}, "RUN_NAME", "plain folder name"),
        ({"GPU_COUNT": "2", "STRATEGY": "single"}, "STRATEGY", "must be auto or ddp"),
        ({"MODEL_PATH": " "}, "MODEL_PATH", "is empty"),
        ({"RUN_NAME": "caf\udce9"}, "RUN_NAME", "is not UTF-8"),
        ({"CTX_LEN": "9" * 20}, "CTX_LEN", "is too large"),
        ({"MINI_BSZ": "9" * 12}, "MINI_BSZ", "must be 1000000000 or less"),
        ({"WARMUP_STEPS": "1" + "0" * 400}, "WARMUP_STEPS", "is too large"),
        ({"lora_alpha": "1e300"}, "lora_alpha", "must be 1000000000 or less"),
        ({"BETA1": "1"}, "BETA1", "must be less than 1"),
        ({"MICRO_BSZ": "0"}, "MICRO_BSZ", "must be 1 or more, or auto"),
        ({"DATALOAD": "pak"}, "DATALOAD", "did you mean pack?"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, name, words):
    assert words in problems(**changes)[name]


def test_a_broken_value_does_not_hide_what_is_wrong_with_others():
    found = problems(FINETUNE_MODE="full", EMB_FINETUNE="1", LR_INIT="x", CTX_LEN="0")
    assert set(found) == {"EMB_FINETUNE", "LR_INIT", "CTX_LEN"}
