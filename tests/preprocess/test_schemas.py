# ruff: noqa: E501 - tables of rows
"""What rows of other people's data sets become: every key is used, is harmless metadata, or is reported."""

import copy
import json
from pathlib import Path

import pytest
from helpers.messages import ANSWER, CALL, TOOL, A, Q, S, T, U, read, refused, said, together
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.preprocess import keys as names
from rwkv_peft.preprocess.keys import HARMLESS_IN_MESSAGES, columns, parts_of, squashed
from rwkv_peft.preprocess.one_message import conversations
from rwkv_peft.preprocess.pipeline import parse
from rwkv_peft.preprocess.reader import Block
from rwkv_peft.preprocess.schemas import Reader
from rwkv_peft.preprocess.values import RowError, split_reasoning

# ---- aliases ----


@pytest.mark.parametrize("name", [*names.SYSTEM, "System Prompt", "systemPrompt", "SYSTEM-MESSAGE"])
def test_a_system_text_is_read_under_every_name_and_in_every_schema(name):
    for row in (
        {"messages": [Q, ANSWER]},
        {"prompt": "7 times 8?", "response": "56"},
        {"question": "7 times 8?", "answer": "56"},
    ):
        assert said({name: "Be brief.", **row}) == [(S, "Be brief."), (U, "7 times 8?"), (A, "56")]


def test_an_instruction_beside_messages_is_the_system_text():
    assert said({"instruction": "Be brief.", "messages": [Q, ANSWER]})[0] == (S, "Be brief.")


@pytest.mark.parametrize("name", [*names.THINK, "Complex_CoT", "Reasoning Content"])
def test_reasoning_is_read_under_every_name_in_rows_and_in_messages(name):
    for row in (
        {"messages": [Q, {**ANSWER, name: "7*8"}]},
        {"messages": [Q, ANSWER], name: "7*8"},
        {"instruction": "7 times 8?", "output": "56", name: "7*8"},
        {"prompt": "7 times 8?", "response": "56", name: "7*8"},
    ):
        assert said(row)[-1] == (A, "(7*8) 56")


@pytest.mark.parametrize("name", ["tools", "functions"])
@pytest.mark.parametrize(
    "wrap", [lambda t: [t], lambda t: [{"type": "function", "function": t}], lambda t: json.dumps([t])]
)
@pytest.mark.parametrize("place", ["row", "system", "empty system", "null system", "pair"])
def test_tools_are_read_in_the_row_and_in_a_system_message_with_and_without_a_text(name, wrap, place):
    tools = wrap(TOOL)
    row = {
        "row": {"messages": [Q, ANSWER], name: tools},
        "system": {"messages": [{"role": "system", "content": "Be.", name: tools}, Q, ANSWER]},
        "empty system": {"messages": [{"role": "system", "content": "", name: tools}, Q, ANSWER]},
        "null system": {"conversations": [{"role": "system", "content": None, name: tools}, Q, ANSWER]},
        "pair": {"prompt": "7 times 8?", "response": "56", name: tools},
    }[place]
    result, reader = read(row)
    assert json.loads(result.tools) == [TOOL] and not reader.unused
    assert [m.role for m in result.messages] == ([S, U, A] if place == "system" else [U, A])


@pytest.mark.parametrize("name", ["tool_calls", "tool_call", "function_call"])
@pytest.mark.parametrize(
    "call",
    [
        CALL,
        [CALL],
        [{"id": "1", "type": "function", "function": {**CALL, "arguments": '{"place": "Bay"}'}}],
        json.dumps(CALL),
    ],
)
def test_calls_are_read_under_every_name(name, call):
    assert said({"messages": [Q, {"role": "assistant", "content": None, name: call}]})[-1] == (A, json.dumps(CALL))


