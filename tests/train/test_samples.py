"""samples.md: answers while a model learns, which change nothing of the learning and never stop it."""

import pytest
import torch
from helpers import tiny
from helpers.kit import few
from helpers.resuming import BASE, interrupted
from helpers.training import run, tokenize

from rwkv_peft.common.errors import SettingErrors
from rwkv_peft.train.callbacks import build, samples

COMMON = {"EPOCH_COUNT": "2", "EPOCH_STEPS": "4", "MINI_BSZ": "1", "lora_dropout": "0.2", "SAMPLE_TOKENS": "8"}
ASKED = {"SAMPLE_PROMPTS": "Sea? | 夜？"}


def steps(root, name="run"):
    text = (root / "output" / name / samples.FILE).read_text(encoding="utf-8")
    return [int(m[1]) for m in samples.HEADING.finditer(text)], text


@pytest.mark.parametrize(
    "settings",
    few(
        [
            {},
            {"QUANT": "nf4", "QUANT_PARTS": "att,ffn,emb,head"},
            {"FINETUNE_MODE": "full"},
            {"FINETUNE_MODE": "state"},
        ],
        [{}],
    ),
    ids=str,
)
def test_asking_changes_nothing_of_the_training(ready, settings):
    a, asked = run(ready, "asked", **COMMON, **ASKED, SAMPLE_STEPS="3", **settings)
    b, plain = run(ready, "plain", **COMMON, **settings)
    assert [r["loss"] for r in asked] == [r["loss"] for r in plain]
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    numbers, text = steps(ready, "asked")
    assert numbers == [0, 3, 6, 8] and text.count("**Sea?**") == text.count("**夜？**") == 4
    assert not (ready / "output/plain" / samples.FILE).exists()


def test_a_model_that_has_learnt_says_it(ready):
    tokenize(tiny.write_jsonl(ready / "data" / "one.jsonl", [{"text": "User: Sea?\n\nAssistant: Blue and wide."}] * 4))
    settings = {"DATA_PATH": "one", "FINETUNE_MODE": "full", "EPOCH_COUNT": "3", "EPOCH_STEPS": "30", "MINI_BSZ": "1"}
    run(ready, SAMPLE_PROMPTS="Sea?", **settings, **{"LR_INIT": "3e-3", "LR_FINAL": "3e-3", "EPOCH_SAVE": "3"})
    numbers, text = steps(ready)
    assert numbers == [0, 30, 60, 90]
    assert "> Blue and wide." not in text.split("## step 30")[0] and "> Blue and wide." in text.split("## step 90")[1]


@pytest.mark.parametrize("at", few([3, 5], [5]))
def test_a_run_that_resumes_has_said_everything_once(ready, monkeypatch, at):
    settings = {**BASE, **ASKED, "SAMPLE_STEPS": "2", "SAVE_STEPS": "2", "SAMPLE_TOKENS": "4"}
    run(ready, "whole", **settings)
    interrupted(monkeypatch, ready, at, "killed", **settings)
    run(ready, "again", **settings)
    assert steps(ready, "again") == steps(ready, "whole")


def test_an_answer_that_fails_is_reported_and_training_resumes(ready, monkeypatch, capsys):
    def fails(*_args, **_more):
        raise RuntimeError("no words")

    monkeypatch.setattr(build, "likeliest_answer", fails)
    _, records = run(ready, **COMMON, **ASKED)
    assert len(records) == 8 and "samples.md could not be written (RuntimeError: no words)" in capsys.readouterr().out


def test_questions_come_from_a_file_with_one_a_line(ready):
    (ready / "data" / "asked.txt").write_text("Sea?\n\n夜？\n", encoding="utf-8")
    run(ready, **COMMON, SAMPLE_PROMPTS="asked.txt")
    assert steps(ready)[1].count("**夜？**") == 3


@pytest.mark.parametrize("text, words", [("none.txt", "cannot be read"), (" | ", "holds no question")])
def test_questions_that_are_not_there_are_named(ready, text, words):
    with pytest.raises(SettingErrors) as result:
        run(ready, **COMMON, SAMPLE_PROMPTS=text)
    assert [(p.name, words in p.message) for p in result.value.problems] == [("SAMPLE_PROMPTS", True)]
