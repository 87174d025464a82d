# ruff: noqa: E501 - tables of rows
"""Values that mean less, or something else, than they seem: labels of preference data, letters of choices, switches of reasoning,
lists of answers."""

import json

import pytest
from helpers.kit import ROOT
from helpers.messages import ANSWER, CALL, A, Q, S, U, read, refused, said, together
from helpers.scripts import shell_values

from rwkv_peft.cli.preview import preview
from rwkv_peft.config.shell import Script
from rwkv_peft.preprocess.choices import choices_of
from rwkv_peft.preprocess.config import TokenizeConfig
from rwkv_peft.preprocess.keys import columns
from rwkv_peft.preprocess.pipeline import EncodeConfig, RowEncoder
from rwkv_peft.preprocess.reader import Block
from rwkv_peft.preprocess.schemas import Reader
from rwkv_peft.preprocess.values import RowError, is_nothing, split_reasoning
from rwkv_peft.text.presets import PRESETS

SAID_Q, SAID_A = (U, "7 times 8?"), (A, "56")


# ---- labels of preference data ----


@pytest.mark.parametrize("first", [None, "spam", True])
@pytest.mark.parametrize(
    ("name", "value"),
    [("label", False), ("label", "False"), ("label", 0), ("label", "0"), ("kto_tag", "false"), ("KTO_tag", 0)],
)
def test_whether_an_answer_is_liked_is_asked_of_every_row_whatever_the_first_one_says(name, value, first):
    reader = Reader()
    reader.read({"prompt": "a", "completion": "b", name: first})
    _, result = reader.read({"prompt": "7 times 8?", "completion": "54", name: value})
    assert [m.learn for m in result.messages] == [True, False]


@pytest.mark.parametrize("row", [{"prompt": "7 times 8?", "response": "56"}, {"messages": [Q, ANSWER]}])
def test_a_label_without_a_completion_counts_where_it_is_true_or_false(row):
    assert said({**row, "label": False})[-1] == (A, "-56")
    assert read({**row, "label": False})[1].unused == {("answer that is false by the column", "label"): 1}
    assert said({**row, "label": True}) == [SAID_Q, SAID_A]
    for other in (0, "False", "spam"):
        result, reader = read({**row, "label": other})
        assert result.messages[-1].learn and reader.unused == {("column", "label"): 1}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "7 times 8?", "response": "56", "output_with_loss": False},
        {"conversation": [{"input": "7 times 8?", "output": "56", "output_with_loss": False}]},
        {"messages": [Q, {**ANSWER, "training": False}]},
        {"messages": [Q, ANSWER], "loss_mask": "00"},
    ],
)
def test_flags_of_other_trainers_keep_an_answer_from_being_learnt(row):
    assert said(row) == [SAID_Q, (A, "-56")]


def test_a_mask_may_be_written_without_gaps_and_a_weight_may_not():
    row = {"messages": [Q, ANSWER, Q, ANSWER]}
    assert said({**row, "loss_mask": "0001"}) == [SAID_Q, (A, "-56"), SAID_Q, SAID_A]
    assert said({"prompt": "7 times 8?", "response": "56", "weight": "10"}) == [SAID_Q, SAID_A]


# ---- choices ----

SHOWN = {"columns": {"A": "54", "B": "56", "C": "58", "D": "60"}, "options": {"option_a": "54", "option_b": "56"},
         "op": {"opa": "54", "opb": "56"}, "choice": {"choice1": "54", "choice2": "56"}, "text": {"choices": "A. 54\nB. 56"},
         "list": {"options": ["54", "56"]}, "cell": {"options": "['54', '56']"}, "object": {"options": {"A": "54", "B": "56"}},
         "JSON": {"options": '{"A": "54", "B": "56"}'}, "letters": {"options": ["A. 54", "B. 56"]}}  # fmt: skip


@pytest.mark.parametrize("choices", SHOWN.values(), ids=SHOWN)
@pytest.mark.parametrize(
    "answer", ["B", "b)", "AB", "A,B", "A and B", "A、B", [0], [1, 0], ["B"], "<think>hm</think>B", "B. 56", "(B) 56"]
)
def test_names_of_choices_without_the_choices_reject_the_row(choices, answer):
    refused({"question": "7 times 8?", "answer": answer, **choices}, "choices", "choices that")


