"""One way to address a run and its epoch, in every command: latest, a name or a path; a number, last, best or step-N."""

import json
import shlex

import pytest
from helpers.training import config

from rwkv_peft.chat import load
from rwkv_peft.checkpoint import run_dir
from rwkv_peft.cli import chat, train
from rwkv_peft.cli.merge import MergeConfig, command, command_line
from rwkv_peft.common import paths
from rwkv_peft.common.errors import UserError
from rwkv_peft.merge.inputs import checkpoint_files


def make(root, name: str, *files: str):
    """A run in output/ with these checkpoints, which is the newest."""
    folder = root / "output" / name
    folder.mkdir()
    for number, file in enumerate(files):
        (folder / f"rwkv-{file}.pth").touch()
        (folder / f"rwkv-{file}.json").write_text(json.dumps({"step": number}))
    (folder / "run.json").write_text("{}")
    run_dir.point_latest(folder)
    return folder


@pytest.fixture
def two(project_folder, monkeypatch):
    monkeypatch.chdir(project_folder)
    make(project_folder, "a run", "0", "1", "best", "step-30")
    make(project_folder, "b", "0", "7", "best", "step-2")
    (project_folder / "model" / "base.pth").touch()
    return project_folder


ONE_WORD = {
    "latest": "b/rwkv-7",
    "latest/0": "b/rwkv-0",
    "latest/best": "b/rwkv-best",
    "output/latest": "b/rwkv-7",
    "output/latest/step-2": "b/rwkv-step-2",
    "a run": "a run/rwkv-1",
    "a run/": "a run/rwkv-1",
    "a run/0": "a run/rwkv-0",
    "a run/last": "a run/rwkv-1",
    "a run/best": "a run/rwkv-best",
    "a run/step-30": "a run/rwkv-step-30",
    "output/a run": "a run/rwkv-1",
    "./output/a run/": "a run/rwkv-1",
    "output/a run/best": "a run/rwkv-best",
    "output/a run/rwkv-0.pth": "a run/rwkv-0",
    "a run/rwkv-0.pth": "a run/rwkv-0",
    "a run/rwkv-0": "a run/rwkv-0",
    "7": "b/rwkv-7",
    "007": "b/rwkv-7",
    "last": "b/rwkv-7",
    "best": "b/rwkv-best",
    "step-2": "b/rwkv-step-2",
}


@pytest.mark.parametrize(("word", "file"), ONE_WORD.items())
def test_a_word_addresses_the_same_checkpoint_everywhere(two, word, file):
    path = two / "output" / f"{file}.pth"
    assert run_dir.find_checkpoint(word).resolve() == path
    assert [result.resolve() for result in checkpoint_files([word], "")] == [path]
    assert [result.resolve() for result in checkpoint_files([word, word], "", "--stack")] == [path, path]


def test_an_absolute_path_of_a_run_anywhere(two, tmp_path):
    folder = make(two, "c", "4").rename(tmp_path / "elsewhere")
    assert run_dir.find_checkpoint(str(folder)) == run_dir.find_checkpoint(f"{folder}/4") == folder / "rwkv-4.pth"


@pytest.mark.parametrize(
    ("typed", "run", "file"),
    [
        ("", "", "b/rwkv-7"),
        ("", "a run", "a run/rwkv-1"),
        ("0", "", "b/rwkv-0"),
        ("0", "a run", "a run/rwkv-0"),
        ("best", "a run", "a run/rwkv-best"),
        ("'a run' 0", "", "a run/rwkv-0"),
        ("b 7", "", "b/rwkv-7"),
        ("'a run' last", "", "a run/rwkv-1"),
        ("latest best", "", "b/rwkv-best"),
        ("output/b step-2", "", "b/rwkv-step-2"),
        ("b rwkv-0.pth", "", "b/rwkv-0"),
        ("b rwkv-best", "", "b/rwkv-best"),
        ("--run 'a run' 0", "", "a run/rwkv-0"),
        ("--run=latest best", "a run", "b/rwkv-best"),
        ("--run 'output/a run'", "b", "a run/rwkv-1"),
    ],
)
def test_merge_takes_a_run_and_an_epoch(two, typed, run, file):
    words, given, how, _ = command_line(shlex.split(typed))
    assert not how and checkpoint_files(words, given or run) == [two / "output" / f"{file}.pth"]


