"""F10: hostile names and values. Nothing of them is ever evaluated, they arrive as they are or are refused with a sentence, and
nothing is written outside the project."""

import os
import random
import shlex
import subprocess
import sys

import pytest
from helpers import tiny
from helpers.kit import EVERYTHING
from helpers.training import config, run, tokenize

from rwkv_peft.checkpoint import run_dir
from rwkv_peft.cli import train
from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.merge.inputs import checkpoint_files

PIECES = (
    "$(touch CANARY)", "`touch CANARY`", "; touch CANARY;", "| touch CANARY", "&& touch CANARY", "${IFS}", "$HOME", "\\",
    "'", '"', "\n", "\t", " ", "  ", "*", "?", "[a", "~", "!", "#", "%s", "{a,b}", "-rf", "--", "..", "../", "/", "//", ".",
    "$$", "=", ":", "1:", "a", "数据", "🦜", "é", "\u202e", "\ufeff", "x" * 300, "NUL", "con", "%00", "\x7f", "\x1b[31m",
    "latest", "auto", "none",
)  # fmt: skip


def names(count: int, seed: int = 0):
    rng = random.Random(seed)
    return ["".join(rng.choice(PIECES) for _ in range(rng.randint(1, 4))) for _ in range(count)]


def everything(root):
    return {p for p in root.parent.rglob("*") if p.name.startswith("CANARY") or not p.is_relative_to(root)}


@pytest.mark.slow
@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_training_takes_a_name_as_it_is_or_refuses_it(ready, monkeypatch, count):
    monkeypatch.chdir(ready)
    before = everything(ready)
    for i, name in enumerate(names(count)):
        for variable in ("RUN_NAME", "MODEL_PATH", "DATA_PATH", "lora_load", "SAMPLE_PROMPTS")[i % 5 : i % 5 + 1]:
            try:
                train.command(config(**{"RUN_NAME": "", variable: name}), ["--dry-run"])
            except (SettingErrors, UserError, OSError) as refused:
                assert str(refused)
    assert everything(ready) == before and list((ready / "output").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("count", [12, pytest.param(60, marks=pytest.mark.slow)])
def test_a_run_of_any_name_lies_in_its_folder(ready, monkeypatch, count):
    monkeypatch.chdir(ready)
    before, trained = everything(ready), 0
    for name in names(count, seed=1):
        try:
            run(ready, name, EPOCH_STEPS="1")
        except (SettingErrors, UserError, OSError):
            continue
        trained += 1
        assert {"run.json", "loss.jsonl", "rwkv-0.pth"} <= {p.name for p in (ready / "output" / name).iterdir()}
        assert run_dir.run_folder(name) == ready / "output" / name
    assert trained >= count // 6 and everything(ready) == before
    assert all(p.parent == ready / "output" for p in (ready / "output").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("count", [60, pytest.param(500 if EVERYTHING else 150, marks=pytest.mark.slow)])
def test_tokenizing_a_file_of_any_name_writes_beside_it_and_merging_finds_nothing(project_folder, monkeypatch, count):
    monkeypatch.chdir(project_folder)
    before, made = everything(project_folder), 0
    for name in names(count, seed=2):
        if "/" in name or len(name.encode()) > 200 or name in (".", ".."):
            continue
        source = project_folder / "data" / f"{name}.jsonl"
        tiny.write_jsonl(source, tiny.CHATS[:2])
        try:
            tokenize(source)
            made += 1
        except (UserError, SettingErrors) as refused:
            assert str(refused)
        assert all(p.name.startswith(name) for p in (project_folder / "data").iterdir())
        for left in (project_folder / "data").iterdir():
            left.unlink()
        with pytest.raises((UserError, SettingErrors, OSError)):
            checkpoint_files([name], "")
    assert made > count // 4 and everything(project_folder) == before


def test_bash_hands_values_over_as_they_are(tmp_path):
    """All of them in one script, each once as a setting and once behind the command."""
    values = [name for name in names(500, seed=3) if "\x00" not in name]
    script = tmp_path / "x y.sh"
    lines = [f"V{i}={shlex.quote(value)}" for i, value in enumerate(values)]
    code = "import os, sys; print([os.environ[f'V{i}'] for i in range(len(sys.argv) - 1)] == sys.argv[1:])"
    show = f'exec {shlex.quote(sys.executable)} -c {shlex.quote(code)} "$@"'
    script.write_text("\n".join(["#!/usr/bin/env bash", "set -euo pipefail", "set -a", *lines, "set +a", show]) + "\n")
    done = subprocess.run(["bash", script, *values], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "True\n", done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["x y.sh"]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["training.sh", "make_tokenize.sh", "merge.sh"])
def test_the_scripts_evaluate_nothing(kit, script):
    """Real scripts, with the values that would do most."""
    variable = {"training.sh": "MODEL_PATH", "merge.sh": "MODEL_PATH", "make_tokenize.sh": "PROMPT_TYPE"}[script]
    text = (kit.root / script).read_text()
    for value in (*PIECES[:8], "$(touch CANARY)/../x y`touch CANARY`"):
        lines = [
            f"{variable}={shlex.quote(value)}" if line.startswith(f"{variable}=") else line
            for line in text.splitlines()
        ]
        (kit.root / script).write_text("\n".join(lines) + "\n")
        kit.run(script, value, ok=False)
    assert not list(kit.root.rglob("CANARY*")) and not os.path.exists("/CANARY")
