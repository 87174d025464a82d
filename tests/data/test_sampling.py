"""Rows, passes and steps: everything is used exactly once, on any number of ranks, the same for the same seed."""

from collections import Counter

import numpy as np
import pytest
from helpers.token_files import MODES, data, documents, source
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.data.sampling import Plan, auto_ctx_len, reorder_groups
from rwkv_peft.data.truncate import truncate_documents
from rwkv_peft.data.windows import is_prime, magic_prime

SIZES = st.lists(st.integers(2, 80), min_size=1, max_size=40)
OVERLONG = ("truncate", "truncate-left", "drop", "split")


def targets(sequences):
    """The tokens that are targets, with how often each is."""
    return Counter(int(t) for tokens, _ in sequences for t in tokens[1:])


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, ctx_len=st.integers(1, 90), overlong=st.sampled_from(OVERLONG), zero=st.booleans())
def test_exactly_the_context_fits_and_overlong_says_what_becomes_of_more(sizes, ctx_len, overlong, zero):
    ids, _ = documents(sizes, ended=float(zero))
    tokens, starts = np.concatenate(ids), np.concatenate([[0], np.cumsum(sizes)])
    items = truncate_documents(np.array(sizes), starts, ctx_len, overlong)
    pieces = {}
    for document, start, stop in zip(items.document, items.start, items.stop(), strict=True):
        piece = tokens[start:stop].tolist()
        assert 2 <= len(piece) <= ctx_len + 1
        pieces.setdefault(int(document), []).append(piece)
    for i, document in enumerate(ids):
        whole, n = document.tolist(), ctx_len + 1
        if len(whole) <= n:
            assert pieces[i] == [whole]
        elif overlong == "truncate":
            assert pieces[i] == [whole[:n]]
        elif overlong == "truncate-left":
            assert pieces[i] == [whole[-n:]]
        elif overlong == "drop":
            assert i not in pieces
        else:  # every target once, from the token before it
            assert sum((piece[1:] for piece in pieces[i]), []) == whole[1:]
            assert [piece[0] for piece in pieces[i][1:]] == [piece[-1] for piece in pieces[i][:-1]]


@settings(max_examples=60, deadline=None)
@given(
    sizes=SIZES, ctx_len=st.integers(1, 90), number=st.integers(0, 3), mode=st.sampled_from(MODES[:-1]),
    overlong=st.sampled_from(["truncate", "split"]), shuffle=st.booleans(),
)  # fmt: skip
def test_a_pass_uses_everything_exactly_once_and_no_row_is_longer_than_the_context(
    sizes, ctx_len, number, mode, overlong, shuffle
):
    ids, _ = documents(sizes, ended=0)
    given = data([source(ids)], mode, "none", ctx_len, overlong, shuffle)
    rows = [given.row(number * given.rows + i) for i in range(given.rows)]
    assert all(sum(len(tokens) - 1 for tokens, _ in row) <= ctx_len for row in rows)
    seen = targets(sequence for row in rows for sequence in row)
    if mode == "get":
        wanted = Counter(np.concatenate(ids)[1:].tolist())
    elif mode == "concat":  # the first token of the pass is the only one that is no target
        wanted = Counter(np.concatenate(ids).tolist()) + Counter({0: len(ids)})
        [first] = wanted - seen
        assert first in [document[0] for document in ids]
        wanted[first] -= 1
        wanted = +wanted
    else:
        limit = None if overlong == "split" else ctx_len + 1
        wanted = Counter(int(t) for document in ids for t in document[1:limit])
    assert seen == wanted


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, ctx_len=st.integers(1, 90), shuffle=st.booleans())
def test_concat_ends_every_document_with_one_token_0_and_loses_nothing_between_rows(sizes, ctx_len, shuffle):
    ids, _ = documents(sizes, ended=0.5)
    given = data([source(ids)], "concat", "none", ctx_len, shuffle=shuffle)
    rows = [given.row(i) for i in range(given.rows)]
    assert all(len(row) == 1 for row in rows)
    text = [int(rows[0][0][0][0]), *(int(t) for [(tokens, _)] in rows for t in tokens[1:])]
    assert all(len(row[0][0]) == ctx_len + 1 for row in rows[:-1])
    result, at = [], 0
    for place, token in enumerate(text):
        if token == 0:
            result.append(tuple(text[at:place]))
            at = place + 1
    assert at == len(text)
    wanted = [tuple(t for t in document.tolist() if t) for document in ids]
    assert sorted(result) == sorted(wanted)
    assert shuffle or result == wanted


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, ctx_len=st.integers(80, 200), mode=st.sampled_from(MODES[:-1]))
def test_every_pass_has_the_same_number_of_rows(sizes, ctx_len, mode):
    given = data([source(documents(sizes)[0])], mode, "pad", ctx_len)
    for number in (1, 2):
        for row in (number * given.rows, (number + 1) * given.rows - 1):
            assert given.row(row)