@pytest.mark.parametrize(
    ("typed", "run", "words"),
    [
        ("b 'a run'", "", "./merge.sh --stack b 'a run'"),
        ("output/b/rwkv-7.pth 'a run'", "", "./merge.sh --stack output/b/rwkv-7.pth 'a run'"),
        ("b 0 7", "", "./merge.sh --stack b/0 b/7"),
        ("0 7", "", "./merge.sh --stack 0 7"),
        ("b 1.5", "", "1.5: there is no such run or checkpoint"),
        ("b Best", "", "Best: there is no such run or checkpoint"),
        ("7 b", "", "^7 b: the run comes first:\n  ./merge.sh b 7$"),
        ("best 'a run'", "", "the run comes first:\n  ./merge.sh 'a run' best$"),
        ("0 b 7", "", "\n  ./merge.sh --stack b/0 b/7$"),
        ("b 0 'a run' last", "", "\n  ./merge.sh --stack b/0 'a run/last'$"),
        ("7 output/b/rwkv-7.pth", "", "\n  ./merge.sh --stack latest/7 output/b/rwkv-7.pth$"),
        ("b/0 7", "", "b/0: there is no such run"),
        ("output/b/rwkv-7.pth 7", "", "is a file, which has no epoch 7"),
        ("b 5", "", "has no rwkv-5.pth; it has the epochs 0, 7 and the steps 2"),
        ("b/5", "", "has no rwkv-5.pth; it has the epochs 0, 7"),
        ("output/b/rwkv-9.pth", "", "has no rwkv-9.pth; it has the epochs"),
        ("b/beste", "", "has no beste. Write a run and its epoch as RUN/EPOCH"),
        ("bb best", "", "bb: there is no such run"),
        ("c", "", "c: there is no such run or checkpoint"),
        ("-1", "", "an epoch is a whole number from 0"),
        ("step-9", "", "has no rwkv-step-9.pth"),
        (f"b {'9' * 200}", "", "there is no such run or checkpoint"),
        (f"step-{'9' * 200}", "", "there is no such run or checkpoint"),
        ("--average b:1e10 b", "", "more than 0, and less than 1e9"),
        ("0", "c", "RUN=c: there is no such run"),
        ("model", "", "model: there is no such run"),
        ("--stack b 'a run'/0 0", "", "of which run\\? Write the run and the epoch together, as b/0"),
        ("--stack b/0 output/b/rwkv-7.pth 7", "", "of which run\\? Write the run and the epoch together, as RUN/7"),
        ("--stack b", "", "--stack needs two"),
        ("--average b", "", "--average needs two"),
    ],
)
def test_what_addresses_no_single_checkpoint_is_refused_with_the_line_to_take(two, typed, run, words):
    typed = shlex.split(typed)
    with pytest.raises(UserError, match=words):
        command(MergeConfig(run, "", "original", "", "", ""), typed)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("--run b 'a run'", "both say which run"),
        ("--run", "--run wants a run behind it"),
        ("--run=", "--run wants a run behind it"),
        ("--stack --average b b", "--stack and --average do not go together"),
        ("--stak a b", "is not an option; did you mean --stack"),
    ],
)
def test_options_that_contradict_each_other_are_refused(two, typed, words):
    with pytest.raises(UserError, match=words):
        command(MergeConfig("", "", "original", "", "", ""), shlex.split(typed))


@pytest.mark.parametrize("words", [["a run"], ["a run", "0"], ["a run/0"], ["--stack", "a run", "b/0"]])
def test_a_run_that_is_set_and_not_used_is_reported(two, capsys, words):
    words, _, how, _ = command_line(words)
    checkpoint_files(words, "b", how)
    assert "note: RUN=b is not used" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["1", "best", "last", "step-3"])
def test_a_run_whose_name_can_be_an_epoch_is_addressed_by_its_path(two, capsys, name):
    folder = make(two, name, "0", "1", "best", "step-3")
    assert (
        run_dir.find_checkpoint(f"output/{name}")
        == run_dir.find_checkpoint(f"output/{name}/1")
        == folder / "rwkv-1.pth"
    )
    assert checkpoint_files([f"output/{name}", "1"], "") == checkpoint_files(["1"], name) == [folder / "rwkv-1.pth"]
    assert checkpoint_files([name, "0"], "") == [folder / "rwkv-0.pth"], "in front of an epoch stands a run"
    assert run_dir.merge_arguments(folder, "0") == f"output/{name} 0"
    run_dir.point_latest(two / "output" / "a run")
    assert run_dir.find_checkpoint(name.replace("3", "30")).parent == two / "output" / "a run"
    assert name == "step-3" or f"note: {name} is taken for an epoch; the run of that name is output/{name}" in (
        capsys.readouterr().err
    )


@pytest.mark.smoke(2)
@pytest.mark.parametrize("word", ["first", "first/0", "latest", "latest/last", "0", "output/first/rwkv-0.pth"])
def test_chat_and_training_take_the_same_addresses(ready, word):
    train.command(config(RUN_NAME="first"), [])
    path = paths.OUTPUT / "first" / "rwkv-0.pth"
    assert load.find_adapter(word).resolve() == path
    train.command(config(RUN_NAME="second", lora_load=word), ["--dry-run"])


def test_diagnose_takes_a_run_and_its_epoch(ready, capsys):
    train.command(config(RUN_NAME="first", EPOCH_COUNT="2"), [])
    asking = chat.ChatConfig("", "", "rwkv-world", "auto", "", 8, 0.0, 1.0, 0, 1, "fp32")
    chat.command(asking, ["--diagnose", "first/0"])
    assert "output/first/rwkv-0.pth (LoRA) beside its base" in capsys.readouterr().out
    with pytest.raises(UserError, match="a run and its epoch are one word: --adapter RUN/0, --diagnose RUN/0"):
        chat.command(asking, ["--diagnose", "first", "0"])


@pytest.mark.slow
def test_merged_by_script_with_the_lines_of_the_help(shared_kit):
    kit = shared_kit
    for name in ("one", "two"):
        kit.run(kit.set(to=f"{name}.sh", RUN_NAME=name, EPOCH_COUNT="2"))
    for typed, run, made in (
        (["1"], "", "tiny-two-1"),
        (["one", "0"], "", "tiny-one-0"),
        (["latest", "last"], "", "tiny-two-1"),
        (["--run", "one", "last"], "", "tiny-one-1"),
        (["0"], "one", "tiny-one-0"),
        (["--stack", "one/0", "two"], "", "tiny-one-0+two-1"),
    ):
        said = kit.run("merge.sh", *typed, **({"RUN": run} if run else {})).stdout
        assert f"wrote     merge/{made}.pth" in said
    refused = kit.run("merge.sh", "output/one/rwkv-0.pth", "output/two/rwkv-1.pth", ok=False)
    assert refused.returncode == 2
    assert "./merge.sh --stack output/one/rwkv-0.pth output/two/rwkv-1.pth" in refused.stderr
