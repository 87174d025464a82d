"""A checkpoint that takes the place of an earlier one: on a full disk, and in a process that ends in between."""

import contextlib
import errno
import itertools
import json
import os
import shutil

import pytest
import torch
from helpers import tiny
from helpers.training import run, tokenize

from rwkv_peft.checkpoint import base_model, pth, run_dir, sidecars
from rwkv_peft.common import atomic_io, hashing
from rwkv_peft.common.errors import UserError
from rwkv_peft.train.callbacks.checkpoint import CheckpointWriter

PAST = 2**22 - 3  # the id of no process


@contextlib.contextmanager
def full_disk(monkeypatch, after: int):
    """No space is left from so many writes, syncs and renames on. (Later renames work: they need none.)"""
    left = itertools.count(after, -1)

    def counted(function, once: bool = False):
        def call(*arguments, **named):
            if (now := next(left)) == 0 or now < 0 and not once:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments, **named)

        return call

    class File:
        def __init__(self, file):
            self.file, self.write = file, counted(file.write)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    with monkeypatch.context() as patched:
        for name in ("pwrite", "fsync", "replace"):
            patched.setattr(os, name, counted(getattr(os, name), name == "replace"))
        for module in (atomic_io, sidecars):  # (File closes it)
            patched.setattr(module, "open", lambda *a, **k: File(open(*a, **k)), raising=False)  # noqa: SIM115
        yield


def content(folder):
    return {path.name: path.read_bytes() for path in folder.glob("rwkv-best*")}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", pytest.param("lisa", marks=pytest.mark.slow)])
def test_a_full_disk_at_any_write_keeps_the_best_checkpoint(ready, monkeypatch, method):
    tokenize(tiny.write_jsonl(ready / "data" / "chat.valid.jsonl", tiny.CHATS[:3]))
    original, tried = CheckpointWriter.write, []

    def write(self, trained, epoch, finished, step, name=""):
        what = trained, epoch, finished, step, name
        folder = self.run.run_dir
        before = content(folder)
        if name != "best" or not before:
            return original(self, *what)
        for writes in itertools.count():
            try:
                with full_disk(monkeypatch, writes):
                    path = original(self, *what)
                break
            except (OSError, UserError):
                about = json.loads((folder / "rwkv-best.json").read_text())
                base_model.check_sidecar(folder / "rwkv-best.pth", about)
                assert about["step"] == step or content(folder) == before
        tried.append(step)
        assert content(folder).keys() == before.keys() and content(folder) != before and writes > 5
        base_model.check_sidecar(folder / "rwkv-best.pth", json.loads((folder / "rwkv-best.json").read_text()))
        return path

    monkeypatch.setattr(CheckpointWriter, "write", write)
    run(
        ready, "one", FINETUNE_MODE=method, EPOCH_COUNT="3", KEEP_BEST="1", LR_INIT="1e-3", LR_FINAL="1e-3", lisa_r="1",
        lisa_k="2", PRECISION="bf16" if method == "lisa" else "fp32",
    )  # fmt: skip
    assert tried


def pair(folder, value: float, name: str = "rwkv-best"):
    path = folder / f"{name}.pth"
    pth.save(path, {"a": torch.full((8,), value)})
    atomic_io.write_json(path.with_suffix(".json"), {"step": int(value), "checkpoint_sha256": hashing.sha256(path)})
    return path


@pytest.fixture
def torn(tmp_path):
    """What a process leaves that ends between the two renames."""
    path, fresh = pair(tmp_path, 1), pair(tmp_path, 2, "fresh")
    os.replace(fresh.with_suffix(".json"), path.with_suffix(".json"))
    return path, fresh


def test_a_pair_whose_writer_was_killed_between_the_renames_is_completed_by_its_reader(torn):
    path, fresh = torn
    os.replace(fresh, f"{path}.tmp-{PAST}")
    base_model.check_sidecar(path, sidecars.read_sidecar(path, ()))
    assert pth.load(path)["a"][0] == 2


def test_a_half_written_checkpoint_is_not_taken_for_the_one_of_the_sidecar(torn):
    path, fresh = torn
    shutil.move(fresh, f"{path}.tmp-{PAST}")
    with open(f"{path}.tmp-{PAST}", "r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match="is not the file that its .json was written with"):
        base_model.check_sidecar(path, sidecars.read_sidecar(path, ()))


@pytest.mark.parametrize("renamed", [False, True], ids=["before the sidecar's rename", "after it"])
def test_leaving_in_the_middle_of_a_save_leaves_the_earlier_checkpoint_or_the_new_one(tmp_path, renamed):
    path = pair(tmp_path, 1)
    fresh = pair(tmp_path, 2, "fresh")
    os.replace(fresh, atomic_io.temp_path(path))
    if renamed:
        os.replace(fresh.with_suffix(".json"), path.with_suffix(".json"))
    run_dir.remove_partial_files(tmp_path)
    about = sidecars.read_sidecar(path, ())
    base_model.check_sidecar(path, about)
    assert about["step"] == pth.load(path)["a"][0] == 1 + renamed
    assert not list(tmp_path.glob("*.tmp-*"))


@pytest.mark.parametrize("earlier", [False, True])
def test_where_the_second_rename_fails_the_first_is_undone(tmp_path, monkeypatch, earlier):
    if earlier:
        pair(tmp_path, 1)
    before = content(tmp_path)
    fresh = pair(tmp_path, 2, "fresh")
    replace = os.replace
    with monkeypatch.context() as patched:

        def fail(source, target):
            if source == fresh:
                raise OSError(errno.EIO, "Input/output error")
            replace(source, target)

        patched.setattr(os, "replace", fail)
        with pytest.raises(OSError):
            sidecars.replace_pair(fresh, fresh.with_suffix(".json"), tmp_path / "rwkv-best.pth")
    assert content(tmp_path) == before
