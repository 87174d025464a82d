"""A file that is in use and changes ends the command with exit code 2 and its name; nothing is saved after that."""

import contextlib
import dataclasses
import errno
import importlib
import itertools
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning  # noqa: F401 (once, for all that are forked)
import torch
from helpers import tiny
from helpers.kit import ROOT, few
from helpers.scripts import shell_values
from helpers.training import FAST, config, tokenize

import rwkv_peft.cli.merge as merging
from rwkv_peft.checkpoint import pth, pth_rewrite, run_dir, step_log, train_state
from rwkv_peft.cli import chat, train
from rwkv_peft.common import file_watch, hashing
from rwkv_peft.common.errors import EXIT_USER, SettingErrors, UserError, handle_errors
from rwkv_peft.config.shell import Script
from rwkv_peft.export import EXPORTS
from rwkv_peft.merge import fold
from rwkv_peft.merge import write as deliver
from rwkv_peft.preprocess import tokenize as tokenizing
from rwkv_peft.train.callbacks import loggers, metrics

LONG = {
    "lora_parts": "att,ffn",
    "EPOCH_COUNT": "9000",
    "EPOCH_SAVE": "9000",
    "SAVE_STEPS": "5",
    "KEEP_LAST": "3",
    "MICRO_BSZ": "1",
}
TOKENS = ("chat.bin", "chat.idx", "chat.roles.bin", "chat.roles.idx")


def other(content: bytes) -> bytes:
    """As many bytes, none of them the same."""
    return bytes(255 - byte for byte in content)


def overwrite(path: Path) -> None:
    content = other(path.read_bytes())
    with open(path, "r+b") as file:
        file.write(content)


def overwrite_and_put_the_time_back(path: Path) -> None:
    before = path.stat()
    overwrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    fresh = path.with_name("fresh")
    fresh.write_bytes(other(path.read_bytes()))
    os.replace(fresh, path)


def replace_by_a_shorter_one(path: Path) -> None:
    fresh = path.with_name("fresh")
    fresh.write_bytes(path.read_bytes()[:-1])
    os.replace(fresh, path)


def cut(path: Path) -> None:
    os.truncate(path, 1000 if path.stat().st_size > 1000 else 0)


def cut_below_a_page(path: Path) -> None:
    os.truncate(path, 10)


def grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\0")


def rename_the_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))


def link_to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def make_a_folder_of_it(path: Path) -> None:
    path.unlink()
    path.mkdir()


HARM = (
    overwrite, overwrite_and_put_the_time_back, replace, replace_by_a_shorter_one, cut, cut_below_a_page, grow, Path.unlink,
    rename_the_folder, link_to_nowhere, make_a_folder_of_it,
)  # fmt: skip