@pytest.mark.parametrize("value", [None, "", " ", {}])
def test_a_call_of_no_arguments_has_an_empty_object(value):
    row = {"messages": [Q, {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": value}}]}]}
    assert said(row)[-1] == (A, '{"name": "now", "arguments": {}}')


FLAGS = [
    ("weight", 0),
    ("loss", False),
    ("train", "false"),
    ("trainable", 0.0),
    ("masked", True),
    ("loss_mask", 0),
    ("masked", 1),
]


@pytest.mark.parametrize(("name", "value"), FLAGS)
def test_a_flag_of_a_message_keeps_its_answer_from_being_learnt(name, value):
    other = {"role": "assistant", "content": "yes"}
    assert said({"messages": [Q, {**ANSWER, name: value}, Q, other]})[1::2] == [(A, "-56"), (A, "yes")]
    assert said({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y", name: value}]})[
        1
    ] == (A, "-y")


@pytest.mark.parametrize(("name", "value"), FLAGS)
def test_a_flag_of_a_row_is_one_of_all_its_answers(name, value):
    assert said({"messages": [Q, ANSWER], name: value})[1] == (A, "-56")
    assert said({"instruction": "x", "output": "y", name: value})[1] == (A, "-y")


@pytest.mark.parametrize("flags", [[0, 0, 0, 1], [0, 1], [False, True], ["0", "1"], "[0, 0, 0, 1]", "[False, True]",
                                   "0 0 0 1", "0,1"])  # fmt: skip
def test_a_list_of_flags_has_one_for_each_message_or_for_each_answer(flags):
    row = {"messages": [Q, ANSWER, Q, ANSWER], "loss_mask": flags}
    assert said(row)[1::2] == [(A, "-56"), (A, "56")]


@pytest.mark.parametrize("flags", [[[0, 1], [1]], [0, 2], [1, "maybe"]])
def test_a_list_of_what_is_no_flag_is_refused(flags):
    refused({"messages": [Q, ANSWER], "loss_mask": flags}, "wrong type", "it must be 0 or 1")
    refused({"prompt": "a", "response": "b", "loss_mask": [[1]]}, "wrong type", "it must be 0 or 1")


def test_a_list_of_flags_of_another_length_is_refused():
    refused({"messages": [Q, ANSWER], "loss_mask": [1, 0, 1]}, "wrong type", '"loss_mask" has 3 flags for 2 messages')


@pytest.mark.parametrize(
    ("row", "values"),
    [
        ({"system": "a", "system_prompt": "b", "messages": [Q, ANSWER]}, ("'a'", "'b'")),
        ({"system": "a", "messages": [{"role": "system", "content": "b"}, Q, ANSWER]}, ("'a'", "'b'")),
        ({"prompt": "x", "response": "y", "cot": "a", "think": "b"}, ("'a'", "'b'")),
        ({"messages": [Q, {**ANSWER, "thinking": "a", "reasoning": "b"}]}, ("'a'", "'b'")),
        ({"messages": [Q, {**ANSWER, "content": "<think>a</think>56", "reasoning": "b"}]}, ("'a'", "'b'")),
        ({"messages": [Q, {**ANSWER, "weight": 0, "loss": True}]}, ("weight=0", "loss=True")),
        ({"messages": [Q, {**ANSWER, "weight": 1, "masked": True}]}, ("weight=1", "masked=True")),
        ({"messages": [Q, {**ANSWER, "loss": True}], "loss_mask": [0, 0]}, ("message 2", "loss_mask")),
        ({"messages": [Q, ANSWER], "tools": [TOOL], "functions": [{"name": "other"}]}, ("tide", "other")),
        ({"messages": [{"role": "system", "content": "", "tools": [{"name": "other"}]}, Q, ANSWER], "tools": [TOOL]}, ("tide", "other")),
        ({"messages": [Q, {**ANSWER, "tool_call": CALL, "function_call": {"name": "b"}}]}, ("tide", "'{\"name\": \"b\"")),
    ],
)  # fmt: skip
def test_two_names_of_one_part_that_disagree_reject_the_row_with_both_values(row, values):
    refused(row, "two values", *values)


def test_two_names_of_one_part_that_agree_are_one():
    row = {
        "system": "a",
        "system_prompt": "a ",
        "messages": [{"role": "system", "content": "a"}, Q, ANSWER],
        "tools": [TOOL],
    }
    assert said({**row, "functions": [{"type": "function", "function": TOOL}]})[0] == (S, "a")


# ---- nothing is dropped silently ----

ROWS = {
    "messages": {"messages": [{"role": "system", "content": "Be."}, Q, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "pair": {"prompt": "a", "response": "b"},
    "alpaca": {"instruction": "a", "input": "c", "output": "b"},
    "text": {"text": "some text"},
    "tools": {
        "tools": [{"type": "function", "function": TOOL}],
        "messages": [Q, {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": CALL}]}, {"role": "tool", "content": "x"}],
    },
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ANSWER]},
    "turns": {"conversation": [{"human": "a", "assistant": "b"}]},
}  # fmt: skip
# the objects inside a row that may have keys of their own
LEVELS = {
    "row": lambda row: row,
    "message": lambda row: (row.get("messages") or row.get("conversations") or row.get("conversation") or [row])[0],
    "answer": lambda row: (row.get("messages") or row.get("conversations") or row.get("conversation") or [row])[-1],
    "part": lambda row: row["messages"][0]["content"][0],
    "tool": lambda row: row["tools"][0],
    "call": lambda row: row["messages"][1]["tool_calls"][0],
    "function": lambda row: row["messages"][1]["tool_calls"][0]["function"],
}
KNOWN = [name for group in vars(names).values() if isinstance(group, tuple) for name in group if isinstance(name, str)]
KEYS = st.one_of(st.sampled_from(KNOWN), st.text(st.characters(codec="utf-8"), min_size=1, max_size=12))
VALUES = st.one_of(
    st.text(min_size=1),
    st.integers(),
    st.booleans(),
    st.lists(st.integers(), min_size=1),
    st.just({"a": 1}),
    st.just([0, 1]),
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(ROWS)), st.sampled_from(sorted(LEVELS)), KEYS, VALUES)
def test_every_key_at_every_level_is_used_or_harmless_or_reported(kind, level, key, value):
    row = copy.deepcopy(ROWS[kind])
    try:
        target = LEVELS[level](row)
    except (KeyError, TypeError):
        return
    if not isinstance(target, dict) or key in target:
        return
    before, _ = read(row)
    target[key] = value
    try:
        after, reader = read(row)
    except RowError:
        return  # reported with file and line
    if after != before or not str(value).strip():
        return  # it is used
    word = squashed(key)
    same = [v for v in ("a", "b", "c", "Be.", "some text") if v == value]  # another name for what is there already
    learns = key in parts_of((key,)).flags
    assert any(key in name for _, name in reader.unused) or word in HARMLESS_IN_MESSAGES or same or learns, (
        level,
        key,
        value,
    )


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-2, 2), st.floats(allow_infinity=False), st.text(max_size=5),
        st.sampled_from(["user", "assistant", "system", "tool", "think", "<think>a</think>b", "</think>", "[1]", "[{", '{"name": "f"}', "<image>"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.sampled_from(KNOWN), st.text(max_size=2)), inner, max_size=3)),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KNOWN), JSON, min_size=1, max_size=4), st.booleans())
def test_whatever_a_row_holds_it_is_read_or_refused_with_a_sentence(row, padded):
    try:
        _, result = Reader(padded=padded).read(row)
    except RowError as error:
        assert str(error)
    else:
        assert isinstance(result, str) or all(
            isinstance(m.content, str) and isinstance(m.think, str) for m in result.messages
        )


def test_a_key_that_says_nothing_is_not_reported():
    _, reader = read({"messages": [{**Q, "extra": None}, ANSWER], "label": "", "notes": [], "id": 7})
    assert not reader.unused


def test_columns_of_another_kind_in_a_row_are_reported():
    _, reader = read({"messages": [Q, ANSWER], "prompt": "7 times 8?", "text": "x"})
    assert set(reader.unused) == {("column", "prompt"), ("column", "text")}


