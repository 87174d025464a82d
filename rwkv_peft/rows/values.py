"""Values of rows -> text, and the reasoning in an answer apart from the answer itself."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from ..templates.template import END_OF_THINK, THINK, tidy_answer


class RowError(Exception):
    """Why a row cannot be used. reason: a few words that are counted; the message: a sentence about this row."""

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)  # both, so that it survives the way between processes
        self.reason, self.message = reason, message

    def __str__(self) -> str:
        return self.message


def is_nothing(value: Any) -> bool:
    """Whether a value says nothing: null, NaN (an empty cell of a table), "", blanks, an empty list or object."""
    if value is None or value == "" or value == [] or value == {}:
        return True
    return value.isspace() if isinstance(value, str) else isinstance(value, float) and math.isnan(value)


def as_text(value: Any) -> str:
    """A value as text: a string is itself; a number, true, false, an object or a list is what JSON writes for it (a date: its
    ISO form; bytes: their UTF-8 text)."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise RowError("not UTF-8", "holds bytes that are no UTF-8 text") from None
    return json.dumps(value, ensure_ascii=False, default=str)


def without_padding(value: Any) -> Any:
    """A value without the nulls that Arrow puts where an object lacks a field that others have."""
    if isinstance(value, dict):
        return {key: without_padding(v) for key, v in value.items() if v is not None}
    return [without_padding(v) for v in value] if isinstance(value, list) else value


def kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null",
             bytes: "bytes that are no UTF-8 text"}  # fmt: skip
    return names.get(type(value), "a number")


def short(value: Any, most: int = 40) -> str:
    """A value for a message."""
    text = as_text(value) if not isinstance(value, bytes) else repr(value)
    return repr(text if len(text) <= most else text[: most - 3] + "...")


# tags that data sets put around a thought, besides <think>
OTHER_TAGS = re.compile(
    r"\s*(?:<(thinking|thought|reasoning)>(.*?)</\1>|<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>|\[THINK\](.*?)\[/THINK\]"
    r"|◁think▷(.*?)◁/think▷)(.*)\Z",
    re.DOTALL,
)
SOLUTION = re.compile(r"\s*<\|begin_of_solution\|>(.*)<\|end_of_solution\|>\s*\Z", re.DOTALL)
IN_CODE = re.compile(r"`+[^`]*</?think>[^`]*`+")  # an answer that writes about the tags


def split_reasoning(answer: str) -> tuple[str, str]:
    """The thought of an answer, and the answer: <think>...</think> at its start.

    A closing tag without an opening one is repaired (DeepSeek's template gives the opening tag to the model, so its answers
    lack it). RowError where a thought never ends, or tags can be read in more than one way.
    """
    if not wants_a_look(answer):
        return "", answer
    if other := OTHER_TAGS.match(answer):
        think = next((text for text in other.groups()[1:5] if text is not None), "")
        words = SOLUTION.match(other[6])
        answer = f"{THINK}{think}{END_OF_THINK}{words[1] if words else other[6]}"
    if THINK not in answer and END_OF_THINK not in answer:
        return "", answer
    bare = IN_CODE.sub(lambda found: " " * len(found[0]), answer)
    opened, closed = bare.count(THINK), bare.count(END_OF_THINK)
    starts = bare.lstrip().startswith(THINK)
    if opened == closed == 0:
        return "", answer
    if opened > 1 or closed > 1:
        raise RowError(
            "reasoning", f"has {opened} {THINK} and {closed} {END_OF_THINK} in one answer; one of each can be used"
        )
    if opened and not closed:
        raise RowError("reasoning", f"has a thought that never ends: there is {THINK}, but no {END_OF_THINK}")
    if opened and not starts:
        raise RowError("reasoning", f"has {THINK} in the middle of an answer; a thought must come first")
    begin = bare.index(THINK) + len(THINK) if opened else 0
    end = bare.index(END_OF_THINK)
    if end < begin:
        raise RowError("reasoning", f"has {END_OF_THINK} before {THINK}")
    return answer[begin:end].strip(), tidy_answer(answer[end + len(END_OF_THINK) :])


# a picture, sound or film stands here in data for models that can see or hear
PLACEHOLDER = re.compile(
    r"<(image|video|audio|img|speech)>(?!.*</\1>)|<\|(?:image|video|audio|vision|img)\w*\|>"
    r"|<image_?(?:placeholder|token|soft_token|pad)?_?\d*>|<img>[^<\n]{1,300}</img>|\[IMG\](?!.*\[/IMG\])|data:image/\w+;base64",
    re.DOTALL,
)
# how every such tag and placeholder begins
SUSPECT = re.compile(r"<\|?/?(?:thi|tho|rea|ima|img|vid|aud|vis|spe|begin_of)|\[(?:THINK|IMG)")
QUOTED = re.compile(r"`[^`]*`|```.*?```", re.DOTALL)


NOT_TEXT = "the row needs a picture, sound or film, and only text can be trained"


def wants_a_look(text: str) -> bool:
    """Whether a text may hold reasoning or a placeholder; quick, for texts that have neither."""
    return ("<" in text or "[" in text) and SUSPECT.search(text) is not None or "data:image/" in text or "◁" in text


def check_text_only(text: str, where: str) -> None:
    """RowError if a text has a placeholder for something that is no text, outside quoted code."""
    if wants_a_look(text) and (found := PLACEHOLDER.search(QUOTED.sub("", text) if "`" in text else text)):
        raise RowError("not text", f"{where} has the placeholder {found[0][:20]}: {NOT_TEXT}")
