"""Rows that are cut, by make_tokenize.sh and by training.sh: nothing is trained that the whole row does not train."""

import json

import numpy as np
import pytest
from helpers.token_files import data, documents, source
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.common.errors import SettingErrors
from rwkv_peft.data.masking import Markers, target_weights
from rwkv_peft.data.tokenized_files import roles_in_text
from rwkv_peft.preprocess.pipeline import EncodeConfig, RowEncoder
from rwkv_peft.preprocess.reader import Block
from rwkv_peft.preprocess.truncate import Limits
from rwkv_peft.text import tokenizer
from rwkv_peft.text.presets import PRESETS
from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import ENDINGS

TEMPLATES = ("rwkv-world", "rwkv-g1", "rwkv-g1-think", "chatml", "alpaca")
MASKS = ("none", "pad", "qa", "last", "se")
WORDS = ["The lamp", " is lit", " at sunset.", "灯塔", "。", "\n", "日落时分", " x = 1", "🐱", " And", " so on", "?"]
CONTENT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map("".join).filter(lambda s: s.strip())


def encode_block_of(row, template="rwkv-world", eot="doc", limits=None, **options):
    recipe = EncodeConfig(PRESETS[template], eot, limits=limits or Limits(), **options)
    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    return RowEncoder(recipe).block(Block("x.jsonl", 1, line, 0))


def rows_of(made):
    ends = np.cumsum(made.sizes)
    return [(made.ids[e - n : e], made.roles[e - n : e]) for e, n in zip(ends, made.sizes, strict=True)]


def trained_pairs(made, mask: str) -> set[tuple[int, int]]:
    """(token, next) of everything that is trained."""
    result = set()
    for ids, roles in rows_of(made):
        if mask == "se":
            roles = roles_in_text(ids, Markers(b"Assistant:", b"\n\n").spans)
        weights = target_weights(roles, "qa" if mask == "se" else mask)
        result |= {(int(ids[i]), int(ids[i + 1])) for i in np.flatnonzero(weights)}
    return result


def dialogue(contents):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