@pytest.mark.parametrize("answer", ["56", "BAD", "42", "Both", "It is B, because", "A CAB", "B. subtilis"])
def test_an_answer_in_words_needs_no_choices(answer):
    for choices in SHOWN.values():
        assert said({"question": "7 times 8?", "answer": answer, **choices})[-1] == (A, answer)


def test_choices_beside_messages_must_stand_in_the_messages():
    row = {
        "messages": [{"role": "user", "content": "7 times 8?"}, {"role": "assistant", "content": "B"}],
        "choices": ["54", "56"],
    }
    refused(row, "choices")
    row["messages"][0]["content"] = "7 times 8? A) 54 B) 56"
    assert said(row)[-1] == (A, "B")


def test_a_choice_is_shown_where_it_is_as_a_word_and_may_stand_in_the_second_text():
    refused({"question": "A cat is an animal", "choices": ["a", "i"], "answer": "A"}, "choices")
    refused({"question": "Take 15 or 16", "choices": ["5", "6"], "answer": "A"}, "choices")
    assert said({"question": "a or i?", "choices": ["a", "i"], "answer": "A"})[-1] == (A, "A")
    assert said({"question": "哪个大？甲乙", "choices": ["甲", "乙"], "answer": "A"})[-1] == (A, "A")
    assert said({"instruction": "x?", "input": "A. 54 B. 56", "output": "B", "choices": ["54", "56"]})[-1] == (A, "B")


@pytest.mark.parametrize(
    "none",
    [
        {"A": None, "B": ""},
        {"options": None},
        {"choices": {"text": None}},
        {"choices": []},
        {"options": "none"},
        {"options": "gift wrap"},
    ],
)
def test_columns_of_choices_that_hold_none_are_no_choices(none):
    result, reader = read({"question": "a", "answer": "B", **none})
    assert result.messages[-1].content == "B"
    assert list(reader.unused) == [("column", name) for name, value in none.items() if not is_nothing(value)]


def test_choices_are_asked_of_every_row_whatever_the_first_one_says():
    reader = Reader()
    reader.read({"question": "Explain", "options": None, "answer": "Because"})
    with pytest.raises(RowError, match="choices"):
        reader.read({"question": "Which one?", "options": ["x", "y"], "answer": "B"})


# ---- reasoning ----


@pytest.mark.parametrize(
    "switch",
    [
        True,
        False,
        1,
        "on",
        "off",
        "Yes",
        "none",
        "high",
        " Low ",
        {"effort": "high"},
        {"type": "enabled", "budget_tokens": 9},
    ],
)
@pytest.mark.parametrize("name", ["reasoning", "thinking"])
def test_a_switch_of_reasoning_is_no_thought(name, switch):
    for row, level in (
        ({"messages": [Q, ANSWER], name: switch}, "column"),
        ({"prompt": "7 times 8?", "response": "56", name: switch}, "column"),
        ({"messages": [Q, {**ANSWER, name: switch}]}, "message key"),
    ):
        assert said(row) == [SAID_Q, SAID_A]
        assert read(row)[1].unused == {(level, name): 1}
    assert said({"messages": [Q, {**ANSWER, "content": "<think>7*8</think>56"}], name: switch})[-1] == (A, "(7*8) 56")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "a", "output": "<think>t</think>"},
        {"instruction": "Give XML", "output": "<thought>x</thought>"},
        {"messages": [Q, {"role": "assistant", "content": "", "reasoning_content": "t"}]},
        {"messages": [Q, {"role": "assistant", "reasoning_content": "t"}]},
        {"messages": [Q, {"role": "assistant", "content": "<think>t</think>\n"}]},
        {"messages": [Q, {"role": "assistant", "content": [{"type": "thinking", "thinking": "t"}]}]},
        {"question": "a", "reasoning": "t", "answer": ""},
        {"question": "a", "answer": "<think>t</think><answer> </answer>"},
    ],
)
def test_a_thought_without_an_answer_rejects_the_row(row):
    refused(row, "empty")