class Command:
    """A command in a process of its own, a copy of this one: it has everything imported already."""

    def __init__(self, work: Callable[[], object], log: Path):
        self.log = log
        self.pid = os.fork()
        if not self.pid:
            self.become(work)

    def become(self, work: Callable[[], object]) -> None:
        code = 70
        try:
            os.setsid()
            file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1), os.dup2(file, 2)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
            with handle_errors(lambda result: str(result)):
                work()
            code = 0
        except SystemExit as left:
            code = left.code or 0
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def runs(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def until(self, condition: Callable[[], object], seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.runs() and time.monotonic() < deadline, self.said
            time.sleep(0.01)

    def code(self, seconds: float = 60) -> int:
        deadline = time.monotonic() + seconds
        while self.runs() and time.monotonic() < deadline:
            time.sleep(0.02)
        if self.runs():
            os.killpg(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class Run:
    """A training of the project's, as long as it likes, with a state and a checkpoint every 5 steps."""

    def __init__(self, root: Path, **changes: str):
        self.root, self.folder, self.changes = root, root / "output/run", LONG | changes

    def start(self, *typed: str, **changes: str) -> Command:
        settings = config(**self.changes | changes)
        return Command(lambda: train.command(settings, list(typed)), self.root / "said.txt")

    def saved(self) -> list[Path]:
        return [p for p in [*self.folder.glob("rwkv-*.pth"), *self.folder.glob("state/step-*")]]

    def steps(self) -> int:
        log = self.folder / "loss.jsonl"
        return log.read_text().count("\n") if log.exists() else 0

    def stops(self, name: str, harm: Callable[[], object], **changes: str) -> str:
        """Start, do harm when something was saved, and see that it stops as it should."""
        process = self.start(**changes)
        process.until(lambda: self.folder.is_dir() and len(self.saved()) > 2)
        harm()
        return self.must_stop(process, name, time.time_ns())

    def must_stop(self, process: Command, name: str, when: int) -> str:
        code, said = process.code(), process.said
        assert code == EXIT_USER, said
        last = said.splitlines()[-1]
        assert name in last and "run the script again" in last and "Traceback" not in said, said
        assert not [p for p in self.saved() if p.stat().st_mtime_ns > when], said
        return said


@pytest.fixture
def run(ready) -> Run:
    return Run(ready)


@pytest.fixture
def finished(run) -> Run:
    """Where output/first/rwkv-0.pth is there to begin with."""
    assert Run(run.root, EPOCH_COUNT="1", SAVE_STEPS="0", EPOCH_SAVE="1", RUN_NAME="first").start().code() == 0
    return run


@pytest.mark.smoke(1)
@pytest.mark.parametrize("harm", few(HARM, (overwrite, cut, cut_below_a_page)))
@pytest.mark.parametrize("name", ["model/tiny.pth", "data/chat.bin"])
def test_a_run_stops(run, name, harm):
    path = run.root / name
    run.stops(name, lambda: harm(path))


@pytest.mark.slow
@pytest.mark.parametrize("harm", few((overwrite, replace, cut, Path.unlink), (replace,)))
@pytest.mark.parametrize("name", ["chat.idx", "chat.roles.bin", "chat.roles.idx"])
def test_every_token_file_is_watched(run, name, harm):
    run.stops(f"data/{name}", lambda: harm(run.root / "data" / name))


@pytest.mark.slow
@pytest.mark.parametrize(
    "harm", few((overwrite, overwrite_and_put_the_time_back, replace, cut, cut_below_a_page, Path.unlink), (overwrite,))
)
def test_so_is_the_checkpoint_that_a_run_began_with(finished, harm):
    first = finished.root / "output/first/rwkv-0.pth"
    said = finished.stops("output/first/rwkv-0.pth", lambda: harm(first), lora_load="latest/0")
    assert "starts from output/first/rwkv-0.pth" in said


@pytest.mark.slow
@pytest.mark.parametrize("harm", few((overwrite, replace, cut, Path.unlink), (replace,)))
def test_and_the_state_of_state_tuning(run, harm):
    tune = {"FINETUNE_MODE": "state_tuning"}
    short = Run(run.root, EPOCH_COUNT="1", SAVE_STEPS="0", EPOCH_SAVE="1", RUN_NAME="first", **tune)
    assert short.start().code() == 0
    first = run.root / "output/first/rwkv-0.pth"
    run.stops("output/first/rwkv-0.pth", lambda: harm(first), state_load="output/first/rwkv-0.pth", **tune)


@pytest.mark.slow
@pytest.mark.parametrize("harm", few((overwrite, cut), (overwrite,)))
def test_and_what_is_held_out(run, harm):
    for ending in (".bin", ".idx", ".roles.bin", ".roles.idx"):
        shutil.copy(run.root / f"data/chat{ending}", run.root / f"data/held{ending}")
    run.stops("data/held.bin", lambda: harm(run.root / "data/held.bin"), VAL_DATA="held", VAL_STEPS="5")


@pytest.mark.slow
@pytest.mark.parametrize("harm", few((overwrite, cut, Path.unlink), (overwrite,)))
def test_rows_that_are_streamed_are_watched(run, harm):
    rows = tiny.write_jsonl(run.root / "data/rows.jsonl", tiny.CHATS)
    streamed = {"STREAMING": "1", "DATA_PATH": "rows.jsonl", "MAX_STEPS": "90000", "CTX_LEN": "64", "EPOCH_COUNT": "1"}
    run.stops("data/rows.jsonl", lambda: harm(rows), **streamed)


@pytest.mark.slow
@pytest.mark.parametrize("harm", few((overwrite, cut), (cut,)))
@pytest.mark.parametrize("name", ["model/tiny.pth", "data/chat.bin"])
def test_processes_that_load_data_stop_as_well(run, name, harm):
    run.stops(name, lambda: harm(run.root / name), NUM_WORKERS="1")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model/tiny.pth", "data/chat.bin"])
def test_a_change_is_noticed_within_seconds_where_nothing_is_saved(run, name):
    process = run.start(SAVE_STEPS="0")
    process.until(lambda: run.steps() > 3)
    overwrite(run.root / name)
    run.must_stop(process, name, time.time_ns())
    assert not run.saved()


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no tmpfs")
@pytest.mark.parametrize("name", ["model/tiny.pth", "data/chat.bin"])
def test_a_write_that_leaves_the_times_alone_is_seen_in_the_content(run, name):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        path, real = run.root / name, Path(memory) / "file"
        shutil.move(path, real)
        path.symlink_to(real)

        def write() -> None:
            with open(real, "r+b") as file, mmap.mmap(file.fileno(), 0) as content:
                before = file_watch.read_stamp(real)
                content[:] = other(content[:])
                assert file_watch.read_stamp(real) == before

        run.stops(name, write)


def write_the_same_again(path: Path) -> None:
    content = path.read_bytes()
    with open(path, "r+b") as file:
        file.write(content)


def overwrite_and_put_the_content_back(path: Path) -> None:
    """As a copy into the file and back: what was read between is not known."""
    kept = path.read_bytes()
    overwrite(path)
    path.write_bytes(kept)


def replace_by_the_same(path: Path) -> None:
    fresh = path.with_name("fresh")
    shutil.copy2(path, fresh)
    os.replace(fresh, path)


WRITTEN = (os.utime, write_the_same_again, overwrite_and_put_the_content_back)  # the content is what it was
SAME = {
    "rights": lambda path: path.chmod(0o600),
    "linked": lambda path: os.link(path, path.with_name("another name")),
    "replaced": replace_by_the_same,
    "moved away and back": lambda path: (path.rename(path.with_name("x")), path.with_name("x").rename(path)),
}


@pytest.mark.smoke(1)
@pytest.mark.parametrize("harm", few(WRITTEN, (os.utime, overwrite_and_put_the_content_back)))
@pytest.mark.parametrize("name", ["model/tiny.pth", "data/chat.bin"])
def test_a_file_that_was_written_to_stops_a_run_and_the_last_state_resumes(run, name, harm):
    said = run.stops(name, lambda: harm(run.root / name))
    assert f"{name}: " in said.splitlines()[-1]
    step = max(int(p.name[5:]) for p in run.folder.glob("state/step-*"))
    process = run.start(EPOCH_COUNT=str(step // 4 + 2), EPOCH_SAVE="9000")
    assert process.code() == 0 and f"goes on   output/run at step {step}" in process.said, process.said


@pytest.mark.slow
@pytest.mark.parametrize("how", few(SAME, ("linked", "replaced")))
@pytest.mark.parametrize("name", ["model/tiny.pth", "data/chat.bin"])
def test_the_same_content_again_is_no_change(run, name, how):
    process = run.start()
    process.until(lambda: run.steps() > 6)
    SAME[how](run.root / name)
    noted = how == "replaced"
    if noted:
        process.until(lambda: f"{name} was replaced, and has the same content" in process.said)
    before = run.saved()
    process.until(lambda: not {*run.saved()} & {*before})  # each save looks at all files
    os.kill(process.pid, signal.SIGINT)
    assert process.code() == 130, process.said
    assert process.said.count("the same content") == noted


def test_nothing_is_saved_on_the_way_out_either(run):
    """Ctrl-C between the change and the look at it."""
    process = run.start(SAVE_STEPS="0")
    process.until(lambda: run.steps() > 3)
    overwrite(run.root / "data/chat.bin")
    when = time.time_ns()
    os.kill(process.pid, signal.SIGINT)
    run.must_stop(process, "data/chat.bin", when)
    assert not run.saved()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"EPOCH_COUNT": "3"}, {"EPOCH_SAVE": "1"}, {"KEEP_BEST": "1", "VAL_DATA": "chat"}],
    ids=["last", "every", "best"],
)
def test_nor_at_the_end_of_an_epoch(ready, monkeypatch, changes):
    """The change comes in the last step before something would be saved, in this very process."""
    from rwkv_peft.train.module import TrainingModule

    real, steps_done = TrainingModule.training_step, []

    def step(self, batch, number):
        steps_done.append(number)
        if len(steps_done) == 12:
            overwrite(ready / "data/chat.bin")
        return real(self, batch, number)

    monkeypatch.setattr(TrainingModule, "training_step", step)
    monkeypatch.setattr(file_watch, "CHECK_SECONDS", 1e9)  # only saves look
    shutil.copytree(ready / "data", ready / "kept")
    settings = LONG | {"SAVE_STEPS": "0", "RUN_NAME": "run"} | changes
    if "VAL_DATA" in changes:
        for ending in (".bin", ".idx", ".roles.bin", ".roles.idx"):
            shutil.copy(ready / f"data/chat{ending}", ready / f"data/held{ending}")
        settings["VAL_DATA"] = "held"
    with pytest.raises(file_watch.FileChanged, match="data/chat.bin: has other content"):
        train.command(config(**settings), [])
    result = {p.name for p in (ready / "output/run").glob("*") if p.name.startswith(("rwkv", "state"))}
    assert not result & {"rwkv-2.pth", "rwkv-2.json"} and len(steps_done) == 12


@pytest.mark.slow
def test_the_last_good_state_resumes_once_the_file_is_back(run):
    """With the bits of a run that was never disturbed; while the file is not back, it is refused."""
    path = run.root / "data/chat.bin"
    kept = path.read_bytes()
    run.stops("data/chat.bin", lambda: overwrite(path))
    step = max(int(p.name[5:]) for p in run.folder.glob("state/step-*"))
    ends = {"EPOCH_COUNT": str(step // 4 + 3), "EPOCH_SAVE": "9000"}
    process = run.start(**ends)
    assert process.code() == EXIT_USER and "DATA_PATH: has another content than when" in process.said
    path.write_bytes(kept)
    process = run.start(**ends)
    assert process.code() == 0 and f"goes on   output/run at step {step}" in process.said, process.said
    process = run.start(**ends, RUN_NAME="whole")
    assert process.code() == 0, process.said
    last = f"rwkv-{step // 4 + 2}.pth"
    mine, theirs = (pth.load(run.root / "output" / name / last) for name in ("run", "whole"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_run_with_another_base_is_refused(run):
    path = run.root / "model/tiny.pth"
    run.stops("model/tiny.pth", lambda: replace_by_another_model(path))
    process = run.start()
    assert process.code() == EXIT_USER and "MODEL_PATH: is another file than tiny.pth" in process.said, process.said


def replace_by_another_model(path: Path) -> None:
    tiny.save_model(path.with_name("fresh.pth"), seed=1)
    os.replace(path.with_name("fresh.pth"), path)


@pytest.mark.slow
@pytest.mark.parametrize("harm", few((overwrite, cut, Path.unlink), (overwrite,)))
@pytest.mark.parametrize("part", ["weights", "optimizer"])
def test_a_state_that_changes_while_it_is_read_is_not_gone_on_from(run, monkeypatch, part, harm):
    assert Run(run.root, EPOCH_COUNT="4").start().code() == 0
    real = train_state.TrainState.tensors

    def tensors(self, name):
        result = real(self, name)
        if name == part:
            harm(self.folder / f"{name}.safetensors")
        return result

    monkeypatch.setattr(train_state.TrainState, "tensors", tensors)
    process = run.start(EPOCH_COUNT="9")
    code, said = process.code(), process.said
    assert code == EXIT_USER and f"/{part}.safetensors: " in said.splitlines()[-1] and "Traceback" not in said, said


@pytest.mark.slow
def test_states_that_the_run_itself_removes_are_no_change(run):
    assert Run(run.root, EPOCH_COUNT="4").start().code() == 0
    process = run.start(EPOCH_COUNT="40", KEEP_LAST="1")
    assert process.code() == 0, process.said


@pytest.fixture
def two(kit):
    """A kit that trains with two processes."""
    tiny.save_model(kit.root / "model" / "tiny.pth")
    kit.data("chat.jsonl", *tiny.CHATS)
    kit.run("make_tokenize.sh", "chat.jsonl")
    kit.set(**FAST | LONG | {"GPU_COUNT": "2"})
    return kit


@pytest.mark.slow
@pytest.mark.parametrize("harm", [overwrite, cut, Path.unlink])
@pytest.mark.parametrize("name", ["model/tiny.pth", "data/chat.bin"])
def test_two_processes_stop_together(two, name, harm):
    first = subprocess.Popen(
        [str(two.root / "training.sh")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    folder = two.root / "output/run"
    deadline = time.monotonic() + 90
    while len(list(folder.glob("state/step-*"))) < 2:
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.05)
    harm(two.root / name)
    when = time.time_ns()
    said, _ = first.communicate(timeout=60)
    assert first.returncode == EXIT_USER and name in said.splitlines()[-1] and "Traceback" not in said, said
    assert said.count("Nothing was saved after that") == 1, said
    assert not [p for p in folder.glob("state/step-*") if p.stat().st_mtime_ns > when], said
    deadline = time.monotonic() + 30  # (one that has ended stays in the list until the system has taken note)
    while left := subprocess.run(["pgrep", "-g", str(first.pid)], capture_output=True, text=True).stdout:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def rows_of(path: Path, many: int = 4000) -> Path:
    return tiny.write_jsonl(path, [{"text": f"User: {i}?\n\nAssistant: {i} is {i * i}."} for i in range(many)])


def cut_in_the_middle(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def append_a_row(path: Path) -> None:
    with open(path, "a") as file:
        file.write('{"text": "User: More?\\n\\nAssistant: More."}\n')


def change_one_letter(path: Path) -> None:
    """Far from any piece that is looked at, with the time put back."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    with open(path, "r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


READING = {  # when the input changes -> what is replaced for that, of which module
    "before it is counted": ("rwkv_peft.preprocess.cache", "key"),
    "before it is read": ("rwkv_peft.preprocess.tokenize", "progress"),
    "while it is read": ("rwkv_peft.preprocess.stats", "CorpusStats.add"),
    "before the files are put in place": ("rwkv_peft.preprocess.tokenize", "write"),
}


@pytest.mark.parametrize("workers", few(("1", "2"), ("1",)))
@pytest.mark.parametrize("harm", [append_a_row, cut_in_the_middle, change_one_letter, overwrite, replace, Path.unlink])
@pytest.mark.parametrize("when", READING)
def test_tokenizing_what_changes_puts_no_file_in_place(project_folder, monkeypatch, when, harm, workers):
    source, done = rows_of(project_folder / "data/rows.jsonl"), []
    module, name = READING[when]
    owner = importlib.import_module(module)
    owner = owner.CorpusStats if "." in name else owner
    name = name.rpartition(".")[2]
    real = getattr(owner, name)

    def first(*arguments, **named):
        if not done:
            done.append(True)
            harm(source)
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, first)
    monkeypatch.setattr(file_watch, "RETRY_SECONDS", 0.1)
    with pytest.raises(UserError, match=r"data/rows\.jsonl: .* Nothing was written"):
        tokenize(source, WORKERS=workers)
    assert done and {p.name for p in (project_folder / "data").iterdir()} <= {"rows.jsonl"}


@pytest.mark.parametrize("harm", [append_a_row, cut_in_the_middle, Path.unlink])
@pytest.mark.parametrize("ending", [".gz", ".csv", ".parquet", ".json"])
def test_whatever_the_format(project_folder, monkeypatch, ending, harm):
    from helpers.row_files import write

    source = write(project_folder / "data", ".jsonl.gz" if ending == ".gz" else ending)
    real = tokenizing.progress
    monkeypatch.setattr(tokenizing, "progress", lambda *given: harm(source) or real(*given))
    monkeypatch.setattr(file_watch, "RETRY_SECONDS", 0.1)
    with pytest.raises(UserError, match=rf"data/{re.escape(source.name)}: .* Nothing was written"):
        tokenize(source)
    assert {p.name for p in (project_folder / "data").iterdir()} <= {source.name}


@pytest.mark.parametrize("name", ["b.jsonl", "c.jsonl"])
def test_of_a_folder_every_file_counts_and_so_does_a_new_one(project_folder, monkeypatch, name):
    folder = project_folder / "data/many"
    folder.mkdir()
    rows_of(folder / "a.jsonl", 20), rows_of(folder / "b.jsonl", 20)
    real = tokenizing.progress
    monkeypatch.setattr(tokenizing, "progress", lambda *given: rows_of(folder / name, 30) and real(*given))
    with pytest.raises(UserError, match=rf"data/many/{name}: .* Nothing was written"):
        tokenize(folder)
    assert {p.name for p in (project_folder / "data").iterdir()} == {"many"}


@pytest.mark.parametrize("how", SAME)
def test_tokenizing_what_has_the_same_content_resumes(project_folder, monkeypatch, how):
    source = rows_of(project_folder / "data/rows.jsonl", 20)
    real = tokenizing.write
    monkeypatch.setattr(tokenizing, "write", lambda *given: SAME[how](source) and None or real(*given))
    assert tokenize(source)["rows"]["kept"] == 20


def test_the_command_says_it_with_exit_code_2(shared_kit):
    source = rows_of(shared_kit.root / "data/growing.jsonl", 60_000)
    before = sorted((shared_kit.root / "data").iterdir())
    process = subprocess.Popen(
        [str(shared_kit.root / "make_tokenize.sh"), "growing.jsonl"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip
    while process.poll() is None:  # a program that writes to it all the time
        append_a_row(source)
        time.sleep(0.05)
    said = process.communicate()[0]
    assert process.returncode == EXIT_USER and "data/growing.jsonl: " in said.splitlines()[-1], said
    assert "Traceback" not in said and sorted((shared_kit.root / "data").iterdir()) == before
    source.unlink()


@pytest.fixture
def merged(finished):
    """Where ./merge.sh has a run to fold."""
    return finished.root


def merge_with(*typed: str) -> None:
    values = shell_values(ROOT / "merge.sh")
    merging.command(Script(ROOT / "merge.sh", values).read(merging.MergeConfig), list(typed))


def between(monkeypatch, owner, name: str, harm: Callable[[], object], after: bool) -> None:
    """Do harm once, before or after a function is called."""
    real, done = getattr(owner, name), []

    def called(*arguments, **named):
        if not after and not done:
            done.append(harm())
        result = real(*arguments, **named)
        if after and not done:
            done.append(harm())
        return result

    monkeypatch.setattr(owner, name, called)


def other_model(path: Path) -> None:
    """Another sound model of the same shapes in the same file."""
    fresh = tiny.save_model(path.with_name("other.pth"), seed=5)
    path.write_bytes(fresh.read_bytes())
    fresh.unlink()


MERGING = {  # when a file changes during a merge
    "before the adapters are sorted": ("fold", "opened", False),
    "before it is read": ("checkpoint", "rewrite", False),
    "before it is verified": ("deliver", "verify", False),
    "when it is verified": ("deliver", "verify", True),
}


@pytest.mark.smoke(1)
@pytest.mark.parametrize("when", few(MERGING, ("before it is verified",)))
@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("model/tiny.pth", other_model), ("model/tiny.pth", overwrite), ("model/tiny.pth", cut_in_the_middle),
        ("model/tiny.pth", Path.unlink), ("output/first/rwkv-0.pth", overwrite), ("output/first/rwkv-0.pth", replace),
        ("output/first/rwkv-0.json", overwrite),
    ],
)  # fmt: skip
def test_a_merge_of_what_changes_is_not_put_in_place(merged, monkeypatch, when, name, harm):
    module, function, after = MERGING[when]
    owner = {"fold": fold, "checkpoint": pth_rewrite, "deliver": deliver}[module]
    between(monkeypatch, owner, function, lambda: harm(merged / name), after)
    with pytest.raises(file_watch.FileChanged, match=rf"{re.escape(name)}: .* Nothing was written"):
        merge_with("first")
    assert not list((merged / "merge").iterdir())


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
@pytest.mark.parametrize("harm", few((other_model, overwrite, replace, cut_in_the_middle, Path.unlink), (other_model,)))
def test_an_export_of_a_model_that_changes(merged, monkeypatch, kind, harm):
    model = merged / "model/tiny.pth"
    real = EXPORTS[kind]

    def write(source, target, geometry, asked):
        lines = list(real.write(source, target, geometry, asked))
        harm(model)
        return lines

    monkeypatch.setitem(EXPORTS, kind, dataclasses.replace(real, write=write))
    with pytest.raises(file_watch.FileChanged, match=r"model/tiny\.pth: .* Nothing was written"):
        merge_with("model/tiny.pth", "--export", kind)
    assert not list((merged / "merge").iterdir())


@pytest.mark.parametrize("harm", few((overwrite, replace, cut_in_the_middle), (replace,)))
def test_an_export_of_an_adapter_that_changes(merged, monkeypatch, harm):
    from rwkv_peft.export import peft_export

    between(monkeypatch, peft_export, "write", lambda: harm(merged / "output/first/rwkv-0.pth"), True)
    with pytest.raises(file_watch.FileChanged, match=r"output/first/rwkv-0\.pth: .* Nothing was written"):
        merge_with("first", "--export", "peft")
    assert not list((merged / "merge").iterdir())


@pytest.mark.parametrize("how", few(SAME, ("linked",)))
@pytest.mark.parametrize("name", ["model/tiny.pth", "output/first/rwkv-0.pth"])
def test_a_merge_of_what_has_the_same_content_is_made(merged, monkeypatch, name, how):
    between(monkeypatch, deliver, "verify", lambda: SAME[how](merged / name), False)
    merge_with("first")
    assert (merged / "merge/tiny-first-0.pth").is_file()


def test_a_merge_whose_adapter_is_cut_leaves_with_words_and_without_half_a_file(merged, monkeypatch):
    """The adapter is mapped: what reads it then would be ended by SIGBUS."""
    adapter = merged / "output/first/rwkv-0.pth"
    between(monkeypatch, pth_rewrite, "write_zip", lambda: cut_below_a_page(adapter), False)
    process = Command(lambda: merge_with("first"), merged / "said.txt")
    assert process.code() == EXIT_USER, process.said
    assert "output/first/rwkv-0.pth: became shorter" in process.said.splitlines()[-1], process.said
    assert not list((merged / "merge").iterdir())


def test_two_threads_that_read_a_file_that_was_cut_leave_once_and_in_words(tmp_path):
    code = """
import mmap, os, sys, threading, time
from rwkv_peft.common import bus_error

def leave():
    time.sleep(0.5)  # the other thread reads meanwhile
    print("why", flush=True)
    os._exit(5)

path = sys.argv[1]
with open(path, "wb") as file:
    file.write(bytes(4 * mmap.PAGESIZE))
with open(path, "r+b") as file, bus_error.handle_bus_error(leave):
    content = mmap.mmap(file.fileno(), 0)
    file.truncate(0)
    for page in range(2):
        threading.Thread(target=lambda: content[page * mmap.PAGESIZE]).start()
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "file"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.split()) == (5, ["why"])


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no tmpfs")
def test_content_that_was_known_is_taken_again_where_a_write_has_left_the_times_alone(monkeypatch):
    monkeypatch.setattr(hashing, "SETTLED", -1.0)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        path = rows_of(Path(memory) / "rows.jsonl")
        known = hashing.fingerprint(path)
        assert hashing.fingerprint(path, known) == known
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as content:
            content[:] = other(content[:])
        result = hashing.fingerprint(path, known)
        assert result["mark"] == known["mark"] and result["sha256"] == hashing.sha256(path) != known["sha256"]


def test_a_model_that_is_cut_while_it_talks_is_named(ready, monkeypatch):
    path = ready / "model/tiny.pth"
    between(monkeypatch, chat, "answer", lambda: cut(path), False)
    process = Command(lambda: chat.command(chat_settings(), ["--prompt", "Hi"]), ready / "said.txt")
    assert process.code() == EXIT_USER, process.said
    assert "model/tiny.pth: became shorter" in process.said.splitlines()[-1], process.said


def chat_settings(**changes: str) -> chat.ChatConfig:
    values = (
        shell_values(ROOT / "chat.sh") | {"MODEL_PATH": "tiny.pth", "PRECISION": "fp32", "MAX_TOKENS": "4"} | changes
    )
    return Script(ROOT / "chat.sh", values).read(chat.ChatConfig)


@pytest.mark.smoke(1)
@pytest.mark.parametrize("harm", few((overwrite, other_model, replace, grow, Path.unlink), (overwrite, Path.unlink)))
@pytest.mark.parametrize("name", ["model/tiny.pth", "output/first/rwkv-0.pth"])
def test_a_model_or_adapter_that_changes_gives_no_further_answer(finished, monkeypatch, name, harm):
    path, asked = finished.root / name, []

    def question(_: str) -> str:
        asked.append(True)
        if len(asked) == 2:
            harm(path)
        return "Hi"

    monkeypatch.setattr("builtins.input", question)
    process = Command(lambda: chat.command(chat_settings(ADAPTER="first"), []), finished.root / "said.txt")
    assert process.code() == EXIT_USER, process.said
    assert f"{name}: " in (last := process.said.splitlines()[-1]) and "Start ./chat.sh again" in last, process.said
    assert process.said.count("\nAssistant:") == 1 and "Traceback" not in process.said, process.said


def test_nor_the_only_answer(ready, monkeypatch):
    between(monkeypatch, chat, "once", lambda: other_model(ready / "model/tiny.pth"), False)
    with pytest.raises(file_watch.FileChanged, match=r"model/tiny\.pth: .* it was opened"):
        chat.command(chat_settings(), ["--prompt", "Hi"])


@pytest.fixture(params=[True, False], ids=["content known", "content not known"])
def watched(tmp_path, monkeypatch, request) -> tuple[file_watch.FileWatch, Path]:
    """not known: as of a streamed file above SMALL."""
    if not request.param:
        monkeypatch.setattr(file_watch, "HASHED_BYTES", 0)
    path = rows_of(tmp_path / "rows.jsonl")
    watch = file_watch.FileWatch("it was opened", "Run it again.")
    watch.add([path])
    assert bool(watch.files[str(path)].sha256) == request.param
    return watch, path


@pytest.mark.parametrize("harm", WRITTEN)
def test_what_was_written_to_is_changed_whatever_it_holds(watched, harm):
    watch, path = watched
    harm(path)
    with pytest.raises(file_watch.FileChanged, match="rows.jsonl: was written to, or touched, since it was opened"):
        watch.must_be_unchanged()


@pytest.mark.parametrize("how", [how for how in SAME if how != "replaced"])
def test_other_rights_and_names_are_no_change(watched, how):
    watch, path = watched
    before = file_watch.read_stamp(path)
    SAME[how](path)
    assert file_watch.read_stamp(path) != before
    assert watch.look() is None and watch.look() is None


def test_another_file_of_that_name_is_no_change_only_where_the_content_is_known(watched):
    watch, path = watched
    replace_by_the_same(path)
    known = watch.files[str(path)].sha256
    result = watch.look()
    assert result is None if known else "rows.jsonl: was replaced by another file since" in str(result)


def test_a_time_that_was_put_back_hides_nothing_where_the_content_is_known(tmp_path):
    path = rows_of(tmp_path / "rows.jsonl")
    watch = file_watch.FileWatch("it was opened", "Run it again.")
    watch.add([path])
    change_one_letter(path)
    assert "rows.jsonl: has other content than when it was opened" in str(watch.look(every=False))


def test_the_next_look_comes_soon_however_long_the_last_one_took(tmp_path, monkeypatch):
    path = rows_of(tmp_path / "rows.jsonl")
    watch = file_watch.FileWatch("it was opened", "Run it again.")
    watch.add([path])
    clock = itertools.count(0, 0.001)  # each question for the time takes a millisecond, and each whole content an hour
    hours = []
    monkeypatch.setattr(file_watch.time, "thread_time", lambda: next(clock) + 3600 * len(hours))
    real = file_watch.sha256
    monkeypatch.setattr(file_watch, "sha256", lambda path: hours.append(path) or real(path))
    replace_by_the_same(path)
    assert watch.look() is None and len(hours) == 1
    assert watch.pause() == pytest.approx(file_watch.CHECK_SECONDS, abs=0.6), (
        "the content that was compared was charged"
    )
    watch.seconds = 3600.0
    assert watch.pause() == file_watch.MAX_CHECK_SECONDS <= 5
    overwrite(path)
    assert "rows.jsonl: " in str(watch.look(every=False))


def test_a_pipe_in_place_of_an_empty_file_is_not_waited_for(tmp_path):
    path = tmp_path / "empty"
    path.touch()
    watch = file_watch.FileWatch("it was opened", "Run it again.")
    watch.add([path])
    path.unlink(), os.mkfifo(path)
    assert "empty: is no regular file any more" in str(watch.look())


def test_what_was_once_seen_to_be_changed_stays_so(tmp_path):
    path = rows_of(tmp_path / "rows.jsonl")
    kept, before = path.read_bytes(), path.stat()
    watch = file_watch.FileWatch("it was opened", "Run it again.")
    watch.add([path])
    overwrite(path)
    assert watch.look()
    path.write_bytes(kept), os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(file_watch.FileChanged, match="has other content"):
        watch.must_be_unchanged()


def test_a_file_that_is_away_for_a_moment_is_waited_for(tmp_path):
    """A share that stumbles, or somebody who replaces it in two steps."""
    path = rows_of(tmp_path / "rows.jsonl")
    watch = file_watch.FileWatch("it was opened", "Run it again.")
    watch.add([path])
    path.rename(tmp_path / "away")
    back = threading.Timer(0.3, lambda: (tmp_path / "away").rename(path))
    back.start()
    assert watch.look() is None
    back.join()


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOTCONN])
def test_a_share_that_is_gone_is_named(tmp_path, monkeypatch, number):
    path = rows_of(tmp_path / "rows.jsonl")
    watch = file_watch.FileWatch("it was opened", "Run it again.")
    watch.add([path])
    monkeypatch.setattr(file_watch, "RETRY_SECONDS", 0.1)

    def gone(*_):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(file_watch, "read_stamp", gone)
    words = rf"rows\.jsonl: cannot be read any more \({re.escape(os.strerror(number))}\)"
    assert re.search(words, watch.cut_off())
    with pytest.raises(file_watch.FileChanged, match=words):
        watch.must_be_unchanged()


def test_whatever_else_goes_wrong_is_explained_by_a_file_that_has_changed(tmp_path):
    path = rows_of(tmp_path / "rows.jsonl")
    watch = file_watch.FileWatch("it was opened", "Run it again.")
    watch.add([path])
    with pytest.raises(IndexError), watch.explaining():
        raise IndexError("index 70000 is out of range")
    with pytest.raises(file_watch.FileChanged, match="rows.jsonl: became longer"), watch.explaining():
        append_a_row(path)
        raise IndexError("index 70000 is out of range")


def test_a_content_that_was_read_while_the_file_was_written_to_is_not_known(tmp_path, monkeypatch):
    monkeypatch.setattr(file_watch, "HASHED_BYTES", 0)
    path = rows_of(tmp_path / "rows.jsonl")
    watch = file_watch.FileWatch("it was opened", "Run it again.")
    watch.add([path])
    change_one_letter(path)
    watch.know(path, hashing.sha256(path))
    assert watch.files[str(path)].sha256 is None, "the changed content was taken for the one that it began with"


def edit_as_sed_does(path: Path) -> None:
    fresh = path.with_name("sedXYZ")
    fresh.write_bytes(path.read_bytes().rpartition(b'{"step": 3,')[0])  # (and lines come to the old file meanwhile)
    os.replace(fresh, path)


@pytest.mark.parametrize("harm", [edit_as_sed_does, Path.unlink])
def test_a_log_that_an_editor_replaces_loses_no_record_and_lets_no_second_run_in(run, harm):
    log = run.folder / "loss.jsonl"
    process = run.start()
    process.until(lambda: len(run.saved()) > 2)
    harm(log)
    assert run_dir.is_running(run.folder)
    with pytest.raises(SettingErrors, match="is being trained at this moment"), contextlib.ExitStack() as cleanup:
        run_dir.lock_run_dir("run", "stem", cleanup, goes_on=True)
    process.until(lambda: "loss.jsonl was replaced or removed" in process.said)
    harm(log)
    saved = run.saved()
    process.until(lambda: not {*run.saved()} & {*saved})
    os.kill(process.pid, signal.SIGINT)
    assert process.code() == 130, process.said
    steps = [record["step"] for record in step_log.read_log(run.folder)]
    assert steps == [*range(1, steps[-1] + 1)] and steps[-1] >= max(int(p.name[5:]) for p in run.folder.glob("state/*"))
    assert process.said.count("warning   output/run/loss.jsonl") == 1, process.said
    assert not run_dir.is_running(run.folder)


def test_a_log_that_kept_bytes_that_are_no_text_is_followed_as_well(tmp_path):
    path, reported = tmp_path / "loss.jsonl", []
    record = metrics.StepMetrics(1, 0, 2.0, 1e-3, 1.0, 5, 5, 9.0, 9.0, 1.0)
    log = loggers.LossFile(path, reported.append)
    log(record)
    with open(path, "ab") as file:
        file.write(b"\xff\xfe\n")
    path.unlink()
    log(dataclasses.replace(record, step=2))
    log.close()
    assert [record["step"] for record in step_log.read_log(tmp_path)] == [1, 2] and "it goes on" in reported[0]


def test_no_tracker_writes_into_a_folder_that_has_taken_the_runs_place(run):
    folder, moved, canary = run.folder, run.folder.with_name("moved"), run.root / "canary"
    process = run.start(TENSORBOARD="1", SAVE_STEPS="0")
    process.until(lambda: run.steps() > 9)
    (canary / "tensorboard").mkdir(parents=True)
    [events] = folder.glob("tensorboard/*")
    (canary / "tensorboard" / events.name).touch()
    folder.rename(moved)
    folder.symlink_to(canary)
    assert process.code() == EXIT_USER and "output/run: is not the folder" in process.said, process.said
    assert not (canary / "tensorboard" / events.name).stat().st_size


@pytest.mark.smoke(1)
@pytest.mark.parametrize("another", [True, False], ids=["another in its place", "none"])
def test_a_run_whose_folder_is_renamed_stops_and_writes_nothing_into_another(run, another):
    """The other one has what a run would tidy up: a sidecar alone, an empty log."""
    folder, moved = run.folder, run.folder.with_name("moved")
    for ending in (".bin", ".idx", ".roles.bin", ".roles.idx"):
        shutil.copy(run.root / f"data/chat{ending}", run.root / f"data/held{ending}")
    (run.root / "data/asked.txt").write_text("Hi\n")
    process = run.start(VAL_DATA="held", VAL_STEPS="1", SAMPLE_PROMPTS="asked.txt", SAMPLE_STEPS="1", SAMPLE_TOKENS="2")
    process.until(lambda: len(run.saved()) > 2)
    folder.rename(moved)
    kept = {"loss.jsonl": "", "rwkv-step-5.json": "{}", "run.json": "{}"}
    if another:
        folder.mkdir()
        for name, content in kept.items():
            (folder / name).write_text(content)
    assert process.code() == EXIT_USER, process.said
    last = process.said.splitlines()[-1]
    assert last.startswith("output/run: is not ") and "Nothing was saved after that" in last, process.said
    assert "Traceback" not in process.said and [*folder.parent.glob("run")] == [folder] * another, [*folder.rglob("*")]
    if another:
        assert {path.name: path.read_text() for path in folder.iterdir()} == kept
    moved.rename(folder) if not another else None
    assert step_log.read_log(folder if not another else moved)[-1]["step"] > 5
