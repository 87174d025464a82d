"""The harnesses on the inputs that are kept, for 20 seconds on new ones, and the rules themselves."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fuzz import __main__ as command
from fuzz import harness as rules
from fuzz.harness import Finding, Harness, Judge
from fuzz.worker import HEAD, ROOM, Worker, load
from rwkv_peft.common.errors import UserError

HARNESSES = command.names()


@pytest.fixture(autouse=True)
def temporary_folder():
    before = tempfile.tempdir
    yield
    tempfile.tempdir = before


def fuzz(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(command.HERE), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )


@pytest.mark.parametrize("name", HARNESSES)
def test_every_kept_input_is_refused_in_words_or_read_soundly(name, tmp_path):
    harness = load(name)
    judge = Judge(harness, tmp_path)
    seeds = harness.seeds()
    assert seeds
    outcomes = {judge.judge(path.read_bytes()) for path in seeds}
    assert outcomes


@pytest.mark.slow
@pytest.mark.parametrize("name", HARNESSES)
def test_twenty_seconds_of_new_inputs_break_no_rule(name, tmp_path):
    done = fuzz("--only", name, "--seconds", "20", "--seed", "1", "--results", str(tmp_path))
    kept = sorted(path for path in tmp_path.glob("findings/*/*") if path.suffix != ".txt")
    assert done.returncode == 0, done.stdout + done.stderr + "".join(f"\n{p.name}: {p.read_bytes()!r}" for p in kept)


class Planted(Harness):
    """Breaks the rule that its input names."""

    places = ("the file",)

    def seeds(self):
        return []

    def read(self, data: bytes, folder: Path) -> str:
        if data == b"word":
            raise UserError("the file: is wrong")
        if data == b"nowhere":
            raise UserError("something is wrong")
        if data == b"fault":
            raise KeyError("x")
        if data == b"result":
            rules.sound(False, "not sound")
        if data == b"write":
            (folder.parent / "elsewhere").write_text("x")
        if data == b"start":
            subprocess.run(["true"], check=True)
        if data == b"inside":
            (folder / "here").write_text("x")
        if data.startswith(b"square"):
            sum(1 for _ in data for _ in range(len(data) // 8))
        if data.startswith(b"line"):
            sum(1 for _ in data for _ in range(600))
        return "fine"


@pytest.fixture
def planted(tmp_path):
    (tmp_path / "work").mkdir()
    return Judge(Planted(), tmp_path / "work")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"nowhere", "a message without a place"),
        (b"fault", "KeyError"),
        (b"result", "not sound"),
        (b"write", "touched what is not its own"),
        (b"start", "touched what is not its own"),
    ],
)
def test_what_breaks_a_rule_is_a_finding(planted, data, kind):
    with pytest.raises(Finding, match=kind):
        planted.judge(data)


@pytest.mark.parametrize("data", [b"word", b"inside", b""])
def test_what_keeps_the_rules_is_none(planted, data):
    assert planted.judge(data)


def test_too_much_memory_is_a_finding(planted, monkeypatch):
    most = iter([60 << 20, 1200 << 20])  # (what a process once kept it may hold again unseen)
    monkeypatch.setattr(rules, "memory_now", lambda: 50 << 20)
    monkeypatch.setattr(rules, "most_memory", lambda: next(most))
    with pytest.raises(Finding, match="memory"):
        planted.judge(b"")


def test_too_much_time_is_a_finding(planted, monkeypatch):
    monkeypatch.setattr(rules, "SECONDS", 0.0)
    monkeypatch.setattr(rules, "PER_BYTE", 0.0)
    with pytest.raises(Finding, match="time"):
        planted.judge(b"square" * 300)


@pytest.mark.slow
@pytest.mark.parametrize(("word", "grows"), [(b"square", True), (b"line", False)])
def test_time_that_grows_faster_than_the_size_is_a_finding(planted, monkeypatch, word, grows):
    monkeypatch.setattr(rules, "SECONDS", 1000.0)
    monkeypatch.setattr(planted.harness, "grown", lambda data, random, size: (data * (size // len(data) + 1))[:size])
    try:
        result = planted.grow(word, 0, 1 << 14, much=0.05)
    except Finding as finding:
        result = finding.kind
    assert result == ("time grows faster than the size" if grows else "linear")


def test_a_finding_is_written_down_once_with_its_smallest_input(tmp_path):
    (tmp_path / "work").mkdir()
    shared = tmp_path / "shared"
    shared.write_bytes(bytes(HEAD.size + ROOM))
    worker = Worker.__new__(Worker)
    worker.harness, worker.results, worker.reported = Planted(), tmp_path, set()
    worker.harness.name = "planted"
    for data in (b"long input", b"short", b"a longer input"):
        worker.write(Finding("a kind", "its words"), data)
    [text, kept] = sorted(tmp_path.glob("findings/planted/*"), key=lambda path: path.suffix != ".txt")
    assert kept.read_bytes() == b"short" and text.read_text() == "a kind: its words"


def test_findings_are_named_and_make_the_command_fail(tmp_path, monkeypatch, capsys):
    path = tmp_path / "findings" / "map_keys" / "abc"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    path.with_name("abc.txt").write_text("KeyError somewhere: ...")
    monkeypatch.setattr(command, "fuzz", lambda name, *rest: command.Result(name, 5, findings=[path]))
    assert command.main(["--seconds", "1", "--only", "map_keys", "--results", str(tmp_path)]) == 1
    assert str(path) in (reported := capsys.readouterr().out) and "KeyError somewhere" in reported


def test_without_atheris_inputs_are_changed_at_random_and_that_is_said(tmp_path):
    done = fuzz(
        "--only", "map_keys", "--seconds", "9", "--runs", "300", "--results", str(tmp_path), FUZZ_WITHOUT_ATHERIS="1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "atheris is not installed" in done.stdout and " outcomes" in done.stdout


def test_an_input_is_judged_again_by_its_file(tmp_path):
    seed = load("map_keys").seeds()[0]
    assert fuzz("--replay", "map_keys", str(seed)).returncode == 0