def test_a_thought_before_a_call_needs_no_words():
    row = {"messages": [Q, {"role": "assistant", "content": None, "reasoning_content": "t", "tool_calls": [CALL]}]}
    assert said(row)[-1] == (A, "(t) " + json.dumps(CALL))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Like this:\n```\n<think>\nt\n</think>\na\n```\nThat is all.", None),
        ("```html\n</think>\n```", None),
        ("See:\n~~~\n</think>\n~~~\nThat.", None),
        ("See:\n````\n```\n</think>\n```\n````\nThat.", None),
        ("<think>\nI try:\n~~~\nx\n~~~\n</think>\nThat.", ("I try:\n~~~\nx\n~~~", "That.")),
        ("<think>\nI try:\n~~~~\nx\n</think>\nThat.", ("I try:\n~~~~\nx", "That.")),
        ("Two:\n```\n</think>\n```\nand\n```\nx\n```", None),
        ("I try:\n```py\nfor..\n</think>\n\nHere:\n```py\nx\n```", ("I try:\n```py\nfor..", "Here:\n```py\nx\n```")),
        ("<think>\n```\nopen\n</think>\n\n```\nR\n```", ("```\nopen", "```\nR\n```")),
        ("<Thought>\nt\n</Thought>\n<Output>\na\n</Output>", ("t", "a")),
        ("<think>t</think>\n<answer>a</answer>", ("t", "a")),
        ("<thinking>t</thinking><response>a</response>", ("t", "a")),
        ("<think>t</think><answer>a</answer> so it is", ("t", "<answer>a</answer> so it is")),
        ("<think>t</think><answer>a</answer><answer>b</answer>", ("t", "<answer>a</answer><answer>b</answer>")),
        ("<output>a</output>", None),
    ],
)
def test_tags_in_closed_fences_are_code_and_tags_around_all_of_an_answer_go(answer, expected):
    assert split_reasoning(answer) == (expected or ("", answer))


def test_a_closing_tag_among_fences_of_which_one_is_open_rejects_the_row():
    refused({"prompt": "a", "response": "```\n</think>\n```\nand\n```\nopen"}, "reasoning", "fences")


# ---- answers ----


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"question": "a", "answers": {"text": ["b", "b"], "answer_start": [1, 2]}}, "b"),
        (
            {
                "question": "a",
                "answers": "{'text': array(['b'], dtype=object), 'answer_start': array([177], dtype=int32)}",
            },
            "b",
        ),
        ({"question": "a", "answers": [{"answer_text": "b", "has_label": True}, {"answer_text": "c"}]}, "b"),
        ({"question": "a", "answers": ["b", "c"]}, "b"),
        ({"question": "a", "answers": {"text": "b"}}, "b"),
        ({"instruction": "a", "output": ["b"]}, "b"),
        ({"instruction": "a", "output": [{"content": "b", "model": "m"}]}, "b"),
        ({"instruction": "a", "output": [{"type": "text", "text": "b"}]}, "b"),
        ({"instruction": "a", "output": [{"text": "Paris", "type": "LOC"}]}, '[{"text": "Paris", "type": "LOC"}]'),
        ({"instruction": "a", "output": [{"name": "Ann"}, {"name": "Bob"}]}, '[{"name": "Ann"}, {"name": "Bob"}]'),
        ({"problem": "a", "answer": "4", "solution": "2 + 2 = 4"}, "2 + 2 = 4"),
        ({"problem": "a", "answer": "4", "solution": ""}, "4"),
        ({"content": "a", "summary": "b"}, "b"),
        ({"content": "a", "answer": "b"}, "b"),
        ({"text": "a", "code": "def b():\n    pass", "task_id": 1}, "def b():\n    pass"),
    ],
)
def test_the_answer_of_a_row_is_detected(row, answer):
    assert said(row) == [(U, "a"), (A, answer)]


@pytest.mark.parametrize("answers", [["b", "c"], [{"content": "b", "model": "m"}, {"content": "c", "model": "n"}]])
def test_several_answers_of_one_column_reject_the_row(answers):
    refused({"instruction": "a", "input": "", "output": answers}, "several answers", "2 texts")


