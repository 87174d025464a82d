"""Packs: as few as best fit decreasing makes, every item in one of them, equal lengths apart."""

from collections import Counter

import numpy as np
import pytest
from helpers.token_files import data, documents, source
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.data.packing import assign_packs, best_fit

LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=80)


def one_by_one(lengths, capacity: int) -> list[list[int]]:
    """The definition: the longest first, each into the fullest pack that still has room for it."""
    packs: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fits = [pack for pack in packs if sum(pack) + length <= capacity]
        if fits:
            max(fits, key=sum).append(length)
        else:
            packs.append([length])
    return packs


def contents(lengths, pack) -> Counter:
    order, result = sorted(lengths, reverse=True), {}
    for length, number in zip(order, pack.tolist(), strict=True):
        result.setdefault(number, []).append(length)
    return Counter(tuple(sorted(lengths)) for lengths in result.values())


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(100, 160))
def test_packing_by_length_is_packing_one_by_one(lengths, capacity):
    pack, packs = best_fit(sorted(Counter(lengths).items(), reverse=True), capacity)
    wanted = one_by_one(lengths, capacity)
    assert packs == len(wanted)
    # which of two equally full packs takes an item is all that may differ
    full = Counter(sum(content) for content in contents(lengths, pack).elements())
    assert full == Counter(map(sum, wanted))


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.integers(100, 160))
def test_keeping_equal_lengths_apart_costs_no_pack(lengths, repeats, capacity):
    lengths = lengths * repeats
    pack, packs = assign_packs(np.array(lengths), capacity)
    assert packs <= len(one_by_one(lengths, capacity)) and set(pack.tolist()) == set(range(packs))
    assert all(sum(content) <= capacity for content in contents(lengths, pack))


def test_exactly_the_context_fits_into_a_pack():
    for length in (15, 16):
        assert assign_packs(np.array([length]), 16)[1] == 1
    assert assign_packs(np.array([16, 8, 8]), 16)[1] == 2


@pytest.mark.parametrize("seed", range(4))
def test_repeats_of_a_row_land_in_different_packs(seed):
    """make_tokenize.sh writes every row EPOCHS times, so their lengths are equal."""
    lengths = np.repeat(np.random.default_rng(seed).integers(10, 200, 60), 4)
    pack, packs = assign_packs(lengths, 512)
    order = np.sort(lengths)[::-1]
    twice = sum(count - 1 for count in Counter(zip(pack.tolist(), order.tolist(), strict=True)).values())
    together = sum(n - len(set(p)) for p in one_by_one(lengths.tolist(), 512) for n in [len(p)])
    assert together > 100 and twice < together / 5


def test_who_of_equal_lengths_goes_where_is_drawn_again_every_pass():
    ids, _ = documents([9] * 60)
    given = data([source(ids)], "pack", ctx_len=32)

    def packs(number):
        rows = (given.row(number * given.rows + i) for i in range(given.rows))
        return {frozenset(int(tokens[0]) for tokens, _ in row) for row in rows}

    assert packs(0) != packs(1) and sorted(map(len, packs(0))) == sorted(map(len, packs(1)))
    still = data([source(ids)], "pack", ctx_len=32, shuffle=False)
    assert [still.row(i)[0][0].tolist() for i in range(still.rows)] == [
        still.row(still.rows + i)[0][0].tolist() for i in range(still.rows)
    ]


def test_two_hundred_thousand_documents_are_packed_without_looking_at_each():
    """The number of looks depends on how many lengths there are. (No timing: a quadratic packer would not end.)"""
    lengths = np.random.default_rng(0).lognormal(5.5, 0.7, 200_000).astype(int).clip(1, 1024)
    pack, packs = assign_packs(lengths, 1024)
    assert np.bincount(pack, np.sort(lengths)[::-1]).max() <= 1024
    assert lengths.sum() / (packs * 1024) > 0.99
