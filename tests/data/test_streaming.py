"""STREAMING=1: straight from rows, shuffled in a buffer, the same every time, and the same from any step on."""

import itertools
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.row_files import many, write
from helpers.training import config, run

from rwkv_peft.cli import train
from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.data.dataset import TokenDataset
from rwkv_peft.data.sampling import Plan
from rwkv_peft.data.streaming import Stream
from rwkv_peft.preprocess.pipeline import EncodeConfig
from rwkv_peft.preprocess.row_stream import RowStream, shuffled
from rwkv_peft.text import tokenizer
from rwkv_peft.text.presets import PRESETS

STREAMED = {"STREAMING": "1", "MAX_STEPS": "6", "CTX_LEN": "64", "EPOCH_COUNT": "1", "DATA_PATH": "rows.jsonl"}


def row_stream(*paths: Path, seed=1, buffer=16, say=lambda words: None) -> RowStream:
    return RowStream(paths, EncodeConfig(PRESETS["rwkv-world"]), "file", seed, buffer, say)


def texts(stream, n: int) -> list[str]:
    return [tokenizer.decode(d.ids) for d in itertools.islice(stream.documents(), n)]


def batches(stream, mode="pack", micro=2, accumulate=1, world=1, rank=0, first=0, steps=8, mask="qa"):
    def make(part, number):
        return TokenDataset([part], mode, mask, 64, "truncate", (1, number), True)

    plan = Plan(steps * micro * accumulate * world, None, micro, accumulate, world)
    return Stream(Path("x"), stream.documents, make, None, 65536, 64, plan, rank, first)


@pytest.mark.parametrize("buffer", [1, 2, 16, 100])
def test_a_pass_gives_every_row_once_in_an_order_that_the_seed_decides(tmp_path, buffer):
    path = tiny.write_jsonl(tmp_path / "x.jsonl", many(40))
    one = texts(row_stream(path, buffer=buffer), 80)
    assert one == texts(row_stream(path, buffer=buffer), 80)
    in_order = texts(row_stream(path, buffer=1), 40)
    assert sorted(one[:40]) == sorted(one[40:]) == sorted(in_order)
    assert (one[:40] == in_order) == (buffer == 1)
    if buffer > 1:
        assert one[:40] != one[40:] and one != texts(row_stream(path, buffer=buffer, seed=2), 80)


def test_no_row_comes_earlier_than_the_buffer_allows():
    order = list(shuffled(iter(range(1000)), np.random.default_rng(0), 50))
    assert sorted(order) == list(range(1000)) and order != list(range(1000))
    assert all(number < place + 50 for place, number in enumerate(order))


def test_files_of_a_folder_and_of_every_format_are_streamed_one_after_another(tmp_path):
    paths = [write(tmp_path, kind) for kind in (".csv", ".jsonl.gz", ".parquet")]
    result = texts(row_stream(*paths, buffer=1), 12)
    assert result[:3] == result[3:6] == result[6:9] == result[9:12]


def same(a, b) -> bool:
    return (torch.equal(a.ids, b.ids) and a.cu_seqlens == b.cu_seqlens and torch.equal(a.positions, b.positions)
            and torch.equal(a.targets, b.targets) and (a.step_targets, a.tokens) == (b.step_targets, b.tokens))  # fmt: skip


@pytest.mark.parametrize("mode", ["pack", "pad", "only"])
@pytest.mark.parametrize("first", [1, 3, 8, 15])
def test_batches_from_any_number_on_are_those_of_an_unbroken_run(tmp_path, mode, first):
    stream = row_stream(tiny.write_jsonl(tmp_path / "x.jsonl", many(30)))
    whole = list(batches(stream, mode, accumulate=2))
    rest = list(batches(stream, mode, accumulate=2, first=first))
    assert len(whole) == 16 and len(rest) == 16 - first
    assert all(map(same, rest, whole[first:]))


@pytest.mark.parametrize("mode", ["pack", "pad", "only"])
def test_two_ranks_or_two_accumulated_parts_share_the_rows_of_a_step(tmp_path, mode):
    stream = row_stream(tiny.write_jsonl(tmp_path / "x.jsonl", many(30)))
    one = list(batches(stream, "only" if mode == "only" else mode, micro=4, steps=5))
    ranks = [list(batches(stream, mode, micro=2, world=2, rank=r, steps=5)) for r in (0, 1)]
    parts = list(batches(stream, mode, micro=2, accumulate=2, steps=5))
    for i, whole in enumerate(one):
        for pieces in ([r[i] for r in ranks], parts[2 * i : 2 * i + 2]):
            assert [p.step_targets for p in pieces] == [whole.step_targets] * 2
            assert torch.equal(torch.cat([p.targets for p in pieces]), whole.targets)
            assert sum(p.tokens for p in pieces) == whole.tokens and whole.step_targets == len(whole.targets)


def test_a_step_that_the_stream_ends_in_is_short_and_the_idle_rank_counts_nothing(tmp_path):
    path = tmp_path / "x.jsonl"
    os.mkfifo(path)
    feed = threading.Thread(target=lambda: path.write_text("".join(json.dumps(r) + "\n" for r in many(3))))
    feed.start()
    result = list(batches(row_stream(path), "only", micro=2, world=2, rank=1, steps=50))
    feed.join()
    assert len(result) == 1 and result[0].tokens > 0  # rows 3 and 4 of the step: one of them is there
    feed = threading.Thread(target=lambda: path.write_text("".join(json.dumps(r) + "\n" for r in many(2))))
    feed.start()
    [idle] = batches(row_stream(path), "only", micro=2, world=2, rank=1, steps=50)
    feed.join()
    assert idle.tokens == 0 and not len(idle.targets) and idle.ids.numel() and idle.step_targets > 0