# ---- pictures and sound ----


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [Q, ANSWER], "images": ["a.png"]},
        {"prompt": "a", "response": "b", "image": "a.png"},
        {"messages": [Q, ANSWER], "audios": [{"path": "a.wav"}]},
        {"text": "a", "video": "a.mp4"},
        {"messages": [{**Q, "images": ["a.png"]}, ANSWER]},
        {"messages": [{"role": "user", "content": "<image>\nWhat is it?"}, ANSWER]},
        {"messages": [{"role": "user", "content": "What is <image> here?"}, ANSWER]},
        {"conversations": [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": "A gull."}]},
        {"prompt": "<|image_1|>\nWhat?", "response": "b"},
        {"instruction": "Look", "input": "<|vision_start|><|image_pad|><|vision_end|>", "output": "b"},
        {"messages": [{"role": "user", "content": "<img>a.png</img> What?"}, ANSWER]},
        {"text": "User: <image>\nWhat?\n\nAssistant: A gull."},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}, ANSWER]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER]},
        {"messages": [{"role": "user", "content": {"type": "image", "image": "x"}}, ANSWER]},
        {"prompt": "a", "response": "b", "image_path": "x"},
        {"prompt": "a", "response": "b", "audio_file": "x", "id": 1},
        {"prompt": "<Image>What?", "response": "b"},
        {"prompt": "<image 1> What?", "response": "b"},
        {"prompt": "<start_of_image>What?", "response": "b"},
    ],
)
def test_a_row_that_needs_a_picture_or_sound_is_refused_with_the_reason(row):
    refused(row, "not text", "only text can be trained")


@pytest.mark.parametrize(
    "words",
    [
        "Use <video src='a'> in HTML",
        "<video>\n<source>\n</video>",
        "What does `<image>` mean?",
        "What is this?\n~~~\n<image>\n~~~",
        "What is this?\n````\n```\n<image>\n```\n````",
        "a<b and [IMG]x[/IMG]",
        "<svg><image href='x'/></svg>",
        "<rss><image><url>u</url></image></rss>",
        "a { background: url(data:image/png;base64,x) }",
    ],
)
def test_code_about_pictures_is_text(words):
    assert said({"messages": [{"role": "user", "content": words}, ANSWER]})[0] == (U, words)


@pytest.mark.parametrize(
    ("name", "value"),
    [("images", "[]"), ("image", "nan"), ("frames", 0), ("video", "a film about love"), ("photo", "no")],
)
def test_a_column_of_pictures_that_holds_none_is_no_reason_to_refuse(name, value):
    assert said({"prompt": "a", "response": "b", name: value}) == [(U, "a"), (A, "b")]


def test_empty_columns_of_pictures_are_harmless_and_map_keys_leaves_full_ones_out():
    assert said({"messages": [Q, ANSWER], "images": [], "audio": None, "video": ""})
    result, reader = read({"messages": [Q, ANSWER], "images": ["a.png"]}, columns=columns('{"images": ""}'))
    assert result and ("column", "images") in reader.unused


# ---- Arrow's padding ----


@pytest.mark.parametrize(("padded", "arguments"), [(True, {"a": 2}), (False, {"place": None, "a": 2})])
def test_nulls_that_arrow_filled_in_are_removed_and_nulls_of_json_stay(padded, arguments):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"place": None, "a": 2}}}]}
    tools = [{"name": "add", "parameters": {"properties": {"place": None, "a": {"type": "number", "enum": None}}}}]
    result, _ = read({"messages": [Q, call], "tools": tools}, padded=padded)
    assert json.loads(result.messages[-1].call)["arguments"] == arguments
    assert ("null" in result.tools) != padded


# ---- reasoning ----


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("56", ("", "56")),
        ("<think>7*8</think>56", ("7*8", "56")),
        ("<think>\n7*8\n</think>\n\n56", ("7*8", "56")),
        ("7*8\n</think>\n\n56", ("7*8", "56")),
        ("</think>56", ("", "56")),
        ("<think></think>\n\n    return 56", ("", "    return 56")),
        ("<think>a</think>\n　　段落", ("a", "　　段落")),
        ("<thinking>7*8</thinking>56", ("7*8", "56")),
        ("<|begin_of_thought|>a<|end_of_thought|>\n<|begin_of_solution|>\nb\n<|end_of_solution|>", ("a", "b")),
        ("The tag `<think>` begins a thought.", ("", "The tag `<think>` begins a thought.")),
        ("Use `a` first.\n</think>\n\nCall `b`.", ("Use `a` first.", "Call `b`.")),
        ("<think>Use `a` first.</think>Call `b`.", ("Use `a` first.", "Call `b`.")),
        ("<think>```a``` first.</think>Call ```b```.", ("```a``` first.", "Call ```b```.")),
        ("<think>x</think>\n```\nprint('</think>')\n```", ("x", "```\nprint('</think>')\n```")),
        ("<think>\nTry ```py\nx=1\n``` ok\n</think>\n\n```py\nx=1\n```", ("Try ```py\nx=1\n``` ok", "```py\nx=1\n```")),
        ("<think>\n```py\nx=1\n```</think>R", ("```py\nx=1\n```", "R")),
        ("I try:\n```py\nfor..\n</think>\n\nHere:\n```py\nx\n```", ("I try:\n```py\nfor..", "Here:\n```py\nx\n```")),
        ("<think>\n```\nnever closed\n</think>\n\nR", ("```\nnever closed", "R")),
        (">\nhm\n</think>\n\nR", ("hm", "R")),
        ("<THINK>hm</THINK>R", ("hm", "R")),
        ("<think >hm</think >R", ("hm", "R")),
        ("hm</thinking>R", ("hm", "R")),
        ("<scratchpad>hm</scratchpad>R", ("hm", "R")),
        ("<思考过程>hm</思考过程>R", ("hm", "R")),
        ("<analysis>hm</analysis><verdict>R</verdict>", ("", "<analysis>hm</analysis><verdict>R</verdict>")),
        ("<reason>hm</reason>R", ("hm", "R")),
        ("<seed:think>hm</seed:think>R", ("hm", "R")),
        ("[THINK]hm[/THINK]R", ("hm", "R")),
        ("◁think▷hm◁/think▷R", ("hm", "R")),
        ("<|begin_of_solution|>\nR\n<|end_of_solution|>", ("", "R")),
        ("Give <reason>x</reason> tags in XML.", ("", "Give <reason>x</reason> tags in XML.")),
        ("a < b and [1] and <b>bold</b>", ("", "a < b and [1] and <b>bold</b>")),
        ("Write `<think>x</think>` first.", ("", "Write `<think>x</think>` first.")),
        *(
            (text, ("", text))
            for text in (
                "So:\n~~~\n<think>x</think>\n~~~\nThat.",
                "So:\n~~~~ xml\n~~~\n<think>x</think>\n~~~~",
                "So:\n````\n```\n<think>x</think>\n```\n````\nThat.",
                "So:\n````md\n```\n<think>x</think>\n````\nThat.",
                "So:\n```md\n```py\n1\n```\n<think>x</think>\n```\nThat.",
                "> ~~~\n> <think>x</think>\n> ~~~",
                "Write ``a ` <think>x</think>`` first.",
                "Write ```` <think>x</think> ```` first, `a`.",
            )
        ),
    ],
)
def test_a_thought_is_taken_out_of_an_answer_and_one_without_its_opening_tag_is_repaired(answer, expected):
    assert split_reasoning(answer) == expected


