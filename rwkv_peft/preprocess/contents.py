"""A content in parts -> its text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import orjson

from . import message_order
from .keys import THINK, left_over, parts_of, squashed
from .values import NOT_TEXT, RowError, is_nothing, kind

THINK_NAMES = frozenset(map(squashed, THINK))


def parts_of_json(text: str) -> Any:
    """Return the parts of a content that is JSON in a text, as tables and databases keep them; else the text itself."""
    with contextlib.suppress(orjson.JSONDecodeError):
        parts = orjson.loads(text)
        if all(map(message_order.is_part, parts)):
            return parts
    return text


def joined_parts(i: int, parts: Iterable[Any], unused: dict[tuple[str, str], int]) -> tuple[str, str]:
    """OpenAI's list of parts as text, and the thought in it; only text can be trained."""
    texts, thoughts = [], []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise RowError("not text", f"message {i} has a part of type {kind(part)}; only text can be trained")
        named = parts_of(tuple(part))
        of_type = squashed(str(part.get("type", "")))
        is_thought = of_type in THINK_NAMES or of_type == "summarytext" or part.get("thought") is True
        medium = next(
            (key for key in ("text", *named.think, "content", "summary") if isinstance(said(part.get(key)), str)),
            "",
        )
        if medium and is_thought:
            thoughts.append(said(part[medium]))
            used: tuple[str, ...] = ("type", "signature", "thought", medium)
        elif medium == "text":
            texts.append(said(part["text"]))
            used = ("text", "type")
        elif medium in named.think and not of_type:
            thoughts.append(said(part[medium]))
            used = (medium,)
        else:
            raise RowError("not text", f"message {i} has a part of type {part.get('type')}; only text can be trained")
        if any(not is_nothing(part[key]) for key in named.media):
            raise RowError("not text", f"message {i} has a part with {named.media[0]}; {NOT_TEXT}")
        for key in left_over(tuple(part), used):
            if not is_nothing(part[key]):
                unused["key of a content part", key] = 1
    return "\n".join(texts), "\n".join(thoughts)


def said(value: Any) -> Any:
    """The text of a system text or thought that is an object or a list of parts (Gemini, Anthropic); else the value."""
    if isinstance(value, dict) and len(named := parts_of(tuple(value)).said) and value.get("type", "text") == "text":
        return said(value[named[0]])
    if (
        isinstance(value, list)
        and value
        and all(isinstance(one, dict) and isinstance(one.get("text"), str) for one in value)
    ):
        return "\n".join(one["text"] for one in value)
    return value