def test_rows_that_cannot_be_used_are_reported_once_and_a_file_of_nothing_else_is_refused(tmp_path):
    said = []
    path = tiny.write_jsonl(tmp_path / "x.jsonl", [*many(3), *[{"oops": 1}] * 30])
    texts(row_stream(path, say=said.append), 9)
    assert len(said) == 11 and "x.jsonl:4: has none of the keys" in "".join(said)
    assert said[-1] == "left out  30 rows of the first pass; the first 10 are told above"
    with pytest.raises(UserError, match="holds no row that can be used: has none of the keys"):
        texts(row_stream(tiny.write_jsonl(tmp_path / "y.jsonl", [{"oops": 1}])), 1)
    with pytest.raises(UserError, match="holds no row that can be used"):
        texts(row_stream(tiny.write_jsonl(tmp_path / "z.jsonl", [])), 1)


def test_chunks_without_anything_to_train_are_passed_over_but_not_for_ever(tmp_path):
    plain = [{"text": f"plain text number {i} " * 20} for i in range(400)]
    mixed = row_stream(tiny.write_jsonl(tmp_path / "x.jsonl", [*plain, *many(30)]), buffer=1)
    assert len(list(batches(mixed, steps=2))) == 2
    with pytest.raises(SettingErrors, match="finds nothing to train"):
        list(batches(row_stream(tiny.write_jsonl(tmp_path / "y.jsonl", plain[:3]))))


@pytest.fixture
def rows(ready):
    tiny.write_jsonl(ready / "data" / "rows.jsonl", many(60))
    return ready


def test_a_run_trains_for_max_steps_and_is_the_same_again_and_with_a_worker(rows, capsys):
    first, records = run(rows, "a", **STREAMED)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6] and {r["epoch"] for r in records} == {0}
    again, same_records = run(rows, "b", **STREAMED, NUM_WORKERS="1")
    assert [r["loss"] for r in records] == [r["loss"] for r in same_records]
    assert all(torch.equal(first[name], again[name]) for name in first)
    said = capsys.readouterr().out
    assert "data/rows.jsonl: 0.0 MB of rows, again and again, encoded on the way as make_tokenize.sh says" in said
    assert "shuffled among 20,000 rows" in said


@pytest.mark.slow
def test_an_endless_pipe_trains_for_max_steps_and_one_that_ends_saves_what_was_learnt(rows, capsys):
    pipe = rows / "data" / "pipe.jsonl"
    os.mkfifo(pipe)

    def feed(lines):
        try:
            with open(pipe, "w") as file:
                for row in lines:
                    file.write(json.dumps(row) + "\n")
        except BrokenPipeError:
            pass

    settings = STREAMED | {"DATA_PATH": "pipe.jsonl", "STREAM_BUFFER": "8"}
    thread = threading.Thread(target=feed, args=(itertools.cycle(many(60)),))
    thread.start()
    _, records = run(rows, "endless", **settings)
    thread.join()
    assert len(records) == 6
    thread = threading.Thread(target=feed, args=(many(40),))
    thread.start()
    _, records = run(rows, "ends", **settings | {"MAX_STEPS": "500", "MICRO_BSZ": "1"})
    thread.join()
    assert 0 < len(records) < 500
    said = capsys.readouterr().out
    assert "data/pipe.jsonl: a pipe, until it ends" in said
    assert f"The stream ended after {len(records)} of MAX_STEPS=500 steps." in said


def test_a_dry_run_shows_the_plan_and_samples(rows, capsys):
    train.command(config(**STREAMED), ["--dry-run"])
    said = capsys.readouterr().out
    assert "Assistant:[[ " in said and "6 optimizer steps" in said


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"MAX_STEPS": "0"}, "MAX_STEPS", "must say how many optimizer steps"),
        ({"CTX_LEN": "auto"}, "CTX_LEN", "must be a number with STREAMING=1"),
        ({"DATALOAD": "bucket"}, "DATALOAD", "must be pack, pad or only"),
        ({"DATALOAD": "get"}, "DATALOAD", "must be pack, pad or only"),
        ({"PACK": "concat"}, "PACK", "must be isolated"),
        ({"EPOCH_COUNT": "2"}, "EPOCH_COUNT", "must be 1"),
        ({"EPOCH_STEPS": "9"}, "EPOCH_STEPS", "must be auto"),
        ({"NUM_WORKERS": "2"}, "NUM_WORKERS", "must be auto, 0 or 1"),
        ({"STREAMING": "0"}, "MAX_STEPS", "belongs to STREAMING=1"),
    ],
)
def test_what_does_not_go_with_streaming_is_refused_by_name(changes, name, words):
    with pytest.raises(SettingErrors) as result:
        config(**STREAMED | changes)
    assert [p.name for p in result.value.problems if words in p.message] == [name]


@pytest.mark.parametrize(
    ("path", "words"), [("rws.jsonl", "did you mean rows.jsonl?"), ("chat.bin", "must end in one of .jsonl")]
)
def test_a_source_that_cannot_be_streamed_is_named(rows, path, words):
    with pytest.raises(SettingErrors) as result:
        train.command(config(**STREAMED | {"DATA_PATH": path}), [])
    assert words in str(result.value)