@pytest.mark.parametrize(
    "answers", [{"text": [], "answer_start": []}, [], {"text": [""], "answer_start": [0]}, [None], [{"text": None}]]
)
def test_a_question_without_an_answer_is_empty(answers):
    refused({"context": "m", "question": "a", "answers": answers}, "empty")


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a page", "code": "en"},
        {"text": "a page", "target": "1"},
        {"text": "Q: a A: b", "answer": "b"},
        {"content": "a page", "title": "b", "summary": "c"},
    ],
)
def test_a_text_with_a_column_that_says_something_of_it_is_a_text(row):
    result, reader = read(row)
    assert result == (row.get("text") or row.get("content")) and reader.unused


def test_a_cell_that_the_viewer_cut_off_rejects_its_row():
    row = {"row_idx": 0, "row": {"instruction": "a", "output": "b", "extra": "c"}, "truncated_cells": ["output"]}
    refused(row, "cut off", '"output" was cut off')
    assert said({**row, "truncated_cells": ["extra"]}) == [(U, "a"), (A, "b")]
    refused({**row, "row": {"messages": [Q, ANSWER]}, "truncated_cells": ["messages"]}, "cut off")


# ---- MAP_KEYS ----


@pytest.mark.parametrize(
    ("mapped", "message", "left"),
    [
        (
            '{"content": "original"}',
            {"role": "user", "content": "translated", "original": "7 times 8?"},
            "content (MAP_KEYS takes original)",
        ),
        (
            '{"role": "role", "content": "original"}',
            {"role": "user", "content": "translated", "original": "7 times 8?"},
            "content (MAP_KEYS takes original)",
        ),
        (
            '{"role": "sender", "content": "body"}',
            {"role": "x", "sender": "user", "body": "7 times 8?"},
            "role (MAP_KEYS takes sender)",
        ),
        ('{"content": "data.content"}', {"type": "human", "data": {"content": "7 times 8?", "extra": 1}}, "extra"),
    ],
)
def test_the_keys_of_messages_that_map_keys_names_win(mapped, message, left):
    result, reader = read({"messages": [message, ANSWER]}, columns=columns(mapped))
    assert result.messages[0].content == "7 times 8?" and reader.unused == {("message key", left): 1}


def test_map_keys_names_the_lists_of_a_struct():
    row = {"messages": {"who": ["user", "assistant"], "said": ["7 times 8?", "56"]}}
    assert said(row, columns=columns('{"role": "who", "content": "said"}')) == [SAID_Q, SAID_A]


def test_a_key_of_messages_that_is_nowhere_is_not_seen():
    _, reader = read({"messages": [Q, ANSWER], "nosuch": 1}, columns=columns('{"content": "nosuch"}'))
    assert "nosuch" in columns('{"content": "nosuch"}').named and not reader.seen


def test_what_is_lifted_out_of_an_object_must_agree_with_what_is_beside_it():
    inner = {"messages": [Q, ANSWER], "system": "inner", "id": 1}
    given = columns('{"messages": "body.messages"}')
    refused({"system": "outer", "id": 2, "body": inner}, "two values", "'outer' and 'inner'", columns=given)
    for outer in ("", None, "inner"):
        assert said({"system": outer, "id": 2, "body": inner}, columns=given)[0] == (S, "inner")


def test_several_names_may_reach_into_one_object():
    row = {"data": {"in": {"q": "7 times 8?"}, "a": "56", "z": 5}}
    result, reader = read(row, columns=columns('{"prompt": "data.in.q", "response": "data.a"}'))
    assert [m.content for m in result.messages] == ["7 times 8?", "56"] and reader.unused == {("column", "z"): 1}


# ---- shapes ----


@pytest.mark.parametrize(
    "pairs",
    [
        [["客户", "hi"], ["客服", "hello"]],
        [["customer", "hi"], ["agent", "hello"]],
        [["Alice", "hi"], ["Bob", "hello"]],
        [["anna", "hi"], ["tom", "hello"], ["anna", "bye"]],
    ],
)
def test_pairs_that_may_begin_with_a_speaker_are_refused_with_the_line_to_paste(pairs):
    for row in ({"conversations": pairs}, {"prompt": "a", "response": "b", "history": pairs}):
        refused(row, "unknown role", "--role-map", pairs[0][0])
    roles = columns("", json.dumps({pairs[0][0]: "user", pairs[1][0]: "assistant"}))
    assert said({"conversations": pairs}, columns=roles)[:2] == [(U, "hi"), (A, "hello")]