@pytest.mark.parametrize("mode", MODES[:-1])
def test_the_same_seed_gives_the_same_pass_and_another_pass_or_seed_another_order(mode):
    file = source(documents(range(5, 45))[0])
    first, again, other = (data([file], mode, ctx_len=60, seed=seed) for seed in (1, 1, 2))

    def order(given, number):
        return [tokens.tolist() for i in range(given.rows) for tokens, _ in given.row(number * given.rows + i)]

    assert order(first, 0) == order(again, 0)
    assert order(first, 0) != order(first, 1)
    assert order(first, 0) != order(other, 0)


@pytest.mark.parametrize("mode", ["pad", "only"])
def test_without_shuffle_rows_come_in_the_order_of_the_file(mode):
    ids, _ = documents([9, 3, 5], ended=0)
    given = data([source(ids)], mode, ctx_len=20, shuffle=False)
    assert [given.row(i)[0][0].tolist() for i in range(6)] == [d.tolist() for d in ids] * 2


def test_magic_prime_takes_the_windows_of_rwkv_lm_in_its_order():
    """As RWKV-LM's dataset.py writes it: ii = 1 + sample, i = factor * ii^3 % p, with p from its make_data.py."""
    size, ctx_len = 1000, 16
    p = max(n for n in range(1, size // ctx_len) if n % 3 == 2 and is_prime(n))
    assert p == 59 and magic_prime(size // ctx_len) == p
    given = data([source([np.arange(1, size + 1)])], "magic", "none", ctx_len)
    factor, begins = int(p * ((5**0.5) - 1) / 2), []
    for sample in range(2 * p):
        ii = 1 + sample
        begin = ((factor * ii * ii * ii) % p) * ctx_len
        [(tokens, weights)] = given.row(sample)
        assert tokens.tolist() == list(range(begin + 1, begin + ctx_len + 2)) and weights.all()
        begins.append(begin)
    assert sorted(begins[:p]) == [ctx_len * i for i in range(p)] and begins[:p] == begins[p:]
    assert given.rows == p and given.facts().targets == p * ctx_len


@pytest.mark.parametrize(("windows", "p"), [(2, 0), (3, 2), (5, 2), (6, 5), (12, 11), (62, 59)])
def test_the_magic_prime_is_below_the_number_of_windows(windows, p):
    assert magic_prime(windows) == p


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.randoms())
def test_groups_are_taken_whole(sizes, random):
    first = np.concatenate([[0], np.cumsum(sizes)])
    which = np.array(random.sample(range(len(sizes)), len(sizes)))
    values, bounds = reorder_groups(np.arange(first[-1]), first, which)
    groups = [values[a:b].tolist() for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    assert groups == [list(range(first[i], first[i + 1])) for i in which]


@settings(max_examples=60, deadline=None)
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


@pytest.mark.parametrize("mode", ["pack", "get", "concat"])
@pytest.mark.parametrize("number", [1, 17, 40, 100, 1000])
def test_the_automatic_context_leaves_small_data_sixteen_rows_a_pass_where_documents_are_short(mode, number):
    given = data([source([np.arange(1, 34)] * number)], mode, ctx_len=None)
    assert given.rows >= min(number, 16) and given.ctx_len <= 512
