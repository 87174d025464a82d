"""PROMPT_TYPE=auto, and warnings where base, data and chat do not fit one another."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from helpers.kit import ROOT
from helpers.merging import make_run
from helpers.scripts import shell_values
from helpers.training import config, run, tokenize

from rwkv_peft.checkpoint import prompt_format, sidecars
from rwkv_peft.checkpoint.base_template import describe_mismatch, find_base_template, is_g1_name
from rwkv_peft.checkpoint.prompt_format import PromptFormat
from rwkv_peft.cli import chat, train
from rwkv_peft.common import paths
from rwkv_peft.common.errors import UserError
from rwkv_peft.common.file_watch import FileWatch
from rwkv_peft.config.shell import Script
from rwkv_peft.preprocess.config import TokenizeConfig, settled
from rwkv_peft.text.presets import PRESETS

ROWS = [{"question": f"Q{i}", "answer": "A\n\nB"} for i in range(8)]


def write_rows(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def base_is(root: Path, name: str) -> None:
    text = (ROOT / "training.sh").read_text(encoding="utf-8")
    (root / "training.sh").write_text(
        text.replace('MODEL_PATH="rwkv7-tiny.pth"', f"MODEL_PATH={name}"), encoding="utf-8"
    )


def test_auto_is_what_ships_and_the_toy_base_is_a_world_model():
    assert (
        shell_values(ROOT / "make_tokenize.sh")["PROMPT_TYPE"]
        == shell_values(ROOT / "chat.sh")["PROMPT_TYPE"]
        == "auto"
    )
    shipped = Script(ROOT / "make_tokenize.sh", shell_values(ROOT / "make_tokenize.sh")).read(TokenizeConfig)
    became, reported = settled(shipped)
    assert became.prompt_type == "rwkv-world"
    assert reported == "PROMPT_TYPE=auto became rwkv-world (MODEL_PATH in training.sh is rwkv7-tiny.pth)"


@pytest.mark.parametrize(
    ("name", "yes"),
    [
        ("rwkv7-g1k-1.5b-20260930-ctx25600.pth", True), ("rwkv7-g1k-1.5b-20260930-ctx25600", True),
        ("RWKV7-G1-0.1B.safetensors", True), ("rwkv7-g1a4-2.9b-20251118.pth", True), ("my_g1.pth", True),
        ("rwkv7-1.5b-g1d", True), ("model/rwkv7-g1d-0.1b.pth", True), ("RWKV7-G1k-1.5B/model.safetensors", True),
        ("RWKV-x070-World-1.5B-v3.pth", False), ("rwkv7-tiny.pth", False), ("rwkv-kong1.pth", False),
        ("g10b.pth", False), ("big1.pth", False), ("rwkv7-g1k/mine.pth", False), ("", False),
    ],
)  # fmt: skip
def test_a_g1_model_is_known_by_its_name(name, yes):
    assert is_g1_name(Path(name)) == yes


def test_a_link_is_what_it_leads_to(tmp_path):
    (tmp_path / "rwkv7-g1k-1.5b.pth").touch()
    (tmp_path / "base.pth").symlink_to("rwkv7-g1k-1.5b.pth")
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    assert is_g1_name(tmp_path / "base.pth") and not is_g1_name(tmp_path / "loop.pth")


@pytest.mark.parametrize(
    "written", ["rwkv7-g1k-1.5b.pth", '"models/rwkv7-g1k-1.5b.pth"  # mine', "'/x y/rwkv7-g1k-1.5b.pth'"]
)
def test_tokenizing_reads_the_base_from_training_sh_and_says_so(project_folder, capsys, written):
    base_is(project_folder, written)
    path = write_rows(project_folder / "data" / "rows.jsonl")
    made = tokenize(path)
    words = "PROMPT_TYPE=auto became rwkv-g1 (MODEL_PATH in training.sh is rwkv7-g1k-1.5b.pth)"
    assert words in capsys.readouterr().out
    assert made["settings"]["PROMPT_TYPE"] == "rwkv-g1" and made["template"] == PRESETS["rwkv-g1"].to_dict()
    tokenize(path)  # unchanged, and said again
    said = capsys.readouterr().out
    assert words in said and "unchanged" in said
    base_is(project_folder, "RWKV-x070-World-0.1B.pth")
    assert tokenize(path)["settings"]["PROMPT_TYPE"] == "rwkv-world"  # another base makes other tokens


@pytest.mark.parametrize("content", [None, b"", b"MODEL_PATH=\n", b"\xff\xfe", b'MODEL_PATH="half\n'])
def test_without_a_base_it_is_the_world_format(project_folder, capsys, content):
    if content is not None:
        (project_folder / "training.sh").write_bytes(content)
    tokenize(write_rows(project_folder / "data" / "rows.jsonl"))
    assert "became rwkv-world (there is no training.sh that names a base" in capsys.readouterr().out


def test_a_base_that_was_trained_with_a_template_wants_that(project_folder):
    base = project_folder / "model" / "mine.pth"
    base.touch()
    form = PRESETS["rwkv-g1-bot"]
    sidecars.sidecar_path(base).write_text(json.dumps({"prompt_type": form.name, "template": form.to_dict()}))
    base_is(project_folder, "mine.pth")
    shipped = Script(ROOT / "make_tokenize.sh", shell_values(ROOT / "make_tokenize.sh")).read(TokenizeConfig)
    became, reported = settled(shipped)
    assert became.prompt_type == "rwkv-g1-bot" and "mine.pth, which was trained with rwkv-g1-bot" in reported
    own = dataclasses.replace(form, name="own", format_user="Q {{content}}")  # of a file that is gone
    sidecars.sidecar_path(base).write_text(json.dumps({"prompt_type": "own.json", "template": own.to_dict()}))
    became, reported = settled(shipped)
    assert became.prompt_type == "rwkv-world" and "own.json, a template that is not here any more" in reported
    sidecars.sidecar_path(base).write_text("no JSON")
    assert settled(shipped)[0].prompt_type == "rwkv-world"


@pytest.mark.parametrize(
    ("base", "name", "words"),
    [
        ("rwkv7-g1k-1.5b.pth", "rwkv-world", "is a G1 model by its name"),
        ("rwkv7-g1k-1.5b.pth", "rwkv-qa", "is a G1 model by its name"),
        ("rwkv7-g1k-1.5b.pth", "rwkv-g1-bot", ""), ("rwkv7-g1k-1.5b.pth", "rwkv-g1", ""),
        ("rwkv7-g1k-1.5b.pth", "chatml", ""), ("RWKV-x070-World-1.5B.pth", "rwkv-world", ""),
        ("RWKV-x070-World-1.5B.pth", "rwkv-g1-think", "does not say G1 in its name"),
        ("RWKV-x070-World-1.5B.pth", "alpaca", ""),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_base_is_reported(base, name, words):
    said = describe_mismatch(Path(base), PRESETS[name])
    assert words in said and bool(words) == bool(said)


def plan(capsys, **settings) -> str:
    capsys.readouterr()
    train.command(config(**settings), ["--dry-run"])
    return capsys.readouterr().out


def warned(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("warning")]


def test_the_plan_warns_of_data_that_do_not_fit_the_base(ready, capsys):
    shutil.copy(ready / "model" / "tiny.pth", ready / "model" / "rwkv7-g1k-tiny.pth")
    assert not warned(plan(capsys))
    [line] = warned(plan(capsys, MODEL_PATH="rwkv7-g1k-tiny.pth"))
    assert "made with PROMPT_TYPE=rwkv-world, but rwkv7-g1k-tiny.pth is a G1 model" in line
    tokenize(ready / "data" / "chat.jsonl", PROMPT_TYPE="rwkv-g1-fakethink")
    assert not warned(plan(capsys, MODEL_PATH="rwkv7-g1k-tiny.pth"))
    [line] = warned(plan(capsys))
    assert "PROMPT_TYPE=rwkv-g1-fakethink, but tiny.pth does not say G1" in line


def test_the_plan_warns_of_files_and_held_out_rows_of_other_templates(ready, capsys):
    shutil.copy(ready / "data" / "chat.jsonl", ready / "data" / "other.jsonl")
    tokenize(ready / "data" / "other.jsonl", PROMPT_TYPE="rwkv-qa", VALID_PERCENT="30")
    [line] = warned(plan(capsys, DATA_PATH="chat:1 other:1", VAL_DATA="none"))
    assert "different templates: rwkv-qa with EOT=doc, rwkv-world with EOT=doc" in line
    for kept in ("other", "other.valid"):
        [line] = warned(plan(capsys, VAL_DATA=kept))
        assert f"held-out rows of {kept} were made with PROMPT_TYPE=rwkv-qa with EOT=doc, the trained ones with" in line
    assert not warned(plan(capsys, DATA_PATH="other", VAL_DATA="auto"))


def test_a_stream_is_written_as_its_base_wants(ready, capsys):
    shutil.copy(ready / "model" / "tiny.pth", ready / "model" / "rwkv7-g1k-tiny.pth")
    settings = {"STREAMING": "1", "MAX_STEPS": "2", "CTX_LEN": "64", "EPOCH_COUNT": "1", "DATA_PATH": "chat.jsonl"}
    assert "PROMPT_TYPE=rwkv-world" in plan(capsys, **settings)
    said = plan(capsys, **settings, MODEL_PATH="rwkv7-g1k-tiny.pth")
    assert "PROMPT_TYPE=rwkv-g1," in said and not warned(said)


def test_a_run_keeps_the_content_of_its_template_through_training_and_merging(ready, capsys):
    tokenize(ready / "data" / "chat.jsonl", PROMPT_TYPE="rwkv-g1-bot-fakethink")
    run(ready, "bot")
    reported = sidecars.read_sidecar(ready / "output" / "bot" / "rwkv-0.pth", ("prompt_type", "template"))
    assert reported["prompt_type"] == "rwkv-g1-bot-fakethink"
    assert reported["template"] == PRESETS["rwkv-g1-bot-fakethink"].to_dict()


# ---- chat ----


def form_of_chat(capsys, asked="auto", typed=False, reported=None, base="rwkv7-tiny.pth"):
    capsys.readouterr()
    form = chat.form_to_talk_in(asked, typed, reported or {}, "it", Path(base))
    return form.name, capsys.readouterr().err


BOT = {"prompt_type": "rwkv-g1-bot", "template": PRESETS["rwkv-g1-bot"].to_dict()}


@pytest.mark.parametrize(
    ("options", "name", "words"),
    [
        ({}, "rwkv-world", "PROMPT_TYPE=auto became rwkv-world (by the base, rwkv7-tiny.pth)"),
        ({"base": "rwkv7-g1k.pth"}, "rwkv-g1", "PROMPT_TYPE=auto became rwkv-g1 (by the base, rwkv7-g1k.pth)"),
        ({"reported": BOT}, "rwkv-g1-bot", ""),
        ({"reported": BOT, "asked": "rwkv-world"}, "rwkv-g1-bot", "PROMPT_TYPE=rwkv-g1-bot: what it was trained with."),
        (
            {"reported": BOT, "asked": "rwkv-qa", "typed": True},
            "rwkv-qa",
            "warning: --prompt-type rwkv-qa, but it was trained ",
        ),
        ({"reported": BOT, "asked": "rwkv-g1-bot", "typed": True}, "rwkv-g1-bot", ""),
        (
            {"asked": "rwkv-world", "base": "rwkv7-g1k.pth"},
            "rwkv-world",
            "warning: PROMPT_TYPE=rwkv-world, but rwkv7-g1k.pth",
        ),
        ({"asked": "chatml", "typed": True}, "chatml", ""),
        ({"reported": {"prompt_type": "rwkv-g1-fakethink"}}, "rwkv-g1-emptythink-2025", ""),  # of an older version
    ],
)
def test_chat_talks_as_it_was_trained_and_warns_of_what_differs(capsys, options, name, words):
    result, said = form_of_chat(capsys, **options)
    assert result == name and words in said and bool(words) == bool(said)


def test_a_run_whose_template_is_gone_is_refused_unless_another_is_typed(capsys):
    with pytest.raises(
        UserError, match="was trained with PROMPT_TYPE=gone.json, which data/gone.json: there is no such"
    ):
        form_of_chat(capsys, reported={"prompt_type": "gone.json"})
    assert form_of_chat(capsys, reported={"prompt_type": "gone.json"}, asked="chatml", typed=True)[0] == "chatml"


def test_chat_refuses_a_question_that_holds_a_bound(capsys):
    settings = chat.ChatConfig("", "", "auto", "auto", "", 5, 0.0, 1.0, 0, 0, "fp32")
    with pytest.raises(UserError, match="holds ✿, which ends a turn in PROMPT_TYPE=rwkv-g1-bot"):
        chat.once(None, settings, PromptFormat(PRESETS["rwkv-g1-bot"]), "a✿b", False, FileWatch("it was opened", ""))


def test_several_runs_of_one_name_and_other_contents_leave_the_template_open(project_folder):
    from rwkv_peft.merge.write import alike

    old = {"prompt_type": "rwkv-g1-fakethink"}
    new = old | {"template": PRESETS["rwkv-g1-fakethink"].to_dict()}
    assert alike(new, dict(new), ("prompt_type", "template")) and not alike(old, new, ("prompt_type", "template"))


def test_chat_calls_the_old_empty_thought_by_its_name_of_now(capsys):
    reported, said = {"prompt_type": "rwkv-g1-fakethink"}, "was trained with PROMPT_TYPE=rwkv-g1-emptythink-2025"
    assert said in form_of_chat(capsys, "rwkv-g1-fakethink", True, reported)[1]
    assert form_of_chat(capsys, "rwkv-g1-emptythink-2025", True, reported) == ("rwkv-g1-emptythink-2025", "")
    assert prompt_format.read_prompt_format(reported, "it", Path("x.pth")).name == "rwkv-g1-emptythink-2025"


def test_a_plain_base_is_known_by_its_name_alone(project_folder):
    folder, base, _ = make_run(project_folder)
    assert find_base_template(base).name == "rwkv-world" and not find_base_template(base).trained
    assert find_base_template(paths.ROOT / "model" / "nothing-g1.pth").name == "rwkv-g1"
