"""Folders from other people: nothing is written, cut or deleted through what is at a name that the kit writes.

NAMES are all of them, which test_the_list_has_every_name_that_is_written holds to be so. At each, a link to somebody else's file
is there first, or another obstacle: a command of the kit ends, well or with a sentence, and what is somebody else's is as it
was."""

import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import audit as names_written
from helpers import tiny
from helpers.kit import EVERYTHING, few
from helpers.merging import merge
from helpers.training import config, tokenize

# (imported here, once, and not in every child)
import rwkv_peft.train.callbacks.build  # noqa: F401
import rwkv_peft.train.report  # noqa: F401
from rwkv_peft.checkpoint import run_dir
from rwkv_peft.cli import train
from rwkv_peft.common import paths as project
from rwkv_peft.common.errors import handle_errors
from rwkv_peft.merge import write as deliver  # noqa: F401
from rwkv_peft.train import trainer  # noqa: F401
from rwkv_peft.train.callbacks import loggers

LIMIT = 200  # seconds, after which a command is taken to hang
SETTINGS = {
    "EPOCH_COUNT": "1", "SAVE_STEPS": "1", "KEEP_LAST": "1", "KEEP_BEST": "1", "VAL_STEPS": "2", "SAMPLE_PROMPTS": "Hi",
    "SAMPLE_TOKENS": "1", "CTX_LEN": "64", "MICRO_BSZ": "1", "EPOCH_STEPS": "2", "FINETUNE_MODE": "pissa", "pissa_r": "4",
    "OP": "torch", "lora_parts": "att,ffn",
}  # fmt: skip


def trained(name: str, **changes: str) -> None:
    train.command(config(RUN_NAME=name, **SETTINGS | changes), [])


def stopped(name: str) -> None:
    """A run that is reported to stop behind its first step."""
    write = loggers.LossFile.__call__

    def write_and_stop(self, record):
        write(self, record)
        os.kill(os.getpid(), signal.SIGINT)

    loggers.LossFile.__call__ = write_and_stop
    trained(name)


def encoded(root: Path) -> None:
    tokenize(root / "data/chat.jsonl", VALID_PERCENT="25", OVERWRITE_CACHE="1")


def exported(run: str, *kinds: str) -> None:
    merge(run, *(f"--export={kind}" for kind in kinds))


COMMANDS: dict[str, Callable[[Path], None]] = {
    "tokenize": encoded,
    "a new run": lambda root: trained("new"),
    "a run that goes on": lambda root: trained("stopped"),
    "a run that is stopped": lambda root: stopped("new"),
    "find-lr": lambda root: train.command(config(**SETTINGS), ["--find-lr"]),
    "exports": lambda root: exported("done", "safetensors", "gguf", "peft"),
    "exports of a state": lambda root: exported("state", "state", "rwkvcpp"),
}  # fmt: skip
PREPARED: dict[str, Callable[[Path], None]] = {
    "tokenize": encoded,
    "done": lambda root: trained("done"),
    "state": lambda root: trained("state", FINETUNE_MODE="state_tuning"),
    "stopped": lambda root: stopped("stopped"),
}
GOOD = {"a run that is stopped": 130}  # exit codes, where they are not 0


def whole(*paths: str) -> Iterator[str]:
    for path in paths:
        yield from (path, f"{path}.tmp-PID")


def pair(stem: str) -> Iterator[str]:
    """A checkpoint with its sidecar."""
    for ending in ".pth", ".json":
        yield from whole(f"{stem}{ending}", f"{stem}{ending}.tmp-PID")
    yield f"{stem}.json.earlier.tmp-PID"


def state(folder: str, step: int) -> Iterator[str]:
    yield from (f"{folder}/state/{before}step-{step:06}" for before in ("", ".unfinished-"))
    for file in "manifest.json", "weights.safetensors", "optimizer.safetensors", "random.safetensors":
        yield from whole(f"{folder}/state/.unfinished-step-{step:06}/{file}")


