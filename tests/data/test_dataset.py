"""Batches: the same as their definition, row by row; which tokens count; workers that live as long as the run."""

import os
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.token_files import MASKS, MODES, data, documents, source
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.data.binidx import Reader
from rwkv_peft.data.dataset import Batches
from rwkv_peft.data.loader import end_workers, make_loader
from rwkv_peft.data.masking import Markers, target_weights
from rwkv_peft.data.token_source import TokenSource
from rwkv_peft.text.roles import Role

SIZES = st.lists(st.integers(2, 60), min_size=2, max_size=12)


def by_definition(ids, roles, mask):
    """Every token of the file (they are unlike, but for 0) -> whether its document trains it as a target. A document's first
    token is a target only where mask is none."""
    wanted = {}
    for tokens, said in zip(ids, roles, strict=True):
        weights = [mask == "none", *(target_weights(said, mask) > 0)]
        wanted |= {int(t): bool(w) for t, w in zip(tokens, weights, strict=True) if t}
    return wanted


@settings(max_examples=60, deadline=None)
@given(
    sizes=SIZES, ctx_len=st.integers(1, 70), mode=st.sampled_from(MODES), mask=st.sampled_from(MASKS),
    overlong=st.sampled_from(["truncate", "truncate-left", "split"]), seed=st.integers(0, 5),
)  # fmt: skip
def test_a_token_is_trained_as_in_its_whole_document_however_rows_are_made(sizes, ctx_len, mode, mask, overlong, seed):
    ids, roles = documents(sizes, seed)
    try:
        made = data([source(ids, roles)], mode, mask, ctx_len, overlong)
    except SettingErrors:
        return  # nothing to train, or too few windows
    wanted = by_definition(ids, roles, mask)
    ended = {int(document[-2]) for document in ids if not document[-1]}  # what token 0 follows in the file
    total = 0
    for i in range(made.rows):
        for tokens, weights in made.row(i):
            total += int(weights.sum())
            for before, token, weight in zip(tokens, tokens[1:], weights, strict=False):
                if token:
                    assert bool(weight) == wanted[int(token)]
                elif mask in ("none", "pad"):  # one that only separates documents is not trained
                    assert weight == (int(before) in ended)
    assert total == made.facts().targets
    assert total == sum(made.count_row(i) for i in range(made.rows))


def test_a_document_that_is_cut_has_no_end():
    ids = [np.array([1, 2, 3, 4, 5, 6, 7, 0])]
    roles = [np.array([Role.USER] * 2 + [Role.ASSISTANT] * 2 + [Role.USER] * 2 + [Role.ASSISTANT] * 2)]
    for ctx_len, tokens, weights in (
        (7, [1, 2, 3, 4, 5, 6, 7, 0], [0, 1, 1, 0, 0, 1, 1]),
        (6, [1, 2, 3, 4, 5, 6, 7], [0, 1, 1, 0, 0, 1]),
        (4, [1, 2, 3, 4, 5], [0, 1, 1, 0]),
        (3, [1, 2, 3, 4], [0, 1, 1]),
    ):
        [(result, trained)] = data([source(ids, roles)], "pad", "qa", ctx_len).row(0)
        assert (result.tolist(), trained.tolist()) == (tokens, weights)