@pytest.mark.parametrize(
    "answer",
    [
        "<think>7*8",
        "<thinking>hm",
        "[THINK]hm",
        "<|begin_of_thought|>hm",
        "<|channel|>analysis<|message|>hm",
        "</think>" * 60,
        "x <think>7*8</think> 56",
        "~~~\nx <think>7*8</think> 56",
        "~~~\na\n~~~\nx <think>7*8</think> 56",
        "````\na\n````\nx <think>7*8</think> 56",
        "``a`` ` <think>7*8</think>",
        "<think>a</think>b<think>c</think>d",
        "a</think>b</think>c",
        "</think>a<think>",
    ],
)
def test_a_thought_that_can_be_read_in_more_than_one_way_rejects_the_row(answer):
    for row in ({"messages": [Q, {**ANSWER, "content": answer}]}, {"prompt": "a", "response": answer}):
        refused(row, "reasoning")


@pytest.mark.parametrize("thought", ["hm", "<think>hm</think>", "<think>hm", "hm</think>"])
def test_tags_around_a_thought_in_a_key_of_its_own_are_taken_off(thought):
    for row in (
        {"messages": [Q, {**ANSWER, "reasoning_content": thought}]},
        {"prompt": "a", "response": "56", "cot": thought},
    ):
        assert said(row)[-1] == (A, "(hm) 56")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "reasoning", "text": "hm"},
        {"type": "thinking", "thinking": "hm", "signature": "x"},
        {"type": "think", "text": "hm"},
        {"type": "summary_text", "text": "hm"},
        {"text": "hm", "thought": True},
        {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
    ],
)
def test_a_part_that_is_a_thought_is_no_part_of_the_answer(part):
    row = {"messages": [Q, {"role": "assistant", "content": [part, {"type": "text", "text": "56"}]}]}
    result, reader = read(row)
    assert said(row)[-1] == (A, "(hm) 56") and not reader.unused


def test_a_message_that_is_a_thought_belongs_to_the_answer_behind_it():
    assert said({"messages": [Q, {"role": "thought", "content": "7*8"}, ANSWER]})[-1] == (A, "(7*8) 56")
    refused({"messages": [Q, ANSWER, {"role": "reasoning", "content": "7*8"}]}, "reasoning", "no answer follows")


def test_many_backticks_and_tags_take_no_long_time():
    for answer in (
        "`" * 300_000 + "</think>x",
        "`a` " * 60_000 + "</think>x",
        "<b" * 200_000 + "</think>x",
        "~~~a\n" * 60_000 + "</think>x",
    ):
        split_reasoning(answer)


# ---- shapes ----

EXPECTED = [(U, "a"), (A, "b"), (U, "c"), (A, "d")]


@pytest.mark.parametrize(
    "row",
    [
        {"conversation": [{"human": "a", "assistant": "b"}, {"human": "c", "assistant": "d"}]},
        {"conversation": [{"assistant": "b", "human": "a"}, {"assistant": "d", "human": "c"}], "conversation_id": 3},
        {"conversations": [{"user": "a"}, {"assistant": "b"}, {"user": "c"}, {"assistant": "d"}]},
        {"conversations": [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]},
        {"messages": [{"问": "a", "答": "b"}, {"问": "c", "答": "d"}]},
        {"messages": [{"speaker": "human", "text": "a"}, {"speaker": "bot", "text": "b"}, {"speaker": "Human", "text": "c"}, {"speaker": "Bot", "text": "d"}]},
        {"data": ["a", "b", "c", "d"], "id": "0"},
        {"dialog": ["a", "b", "c", "d"]},
        {"conversations": [["a", "b"], ["c", "d"]]},
        {"history": [["a", "b"], ["c", "d"]], "id": 1},  # Gradio
        parse(b'[["a", "b"], ["c", "d"]]'),
        {"dialogue": [{"speaker": "Human", "utterance": "a"}, {"speaker": "AI", "utterance": "b"}, {"speaker": "Human", "utterance": "c"}, {"speaker": "AI", "utterance": "d"}]},
        {"conversations": {"from": ["human", "gpt", "human", "gpt"], "value": ["a", "b", "c", "d"]}},
        {"messages": {"role": ["user", "assistant"] * 2, "content": ["a", "b", "c", "d"]}},
        {"chat": {"turn_2": {"Human": "c", "MOSS": "d"}, "turn_1": {"Human": "<|Human|>: a<eoh>\n", "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n", "MOSS": "<|MOSS|>: b<eom>\n"}}},
        {"messages": [{"role": "用户", "content": "a"}, {"role": "助手", "content": "b"}, {"role": "用户", "content": "c"}, {"role": "模型", "content": "d"}]},
        {"对话": [{"角色": "用户", "内容": "a"}, {"角色": "助手", "内容": "b"}, {"角色": "用户", "内容": "c"}, {"角色": "助手", "内容": "d"}]},
        {"message_tree": 1, "conversation": {"prompt": {"text": "a", "role": "prompter", "replies": [
            {"text": "x", "role": "assistant", "rank": 1, "replies": []},
            {"text": "b", "role": "assistant", "rank": 0, "replies": [{"text": "c", "role": "prompter", "replies": [{"text": "d", "role": "assistant"}]}]}]}}},
    ],
)  # fmt: skip
def test_a_conversation_of_any_shape_is_read(row):
    assert said(row) == EXPECTED


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"type": "human", "content": "a"}, {"type": "ai", "content": "b"}]},  # LangChain
        {"messages": [{"name": "user", "content": "a"}, {"name": "assistant", "content": "b"}]},
        {"messages": [["user", "a"], ["assistant", "b"]]},
        {"messages": [["human", "a"], ["gpt", "b"]]},
        {"messages": [{"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["a"]}}, {"author": {"role": "assistant"}, "content": {"content_type": "text", "parts": ["b"]}}]},  # ChatGPT
        {"messages": {"user": "a", "assistant": "b"}},
        {"turns": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"message_tree_id": "1", "tree_state": None, "prompt": {"text": "a", "role": "prompter", "replies": [{"text": "b", "role": "assistant"}]}},  # OASST trees
        {"messages": [{"role": "user", "content": "a"}], "answer": "b"},  # Dolphin-R1
        {"instruction": "a", "response": "b", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},  # Magpie
        {"instruction": "a", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "a", "response": {"role": "assistant", "content": "b"}},
        {"prompt": "a", "response": [{"text": "b"}]},
        {"prompt": "a", "answers": [{"answer": "c", "rank": 2}, {"answer": "b", "rank": 1}]},  # Nectar
        {"row_idx": 0, "row": {"prompt": "a", "response": "b"}, "truncated_cells": []},  # the viewer of Hugging Face
        {"row": {"prompt": "a", "response": "b"}, "truncated_cells": []},
        {"row": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}},
        {"prompt": "a", "response": "", "chosen": None, "output": "b"},
    ],
)  # fmt: skip
def test_a_short_conversation_of_any_shape_is_read(row):
    assert said(row) == [(U, "a"), (A, "b")]