def of_run(name: str, *more: Iterator[str]) -> set[str]:
    folder = f"output/{name}"
    once = {
        "output/.latest-PID",
        "output/latest",
        f"{folder}/loss.jsonl",
        f"{folder}/valid.jsonl",
        f"{folder}/samples.md",
    }
    return {
        *once, *whole(f"{folder}/run.json", f"{folder}/loss.png"), *pair(f"{folder}/rwkv-0"), *pair(f"{folder}/rwkv-step-1"),
        *state(folder, 1), f"{folder}/state", *(name for names in more for name in names),
    }  # fmt: skip


def of_export(path: str) -> Iterator[str]:
    yield from whole(path, f"{path}.tmp-PID", f"{path}.prompt.json")


TOKENS = [f"data/chat{v}{r}.{kind}" for v in ("", ".valid") for r in ("", ".roles") for kind in ("bin", "idx")]
PEFT = "merge/tiny-done-0-peft"
NAMES = {
    "tokenize": {
        *whole(*TOKENS, "data/chat.report.json", "data/chat.rejects.jsonl", "data/chat.lengths.png"),
        *(f"{name}.tmp-PID.old" for name in TOKENS),
    },
    "a new run": of_run("new", whole("output/new/init_pissa.pth"), pair("output/new/rwkv-best"), state("output/new", 2)),
    "a run that goes on": of_run(
        "stopped", pair("output/stopped/rwkv-best"), state("output/stopped", 2),
        whole("output/stopped/samples.md", "output/stopped/valid.jsonl"),
    ),
    "a run that is stopped": of_run("new", whole("output/new/init_pissa.pth")),
    "find-lr": {*whole("output/find-lr-TIME.png", "output/find-lr-TIME.jsonl")},
    "exports": {*pair("merge/tiny-done-0"), *of_export("merge/tiny-done-0.st"), *of_export("merge/tiny-done-0.gguf"), PEFT,
                f"{PEFT}.tmp-PID", *whole(*(f"{PEFT}.tmp-PID/{name}" for name in ("adapter_config.json",
                "adapter_model.safetensors", "rwkv.prompt.json")))},
    "exports of a state": {name for ending in ("pth", "state", "rwkvcpp.bin")
                           for name in of_export(f"merge/tiny-state-0-alone.{ending}")},
}  # fmt: skip
OURS = {"data", "output", "merge", "output/new", "output/stopped"}  # which the user has named


