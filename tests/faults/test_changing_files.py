"""A file that is in use and changes ends the command with exit code 2 and its name; nothing is saved after that."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from inprocess import config

from rwkv_peft import checkpoint, train
from rwkv_peft.errors import EXIT_USER, door
from rwkv_peft.shell_vars import Script

LONG = {"EPOCH_COUNT": "9000", "EPOCH_SAVE": "9000", "SAVE_STEPS": "5", "KEEP_LAST": "3", "MICRO_BSZ": "1"}
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
            with door(lambda found: str(found)):
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
        assert name in last and "./training.sh again" in last and "Traceback" not in said, said
        assert not [p for p in self.saved() if p.stat().st_mtime_ns > when], said
        left = [p for p in self.folder.rglob("*") if "tmp-" in p.name or "unfinished" in p.name]
        assert not left or code, said
        return said


@pytest.fixture
def run(ready) -> Run:
    return Run(ready)


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", ["model/tiny.pth", "data/chat.bin"])
def test_a_run_stops(run, name, harm):
    path = run.root / name
    run.stops(name, lambda: harm(path))