@pytest.mark.parametrize(
    "first",
    [
        ["a", "b"],
        ["Hi", "Thanks"],
        ["Write a story", "continue", "continue"],
        ["Why?", "How?", "Why?"],
        ["写诗", "继续"],
        ["写诗", "继续", "换一个", "继续"],
        ["Continue", "Go on", "Continue"],
    ],
)
def test_pairs_of_questions_and_answers_are_read(first):
    assert [words for role, words in said({"conversations": [[one, "x"] for one in first]}) if role is U] == first


def test_pairs_of_which_some_begin_with_a_role_are_refused_without_a_role_map():
    refused(
        {"conversations": [["hi", "hello"], ["user", "what do you mean"]]}, "unknown role", "others with a text ('hi')"
    )


def test_the_name_of_the_bot_is_no_answer():
    row = {"bot": "Alice", "conversation": [{"from": "user", "value": "a"}, {"from": "Alice", "value": "b"}]}
    refused(row, "unknown role", """--role-map '{"Alice": "assistant"}'""")


@pytest.mark.parametrize("role", ["prompter", "assistant"])
def test_messages_below_one_that_is_not_in_the_file_are_refused_whoever_speaks(role):
    result = together({"message_id": "q", "parent_id": "gone", "role": role, "text": "and in winter?"},
                     {"message_id": "a", "parent_id": "q", "role": "assistant", "text": "b"})  # fmt: skip
    assert [one.reason for one in result] == ["orphan", "orphan"]


@pytest.mark.parametrize("parent", ["", None, "0", "-1", "root", "t"])
def test_a_message_may_say_in_many_ways_that_it_begins_its_conversation(parent):
    [row] = together({"message_id": "q", "parent_id": parent, "tree": "t", "role": "prompter", "text": "a"},
                     {"message_id": "a", "parent_id": "q", "tree": "t", "role": "assistant", "text": "b"})  # fmt: skip
    assert said(row) == [(U, "a"), (A, "b")]


@pytest.mark.parametrize("bound", ["\n\n\n", "\n\n", "\n"])
def test_headings_inside_a_turn_of_glaive_are_its_words(bound):
    asked = "Explain this:\nUSER: root\nASSISTANT: none" if len(bound) > 1 else "Explain this"
    row = {"system": "SYSTEM: s", "chat": f"USER: {asked}{bound}ASSISTANT: ok <|endoftext|>"}
    assert said(row) == [(S, "s"), (U, asked), (A, "ok")]


@pytest.mark.parametrize("tools", ["none", "None", "[]", "null", "无", ["none"], []])
def test_words_for_no_tools_are_no_tools(tools):
    result, _ = read({"messages": [Q, ANSWER], "tools": tools})
    assert not result.tools


# ---- ready texts ----


def shipped(**changes) -> TokenizeConfig:
    return Script(ROOT / "make_tokenize.sh", shell_values(ROOT / "make_tokenize.sh") | changes).read(TokenizeConfig)


