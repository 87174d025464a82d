"""Questions with choices (MMLU, C-Eval): an answer that is the letter of a choice needs a question that shows the choices."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .json_repair import parse_list
from .keys import squashed
from .values import RowError, as_text, is_nothing

COLUMNS = frozenset(map(squashed, ("choices", "options", "选项", "候选项")))
COLUMN_OF_ONE = re.compile(r"(?:option|choice|opt|op|选项)([a-h1-8])\Z")  # option_a, choice1, opa
LETTERS = "ABCDEFGH"
# what may name choices: B, (b), 2, ABD, "A, B", [0]
NAME = re.compile(r"([A-Ha-h]|\d{1,2})\Z")
# a choice behind its letter: "B. y", "(B) y"
LED = re.compile(r"[\s(（\[]*([A-H])\s*[)）\].．:：、]+\s*(.+)", re.DOTALL)
LETTER = re.compile(r"(?:^|[\s(（])[A-H][.．:：、)）]", re.M)
MARKS = re.compile(r"[\s()\[\]{}.,，、;；/&+\"'和]+|\band\b")


@functools.lru_cache(4096)
def columns_of_choices(keys: tuple[str, ...]) -> tuple[str, ...]:
    """The columns that hold the choices of a question: one that holds all, or one for each."""
    if lists := tuple(key for key in keys if squashed(key) in COLUMNS):
        return lists
    if "A" in keys and "B" in keys:
        return tuple(key for key in LETTERS if key in keys)
    choice_columns = tuple(key for key in keys if COLUMN_OF_ONE.match(squashed(key)))
    return choice_columns if len(choice_columns) > 1 else ()


def choices_of(row: Mapping[str, Any]) -> list[str]:
    """Return the choices of a question, without their letters; none if it has no choices.

    A text of choices has several lines, or letters, or is JSON.
    """
    options: list[Any] = []
    for name in columns_of_choices(tuple(row)):
        value = row[name]
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            with contextlib.suppress(ValueError):
                value = parse_list(value)
        if isinstance(value, dict):
            value = value.get("text", list(value.values()))
        if squashed(name) in COLUMNS and not isinstance(value, list):
            words = "" if is_nothing(value) else as_text(value).strip()
            value = words.split("\n") if "\n" in words or len(LETTER.findall(words)) > 1 else []
        options += value if isinstance(value, list) else [value]
    choices = [as_text(one).strip() for one in options if not is_nothing(one)]
    led = [match for one in choices[: len(LETTERS)] if (match := LED.match(one))]
    if [match[1] for match in led] == list(LETTERS[: len(choices)]):
        return [match[2] for match in led] + choices[len(LETTERS) :]
    return choices


def names_a_choice(answer: str, choices: Sequence[str]) -> bool:
    """Whether an answer is nothing but the letters or numbers of choices, or a letter and its choice."""
    led, among = LED.match(answer), len(choices)
    if led and led[2] in choices and choices.index(led[2]) == LETTERS.index(led[1]):
        return True
    names = [name for name in MARKS.split(answer) if name]
    if len(names) == 1 and len(names[0]) > 1 and set(names[0]) <= set(LETTERS):  # ABD
        names = list(names[0]) if list(names[0]) == sorted(set(names[0])) else names
    return bool(names) and all(
        NAME.match(name) and not (name.isdigit() and int(name) > max(among, 4)) for name in names
    )


def refuse_choice(row: Mapping[str, Any], question: str, answer: Any, where: str) -> None:
    """Raise RowError if an answer is the letter or the number of a choice that the question does not show.

    where: the name of the question, for the message.
    """
    choices = choices_of(row)
    words = as_text(answer).strip()
    if not choices or words in choices or not names_a_choice(words, choices):
        return
    if not all(is_shown(choice, question) for choice in choices):
        raise RowError(
            "choices",
            f"has the answer {words}, one of several choices that {where} does not name: write the choices into the "
            "question, or the words of the right one as the answer",
        )


def is_shown(choice: str, question: str) -> bool:
    """Whether a question has a choice, as words of their own."""
    first, last = choice[:1], choice[-1:]
    before = r"(?<![A-Za-z0-9])" if first.isascii() and first.isalnum() else ""
    behind = r"(?![A-Za-z0-9])" if last.isascii() and last.isalnum() else ""
    return re.search(before + re.escape(choice) + behind, question) is not None
