"""F1, F9, F11, F12, F14, F16, F21, F22: whatever happens while something is written, what was there before is whole, and what
has a name is whole as well. Few trials in the default suite, those of docs/reliability.md with the marker slow."""

import codecs
import contextlib
import os
import random
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.kit import few
from helpers.resuming import interrupted
from helpers.training import run, tokenize

from rwkv_peft.checkpoint import pth, pth_rewrite, run_dir, safetensors_io, train_state
from rwkv_peft.checkpoint.lazy_tensors import LazyTensors
from rwkv_peft.cli.merge import MergeConfig
from rwkv_peft.cli.merge import command as merge_command
from rwkv_peft.common import atomic_io
from rwkv_peft.common.errors import EXIT_MEMORY, SettingErrors, UserError
from rwkv_peft.data.binidx import Writer
from rwkv_peft.distributed.sharding import lazy_tensor
from rwkv_peft.train.module import TrainingModule

SIZE = 200_000  # values of what is saved: a save takes some milliseconds
SAID = 7  # a child's exit code for an error that it has put into words
WRONG = 1  # ... for anything else


def some(count: int, full: int):
    """A number of trials: few always, all with the marker slow."""
    return pytest.mark.parametrize("count", [count, pytest.param(full, marks=pytest.mark.slow)])


def in_a_child(work: Callable[[], None], wait: bool = True) -> int:
    """Run something in a forked process; returns its exit code, or its pid if it is not to be waited for."""
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            work()
        except (OSError, UserError, SettingErrors):
            code = SAID
        except BaseException:
            traceback.print_exc()
            code = WRONG
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if wait else pid


def state(folder: Path, step: int, keep: int = 2) -> None:
    parts = {part: LazyTensors({"a": lazy_tensor(torch.full((SIZE,), float(step)))}) for part in train_state.PARTS}
    train_state.save_state(folder, parts, tiny.state_facts(step), keep)


@pytest.mark.slow
@some(20, 200)
def test_killed_at_any_instant_of_a_save_the_newest_whole_state_is_there(tmp_path, count):
    """F1: SIGKILL while states and checkpoints are written one after another."""
    rng, before = random.Random(count), 0
    state(tmp_path, 1)
    for _ in range(count):

        def save_for_ever(step=before + 1):
            while True:
                pth.save(tmp_path / "rwkv-0.pth", {"a": torch.full((SIZE,), float(step))})
                state(tmp_path, step)
                step += 1

        pid = in_a_child(save_for_ever, wait=False)
        time.sleep(rng.random() * 0.08)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        result = train_state.latest_valid(tmp_path, lambda words: pytest.fail(words))
        assert result.step >= before
        assert all(bool((result.tensors(part)["a"] == result.step).all()) for part in train_state.PARTS)
        before = result.step
        if (tmp_path / "rwkv-0.pth").exists():
            saved = pth.load(tmp_path / "rwkv-0.pth")["a"]
            pth.check_checksums(tmp_path / "rwkv-0.pth")
            assert bool((saved == saved[0]).all())
    train_state.remove_leftovers(tmp_path)
    atomic_io.remove_stale_temps(tmp_path / "rwkv-0.pth")
    assert not [p for p in tmp_path.rglob("*") if "tmp-" in p.name or p.name.startswith(".")]


WRITERS: dict[str, Callable[[Path], None]] = {
    "state": lambda folder: state(folder, 5),
    "checkpoint": lambda folder: pth.save(folder / "x.pth", {"a": torch.ones(SIZE)}),
    "rewritten": lambda folder: pth_rewrite.rewrite(
        folder / "base.pth", folder / "x.pth", lambda name: lambda t: t + 1
    ),
    "safetensors": lambda folder: safetensors_io.write_safetensors(
        folder / "x.st", {"a": (SIZE,)}, torch.float32, lambda name: [torch.ones(SIZE)]
    ),
    "tokens": lambda folder: tokens(folder / "x"),
    "json": lambda folder: atomic_io.write_json(folder / "x.json", {"a": "b" * SIZE}),
}


