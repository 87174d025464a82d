"""Buckets: which edges, all ranks on the same one in a step, every row once a pass, on any number of ranks."""

import itertools
from collections import Counter

import numpy as np
import pytest
from helpers.token_files import data, documents, source
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.data import buckets
from rwkv_peft.data.dataset import Batches

SIZES = st.lists(st.integers(2, 90), min_size=1, max_size=60)


def planned(documents_of, accumulate=1, world=1, epoch_steps=None, **other):
    file = source(documents(documents_of)[0])
    made = data([file], "bucket", ctx_len=96, accumulate=accumulate, world=world, **other)
    return made, made.make_plan(epoch_steps, 0, accumulate, world)


@settings(max_examples=60, deadline=None)
@given(
    sizes=SIZES, accumulate=st.integers(1, 3), world=st.integers(1, 3), budget=st.integers(16, 400), shuffle=st.booleans(),
    edges=st.sampled_from([(), (96,), (16, 48, 96), (32, 64, 80, 96)]), mini=st.booleans(),
)  # fmt: skip
def test_every_row_comes_once_a_pass_and_a_step_keeps_to_one_bucket_on_all_ranks(
    sizes, accumulate, world, budget, shuffle, edges, mini
):
    made, plan = planned(
        sizes, accumulate, world, accumulate if mini else None, budget=budget, shuffle=shuffle, edges=edges
    )
    lengths, edges = made.parts[0].items.length, made.buckets.edges
    seen, steps = [], plan.steps * 2
    for number in range(steps):
        epoch, step = divmod(number, plan.optimizer_steps)
        mine = [
            plan.rows_of_micro_batch(epoch, step * accumulate + part, rank)
            for part in range(accumulate)
            for rank in range(world)
        ]
        rows = [n for part in mine for n in part]
        assert rows == list(plan.rows_of_step(epoch, step)) and rows
        items = [int(made.streams[0].items_of(n)[0]) for n in rows]
        [bucket] = {int(np.searchsorted(edges, lengths[i])) for i in items}
        assert max(map(len, mine)) <= made.buckets.sizes[bucket]
        seen += items
    first, second = seen[: len(sizes)], seen[len(sizes) :]
    assert sorted(first) == sorted(second) == list(range(len(sizes)))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_thousand_rows_are_filled_up_little_and_to_multiples_of_16(world):
    sizes = np.random.default_rng(0).integers(2, 1000, 1000)
    made = data([source(documents(sizes % 97 + 2)[0])], "bucket", "pad", 112, world=world)
    plan = made.make_plan(None, 0, 1, world)
    real = filled = 0
    for rank in range(world):
        for batch in (Batches(made, plan, rank)[i] for i in range(plan.micro_batches)):
            widths = np.diff(batch.cu_seqlens)
            assert len(set(widths.tolist())) == 1
            if batch.tokens:
                assert widths[0] % 16 == 0 and widths[0] <= made.buckets.edges[-1]
                assert batch.ids.numel() <= max(4096, made.buckets.edges[-1])
                real, filled = real + batch.tokens, filled + batch.ids.numel()
    assert real == int((sizes % 97 + 1).sum())
    assert real / filled > 0.8  # 0.49 if all were as long as the longest


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=30))
def test_edges_are_those_with_the_least_filling(lengths):
    """Against all choices of edges; with so few rows the limit on buckets is lifted."""
    lengths = np.array(lengths * buckets.ROWS_PER_BUCKET * 3)
    edges = buckets.best_edges(lengths)
    assert all(edge % 16 == 0 for edge in edges) and list(edges) == sorted(set(edges))
    assert edges[-1] - 16 < lengths.max() <= edges[-1] and len(edges) <= buckets.MOST_BUCKETS

    def filled(edges):
        return int(np.array(edges)[np.searchsorted(edges, lengths)].sum())

    steps = sorted(set((-(-lengths // 16) * 16).tolist()))
    others = itertools.combinations(steps[:-1], len(edges) - 1)
    assert filled(edges) == min(filled((*other, steps[-1])) for other in others)


def test_long_contexts_are_looked_at_more_coarsely():
    lengths = np.random.default_rng(0).integers(1, 100_000, 5000)
    edges = buckets.best_edges(lengths)
    assert len(edges) == buckets.MOST_BUCKETS and edges[-1] >= lengths.max() and all(edge % 16 == 0 for edge in edges)


def test_three_rows_are_enough():
    _, plan = planned([5, 40, 90], accumulate=2, world=2)
    assert plan.steps >= 1


def test_a_budget_gives_each_bucket_its_rows_and_a_list_is_taken_as_it_is():
    lengths = np.array([10, 60, 500])
    assert buckets.make_buckets(lengths, (16, 64, 512), (), 256, 1, 1).sizes == (16, 4, 1)
    assert buckets.make_buckets(lengths, (16, 64, 512), (8, 4, 2), None, 1, 1).sizes == (8, 4, 2)
    many = np.full(10_000, 60)
    assert buckets.make_buckets(many, (64,), (), None, 1, 1).sizes == (4096 // 64,)
    assert buckets.make_buckets(many, (64,), (), None, 8, 8).sizes == (10_000 // (16 * 64),)


def test_without_shuffle_steps_follow_the_file():
    made, plan = planned([90] * 4 + [9] * 4 + [90] * 4, shuffle=False, edges=(16, 96), sizes=(2, 2))
    rows = [list(plan.rows_of_step(0, step)) for step in range(plan.steps)]
    items = [[int(made.streams[0].items_of(n)[0]) for n in step] for step in rows]
    assert items == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]


def test_steps_of_a_pass_come_in_an_order_of_their_own():
    made, plan = planned([9] * 64 + [90] * 64, edges=(16, 96), sizes=(4, 4))
    one, two = made.streams[0].one_pass(0), made.streams[0].one_pass(1)
    assert Counter(one.bucket.tolist()) == Counter(two.bucket.tolist()) == Counter({0: 16, 1: 16})
    assert one.bucket.tolist() != sorted(one.bucket.tolist()) and one.bucket.tolist() != two.bucket.tolist()