def one_by_one(made, rows, fill_to):
    """The definition of a batch: sequence by sequence, place by place."""
    sequences = [sequence for n in rows for sequence in made.row(n)]
    width = -(-(max(len(tokens) for tokens, _ in sequences) - 1) // (fill_to or 1)) * (fill_to or 1)
    ids, positions, targets, bounds, real = [], [], [], [0], 0
    for tokens, weights in sequences:
        for place, weight in enumerate(weights):
            if weight:
                positions.append(len(ids) + place)
                targets.append(int(tokens[place + 1]))
        inputs = tokens[:-1].tolist()
        ids += inputs + [0] * (width - len(inputs) if fill_to else 0)
        bounds.append(len(ids))
        real += len(inputs)
    return ids, tuple(bounds), positions, targets, real


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, mode=st.sampled_from(MODES), mask=st.sampled_from(MASKS), micro=st.integers(1, 5))
def test_a_batch_is_its_rows_behind_one_another(sizes, mode, mask, micro):
    ids, roles = documents([*sizes, 40, 40])
    try:
        made = data([source(ids, roles)], mode, mask, 24, budget=64)
    except SettingErrors:
        return
    plan = made.make_plan(None, micro, 1, 1)
    batches = Batches(made, plan, 0)
    for i in range(len(batches)):
        rows = plan.rows_of_micro_batch(0, i, 0)
        result, fill_to = batches[i], {"pad": 1, "bucket": 16}.get(mode)
        wanted = one_by_one(made, rows, fill_to)
        lists = (
            result.ids[0].tolist(),
            result.cu_seqlens,
            result.positions.tolist(),
            result.targets.tolist(),
            result.tokens,
        )
        assert lists == wanted
        assert result.step_targets == len(wanted[3])
        assert result.ids.dtype == result.positions.dtype == result.targets.dtype == torch.long


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", ["pad", "qa"])
def test_micro_batches_of_all_ranks_add_up_to_their_step(mode, mask):
    """Also at the end of an epoch, where a rank has nothing left and runs something that does not count."""
    ids, roles = documents([8, 30, 17, 5, 44] * 4)
    made = data([source(ids, roles)], mode, mask, 20, accumulate=2, world=7, budget=48)
    plan = made.make_plan(None, 2, 2, 7)
    ranks = [Batches(made, plan, rank) for rank in range(7)]
    total = 0
    for step in range(plan.optimizer_steps):
        numbers = range(2 * step, min(2 * step + 2, plan.micro_batches))
        rows = [plan.rows_of_micro_batch(0, i, rank) for rank in range(7) for i in numbers]
        parts = [ranks[rank][i] for rank in range(7) for i in numbers]
        assert [part.tokens > 0 for part in parts] == [len(mine) > 0 for mine in rows]
        assert {part.step_targets for part in parts} == {sum(len(part.targets) for part in parts)}
        total += sum(len(part.targets) for part in parts)
        assert all(part.ids.numel() for part in parts)
    assert total == made.facts().targets


@pytest.mark.parametrize("mode", MODES)
def test_a_rank_without_rows_runs_a_few_tokens_that_do_not_count(mode):
    made = data([source([np.arange(1, 91)])], mode, "pad", 90 if mode != "magic" else 16, world=200)
    plan = made.make_plan(None, 1, 1, 200)
    first, last = Batches(made, plan, 0)[0], Batches(made, plan, 199)[0]
    assert first.tokens and last.step_targets == made.facts().targets
    assert (last.tokens, last.targets.tolist(), last.positions.tolist()) == (0, [], [])
    assert last.ids.shape == (1, 16) and last.cu_seqlens == (0, 16)


def same(a, b) -> bool:
    return a.cu_seqlens == b.cu_seqlens and torch.equal(a.ids, b.ids) and torch.equal(a.positions, b.positions)


@pytest.mark.parametrize("epoch_steps", [None, 4])
@pytest.mark.parametrize("mode", MODES)
def test_from_any_step_on_the_batches_are_those_of_an_unbroken_run(mode, epoch_steps):
    ids, roles = documents([8, 30, 17, 5, 44] * 5)

    def batches():
        sources = [source(ids, roles, weight=2), source(ids[:9], roles[:9], weight=1)]
        made = data(sources, mode, "qa", 20, accumulate=2, budget=48)
        return Batches(made, made.make_plan(epoch_steps, 2, 2, 1), 0)

    whole = batches()
    unbroken = [whole[i] for i in range(3 * len(whole))]
    for begin in (3, 2 * len(whole) + 1):
        fresh = batches()
        assert all(same(fresh[i], unbroken[i]) for i in range(begin, 3 * len(whole)))


@pytest.mark.parametrize("epoch_steps", [2, 6])
@pytest.mark.parametrize("mode", MODES)
def test_mini_epochs_together_cover_everything_exactly_once(mode, epoch_steps):
    ids, _ = documents([8, 30, 17, 5, 44, 21] * 6, ended=1)
    made = data([source(ids)], mode, "pad", 44, accumulate=2, budget=96)
    plan = made.make_plan(epoch_steps, 1, 2, 1)
    assert plan.micro_batches == epoch_steps and plan.passes_per_epoch < 1
    rows, epoch = [], 0
    while len(rows) < 3 * made.rows:
        rows += [n for step in range(plan.optimizer_steps) for n in plan.rows_of_step(epoch, step)]
        epoch += 1
    for number in range(3):  # pass after pass
        whole = slice(number * made.rows, (number + 1) * made.rows)
        assert sorted(rows[whole]) == list(range(whole.start, whole.stop))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", ["qa", "last"])
def test_roles_detected_in_the_text_are_those_that_are_written_down_and_are_asked_for_once(mode, mask):
    ids, roles = documents([8, 30, 17, 5, 44] * 3)
    asked = []

    def find(tokens):
        asked.append(len(tokens))
        return roles[len(asked) - 1]

    result, written = source(ids, find=find), source(ids, roles)
    assert asked == [len(tokens) for tokens in ids]
    assert not result.roles.flags.writeable and np.array_equal(result.roles, written.roles)
    theirs, ours = data([result], mode, mask), data([written], mode, mask)
    plan = ours.make_plan(None, 2, 1, 1)
    assert all(same(Batches(theirs, plan, 0)[i], Batches(ours, plan, 0)[i]) for i in range(len(Batches(ours, plan, 0))))
    assert len(asked) == len(ids)


