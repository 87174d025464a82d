"""Law 9: every setting works in every combination that is accepted, and the rest is refused with a sentence.

tests/matrix.py has the axes and the laws. Here every cell is read, and of those that are accepted as many run as it takes
for every value to occur (every pair in .ci/run, and a part of those for every three; with EVERYTHING=1 all of those).
"""

import random
import re
from unittest import mock

import matrix
import pytest
import torch
from helpers.kit import EVERYTHING
from matrix import NAMES, accepted, asked, broken, cells, covering, groups_of, read, refusals, settings_of

from rwkv_peft.adapters.specs import ALIASES, MODES
from rwkv_peft.common.errors import SettingErrors
from rwkv_peft.quantize import quantise

PLAIN = matrix.with_values({})  # the first value of every axis
COMPRESSED = (*PLAIN[:-1], "nf4")
VALUE_SHARDS = 13  # of the cells for every value: one a test
PAIR_SHARDS = 40  # of those for every two values: two a test
SHARDS = 27  # of the cells for every three values: about 15 a test


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with matrix.world(tmp_path_factory.mktemp("matrix") / "a project") as root:
        yield root


def test_every_word_of_finetune_mode_is_on_the_axis_or_another_name_of_one_that_is():
    assert {settings["FINETUNE_MODE"] for settings in matrix.AXES["method"].values()} | {*ALIASES} == {*MODES}


def test_every_cell_is_accepted_or_refused_with_variables_and_sentences():
    refused = 0
    for cell, problems in matrix.answers().items():
        refused += bool(problems)
        for problem in problems:
            assert problem.name in matrix.FIELDS, (cell, problem)
            assert re.match("(must|belongs|is|names) .{4}", problem.message), (cell, problem)
    assert 0 < refused < len(accepted()) + refused == sum(1 for _ in cells())


def test_cells_by_turns_are_every_accepted_one_but_for_its_file_and_have_each_file_with_each_value():
    turns, at = matrix.by_turns(), NAMES.index("file")
    assert {*turns} <= {*accepted()}
    without = [cell[:at] + cell[at + 1 :] for cell in turns]
    assert len(without) == len({*without})
    assert {*without} == {cell[:at] + cell[at + 1 :] for cell in accepted()}
    pairs = {(cell[at], axis, value) for cell in accepted() for axis, value in enumerate(cell)}
    assert {(cell[at], axis, value) for cell in turns for axis, value in enumerate(cell)} == pairs


def test_reading_the_script_finds_the_same_as_the_matrix():
    rng = random.Random(0)
    for cell in [*rng.sample(list(cells()), 60), *rng.sample(accepted(), 20)]:
        try:
            read(settings_of(cell))
            result = []
        except SettingErrors as problems:
            result = problems.problems
        assert result == refusals(cell)


@pytest.mark.parametrize("other", ALIASES)
def test_another_name_of_a_method_is_accepted_and_refused_like_it(other):
    mine = [cell for cell in cells() if cell[NAMES.index("method")] == ALIASES[other] and cell[:2] == PLAIN[:2]]
    result = [[p.name for p in refusals(cell)] for cell in mine]
    with mock.patch.dict(matrix.AXES["method"][ALIASES[other]], FINETUNE_MODE=other):
        assert [[p.name for p in refusals(cell)] for cell in mine] == result
    assert [] in result


def test_a_cell_whose_pairs_are_all_accepted_is_accepted():
    """What docs/matrix.md relies on: no three values get into each other's way."""
    pairs = {pair for cell in accepted() for pair in groups_of(cell, 2)}
    living = set(accepted())
    for cell in cells():
        assert (cell in living) == all(pair in pairs for pair in groups_of(cell, 2)), cell


@pytest.mark.parametrize("size", [2, 3])
def test_every_choice_of_values_that_is_accepted_at_all_is_tried(size):
    tried = {choice for cell in covering(size) for choice in groups_of(cell, size)}
    assert tried == {choice for cell in accepted() for choice in groups_of(cell, size)}
    assert set(covering(size)) <= set(accepted())


def test_docs_matrix_md_is_up_to_date():
    assert matrix.DOCS.read_text(encoding="utf-8") == matrix.docs(), "run: python tests/matrix.py --docs"


# (shards, not cells: to know the cells, all 70,200 must be read, which would take seconds in each process that collects this)
@pytest.mark.smoke(1)
@pytest.mark.parametrize("shard", range(VALUE_SHARDS))
def test_the_laws_hold_of_every_value(world, shard):
    result = {cell: wrong for cell in covering(1)[shard::VALUE_SHARDS] if (wrong := broken(cell, asked(cell)))}
    assert result == {}


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(PAIR_SHARDS))
def test_the_laws_hold_where_two_values_meet(world, shard):
    result = {cell: wrong for cell in covering(2)[shard::PAIR_SHARDS] if (wrong := broken(cell, asked(cell)))}
    assert result == {}


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(0, SHARDS, 1 if EVERYTHING else 6))
def test_the_laws_hold_where_three_values_meet(world, shard):
    result = {cell: wrong for cell in covering(3)[shard::SHARDS] if (wrong := broken(cell, asked(cell)))}
    assert result == {}


def drawn(linear, rank):
    """Factors of which none is zero."""
    return tuple(
        torch.nn.Parameter(torch.randn(shape)) for shape in ((rank, linear.in_features), (linear.out_features, rank))
    )


def changed(module, *_):
    """A frozen layer with a weight that is not the base's."""
    module.weight = torch.nn.Parameter(module.weight * (1 + 1e-6), requires_grad=False)
    return module


# what is wrong: a cell, what is replaced and by what, and the laws that must notice
FAULTS = {
    "a fresh adapter changes something": (PLAIN, "adapters.lora.fresh_factors", drawn, ["first step"]),
    "nothing is learnt": (PLAIN, "train.module.TrainingModule.rate_of", lambda *_: 0.0, ["learning", "untrained"]),
    "frozen weights change": (PLAIN, "adapters.inject.frozen", changed, ["frozen"]),
    "a checkpoint is not loaded": (PLAIN, "adapters.inject.load_trained", lambda *_: None, ["attached", "merged", "resumes"]),
    "the base is not as it was in memory": (
        COMPRESSED, "quantize.linear.quantise", lambda weight, mode: quantise(weight, "int8"),
        ["first step", "frozen", "merged compressed"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_laws_notice_when(world, fault):
    cell, target, replacement, laws = FAULTS[fault]
    with mock.patch(f"rwkv_peft.{target}", replacement):
        assert list(broken(cell, asked(cell, laws))) == laws