DIALOGUES = st.lists(CONTENT, min_size=2, max_size=6).map(lambda c: dialogue(c[: len(c) // 2 * 2]))


@settings(max_examples=60, deadline=None)
@given(
    row=DIALOGUES, most=st.integers(2, 60), policy=st.sampled_from(["truncate", "truncate-left", "split"]),
    eot=st.sampled_from(sorted(ENDINGS)), template=st.sampled_from(TEMPLATES), mask=st.sampled_from(MASKS),
)  # fmt: skip
def test_a_row_cut_by_max_tokens_trains_nothing_that_the_whole_row_does_not(row, most, policy, eot, template, mask):
    whole, cut = encode_block_of(row, template, eot), encode_block_of(row, template, eot, Limits(most, policy=policy))
    # the last answer of what is left need not be the last one of all; the text of a marker may begin to count elsewhere
    of_whole = {"last": "qa", "se": "none"}.get(mask, mask)
    assert trained_pairs(cut, mask) <= trained_pairs(whole, of_whole)


@settings(max_examples=60, deadline=None)
@given(
    row=DIALOGUES, target=st.integers(2, 20), source_length=st.integers(0, 20), eot=st.sampled_from(sorted(ENDINGS)),
    policy=st.sampled_from(["truncate", "truncate-left"]), template=st.sampled_from(TEMPLATES),
    mask=st.sampled_from(["qa", "last"]), expand=st.booleans(),
)  # fmt: skip
def test_an_answer_cut_by_target_length_trains_nothing_that_the_whole_one_does_not(
    row, target, source_length, eot, policy, template, mask, expand
):
    limits = Limits(0, source_length, target, policy)
    whole, cut = encode_block_of(row, template, eot), encode_block_of(row, template, eot, limits, expand=expand)
    pairs = trained_pairs(whole, "qa") | (
        trained_pairs(encode_block_of(row, template, eot, expand=True), "qa") if expand else set()
    )
    # the first word of what is left has lost the blank in front of it, and may be other tokens
    reported = {(tokenizer.decode([a])[-1:], b) for a, b in pairs} if policy == "truncate-left" else set()
    assert all((tokenizer.decode([a])[-1:], b) in reported for a, b in trained_pairs(cut, mask) - pairs)


@settings(max_examples=60, deadline=None)
@given(
    row=DIALOGUES, target=st.integers(2, 20), eot=st.sampled_from(sorted(ENDINGS)),
    template=st.sampled_from(TEMPLATES), mask=st.sampled_from(MASKS),
)  # fmt: skip
def test_under_every_mask_a_row_ends_in_the_answer_that_target_length_cuts(row, target, eot, template, mask):
    whole = encode_block_of(row, template, eot)
    cut = encode_block_of(row, template, eot, Limits(target=target, policy="truncate"))
    assert cut.ids.tolist() == whole.ids.tolist()[: len(cut.ids)]
    of_whole = {"last": "qa", "se": "none"}.get(mask, mask)
    assert trained_pairs(cut, mask) <= trained_pairs(whole, of_whole)


LONG = [
    {"role": "user", "content": "Count."},
    {"role": "assistant", "content": "one two three four five six seven eight"},
    {"role": "user", "content": "More."},
    {"role": "assistant", "content": "nine ten"},
]


@pytest.mark.parametrize("eot", ENDINGS)
def test_turns_behind_a_cut_answer_are_counted(eot):
    made = encode_block_of({"messages": LONG}, eot=eot, limits=Limits(target=4, policy="truncate"))
    assert tokenizer.decode(made.ids) == "User: Count.\n\nAssistant: one two three four"
    assert (made.counts["cut rows"], made.counts["cut off"], made.counts["turns cut off"]) == (1, 1, 2)
    assert made.places["cut off"][0].line == 1


def test_an_answer_in_the_history_that_is_not_to_be_learnt_is_cut_and_the_dialogue_resumes():
    limits = Limits(target=4, policy="truncate")
    made = encode_block_of({"messages": LONG}, limits=limits, mask_history=True)
    assert tokenizer.decode(made.ids[:-1]).endswith("three\n\nUser: More.\n\nAssistant: nine ten")
    assert tokenizer.decode(made.ids[made.roles == Role.ASSISTANT][:-1]) == " nine ten"


def test_the_first_token_of_an_answer_that_lost_its_beginning_is_not_learnt():
    made = encode_block_of({"messages": LONG}, limits=Limits(target=4, policy="truncate-left"))
    assert tokenizer.decode(made.ids[made.roles == Role.ASSISTANT][:-1]) == " seven eight\n\n nine ten" or (
        " six" not in tokenizer.decode(made.ids[made.roles == Role.ASSISTANT][:-1])
    )
    assert not made.counts["cut off"]


@pytest.mark.parametrize("template", ["rwkv-world", "rwkv-g1", "rwkv-g1-bot", "chatml"])
@pytest.mark.parametrize("target", [3, 4, 5, 12])
def test_the_end_of_a_turn_that_lost_its_beginning_is_learnt(template, target):
    """And what is left of it is learnt from its second token on."""
    limits = Limits(target=target, policy="truncate-left")
    made, whole = (
        encode_block_of({"messages": LONG[:2]}, template, limits=limits),
        encode_block_of({"messages": LONG[:2]}, template),
    )
    if not len(made.ids):
        return  # the end of a turn alone is longer
    roles = made.roles.tolist()
    behind = max((i + 1 for i, role in enumerate(roles) if role == Role.UNTRAINED), default=roles.index(Role.ASSISTANT))
    learnt = made.ids[behind:].tolist()
    assert set(roles[behind:]) == {Role.ASSISTANT}
    assert roles[-1] == Role.ASSISTANT and whole.ids.tolist()[-len(learnt) :] == learnt
    assert ("✿" in tokenizer.decode(learnt[:-1])) == (template == "rwkv-g1-bot")
    assert roles.count(Role.UNTRAINED) <= 1 and len(learnt) >= min(target - 1, 2)


@pytest.mark.parametrize("policy", ["truncate-left"])
@pytest.mark.parametrize("template", ["rwkv-world", "rwkv-g1-bot"])
def test_no_word_is_cut_inside_where_whole_ones_are_left(template, policy):
    said = "Photosynthesis characteristically disestablishes incomprehensible electroencephalographic flowcharts daily"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    result = set()
    for target in range(2, 40):
        made = encode_block_of({"messages": turns}, template, limits=Limits(target=target, policy=policy))
        if len(made.ids):
            left = (
                tokenizer.decode(made.ids[:-1])
                .split("Assistant:" if template == "rwkv-world" else "Bot✿")[1]
                .strip("✿ \n")
            )
            assert f" {said}".endswith(f" {left}"), left
            result.add(left)
    assert {"daily", "flowcharts daily", said} <= result


def test_half_a_tool_call_is_not_kept():
    call = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1, "b": 2}}]}
    made = encode_block_of({"messages": [LONG[0], call]}, limits=Limits(target=5, policy="truncate"))
    assert made.counts["dropped: longer than TARGET_LENGTH"] == 1


