# ruff: noqa: E501 - tables of rows
"""What a refusal proposes: a line that makes the rows usable, and never one that trains the worse answer or the wrong column."""

import json
import re
import shlex

import pytest
from helpers.messages import ANSWER, A, Q, U, read, refused, said

from rwkv_peft.common.errors import SettingErrors
from rwkv_peft.preprocess.keys import columns
from rwkv_peft.preprocess.schemas import Reader
from rwkv_peft.preprocess.values import RowError
from rwkv_peft.text.roles import Role

BAD = {"role": "assistant", "content": "54"}
PROPOSED = {
    "answers of preferences": ({"system": "s", "question": "7 times 8?", "chosen": "56", "rejected": "54"}, {"response": "chosen"}),
    "compound": ({"question": "7 times 8?", "chosen_response": "56", "rejected_response": "54 it is, and long"}, {"response": "chosen_response"}),
    "compound turned": ({"prompt": "7 times 8?", "response_rejected": "54 it is, and long", "response_chosen": "56"}, {"response": "response_chosen"}),
    "messages": ({"chosen": [Q, ANSWER], "rejected": [Q, BAD]}, {"messages": "chosen"}),
    "answers as messages": ({"prompt": "7 times 8?", "chosen": [ANSWER], "rejected": [BAD]}, {"response": "chosen"}),
    "question of another name": ({"frage": "7 times 8?", "chosen": "56", "rejected": "54"}, {"prompt": "frage", "response": "chosen"}),
    "roles of people": ({"Description": "a long description of the case", "Patient": "7 times 8?", "Doctor": "56"}, {"prompt": "Patient", "response": "Doctor"}),
    "numbered messages": ({"role_1": "a physician with a long name", "topic": "t", "message_1": "7 times 8?", "message_2": "56"}, {"prompt": "message_1", "response": "message_2"}),
    "one answer is missing": ({"question": "7 times 8?", "lösung": "56"}, {"response": "lösung"}),
    "one question is missing": ({"titel": "7 times 8?", "answer": "56"}, {"prompt": "titel"}),
    "a medical table": ({"department": "d", "title": "t", "ask": "7 times 8?", "answer": "56"}, {"prompt": "ask"}),
    "preferences of OpenAI": ({"input": {"messages": [Q]}, "preferred_output": [ANSWER], "non_preferred_output": [BAD]}, {"messages": "input.messages", "response": "preferred_output"}),
    "inside an object": ({"body": {"messages": [Q, ANSWER]}}, {"messages": "body.messages"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PROPOSED)
def test_the_proposed_line_is_right_and_works(name):
    row, wanted = PROPOSED[name]
    with pytest.raises(RowError) as error:
        read(row)
    line = re.search(r"--map-keys ('[^']*')", str(error.value))[1]
    assert json.loads(shlex.split(line)[0]) == wanted
    result = said(row, columns=columns(json.dumps(wanted)))
    assert [one for one in result if one[0] is not Role.SYSTEM] == [(U, "7 times 8?"), (A, "56")]


def test_a_talk_as_one_text_is_proposed_as_a_text_with_headings():
    row = {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"}
    refused(row, "unknown columns", """--convert-headings --map-keys '{"text": "chosen"}'""")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        *(({"prompt": "a", f"response_{a}": "b", f"response_{b}": "c"}, f'"response_{a}" or "response_{b}"') for a, b in ("jk", "01", "ab", "12")),
        ({"label": "1", "review": "good"}, '"label" or "review"'),
        ({"question": "a", "x": "b", "y": "c"}, '"x" or "y"'),
        ({"name": "Alice", "mes": "hi", "is_user": False}, "SillyTavern"),
        ({"prompt": [Q]}, "there is no answer"),
        ({"conversation_a": [Q, ANSWER], "conversation_b": [Q, BAD], "winner": "model_a"}, '"conversation_a" or "conversation_b"'),
        ({"segments": [{"label": False, "text": "q"}, {"label": True, "text": "a"}]}, "it has 'segments'"),
        ({"prompt": "a"}, "there is no answer"),
        ({"question": "a", "opa": "x", "opb": "y", "cop": 1, "exp": "since"}, 'column answer (nothing tells whether "cop" counts them'),
        ({"question": "a", "choices": ["x", "y"], "label": 0}, 'nothing tells whether "label" counts'),
        ({"question": "a", "A": "x", "B": "y"}, "choices are in 'A', 'B': write the words of the right one into a column answer, or"),
        ({"chosen": "a", "rejected": "b"}, "has no question"),
        ({"怎么退货？": "多久？", "七天内。": "三天"}, "first line seems to be data"),
        ({"How long does it take?": "a", "Three days.": "b"}, "first line seems to be data"),
    ],
)  # fmt: skip
def test_where_nothing_reports_the_columns_no_line_is_proposed(row, words):
    refused(row, "unknown columns", words)
    with pytest.raises(RowError) as error:
        read(row)
    assert "--map-keys" not in str(error.value)


def test_questions_and_answers_are_a_pair():
    assert said({"label": "骨科", "questions": "7 times 8?", "answers": "56"}) == [(U, "7 times 8?"), (A, "56")]


def test_a_system_that_answers_is_proposed_as_the_assistant():
    row = {"turns": [{"speaker": "USER", "utterance": "7 times 8?"}, {"speaker": "SYSTEM", "utterance": "56"}]}
    refused(row, "no answer", """--role-map '{"SYSTEM": "assistant"}'""")
    assert said(row, columns=columns("", '{"SYSTEM": "assistant"}')) == [(U, "7 times 8?"), (A, "56")]
    with pytest.raises(RowError) as error:
        read({"messages": [{"role": "system", "content": "s"}, Q]})
    assert "--role-map" not in str(error.value)


def test_the_better_answer_beside_a_conversation_is_proposed_and_read():
    row = {
        "conversations": [{"from": "human", "value": "7 times 8?"}],
        "chosen": {"from": "gpt", "value": "56"},
        "rejected": {"from": "gpt", "value": "54"},
    }
    refused(row, "no answer", """--map-keys '{"response": "chosen"}'""")
    result = Reader(columns=columns('{"response": "chosen"}')).read(row)[1]
    assert [m.content for m in result.messages] == ["7 times 8?", "56"]


def test_map_keys_may_name_a_column_for_one_part_only():
    with pytest.raises(SettingErrors, match="names 'chosen' as prompt and as response"):
        columns('{"prompt": "chosen", "response": "chosen"}')
    assert columns('{"messages": "content", "content": "content"}').named == ("content", "content")
    assert columns('{"images": "", "think": ""}').named == ()
