"""Mixtures of files: what DATA_PATH may say, and that every source has its share after any number of rows."""

from collections import Counter
from fractions import Fraction

import pytest
from helpers.token_files import data, documents, source
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.data.mixture import MixtureSchedule, integer_ratio, nearest_integer_ratio, parse_mixture

WEIGHTS = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("sample", {"sample": 1}),
        ("my chat.idx", {"my chat.idx": 1}),
        ("a:0.7 b:0.3", {"a": Fraction(7, 10), "b": Fraction(3, 10)}),
        ("my chat:2  data/code v2:.5", {"my chat": 2, "data/code v2": Fraction(1, 2)}),
        ("a:b:1 c:3.", {"a:b": 1, "c": 3}),
        ("我的 数据:1", {"我的 数据": 1}),
    ],
)
def test_names_with_weights_are_read_by_the_numbers_at_their_ends(text, names):
    assert dict(parse_mixture(text)) == names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a:0.7 b", "gives b no weight"),
        ("a:0 b:1", "gives a the weight 0; it must be more than 0"),
        ("a:-1 b:1", "gives a the weight -1"),
        ("a:1 a:2", "names a more than once"),
        (":1 a:2", "a weight without a name"),
        ("a:0.1234567 b:1", "too many digits"),
    ],
)
def test_what_is_no_mixture_is_refused_in_words(text, words):
    with pytest.raises(ValueError, match=words):
        parse_mixture(text)


@settings(max_examples=100, deadline=None)
@given(WEIGHTS)
def test_after_any_number_of_rows_every_source_is_within_one_row_of_its_share(weights):
    turns, total, drawn = MixtureSchedule(weights), sum(weights), Counter()
    for number in range(2 * total):
        who, row = turns.locate(number)
        assert row == drawn[who]  # each source's own rows come in order
        drawn[who] += 1
        for k, weight in enumerate(weights):
            assert abs(drawn[k] - (number + 1) * weight / total) < 1
            assert turns.count(k, number + 1) == drawn[k]


def test_shares_need_not_sum_to_one():
    assert integer_ratio([Fraction("0.7"), Fraction("0.3")]) == integer_ratio([Fraction(14), Fraction(6)]) == [7, 3]
    assert nearest_integer_ratio([0.5, 0.25, 0.25], 100) == [2, 1, 1]
    assert 0 not in nearest_integer_ratio([1.0, 1e-9], 100)


@pytest.mark.parametrize("mode", ["pack", "concat", "pad", "only", "get", "magic"])
def test_each_source_goes_through_its_own_passes_in_its_own_turn(mode):
    one, two = documents([7, 9, 4, 12] * 3)[0], documents([5, 8, 6] * 3, seed=1)[0]
    two = [document + 1000 * (document > 0) for document in two]
    mixed = data([source(one, weight=3), source(two, weight=1)], mode)
    alone = [data([source(one)], mode), data([source(two)], mode)]
    rows = [[[t.tolist() for t, _ in mixed.row(n)] for n in range(48 * 4)][i::1] for i in (0,)][0]
    of_two = [any(t >= 1000 for tokens in row for t in tokens) for row in rows]
    assert abs(sum(of_two) - 48) <= 1
    first = [row for row, second in zip(rows, of_two, strict=True) if not second]
    turns = alone[0].rows
    for number in range(len(first) // turns):  # every pass of a source has all of it
        seen = sorted(map(str, first[number * turns : (number + 1) * turns]))
        whole = sorted(str([t.tolist() for t, _ in alone[0].row(number * turns + i)]) for i in range(turns))
        assert mode in ("pack", "get", "concat") or seen == whole
    assert mixed.rows == sum(given.rows for given in alone)
    assert mixed.facts().targets == sum(given.facts().targets for given in alone)


@pytest.mark.parametrize("shares", [(1, 1), (7, 3), (1, 20)])
def test_a_mixture_in_buckets_draws_rows_by_their_shares(shares):
    short, long = documents([9] * 300)[0], documents([60] * 100)[0]
    mixed = data([source(short, weight=shares[0]), source(long, weight=shares[1])], "bucket", ctx_len=64, budget=256)
    plan = mixed.make_plan(None, 0, 1, 1)
    drawn = Counter()
    for epoch in range(40):
        for step in range(plan.optimizer_steps):
            drawn.update(mixed.locate(n)[0] for n in plan.rows_of_step(epoch, step))
    share = shares[0] / sum(shares)
    assert drawn[0] / drawn.total() == pytest.approx(share, rel=0.03)
    assert mixed.passes(plan, 40) == pytest.approx([drawn[0] / 300, drawn[1] / 100], rel=0.1)