@pytest.mark.parametrize("eot", ENDINGS)
def test_a_plain_text_that_is_cut_has_no_end(eot):
    made = encode_block_of({"text": "The lamp is lit at sunset. " * 9}, eot=eot, limits=Limits(12, policy="truncate"))
    assert made.ids[-1] and not tokenizer.decode(made.ids).endswith(("\n", "\x17")) and len(made.ids) == 12
    assert made.counts["cut off"] == 1


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 60), min_size=1, max_size=12), ctx_len=st.integers(1, 70),
    mode=st.sampled_from(["pack", "pad", "only", "bucket", "concat"]), mask=st.sampled_from(MASKS[:-1]),
    overlong=st.sampled_from(["truncate", "truncate-left", "split", "drop"]), ended=st.sampled_from([0.0, 0.5, 1.0]),
)  # fmt: skip
def test_a_row_cut_by_ctx_len_trains_nothing_that_the_whole_row_does_not(sizes, ctx_len, mode, mask, overlong, ended):
    ids, roles = documents(sizes, ended=ended)
    try:
        made = data([source(ids, roles)], mode, mask, ctx_len, overlong)
    except SettingErrors:
        return  # nothing to train
    wanted = set()
    for tokens, said in zip(ids, roles, strict=True):
        weights = target_weights(said, mask)
        wanted |= {(int(tokens[i]), int(tokens[i + 1])) for i in np.flatnonzero(weights)}
    if mask == "none" and mode == "concat":  # all text, across rows
        wanted |= {(int(end), int(tokens[0])) for tokens in ids for end in {0, *(d[-1] for d in ids)}}
    result = {
        (int(tokens[i]), int(tokens[i + 1]))
        for row in range(made.rows)
        for tokens, weights in made.row(row)
        for i in np.flatnonzero(weights)
    }
    assert result <= wanted


def test_a_thought_that_ctx_len_cuts_is_not_followed_by_an_end():
    steps = " ".join(f"Step {i}: {i} and {i} make {2 * i}." for i in range(40))
    row = dialogue(["Q0?", f"<think>\n{steps}\n</think>\nThe answer is 0."])
    made = encode_block_of(row, "rwkv-g1")
    cut = data([source([made.ids], [made.roles])], "pack", "qa", 96)
    [(tokens, weights)] = cut.row(0)
    assert tokens.tolist() == made.ids[:97].tolist() and weights[-1] == 1
    assert cut.facts().unfinished == 1