def in_a_child(root: Path, work: Callable[[Path], None], first: Callable[[], object] = lambda: None) -> tuple[int, str]:
    """Run a command of the kit in a forked process; returns its exit code, and what it said. first: is called in there."""
    said = root.parent / "said.txt"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(LIMIT)
            out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1), os.dup2(out, 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
            project.ROOT, project.OUTPUT = root, root / "output"
            first()
            with handle_errors():
                work(root)
            code = 0
        except SystemExit as left:
            code = left.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.read_text()


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    """A project with tokenized data, a run that is done, one of a state, and one that was stopped."""
    root = tmp_path_factory.mktemp("folders") / "original"
    for folder in ("data", "model", "output", "merge"):
        (root / folder).mkdir(parents=True)
    tiny.save_model(root / "model/tiny.pth")
    tiny.write_jsonl(root / "data/chat.jsonl", [*tiny.CHATS, {"text": 5}])
    for name, work in PREPARED.items():
        code, said = in_a_child(root, work)
        assert code == (130 if name == "stopped" else 0), said
    return root


@pytest.fixture
def copy(original, tmp_path) -> Path:
    root = tmp_path / "a project"
    shutil.copytree(original, root, symlinks=True, ignore=shutil.ignore_patterns("model"))
    (root / "model").symlink_to(original / "model")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("what", few(COMMANDS, ["tokenize", "a run that goes on"]))
def test_the_list_has_every_name_that_is_written(copy, what):
    result, names = copy.parent / "names.txt", set()

    def work(root):
        try:
            COMMANDS[what](root)
        finally:
            result.write_text("\n".join(sorted(names)))

    code, said = in_a_child(copy, work, lambda: names_written.collect(copy, names))
    assert code == GOOD.get(what, 0), said
    assert set(result.read_text().splitlines()) - OURS <= NAMES[what]


class Somebody:
    """Whose file and folder must stay as they are."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder / "somebody", folder / "somebody/diary.txt"
        self.folder.mkdir()
        self.file.write_text('{"step": 1, "loss": 1.0}\n## step 1\nDear diary\n' * 50)
        self.sockets: list[socket.socket] = []
        self.before = self.content()

    def content(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in self.folder.iterdir()}

    def stand(self, path: Path, kind: str) -> None:
        """Put an obstacle in the way, in place of what is there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        OBSTACLES[kind](self, path)

    def listen(self, path: Path) -> None:
        self.sockets.append(socket.socket(socket.AF_UNIX))
        here = os.getcwd()
        os.chdir(path.parent)  # (a socket's path may have some hundred bytes only)
        self.sockets[-1].bind(path.name[-90:])
        os.chdir(here)


def folder_of_theirs(path: Path) -> None:
    path.mkdir()
    (path / "mine.txt").write_text("mine")


OBSTACLES: dict[str, Callable[[Somebody, Path], object]] = {
    "symbolic link": lambda one, path: path.symlink_to(one.file),
    "link to a folder": lambda one, path: path.symlink_to(one.folder),
    "link to nothing": lambda one, path: path.symlink_to(one.folder / "made"),
    "hard link": lambda one, path: os.link(one.file, path),
    "FIFO": lambda one, path: os.mkfifo(path),
    "socket": Somebody.listen,
    "folder": lambda one, path: folder_of_theirs(path),
}


def place(root: Path, name: str) -> Path:
    """A name in the process that it is for."""
    return root / name.replace("-PID", f"-{os.getpid()}")


def is_refused(name: str) -> bool:
    """Whether a command may say that it does not write there."""
    return Path(name).name in (*run_dir.LINES, *run_dir.FOLDERS)


def is_in_use(what: str, path: Path) -> bool:
    """Whether a command would be another one with an obstacle there: a run that is there continues, or is not begun again."""
    if what == "a run that goes on":
        return os.path.lexists(path)
    return path.is_dir() or path.name.startswith("step-") or (path.name.startswith("rwkv-") and path.suffix == ".pth")


TOGETHER = [(what, kind) for what in NAMES if what != "find-lr" for kind in OBSTACLES if kind != "folder"]
FEW = [
    *((what, "symbolic link") for what in ("tokenize", "a run that goes on", "exports")),
    ("a run that goes on", "FIFO"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("what", "kind"), few(TOGETHER, FEW))
def test_what_is_at_the_names_is_replaced_and_not_followed(copy, tmp_path, what, kind):
    one = Somebody(tmp_path)

    def plant():
        for name in sorted(NAMES[what], reverse=True):  # (folders behind what is in them)
            path = place(copy, name)
            if not (is_refused(name) or is_in_use(what, path)):
                one.stand(path, kind)

    code, said = in_a_child(copy, COMMANDS[what], plant)
    assert "Traceback" not in said and code == GOOD.get(what, 0), said
    assert one.content() == one.before


SINGLE = [
    (what, name, kind)
    for what, names in NAMES.items()
    if what != "find-lr"
    for name in sorted(names)
    for kind in OBSTACLES
]
REFUSED = [
    ("a run that goes on", f"output/stopped/{name}", kind)
    for name in ("loss.jsonl", "valid.jsonl", "samples.md", "state", "wandb", "run.json", "rwkv-7.pth") for kind in OBSTACLES
    if name not in ("run.json", "rwkv-7.pth") or kind == "folder"
]  # fmt: skip


@pytest.mark.smoke(2)
@pytest.mark.parametrize(
    ("what", "name", "kind"),
    [*few(REFUSED, REFUSED[:7] + REFUSED[21:22] + REFUSED[-1:]), *(few(SINGLE) if EVERYTHING else ())],
)
def test_one_obstacle_ends_in_a_sentence_or_is_replaced(copy, tmp_path, what, name, kind):
    one = Somebody(tmp_path)
    code, said = in_a_child(copy, COMMANDS[what], lambda: one.stand(place(copy, name), kind))
    assert "Traceback" not in said and code in (GOOD.get(what, 0), 2, 3), said
    assert one.content() == one.before
    if kind == "folder" and "-PID" not in name and "/state" not in name:
        assert (copy / name / "mine.txt").read_text() == "mine"
    if code in (2, 3):
        assert len(said.split()) > 5
