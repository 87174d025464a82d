"""Paths of Windows, web addresses and other names that are no files here are answered by what they are."""

import pytest

from rwkv_peft.common import paths
from rwkv_peft.common.errors import UserError
from rwkv_peft.common.paths import explain_foreign_path
from rwkv_peft.data.tokenized_files import data_files, missing_data
from rwkv_peft.preprocess import files


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("C:\\Users\\me\\my.jsonl", "/mnt/c/Users/me/my.jsonl"),
        ("c:/Users/me/my.jsonl", "/mnt/c/Users/me/my.jsonl"),
        ("D:\\a b\\my.jsonl", "'/mnt/d/a b/my.jsonl'"),
        ('"C:\\Users\\me\\my.jsonl"', "/mnt/c/Users/me/my.jsonl"),
        ("C:Usersmemy.jsonl", "bash has taken the backslashes"),
        ("C:Usersmemy.jsonl", "/mnt/c/"),
        ("C:Usersmemy.jsonl", "single quotes"),
        ("\\\\wsl$\\Ubuntu\\home\\me\\my.jsonl", "/home/me/my.jsonl"),
        ("\\\\wsl.localhost\\Ubuntu-22.04\\home\\me\\my.jsonl", "/home/me/my.jsonl"),
        ("//wsl$/Ubuntu/home/me/my.jsonl", "/home/me/my.jsonl"),
        ("\\wslUbuntuhomememy.jsonl", "single quotes"),
        ("\\\\server\\share\\my.jsonl", "network path"),
        ("file:///C:/Users/me/my%20data.jsonl", "'/mnt/c/Users/me/my data.jsonl'"),
        ("file:///home/me/my.jsonl", "/home/me/my.jsonl"),
        ("/c/Users/me/my.jsonl", "/mnt/c/Users/me/my.jsonl"),
        ("sub\\my.jsonl", "sub/my.jsonl"),
        ("https://example.org/my.jsonl", "web address"),
    ],
)
def test_a_path_of_another_system_is_answered_with_the_one_here(name, words):
    assert words in explain_foreign_path(name)


@pytest.mark.parametrize(
    "name", ["my.jsonl", "sub/my.jsonl", "~/my.jsonl", "chat:0.7 code:0.3", "a:1", "x:0.5", "中文.jsonl", "a b"]
)
def test_other_names_are_left_alone(name):
    assert explain_foreign_path(name) == ""


def test_whether_the_file_is_there_is_said(tmp_path, monkeypatch):
    (tmp_path / "my.jsonl").write_text("x")
    here = str(tmp_path / "my.jsonl").replace("/", "\\")
    assert "it is there: use that" in explain_foreign_path(f"\\\\wsl$\\Ubuntu{here}")
    assert "nothing is there either" in explain_foreign_path("\\\\wsl$\\Ubuntu\\no\\my.jsonl")


def test_a_path_that_lost_its_separators_is_put_together_again(tmp_path):
    (tmp_path / "Users" / "me").mkdir(parents=True)
    (tmp_path / "Users" / "my.jsonl").write_text("x")
    (tmp_path / "Users" / "me" / "my.jsonl").write_text("x")
    assert paths._find_without_separators(tmp_path, "Usersmemy.jsonl") == tmp_path / "Users" / "me" / "my.jsonl"
    assert paths._find_without_separators(tmp_path, "Usersnobody.jsonl") is None


def test_data_and_tokenized_data_are_answered_alike(project_folder):
    for name in ("C:\\Users\\me\\my.jsonl", "C:Usersmemy.jsonl"):
        with pytest.raises(UserError, match="/mnt/c/"):
            files.named(name)
        assert "/mnt/c/" in data_files(name)[1][0]
    assert "/mnt/c/Users/my" in data_files("C:\\Users\\my:0.7 C:\\Users\\other:0.3")[1][0]


def test_the_base_of_a_training_is_answered_so_too(project_folder):
    from helpers.training import config

    from rwkv_peft.common.errors import SettingErrors
    from rwkv_peft.train.checks import open_files

    set_to = config(MODEL_PATH="C:\\models\\rwkv.pth", DATA_PATH="D:\\data\\chat")
    with pytest.raises(SettingErrors) as reported:
        open_files(set_to, paths.resolve_model(set_to.model_path), True)
    said = {problem.name: problem.message for problem in reported.value.problems}
    assert "/mnt/c/models/rwkv.pth" in said["MODEL_PATH"] and "/mnt/d/data/chat" in said["DATA_PATH"]


def test_the_data_for_training_are_not_proposed_as_held_out_data(project_folder):
    for ending in ("bin", "idx"):
        (project_folder / "data" / f"otter.{ending}").write_bytes(b"")
    assert "did you mean otter?" in missing_data(project_folder / "data" / "otter.vaild")
    assert "did you mean" not in data_files("otter.vaild", ["otter"])[1][0]
    for ending in ("bin", "idx"):
        (project_folder / "data" / f"otter.valid.{ending}").write_bytes(b"")
    assert "did you mean otter.valid?" in data_files("otter.vaild", ["otter"])[1][0]
