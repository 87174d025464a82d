"""The scripts are the product: they parse, read clean, explain every variable, and run from anywhere."""

import dataclasses
import os
import re
import shlex
import subprocess

import pytest
from helpers.kit import ROOT
from helpers.scripts import shell_values

from rwkv_peft.cli.chat import ChatConfig
from rwkv_peft.cli.merge import MergeConfig
from rwkv_peft.config.shell import Script, parse_assignments
from rwkv_peft.config.train import RETIRED, TrainConfig
from rwkv_peft.preprocess.config import TokenizeConfig

CONFIGS = {
    "training.sh": TrainConfig,
    "make_tokenize.sh": TokenizeConfig,
    "merge.sh": MergeConfig,
    "chat.sh": ChatConfig,
}
ALL = [*CONFIGS, "quickstart.sh", "test.sh", "setup.sh", "rwkv_peft/run.sh"]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shipped_script_reads_clean(name):
    Script(ROOT / name, shell_values(ROOT / name)).read(CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_script_sets_exactly_the_declared_variables_in_their_order(name):
    script = Script(ROOT / name, {})
    declared = [f.metadata["var"] for f in dataclasses.fields(CONFIGS[name])]
    assert [n for n in script.lines if not n.startswith("_")] == declared


@pytest.mark.parametrize("name", CONFIGS)
def test_every_variable_has_a_comment_above_it(name):
    lines = (ROOT / name).read_text().splitlines()
    for variable, number in Script(ROOT / name, {}).lines.items():
        if not variable.startswith("_"):
            assert lines[number - 2].startswith("#"), f"{name}: {variable} has no comment above it"


def test_every_variable_of_training_sh_is_explained_in_chinese_too():
    text = (ROOT / "training.sh").read_text()
    sections = re.split(r"\n\n", text[text.index("What to train") :])
    for section in sections:
        if re.search(r"^[A-Za-z_]+=", section, re.M):
            assert re.search("[\u4e00-\u9fff]", section), section


def test_no_retired_name_is_a_setting():
    assert not set(RETIRED) & {f.metadata["var"] for f in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_script_that_is_read_without_bash_says_the_same(name):
    reported = {n: v for n, v in parse_assignments(ROOT / name).items() if not n.startswith("_")}
    assert reported and reported.items() <= shell_values(ROOT / name).items()
    assert {f.metadata["var"] for f in dataclasses.fields(CONFIGS[name])} <= reported.keys()


@pytest.mark.parametrize("name", ALL)
def test_the_script_is_executable_bash_without_eval(name):
    path = ROOT / name
    assert path.stat().st_mode & 0o111
    assert path.read_text().startswith("#!/usr/bin/env -S bash #\n")  # whatever a line ends with
    assert not re.search(r"\beval\b", path.read_text())
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_help_is_shown_from_any_folder(name, tmp_path):
    done = subprocess.run([str(ROOT / name), "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0
    assert f"./{name}" in done.stdout
    assert f"Settings are changed in {name} itself" in done.stdout
    assert ("Only RUN is taken from there" in done.stdout) == (name == "merge.sh")


def test_help_may_be_cut_off():
    words = f"{shlex.quote(str(ROOT / 'training.sh'))} --help | head -1"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True)
    assert "./training.sh" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", CONFIGS)
def test_a_setting_of_the_shell_counts_for_nothing_and_is_reported(name):
    given = {**os.environ, "RUN": "no such run", "SEED": "7", "MODEL_PATH": "no such model"}
    done = subprocess.run([str(ROOT / name), "--no-such-option"], capture_output=True, text=True, env=given)
    reported = re.findall(
        r"warning   (\w+) was set in the shell, which counts for nothing: .* of " + re.escape(name), done.stderr
    )
    fields = {f.metadata["var"] for f in dataclasses.fields(CONFIGS[name])}
    assert done.returncode == 2 and set(reported) == {"SEED", "MODEL_PATH"} & fields, done.stderr
    others = subprocess.run([str(ROOT / name), "--no-such-option"], capture_output=True, text=True)
    assert "counts for nothing" not in others.stderr


SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.sh"), ROOT / "rwkv_peft/run.sh"])


@pytest.mark.parametrize("ends", ["", "\r"], ids=["as it is", "Windows line ends"])
@pytest.mark.parametrize("name", [name for name in SCRIPTS if "/" not in name])
def test_sh_instead_of_bash_is_answered_with_what_to_do(tmp_path, name, ends):
    copy = tmp_path / name
    copy.write_bytes((ROOT / name).read_bytes().replace(b"\n", f"{ends}\n".encode()))
    done = subprocess.run(["dash", copy], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == f"Run this with bash: bash {copy}\n"


@pytest.mark.parametrize("lines", ["all", "one"])
@pytest.mark.parametrize("how", [[], ["bash"]], ids=["by its name", "by bash"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_windows_line_ends_are_answered_with_a_fix_that_cures(tmp_path, name, how, lines):
    copy, right = tmp_path / "it's my copy.sh", (ROOT / name).read_bytes()
    copy.write_bytes(right.replace(b"\n", b"\r\n") if lines == "all" else right + b"# mine\r\n")
    copy.chmod(0o755)
    done = subprocess.run([*how, copy], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    reported, _, fix = done.stderr.partition(". Run: ")
    assert reported == f"{copy} has Windows line ends"
    subprocess.run(fix, shell=True, check=True)
    assert copy.read_bytes().replace(b"# mine\n", b"") == right