def test_pairs_of_roles_are_messages_also_in_a_history_and_by_role_map():
    rows = [["customer", "q"], ["agent", "a"]]
    assert said({"messages": rows}, columns=columns("", '{"customer": "user", "agent": "assistant"}')) == [
        (U, "q"),
        (A, "a"),
    ]
    row = {"prompt": "c", "response": "d", "history": [["user", "a"], ["assistant", "b"]]}
    assert said(row) == EXPECTED
    refused({"messages": [["user", "q"], ["bob", "a"]]}, "unknown role", "--role-map")


@pytest.mark.parametrize(
    "rows",
    [
        [{"content": "a"}, {"content": "b"}],
        [{"speaker_id": 0, "content": "a"}, {"speaker_id": 1, "content": "b"}],
        [{"name": "Anna", "content": "a"}],
    ],
)
def test_messages_that_do_not_say_who_speaks_are_refused(rows):
    refused({"messages": rows}, "unknown role")


def test_replies_that_are_not_the_best_are_reported():
    tree = {
        "text": "a",
        "role": "prompter",
        "replies": [{"text": "c", "role": "assistant", "rank": 1}, {"text": "b", "role": "assistant", "rank": 0}],
    }
    _, reader = read({"prompt": tree})
    assert (
        said({"prompt": tree}) == [(U, "a"), (A, "b")]
        and ("part of the tree", "replies that are not the best") in reader.unused
    )


def test_gemini_system_instruction_is_the_system_text():
    row = {
        "systemInstruction": {"role": "system", "parts": [{"text": "s"}]},
        "contents": [{"role": "user", "parts": [{"text": "a"}]}, {"role": "model", "parts": [{"text": "b"}]}],
    }
    assert said(row) == [(S, "s"), (U, "a"), (A, "b")]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "context": "m", "response": "r", "category": "x"},  # Dolly
        {"instruction": "q", "input": "m", "output": "r", "task_type": "x"},  # COIG-CQIA
        {"指令": "q", "输入": "m", "输出": "r"},
        {"Instruction": "q", "Input": "m", "Output": "r"},
    ],
)
def test_columns_of_instruction_input_and_output_are_known(row):
    result, reader = read(row)
    assert [(m.content, m.material) for m in result.messages] == [("q", "m"), ("r", "")] and not reader.unused


@pytest.mark.parametrize(
    "row",
    [
        {"system_prompt": "s", "question": "q", "response": "r", "id": 1},  # OpenOrca
        {"kind": "x", "input": "q", "target": "r", "system": "s"},  # Firefly
        {"meta_instruction": "s", "conversation": [{"human": "q", "assistant": "r"}]},  # MOSS
        {"系统": "s", "问题": "q", "回答": "r"},
        {"system": "s", "用户": "q", "助手": "r"},
        {"system": "s", "user": "q", "assistant": "r"},
        {"System": "s", "Question": "q", "Answer": "r"},
        {" system": "s", "question ": "q", "answer": "r"},
        {"system": "s", "problem": "q", "solution": "r"},  # OpenR1
        {"system": "s", "input": "q", "content": "r"},  # a Chinese R1 distillation
    ],
)
def test_columns_of_system_question_and_answer_are_known(row):
    assert said(row) == [(S, "s"), (U, "q"), (A, "r")]


def test_a_context_that_is_no_text_is_what_json_writes():
    result, _ = read({"context": {"title": ["x"]}, "question": "q", "answer": "a"})
    assert result.messages[0].material == '{"title": ["x"]}'


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"system": "s", "transcript": "USER: hi\n\nASSISTANT: yo"}, """--convert-headings --map-keys '{"text": "transcript"}'"""),
        ({"role_1": "A", "topic": "t", "message_1": "a long question", "message_2": "a long answer"}, """'{"prompt": "message_1", "response": "message_2"}'"""),
    ],
)  # fmt: skip
def test_the_line_to_paste_names_the_texts(row, line):
    refused(row, "unknown columns", line)