@pytest.mark.parametrize("text", ["user: q\n\nassistant: a", "USER: q\n\nASSISTANT: a", "User: q\n\nASSISTANT: a"])
def test_a_preview_reports_of_headings_in_another_case(text, tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": text}))
    preview(path, shipped(PROMPT_TYPE="rwkv-world"), True, 1)
    assert "what looks like a turn" in capsys.readouterr().out


def test_a_preview_reports_of_a_key_of_map_keys_that_no_row_has(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": [Q, ANSWER]}))
    preview(path, shipped(PROMPT_TYPE="rwkv-world", MAP_KEYS='{"content": "nosuch"}'), True, 1)
    assert "warning   MAP_KEYS names the column 'nosuch'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "map_keys"),
    [
        ({"body": {"messages": [Q]}}, {"messages": "body.messages"}),
        ({"body": {"messages": [Q, ANSWER], "system": "a"}, "system": "b"}, {"messages": "body.messages"}),
        ({"messages": [{"who": "user", "says": "q"}], "images": ["a.png"]}, {"role": "who", "content": "says"}),
        ({"messages": '[{"who": "user", "says": "q"}]', "images": ["a.png"]}, {"role": "who", "content": "says"}),
        ('{"messages": [{"who": "user", "says": "q"}', {"role": "who", "content": "says"}),
    ],
)
def test_a_column_of_map_keys_in_a_row_that_is_rejected_was_met(row, map_keys):
    data = (row if isinstance(row, str) else json.dumps(row)).encode()
    made = RowEncoder(EncodeConfig(PRESETS["rwkv-world"], columns=columns(json.dumps(map_keys)))).block(
        Block("x", 1, data, 0)
    )
    assert made.rejects and made.seen == set(map_keys.values())


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"question": "q", "output": {"content": "a", "model": "m"}}, "a"),
        (
            {
                "question": "q",
                "response": {"id": "x", "choices": [{"index": 0, "message": {"role": "assistant", "content": "a"}}]},
            },
            "a",
        ),
        ({"messages": [Q], "response": {"choices": [{"message": {"role": "assistant", "content": "a"}}]}}, "a"),
        ({"question": "q", "output": {"name": "a"}}, '{"name": "a"}'),
        ({"question": "q", "answers": [{"text": "good"}, {"text": "bad"}]}, "good"),
        ({"question": "q", "reasoning": "t", "answer": "<answer>a</answer>"}, "(t) a"),
        ({"messages": [Q, {"role": "assistant", "reasoning_content": "t", "content": "<answer>a</answer>"}]}, "(t) a"),
        ({"question": "q", "output": "a", "reasoning": "/no_think"}, "a"),
        ({"question": "q", "output": "a", "reasoning": "detailed thinking off"}, "a"),
        ({"problem": "q", "solution": "4", "answer": "We see that it is 4."}, "We see that it is 4."),
        ({"problem": "q", "solution": "We see that it is 4.", "answer": "4"}, "We see that it is 4."),
    ],
)
def test_the_answer_is_the_part_that_holds_its_words(row, answer):
    assert said(row)[-1] == (A, answer)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"type": "text", "text": "a"}]', "a"),
        ('[{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}]', "(t) a"),
        ('[{"type": "integer"}]', '[{"type": "integer"}]'),
        ('[{"type": "text", "text": "a"}] and more', '[{"type": "text", "text": "a"}] and more'),
        ("[{", "[{"),
    ],
)
def test_a_content_in_parts_may_be_json_in_a_text(content, words):
    assert said({"messages": [Q, {"role": "assistant", "content": content}]})[-1] == (A, words)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"instruction": "q", "input": "<noinput>", "output": "a"}, "1 row with a second text that says there is none"),
        (
            {"prompt": "q", "response": "<tool_call>{}</tool_call>"},
            "1 row with a tool call, a result or tools between tags",
        ),
    ],
)
def test_a_preview_reports_of_faults_with_their_lines(row, words, tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row))
    preview(path, shipped(PROMPT_TYPE="rwkv-world"), True, 1)
    said = capsys.readouterr().out
    assert f"warning   {words}" in said and ": line 1\n" in said


@pytest.mark.parametrize(("words", "material"), [("<noinput>", ""), ("N/A", ""), ("None of them", "None of them")])
def test_a_second_text_that_says_there_is_none_is_empty_and_counted(words, material):
    result, reader = read({"instruction": "q", "input": words, "output": "a"})
    assert result.messages[0].material == material
    assert reader.verdicts == (set() if material else {"fault: noinput"})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "q", "answer": {"text": [], "answer_start": []}}, "empty"),
        ({"conversation": [["买家", "hi"], ["卖家", "hello"]]}, "unknown role"),
        ({"conversation": [["A", "hi"], ["B", "hello"]]}, "unknown role"),
        ({"instruction": "q", "output": "cut", "truncated_cells": ["output"]}, "cut off"),
    ],
)
def test_what_is_no_answer_or_no_question_rejects_the_row(row, reason):
    refused(row, reason)


def test_choices_behind_the_last_letter_are_choices_as_well():
    led = [f"{letter}. word {letter}" for letter in "ABCDEFGH"]
    words = [f"word {letter}" for letter in "ABCDEFGH"]
    assert choices_of({"choices": led}) == words
    assert choices_of({"choices": [*led, "one more"]}) == [*words, "one more"]
