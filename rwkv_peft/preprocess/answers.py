"""Which part of a row is its answer, where a column holds more than a text."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from . import message_order
from .contents import said
from .json_repair import parse_list
from .keys import ANSWERS_TO_TEXTS, SUMMARIES, left_over, squashed
from .values import RowError, is_nothing

Row = Mapping[str, Any]


def one_answer(value: Any, name: str, unused: dict[tuple[str, str], int]) -> Any:
    """Return the one answer of a value.

    Of a message or a content in parts, its text; of a list of texts, the only one; of a column "answers", which has
    several right ones, the best (SQuAD: its first text; Nectar: that of rank 1).
    """
    if isinstance(value, dict) and message_order.have_roles([value]):
        return [value]
    if isinstance(value, dict) and (messages := messages_of_choices(value.get("choices"))):
        for key in left_over(tuple(value), ("choices", "object", "usage")):
            unused["key of an answer", key] = 1
        if len(messages) > 1:
            unused["further choice of the column", name] = 1
        return messages[:1]
    if isinstance(value, dict) and says_nothing(value):
        return ""
    if isinstance(value, dict) and len(value) > 1 and (key := answer_key(value, False)):  # with its model, its id, ...
        return value[key]
    several = squashed(name) == "answers"
    if (
        isinstance(value, list)
        and value
        and all(is_text_part(one) and not (several and len(one) == 1) for one in value)
    ):
        return said(value)
    if several and isinstance(value, str) and value.lstrip()[:1] in ("{", "["):  # in a cell of a table
        with contextlib.suppress(ValueError):
            words = one_answer(parse_list(value), name, unused)
            return words if isinstance(words, str) else value
    texts = value["text"] if several and isinstance(value, dict) and "text" in value else value
    if isinstance(texts, list) and all(map(says_nothing, texts)):
        return ""
    if several and isinstance(texts, str):
        return texts
    if message_order.is_messages(texts) and all(answer_key(one, several) for one in texts):
        if several:
            texts = sorted(texts, key=message_order.rank_of)
        for one in texts:
            for key in left_over(tuple(one), (answer_key(one, several), "rank")):
                unused["key of an answer", key] = 1
        texts = [one[answer_key(one, several)] for one in texts]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return value
    if len(set(texts)) > 1 and not several:
        raise RowError(
            "several answers",
            f'its "{name}" is a list of {len(texts)} texts, and nothing tells the right one: leave one of them. (If the list '
            "itself is the answer, write it as one text)",
        )
    if len(set(texts)) > 1:
        unused["further text of the column", name] = 1
    return texts[0]


def messages_of_choices(choices: Any) -> list[Any]:
    """The messages in what an API of chats gives back, {"choices": [{"message": {...}}]}; [] where it is something else."""
    messages = [one.get("message") for one in choices if isinstance(one, dict)] if isinstance(choices, list) else []
    return messages if message_order.have_roles(messages) else []


def says_nothing(one: Any) -> bool:
    """Return whether a value is empty, or an object of empty values."""
    return is_nothing(one) or isinstance(one, dict) and all(map(is_nothing, one.values()))


def is_text_part(one: Any) -> bool:
    """Whether an object is a text of a content in parts."""
    return (
        isinstance(one, dict)
        and set(one) <= {"type", "text"}
        and isinstance(one.get("text"), str)
        and one.get("type", "text") in ("text", "output_text")
    )


# the keys of an object of a list of answers that hold its words; of a column "answers" others may as well
ANSWER_KEYS = ("content", "answer", "response", "output", "completion", "回答", "答案")
MORE_ANSWER_KEYS = ("answer_text", "text", "value", "body", "generated_text")


def answer_key(one: Row, several: bool) -> str:
    """Return the key of an answer's text in an object of only the text and metadata; or "".

    several: of a column "answers".
    """
    names = (*ANSWER_KEYS, *MORE_ANSWER_KEYS) if several else ANSWER_KEYS
    texts = [name for name in names if isinstance(one.get(name), str)]
    known = several or len(one) == 1 or not left_over(tuple(one), (*texts, "rank", "index", "finish_reason"))
    return texts[0] if texts and known else ""


def answer_to_text(row: Row, text: str, sure: bool) -> str:
    """Return the column of an answer to a text that is no question (MBPP: code; AdGen: a summary); or "".

    An answer that is a part of the text does not count, and one word of no letters is a label. sure: the text's column
    has the name of a text.
    """
    if not isinstance(row[text], str):
        return ""
    others = [name for name in left_over(tuple(row), (text,)) if not is_nothing(row[name])]
    for name in others:
        value, word = row[name], squashed(name)
        summary = not sure and len(others) == 1 and word in SUMMARIES
        if not isinstance(value, str) or not (summary or word in ANSWERS_TO_TEXTS):
            continue
        is_words = any(map(str.isalpha, value)) and value.strip() not in row[text]
        if is_words and (word != "code" or "\n" in value.strip() or "(" in value):
            return name
    return ""