@pytest.mark.parametrize("prompt", ["7 times 8?", [Q]])
@pytest.mark.parametrize("completion", ["56", [ANSWER]])
def test_messages_on_one_side_of_a_pair_are_messages(prompt, completion):
    assert said({"prompt": prompt, "completion": completion}) == [(U, "7 times 8?"), (A, "56")]


def test_answers_that_are_calls_are_calls_where_there_are_tools():
    row = {"query": "7 times 8?", "tools": json.dumps([TOOL]), "answers": json.dumps([CALL])}  # xlam
    assert said(row) == [(U, "7 times 8?"), (A, json.dumps(CALL))]


def test_of_several_right_answers_the_first_is_learnt_and_the_rest_is_reported():
    squad = {"context": "m", "question": "q", "answers": {"text": ["r", "s"], "answer_start": [0, 3]}, "id": "7"}
    result, reader = read(squad)
    assert said(squad)[-1] == (A, "r") and set(reader.unused) == {("further text of the column", "answers")}


def test_googles_contents_and_parts_are_messages():
    row = {"contents": [{"role": "user", "parts": [{"text": "a"}]}, {"role": "model", "parts": [{"text": "b"}]}]}
    assert said(row) == [(U, "a"), (A, "b")]


@pytest.mark.parametrize(("name", "value"), [("loss", 0.53), ("weight", 2.5), ("train", "part 3")])
def test_a_column_with_the_name_of_a_flag_that_is_none_is_reported(name, value):
    for row in ({"prompt": "a", "response": "b", name: value}, {"messages": [Q, ANSWER], name: value}):
        assert list(read(row)[1].unused) == [("column", name)]


def test_unknown_columns_are_refused_with_the_line_to_paste():
    refused(
        {"frage": "a", "antwort": "b", "id": 1},
        "unknown columns",
        """--map-keys '{"prompt": "frage", "response": "antwort"}'""",
    )
    refused(
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "unknown columns",
        """--map-keys '{"response": "chosen"}'""",
    )
    refused({"verlauf": [{"role": "user"}]}, "unknown columns", """--map-keys '{"messages": "verlauf"}'""")


WORDS = st.one_of(
    st.text(max_size=6),
    st.sampled_from(["a", "", " ", "<think>x</think>y", "<image>", "a\rb", "é", "Ã©t"]),
    st.integers(),
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["instruction", "prompt", "question", "input"]), st.sampled_from(["output", "answer", "answers"]),
    st.fixed_dictionaries({}, optional={"input": WORDS, "context": WORDS, "id": WORDS, "title": WORDS}), WORDS, WORDS, st.booleans(),
)  # fmt: skip
def test_the_short_way_of_plain_pairs_gives_what_the_long_way_gives(prompt, response, others, question, answer, repair):
    row = {**others, prompt: question, response: answer}
    short, long = Reader(repair=repair), Reader(repair=repair)
    long.columns_of_plain_pair = lambda *_: ()

    def outcome(reader):
        try:
            return reader.read(row), dict(reader.unused), reader.verdicts
        except RowError as error:
            return error.reason, str(error)

    assert outcome(short) == outcome(long)


# ---- roles ----


GLAIVE = {
    "system": 'SYSTEM: You can call functions. Use them if required -\n{\n    "name": "tide"\n}\n\n{"name": "wind"}\n',
    "chat": "USER: When is low tide?\n\n\nASSISTANT: <functioncall> "
    '{"name": "tide", "arguments": \'{"place": "St. Peter\\\'s Bay"}\'} <|endoftext|>\n\n\n'
    'FUNCTION RESPONSE: {"at": 4}\n\n\nASSISTANT: At four. <|endoftext|>\n\n\nUSER: Thanks\n\n\nASSISTANT: Welcome <|endoftext|>\n',
}


def test_glaives_talks_are_read_with_their_tools_calls_and_results():
    result, reader = read(GLAIVE)
    assert json.loads(result.tools) == [{"name": "tide"}, {"name": "wind"}] and not reader.unused
    assert said(GLAIVE) == [
        (S, "You can call functions. Use them if required -"), (U, "When is low tide?"),
        (A, json.dumps({"name": "tide", "arguments": {"place": "St. Peter's Bay"}})), (T, '{"at": 4}'), (A, "At four."),
        (U, "Thanks"), (A, "Welcome"),
    ]  # fmt: skip
    refused(
        {**GLAIVE, "chat": "USER: a\n\n\nASSISTANT: <functioncall> {name: 1}"},
        "wrong type",
        "not valid JSON: {name: 1}",
    )


@pytest.mark.parametrize("name", ["label", "kto_tag"])
def test_an_answer_that_preference_data_dislikes_is_not_learnt(name):
    row = {"prompt": "7 times 8?", "completion": "56"}
    assert said({**row, name: True}) == [(U, "7 times 8?"), (A, "56")]
    assert said({**row, name: False}) == [(U, "7 times 8?"), (A, "-56")]
    assert said({"messages": [Q, ANSWER], name: False})[-1] == (A, "-56")
    assert said({"question": "a", "answer": "b", name: False})[-1] == (A, "-b")


@pytest.mark.parametrize("choices", [{"choices": ["54", "56"]}, {"options": {"A": "54", "B": "56"}}, {"A": "54", "B": "56"},
                                     {"choices": {"label": ["A", "B"], "text": ["54", "56"]}}])  # fmt: skip
@pytest.mark.parametrize("answer", [1, "B", "(B)", "1"])
def test_an_answer_that_names_a_choice_which_the_question_does_not_show_rejects_the_row(choices, answer):
    refused({"question": "7 times 8?", "answer": answer, **choices}, "choices", f"the answer {answer}")
    shown = {"question": "7 times 8? A. 54 B. 56", "answer": answer, **choices}
    assert said(shown)[-1] == (A, str(answer))
    assert said({"question": "7 times 8?", "answer": "56", **choices})[-1] == (A, "56")