def test_a_file_that_is_larger_than_a_block_is_counted_right(monkeypatch):
    monkeypatch.setattr("rwkv_peft.data.token_source.BLOCK", 7)
    ids, roles = documents([8, 3, 30, 2, 17, 5, 44] * 3)
    for mask in ("qa", "last"):
        made = data([source(ids, roles)], "only", mask, 50)
        wanted = [int(target_weights(said, mask).sum()) for said in roles]
        assert made.parts[0].counts.tolist() == [n for n in wanted if n]


def test_a_token_outside_the_vocabulary_is_named_with_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr("rwkv_peft.data.token_source.BLOCK", 7)
    from helpers.token_files import write

    prefix = write(tmp_path / "x", [np.array([1, 2, 3] * 5), np.array([4, 900, 5])])
    with pytest.raises(UserError, match="x.bin: row 1 holds token 900, but the model's vocabulary ends at 511"):
        TokenSource(Reader(prefix), None, 512)


def test_what_is_between_the_markers_is_trained_and_the_end_marker_too():
    markers = Markers(b"A:", b"\n\n")

    def trained(data: bytes):
        spans = markers.spans(data)
        assert b"".join(data[s.start : s.end] for s in spans) == data
        return [data[s.start : s.end] for s in spans if s.role == Role.ASSISTANT], spans[-1].role == Role.ASSISTANT

    assert trained(b"Q: x\n\nA: one\n\nQ: y\n\nA: two") == ([b" one\n\n", b" two"], True)
    assert trained(b"A: one\n\n") == ([b" one\n\n"], False)
    assert trained(b"A:") == ([b""], True)
    assert trained(b"A: A: x\n\n") == ([b" A: x\n\n"], False)  # a start marker inside is text
    assert trained(b"nothing") == ([], False)
    assert (markers.starts, markers.ends) == (5, 3)


class Pids(Dataset):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> tuple[int, int]:
        return i, os.getpid()


def test_a_worker_lives_as_long_as_the_run_and_ends_with_it():
    loader = make_loader(Pids(), 1)
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        epochs.append([(int(i), int(pid)) for i, pid in loader])
    assert [i for epoch in epochs for i, _ in epoch] == list(range(10))
    [worker] = {pid for epoch in epochs for _, pid in epoch}
    assert worker != os.getpid()
    os.kill(worker, signal.SIGINT)  # as a terminal's Ctrl-C does to every process: it is the run that decides
    os.kill(worker, signal.SIGTERM)
    loader.sampler.set_epoch(2)
    assert {int(pid) for _, pid in loader} == {worker}
    end_workers(loader)
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


@pytest.mark.parametrize("mode", MODES)
def test_a_worker_makes_the_same_batches(mode):
    ids, roles = documents([8, 30, 17, 5, 44] * 5)
    made = data([source(ids, roles)], mode, "qa", 20, budget=48)
    batches = Batches(made, made.make_plan(None, 2, 1, 1), 0)
    loader = make_loader(batches, 1)
    result = list(loader)
    end_workers(loader)
    assert len(result) == len(batches) and all(same(batches[i], batch) for i, batch in enumerate(result))


def processes(session: int) -> list[str]:
    result = []
    for stat in (f"/proc/{pid}/stat" for pid in os.listdir("/proc") if pid.isdigit()):
        try:
            with open(stat) as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            result.append(stat)
    return result


@pytest.mark.slow
def test_ctrl_c_saves_and_leaves_no_worker_behind(kit):
    tiny.save_model(kit.root / "model" / "tiny.pth")
    kit.data("chat.jsonl", *tiny.CHATS)
    kit.run("make_tokenize.sh", "chat.jsonl")
    kit.set(
        MODEL_PATH="tiny.pth", DATA_PATH="chat", RUN_NAME="r", PRECISION="fp32", EPOCH_COUNT="100000", EPOCH_SAVE="100000",
        NUM_WORKERS="2", DATALOAD="bucket", lora_r="4",
    )  # fmt: skip
    process = subprocess.Popen(
        [str(kit.root / "training.sh")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    log, deadline = kit.root / "output/r/loss.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.1)
    assert len(processes(process.pid)) == 3
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "Run the script again" in err, err
    assert len(list((kit.root / "output/r").glob("rwkv-*.pth"))) == 1
    assert not processes(process.pid)