def tokens(prefix: Path) -> None:
    import numpy as np

    with Writer(prefix, {"": np.uint16}) as writer:
        for _ in range(20):
            writer.add({"": np.arange(SIZE // 20, dtype=np.uint16)})
        writer.commit()


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.smoke(1)
@some(3, 20)
@pytest.mark.parametrize("what", WRITERS)
def test_a_disk_that_is_full_at_any_place_leaves_what_was_there(tmp_path, what, count):
    """F11: no file may grow beyond some size; an error in words, and no new name."""
    pth.save(tmp_path / "base.pth", {"a": torch.zeros(SIZE), "b": torch.zeros(SIZE)})
    state(tmp_path, 4)
    before = content(tmp_path)
    WRITERS[what](tmp_path)
    largest = max(p.stat().st_size for p in tmp_path.rglob("*") if str(p.relative_to(tmp_path)) not in before)
    for name in [p for p in tmp_path.rglob("*") if p.is_file() and str(p.relative_to(tmp_path)) not in before]:
        name.unlink()
    shutil.rmtree(tmp_path / "state/step-000005", ignore_errors=True)
    assert content(tmp_path) == before
    for i in range(count):

        def limited(limit=1 + largest * i // count):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            WRITERS[what](tmp_path)

        assert in_a_child(limited) == SAID
        assert content(tmp_path) == before


@pytest.mark.smoke(1)
@pytest.mark.parametrize("what", ["a new run", "a run that goes on", "a merge", "tokens"])
def test_a_folder_that_cannot_be_written_is_reported_and_nothing_is_written(ready, monkeypatch, what):
    """F12, as somebody who may not."""
    more = {"SAVE_STEPS": "1", "KEEP_LAST": "2", "EPOCH_STEPS": "4", "EPOCH_COUNT": "2"}
    if what in ("a run that goes on", "a merge"):
        interrupted(monkeypatch, ready, 6, "killed", "again", **more)
    rows = ready / "data/more.jsonl"
    rows.write_text('{"text": "abc"}\n')
    merging = MergeConfig("again", "", "original", "", "", "")
    work = {
        "a new run": lambda: run(ready),
        "a run that goes on": lambda: run(ready, "again", **more),
        "a merge": lambda: merge_command(merging, []),
        "tokens": lambda: tokenize(rows),
    }
    before = {path: path.read_bytes() for path in ready.rglob("*") if path.is_file()}
    for folder in ready.parent, ready, *ready.rglob("*"):
        folder.chmod(0o555 if folder.is_dir() else 0o444)
    for parent in list(ready.parents)[:4]:
        parent.chmod(0o755)

    for codec in (
        "utf_16_le",
        "utf_16_be",
        "utf_32_le",
        "utf_32_be",
    ):  # of Python's own files, which no one may not read here
        codecs.lookup(codec)

    def as_other_user():
        os.setuid(65534)
        work[what]()

    try:
        assert in_a_child(as_other_user) == SAID
    finally:
        for folder in ready, *(p for p in ready.rglob("*") if p.is_dir()):
            folder.chmod(0o755)
    assert {path: path.read_bytes() for path in ready.rglob("*") if path.is_file()} == before


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError("can't allocate memory")


@pytest.mark.smoke(1)
@pytest.mark.parametrize("error", few(FULL, FULL[:1]))
@pytest.mark.parametrize(
    "settings",
    [
        {}, {"GRAD_CP": "1", "QUANT": "nf4", "lora_r": "8"}, {"FINETUNE_MODE": "full"}, {"FINETUNE_MODE": "state_tuning"},
        {"TRAIN_TYPE": "infctx", "CHUNK_CTX": "16", "DATALOAD": "only"},
    ],
)  # fmt: skip
def test_out_of_memory_says_what_to_change_and_changes_nothing(ready, monkeypatch, capsys, error, settings):
    """F14: at the third step."""
    summed, calls = TrainingModule.summed_loss, []

    def full(self, batch):
        calls.append(batch)
        if len(calls) == 3:
            raise error
        return summed(self, batch)

    monkeypatch.setattr(TrainingModule, "summed_loss", full)
    with pytest.raises(SystemExit) as left:
        run(ready, **{"EPOCH_COUNT": "3", "MICRO_BSZ": "2", "KEEP_LAST": "2", "SAVE_STEPS": "1"} | settings)
    said = capsys.readouterr().err
    assert left.value.code == EXIT_MEMORY and "Out of memory" in said and "What to change, in this order" in said
    assert "MICRO_BSZ=1 and MINI_BSZ=2" in said
    assert train_state.latest_valid(ready / "output/run", print).step == 2
    monkeypatch.undo()


@some(4, 20)
def test_of_two_runs_that_want_one_folder_one_gets_it(project_folder, count):
    """F16."""
    for race in range(count):
        go, over = time.monotonic() + 0.05, project_folder / f"over{race}"

        def claim(name=f"race{race}", go=go, over=over):
            with contextlib.ExitStack() as cleanup:
                while time.monotonic() < go:
                    pass
                run_dir.lock_run_dir(name, "x", cleanup)
                while not over.exists():  # the folder is its own until the other one has asked for it
                    time.sleep(0.01)

        pids, patience = [in_a_child(claim, wait=False) for _ in range(2)], time.monotonic() + 60
        statuses: dict[int, int] = {}
        while not statuses and time.monotonic() < patience:
            time.sleep(0.01)
            statuses |= {pid: status for pid, status in (os.waitpid(pid, os.WNOHANG) for pid in pids) if pid}
        over.touch()
        statuses |= {pid: os.waitpid(pid, 0)[1] for pid in pids if pid not in statuses}
        assert sorted(map(os.waitstatus_to_exitcode, statuses.values())) == [0, SAID]


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


PLACES = ("state/step-000002/evil.pth", "state/step-000002/weights.safetensors", "rwkv-0.pth", "init_pissa.pth")


@pytest.mark.smoke(1)
@pytest.mark.parametrize("where", few(PLACES, PLACES[:2]))
def test_a_run_folder_of_somebody_else_executes_nothing(ready, tmp_path, where):
    """F21: pickles in every place that going on, merging and talking look at."""
    from rwkv_peft.merge.inputs import load_checkpoint

    run(ready, KEEP_LAST="9", SAVE_STEPS="1")
    canary = tmp_path / "canary"
    torch.save({"a": torch.zeros(1), "x": Evil(canary)}, ready / "output/run" / where)
    with contextlib.suppress(UserError, SettingErrors, SystemExit):
        run(ready, KEEP_LAST="9", SAVE_STEPS="1", EPOCH_COUNT="2")
    with contextlib.suppress(UserError, SettingErrors):
        load_checkpoint(ready / "output/run/rwkv-0.pth", "", None, None, False)
    assert not canary.exists()


@some(30, 300)
def test_a_manifest_finds_every_flipped_bit(tmp_path, count):
    """F9, of states: the newest is passed over, the one before it taken."""
    state(tmp_path, 1)
    state(tmp_path, 2)
    newest, rng = tmp_path / "state/step-000002", random.Random(count)
    files = sorted(newest.iterdir())
    for _ in range(count):
        file = rng.choice(files)
        data = bytearray(file.read_bytes())
        place = rng.randrange(len(data))
        old, data[place] = data[place], data[place] ^ (1 << rng.randrange(8))
        file.write_bytes(data)
        said: list[str] = []
        assert train_state.latest_valid(tmp_path, said.append).step == 1 and said
        data[place] = old
        file.write_bytes(data)
    assert train_state.latest_valid(tmp_path, print).step == 2


def test_after_a_power_cut_there_is_the_old_state_or_the_new_one(tmp_path, monkeypatch):
    """F22: what was written and not yet brought onto the disk is gone, at every point of a save. A rename whose folder was not
    brought there may be gone or not."""
    disk: dict[str, bytes] = {}

    class Cut(BaseException):
        pass

    real_sync, real_folder, points = os.fsync, atomic_io.fsync_dir, [0, None]

    def point():
        points[0] += 1
        if points[0] == points[1]:
            raise Cut

    def sync(handle):
        real_sync(handle)
        with contextlib.suppress(OSError):
            path = os.readlink(f"/proc/self/fd/{handle}")
            if Path(path).is_file():
                disk[path] = Path(path).read_bytes()
        point()

    def folder(path):
        real_folder(path)
        point()

    state(tmp_path, 1)
    first = content(tmp_path)
    monkeypatch.setattr(os, "fsync", sync)
    for module in (atomic_io, train_state):
        monkeypatch.setattr(module, "fsync_dir", folder)
    for stop in range(1, 30):
        points[:] = [0, stop]
        disk.clear()
        finished = False
        with contextlib.suppress(Cut):
            state(tmp_path, 2, keep=1)
            finished = True
        # of files that have a place in the new state, only what was brought to the disk is left of what was written
        for path in (tmp_path / "state/step-000002").glob("*"):
            synced = [data for name, data in disk.items() if Path(name).name.split(".tmp-")[0] == path.name]
            path.write_bytes(synced[-1] if synced else b"")
        monkeypatch.undo()
        result = train_state.latest_valid(tmp_path, print)
        assert result.step == 2 if finished else result.step in (1, 2)
        if finished:
            break
        shutil.rmtree(tmp_path / "state")
        for name, data in first.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
        monkeypatch.setattr(os, "fsync", sync)
        for module in (atomic_io, train_state):
            monkeypatch.setattr(module, "fsync_dir", folder)
    assert finished and stop > 5