def test_map_keys_reaches_into_an_object_and_names_the_keys_of_messages():
    inside = {"body": {"messages": [Q, ANSWER], "temperature": 1}}
    refused(inside, "unknown columns", """--map-keys '{"messages": "body.messages"}'""")
    result, reader = read(inside, columns=columns('{"messages": "body.messages"}'))
    assert len(result.messages) == 2 and reader.unused == {("column", "temperature"): 1}
    assert reader.seen == {"body.messages"}
    row = {"messages": [{"who": "user", "said": "7 times 8?"}, {"who": "bob", "said": "56"}]}
    refused(
        row, "unknown role", """--map-keys '{"role": "who", "content": "said"}' --role-map '{"bob": "assistant"}'"""
    )
    result = said(row, columns=columns('{"role": "who", "content": "said"}', '{"bob": "assistant"}'))
    assert result == [(U, "7 times 8?"), (A, "56")]


def test_role_map_names_roles_and_leaves_out_what_it_maps_to_nothing():
    rows = [("customer", "a"), ("narrator", "n"), ("Agent", "b"), ("environment", "t"), ("agent", "d")]
    roles = columns("", '{"customer": "user", "agent": "assistant", "environment": "tool", "narrator": ""}')
    row = {"messages": [{"role": role, "content": words} for role, words in rows]}
    assert said(row, columns=roles) == [(U, "a"), (A, "b"), (T, "t"), (A, "d")]


def test_unknown_roles_are_refused_with_the_line_to_paste():
    row = {"conversations": [{"from": "customer", "value": "a"}, {"from": "agent", "value": "b"}]}
    refused(row, "unknown role", """--role-map '{"customer": "user", "agent": "assistant"}'""")
    row = {"messages": [{"role": "Anna", "content": "a"}, {"role": "Bob", "content": "b"}]}
    refused(row, "unknown role", """--role-map '{"Anna": "user", "Bob": "assistant"}'""")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{", "not readable as JSON"),
        ("[]", "must be an object"),
        ('{"a": "wizard"}', "known are"),
        ('{"user": "customer"}', "turn it round"),
    ],
)
def test_a_role_map_that_cannot_be_used_says_why(value, words):
    with pytest.raises(SettingErrors, match="ROLE_MAP") as error:
        columns("", value)
    assert words in str(error.value)


# ---- values ----


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (42, "42"),
        (3.5, "3.5"),
        (True, "true"),
        ({"a": [1, None]}, '{"a": [1, null]}'),
        ([1, "x"], '[1, "x"]'),
        ("42", "42"),
        (0, "0"),
        (False, "false"),
    ],
)
def test_answers_and_tool_results_that_are_no_text_are_what_json_writes(value, text):
    assert said({"instruction": "a", "output": value})[-1] == (A, text)
    assert said({"messages": [Q, {"role": "assistant", "content": value}]})[-1] == (A, text)
    assert said({"messages": [Q, ANSWER, {"role": "tool", "content": value}]})[-1] == (T, text)


@pytest.mark.parametrize("empty", [None, "", "  ", float("nan")])
def test_an_empty_system_text_and_an_empty_tool_result_are_no_fault(empty):
    assert said({"messages": [{"role": "system", "content": empty}, Q, ANSWER]}) == [(U, "7 times 8?"), (A, "56")]
    call = {"role": "assistant", "tool_calls": [CALL]}
    made = said({"messages": [Q, call, {"role": "tool", "content": empty}, ANSWER]})
    assert made[2][0] is T and not made[2][1].strip() and made[3] == (A, "56")


def test_line_ends_of_ready_texts_are_newlines():
    assert read({"text": "User: a\r\n\r\nAssistant: b\rc"})[0] == "User: a\n\nAssistant: b\nc"


# ---- one message a row ----


def test_rows_of_one_message_are_put_together_by_their_conversation():
    rows = [{"conversation_id": c, "role": r, "content": w} for c, r, w in
            [(1, "user", "a"), (2, "user", "x"), (1, "assistant", "b"), (2, "assistant", "y")]]  # fmt: skip
    assert [said(row) for row in together(*rows)] == [[(U, "a"), (A, "b")], [(U, "x"), (A, "y")]]


@pytest.mark.parametrize(
    ("id_name", "given"),
    [
        ("conversation_id", {"role": "who", "content": "says"}),
        ("talk", {"role": "who", "content": "says", "conversation_id": "talk"}),
        ("talk", {"role": "who", "content": "body.says", "conversation_id": "talk"}),
    ],
)
def test_rows_of_one_message_may_have_their_columns_from_map_keys(id_name, given):
    rows = [{id_name: c, "who": r, "says": w} for c, r, w in
            [(1, "user", "a"), (2, "user", "x"), (1, "assistant", "b"), (2, "assistant", "y")]]  # fmt: skip
    if "." in given["content"]:
        rows = [{"body": {"says": row.pop("says")}, **row} for row in rows]
    mapped = columns(json.dumps(given))
    result = together(*rows, columns=mapped)
    assert [said(row, columns=mapped) for row in result] == [[(U, "a"), (A, "b")], [(U, "x"), (A, "y")]]
    assert not read(result[0], columns=mapped)[1].unused
    assert read(result[0], columns=mapped)[1].seen == set(mapped.named)


def test_a_conversation_id_of_map_keys_that_is_not_there_is_an_error_and_a_missing_one_is_proposed():
    row = {"talk": 1, "who": "client", "says": "a"}
    with pytest.raises(UserError, match="names the column 'tlak' as conversation_id"):
        together(row, columns=columns('{"role": "who", "content": "says", "conversation_id": "tlak"}'))
    given = columns('{"conversation_id": "talk"}')
    first, *_ = conversations([Block("x.jsonl", 1, [(1, {"messages": [Q, ANSWER]})], 0)], given)
    assert "names a conversation_id, which is not used" in first.notes[0].words
    given = columns('{"role": "who", "content": "says"}')
    refused(row, "single message", """--map-keys '{"conversation_id": "NAME"}'""", columns=given)


def test_answers_of_a_tree_by_role_map_are_learnt_once():
    rows = [
        {"message_id": str(i), "parent_id": parent, "text": str(i), "role": role}
        for i, parent, role in (
            (1, None, "client"),
            (2, "1", "agent"),
            (3, "2", "client"),
            (4, "3", "agent"),
            (5, "3", "agent"),
        )
    ]
    given = columns("", '{"client": "user", "agent": "assistant"}')
    assert said(together(*rows, columns=given)[1], columns=given)[1] == (A, "-2")


