"""Rows, passes and steps: everything is used exactly once, on any number of ranks, the same for the same seed."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.data.sampling import Plan, auto_ctx_len, best_fit, number_of_rows, one_pass

MODES = ("pack", "pad", "only", "get")
SIZES = st.lists(st.integers(2, 80), min_size=1, max_size=40).map(lambda x: np.array(x, dtype=np.int32))


def make(mode, sizes, ctx_len, number=0, seed=1, shuffle=True):
    return one_pass(mode, sizes, ctx_len, np.arange(len(sizes)), seed, number, shuffle)


@settings(max_examples=100, deadline=None)
@given(sizes=SIZES, ctx_len=st.integers(1, 90), number=st.integers(0, 3), mode=st.sampled_from(["pack", "pad", "only"]))
def test_every_document_is_in_a_pass_exactly_once_and_cut_only_at_the_context(sizes, ctx_len, number, mode):
    one = make(mode, sizes, ctx_len, number)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    assert sorted(one.documents) == list(range(len(sizes)))
    for document, (a, b) in zip(one.documents, one.pieces, strict=True):
        assert a == starts[document] and b - a == min(sizes[document], ctx_len + 1)
    for i in range(len(one)):
        assert sum(b - a - 1 for a, b in one.row(i)) <= ctx_len


@settings(max_examples=100, deadline=None)
@given(sizes=SIZES, ctx_len=st.integers(1, 90), number=st.integers(0, 3), shuffle=st.booleans())
def test_windows_cover_every_target_of_the_file_exactly_once(sizes, ctx_len, number, shuffle):
    one = make("get", sizes, ctx_len, number, shuffle=shuffle)
    targets = Counter(t for a, b in one.pieces for t in range(a + 1, b))
    assert targets == Counter(range(1, int(sizes.sum())))
    assert all(sum(b - a - 1 for a, b in one.row(i)) <= ctx_len for i in range(len(one)))


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, ctx_len=st.integers(80, 200), mode=st.sampled_from(MODES))
def test_every_pass_has_the_same_number_of_rows(sizes, ctx_len, mode):
    expected = number_of_rows(mode, sizes, ctx_len, np.arange(len(sizes)))
    assert {len(make(mode, sizes, ctx_len, number)) for number in range(4)} == {expected}


@pytest.mark.parametrize("mode", MODES)
def test_the_same_seed_gives_the_same_pass_and_another_pass_another_order(mode):
    sizes = np.arange(5, 45, dtype=np.int32)
    same, again, other = make(mode, sizes, 60, 0), make(mode, sizes, 60, 0), make(mode, sizes, 60, 1)
    assert np.array_equal(same.pieces, again.pieces) and np.array_equal(same.first, again.first)
    assert not np.array_equal(same.pieces, other.pieces)


@pytest.mark.parametrize("mode", ["pad", "only"])
def test_without_shuffle_rows_come_in_the_order_of_the_file(mode):
    sizes = np.array([9, 3, 5], dtype=np.int32)
    assert make(mode, sizes, 20, 3, shuffle=False).documents.tolist() == [0, 1, 2]


def test_exactly_the_context_fits_into_a_row():
    for length in (15, 16):
        assert len(best_fit(np.array([length]), 16)) == 1
    assert sorted(map(len, best_fit(np.array([16, 8, 8, 1]), 16))) == [1, 1, 2]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=80))
def test_packing_is_close_to_the_fewest_rows_possible(lengths):
    rows = len(best_fit(np.array(lengths), 100))
    least = -(-sum(lengths) // 100)
    assert rows <= 11 / 9 * max(least, sum(1 for n in lengths if n > 50)) + 1  # the known bound of best fit decreasing


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 60), micro=st.integers(1, 5), accumulate=st.integers(1, 4), world=st.integers(1, 3),
    epoch_steps=st.one_of(st.none(), st.integers(1, 30)),
)  # fmt: skip
def test_ranks_and_micro_batches_share_the_rows_of_every_step_without_gap_or_overlap(
    rows, micro, accumulate, world, epoch_steps
):
    plan = Plan(rows, epoch_steps, micro, accumulate, world)
    seen = []
    for epoch in range(2):
        for step in range(plan.optimizer_steps):
            mine = [
                n
                for part in range(accumulate)
                for rank in range(world)
                if step * accumulate + part < plan.micro_batches
                for n in plan.rows_of_micro_batch(epoch, step * accumulate + part, rank)
            ]
            assert mine == list(plan.rows_of_step(epoch, step))
            seen += mine
    assert seen == list(range(2 * plan.rows_per_epoch))
    if epoch_steps is None:
        assert plan.rows_per_epoch == rows


@pytest.mark.parametrize("split", [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 8, 1)])
def test_a_step_takes_the_same_rows_however_it_is_split(split):
    plan, whole = Plan(50, None, *split), Plan(50, None, 8, 1, 1)
    assert [list(plan.rows_of_step(1, s)) for s in range(plan.optimizer_steps)] == [
        list(whole.rows_of_step(1, s)) for s in range(whole.optimizer_steps)
    ]


def test_short_epochs_go_on_through_the_data_in_turn():
    plan = Plan(rows=10, epoch_steps=3, micro_bsz=2, accumulate=1, world=1)
    first = [list(plan.rows_of_step(epoch, step)) for epoch in range(2) for step in range(3)]
    assert sum(first, []) == list(range(12))  # 10 and 11 are the first rows of the second pass


@pytest.mark.parametrize(
    ("mode", "longest", "ctx_len"), [("pad", 100, 112), ("pack", 100, 512), ("pack", 700, 704), ("only", 99999, 4096)]
)
def test_the_automatic_context_takes_the_longest_row_within_limits(mode, longest, ctx_len):
    assert auto_ctx_len(mode, np.array([longest] * 200)) == ctx_len


@pytest.mark.parametrize("mode", ["pack", "get"])
@pytest.mark.parametrize("documents", [1, 17, 40, 100, 1000])
def test_the_automatic_context_leaves_small_data_sixteen_rows_a_pass_where_documents_are_short(mode, documents):
    sizes = np.full(documents, 33, dtype=np.int32)
    ctx_len = auto_ctx_len(mode, sizes)
    rows = number_of_rows(mode, sizes, ctx_len, np.arange(documents))
    assert rows >= min(documents, 16) and ctx_len <= 512
