"""What a run says of its data before it begins, and what DATA_PATH may not say."""

import json

import numpy as np
import pytest
from helpers.token_files import write
from helpers.training import config, run

from rwkv_peft.cli import train
from rwkv_peft.common.errors import SettingErrors
from rwkv_peft.text import tokenizer


@pytest.fixture
def mixed(ready):
    """chat, and a file without roles whose name has a space."""
    said = np.array([*tokenizer.encode("User: Say no.\n\nAssistant: No, no."), 0])
    write(ready / "data" / "my no", [said] * 20)
    return ready


BUCKET = {"DATALOAD": "bucket", "MICRO_BSZ": "auto"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"CTX_LEN": "24"}, "3 rows longer than CTX_LEN=24: 51 tokens at the end are not trained (CTX_LEN=auto takes up"),
        ({"CTX_LEN": "24"}, "warning   1 of those end inside what is learnt: the model does not learn to stop from it"),
        ({"CTX_LEN": "24", "OVERLONG": "truncate-left"}, "3 rows longer than CTX_LEN=24: 51 tokens at the beginning are not"),
        ({"CTX_LEN": "24", "OVERLONG": "drop"}, "3 rows longer than CTX_LEN=24: left out with their 126 tokens"),
        ({"CTX_LEN": "24", "OVERLONG": "split"}, "3 rows longer than CTX_LEN=24: cut into 7 pieces"),
        ({"CTX_LEN": "13"}, "1 row of those with nothing left to train: left out"),
        (BUCKET | {"CTX_LEN": "auto"}, "buckets, longest row x rows at once: 64 x 1; 8 optimizer steps a pass"),
        (BUCKET | {"TRAIN_LENGTHS": "32 64", "TRAIN_BATCH_SIZES": "4 2"}, "rows at once: 32 x 4, 64 x 2; 3 optimizer steps"),
        ({"DATALOAD": "get", "MAGIC_PRIME": "1", "CTX_LEN": "24"}, "MAGIC_PRIME 5: 4 windows at the end of chat.bin left out"),
        ({"PACK": "concat", "CTX_LEN": "24"}, "CTX_LEN=24: 9 windows a pass"),
        ({"DATALOAD": "get", "CTX_LEN": "24"}, "CTX_LEN=24: 9 windows a pass"),
        ({"DATALOAD": "only", "LOSS_MASK": "se", "MASK_START": "Assistant:", "MASK_END": r"\n\n"}, "8 rows a pass"),
        ({"DATA_PATH": "chat:0.7 my no:0.3", "DATALOAD": "pad"}, "chat: 8 rows, 70.0% of what is drawn; the run goes through"),
        ({"DATA_PATH": "chat:3 my no:1", "DATALOAD": "pad", "EPOCH_STEPS": "8"}, "my no: 20 rows, 25.0% of what is drawn; the "
         "run goes through it 0.20 times"),
    ],
)  # fmt: skip
def test_a_dry_run_says_what_becomes_of_the_data_and_shows_samples(mixed, capsys, settings, words):
    train.command(config(**settings), ["--dry-run"])
    said = capsys.readouterr().out
    assert words in said
    assert "--- sample 2:" in said and "[[" in said.split("--- sample 1")[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "chat:1 nothing:2 nil:3",
            ["data/nothing.bin and .idx: there is no such file", "data/nil.bin and .idx: there is no"],
        ),
        ("chat:1 data/chat.idx:2", ["names data/chat more than once"]),
        ("chat:1 my no", ["gives my no no weight"]),
        ("chat:0 my no:1", ["gives chat the weight 0; it must be more than 0"]),
    ],
)
def test_everything_wrong_with_a_mixture_is_reported_at_once(mixed, text, words):
    with pytest.raises(SettingErrors) as result:
        train.command(config(DATA_PATH=text), [])
    messages = [p.message for p in result.value.problems if p.name == "DATA_PATH"]
    assert len(messages) == len(words) and all(w in m for w, m in zip(words, messages, strict=True))


def test_a_file_whose_very_name_validations_like_a_mixture_is_that_file(mixed, capsys):
    for ending in ("bin", "idx"):
        (mixed / "data" / f"chat:1.{ending}").write_bytes((mixed / "data" / f"my no.{ending}").read_bytes())
    train.command(config(DATA_PATH="chat:1"), ["--dry-run"])
    assert "data/chat:1.bin: 20 rows" in capsys.readouterr().out


def test_a_mixture_names_its_run_and_its_run_json_says_what_auto_became(mixed):
    from datetime import datetime

    train.command(config(DATA_PATH="chat:1 my no:1", RUN_NAME="", **BUCKET), [])
    [folder] = [path for path in (mixed / "output").iterdir() if not path.is_symlink()]
    assert folder.name.startswith(f"chat+my no-lora-{datetime.now():%Y}")
    settings = json.loads((folder / "run.json").read_text())
    assert (settings["DATA_PATH"], settings["TRAIN_LENGTHS"], settings["MICRO_BSZ"]) == ("chat:1 my no:1", "64", "auto")
    # what it says can be said again
    again = {
        n: str(settings[n]) for n in ("CTX_LEN", "TRAIN_LENGTHS", "TRAIN_BATCH_SIZES", "EPOCH_STEPS", "NUM_WORKERS")
    }
    _, records = run(mixed, "again", DATA_PATH="chat:1 my no:1", **BUCKET, **again)
    assert [r["targets"] for r in records] == [
        json.loads(line)["targets"] for line in (folder / "loss.jsonl").read_text().splitlines()
    ]


def test_a_run_remembers_the_template_of_its_data_and_chat_talks_in_it(ready, capsys, monkeypatch):
    from helpers.training import run, tokenize

    from rwkv_peft.checkpoint import sidecars
    from rwkv_peft.cli import chat

    tokenize(ready / "data" / "chat.jsonl", PROMPT_TYPE="rwkv-qa", EOT="both")
    run(ready, "qa")
    sidecar = sidecars.read_sidecar(ready / "output" / "qa" / "rwkv-0.pth", ("prompt_type", "eot"))
    assert (sidecar["prompt_type"], sidecar["eot"]) == ("rwkv-qa", "both")
    asked = []
    monkeypatch.setattr(chat, "once", lambda model, config, how, *_: asked.append(how.template.name))
    settings = chat.ChatConfig("", "output/qa", "rwkv-world", "auto", "", 5, 0.0, 1.0, 0, 0, "fp32")
    capsys.readouterr()
    chat.command(settings, ["--prompt", "Hi"])
    assert "PROMPT_TYPE=rwkv-qa: what it was trained with." in capsys.readouterr().err
    chat.command(settings, ["--prompt", "Hi", "--prompt-type", "chatml"])
    chat.command(settings, ["--prompt", "Hi", "--raw"])
    assert asked == ["rwkv-qa", "chatml", "empty"]


def test_data_of_different_templates_are_reported(ready, capsys):
    from helpers.training import tokenize

    (ready / "data" / "other.jsonl").write_bytes((ready / "data" / "chat.jsonl").read_bytes())
    tokenize(ready / "data" / "other.jsonl", PROMPT_TYPE="rwkv-g1")
    train.command(config(DATA_PATH="chat:1 other:1"), ["--dry-run"])
    said = capsys.readouterr().out
    assert "these data were made with different templates: rwkv-g1 with EOT=doc, rwkv-world with EOT=doc" in said