def test_rows_of_one_message_follow_their_turn_numbers():
    rows = [{"id": 1, "turn": t, "role": r, "content": w} for t, r, w in [(2, "assistant", "b"), (1, "user", "a")]]
    assert [said(row) for row in together(*rows)] == [[(U, "a"), (A, "b")]]


def test_a_tree_of_messages_gives_its_paths_and_every_answer_is_learnt_once():
    rows = [
        {"message_id": "1", "parent_id": None, "text": "a", "role": "prompter"},
        {"message_id": "3", "parent_id": "1", "text": "worse", "role": "assistant", "rank": 1},
        {"message_id": "2", "parent_id": "1", "text": "b", "role": "assistant", "rank": 0},
        {"message_id": "4", "parent_id": "2", "text": "c", "role": "prompter"},
        {"message_id": "5", "parent_id": "4", "text": "d", "role": "assistant"},
        {"message_id": "6", "parent_id": "4", "text": "e", "role": "assistant"},
        {"message_id": "7", "parent_id": "6", "text": "gone", "role": "prompter", "deleted": True},
    ]
    result = [said(row) for row in together(*rows)]
    assert result == [
        [(U, "a"), (A, "b"), (U, "c"), (A, "d")],
        [(U, "a"), (A, "-b"), (U, "c"), (A, "e")],
        [(U, "a"), (A, "worse")],
    ]


def test_single_messages_of_unknown_roles_are_put_together_and_refused_with_the_role_map_line():
    rows = [{"dialog_id": "1", "speaker": "customer", "text": "q"}, {"dialog_id": "1", "speaker": "agent", "text": "a"}]
    [row] = together(*rows)
    refused(row, "unknown role", """--role-map '{"customer": "user", "agent": "assistant"}'""")
    assert said(row, columns=columns("", '{"customer": "user", "agent": "assistant"}')) == [(U, "q"), (A, "a")]


def test_ranks_may_be_text_and_keys_may_be_missing():
    rows = [
        {"id": 9, "role": "user", "text": "x", "message_id": "0", "parent_id": None},
        {"message_id": "1", "parent_id": None, "role": "prompter", "text": "a"},
        {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "tenth", "rank": "10.0"},
        {"message_id": "3", "parent_id": "1", "role": "assistant", "text": "second", "rank": "2.0"},
        {"message_id": "4", "parent_id": "1", "role": "assistant", "text": "none", "rank": ""},
        {"message_id": "5", "parent_id": "1", "role": "assistant", "text": "first", "rank": 1},
    ]
    result = [said(row)[-1][1] for row in together(*rows) if len(row["messages"]) > 1]
    assert result == ["first", "second", "tenth", "none"]


def test_a_call_among_single_messages_needs_no_text():
    rows = [{"conversation_id": 1, "role": "user", "content": "q"},
            {"conversation_id": 1, "role": "assistant", "content": None, "tool_calls": [CALL]}]  # fmt: skip
    assert [said(row) for row in together(*rows)] == [[(U, "q"), (A, json.dumps(CALL))]]


def test_an_answer_whose_question_is_not_in_the_file_is_refused():
    [result] = together({"message_id": "2", "parent_id": "1", "text": "b", "role": "assistant"})
    assert isinstance(result, RowError) and "'1', which is not in the file" in str(result)


def test_messages_whose_parents_lead_in_a_circle_are_refused():
    result = together(
        {"message_id": "1", "parent_id": "2", "text": "a", "role": "prompter"},
        {"message_id": "2", "parent_id": "1", "text": "b", "role": "assistant"},
        {"message_id": "3", "parent_id": None, "text": "c", "role": "prompter"},
        {"message_id": "4", "parent_id": "3", "text": "d", "role": "assistant"},
    )
    assert [str(one) for one in result[:2]] == [
        'its "parent_id" leads back to itself, or to a conversation that is too long'
    ] * 2
    assert said(result[2]) == [(U, "c"), (A, "d")]


def test_a_message_with_the_id_of_another_one_is_refused_with_its_line():
    first, second = together(
        {"message_id": "1", "parent_id": None, "text": "a", "role": "prompter"},
        {"message_id": "2", "parent_id": "1", "text": "b", "role": "assistant"},
        {"message_id": "1", "parent_id": "2", "text": "c", "role": "prompter"},
    )
    assert said(first) == [(U, "a"), (A, "b")] and str(second) == "has the message_id '1', as line 1 has"


def test_a_conversation_of_thousands_of_messages_is_one(monkeypatch):
    rows = [{"message_id": str(i), "parent_id": str(i - 1) if i else None, "text": str(i),
             "role": ("prompter", "assistant")[i % 2]} for i in range(3000)]  # fmt: skip
    [row] = together(*rows)
    assert [m["text"] for m in row["messages"]] == [str(i) for i in range(3000)]
    monkeypatch.setattr("rwkv_peft.preprocess.one_message.LONGEST_PATH", 2998)
    cut, *below = together(*rows)
    assert "is message 2,998 of its conversation, and not the last" in str(cut) and len(below) == 2


def test_a_question_that_no_one_answers_and_what_is_below_an_orphan_are_refused():
    question, orphan, below = together(
        {"message_id": "1", "parent_id": None, "text": "a", "role": "prompter"},
        {"message_id": "2", "parent_id": "9", "text": "b", "role": "assistant"},
        {"message_id": "3", "parent_id": "2", "text": "c", "role": "prompter"},
    )
    refused(question, "no answer")
    assert orphan.reason == below.reason == "orphan" and "is below line 2, which follows" in str(below)


def test_a_single_message_without_a_conversation_is_refused_and_never_taken_as_text():
    refused({"role": "user", "text": "a", "number": 1}, "single message", "conversation_id")


@pytest.mark.parametrize("page", ["data.md", "data_zh.md"])
def test_the_documentation_lists_every_name(page):
    text = (Path(__file__).resolve().parents[2] / "docs" / page).read_text(encoding="utf-8")
    assert names.documented() in text
