"""Flags of rows and messages: whether an answer is to be learnt."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from .json_repair import parse_list
from .keys import Parts, squashed

WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
IN_TEXT = re.compile(r"\s*[01](?:[\s,;]+[01])+\s*\Z")
WITHOUT_GAPS = re.compile(r"\s*[01]{2,}\s*\Z")  # (of a mask alone: a weight may be 10)
# preference data (KTO) say whether an answer is liked
LIKED, LABEL = "ktotag", "label"


def flag_word(value: Any) -> bool | None:
    """What a flag says: true, false, 0, 1, and the same as texts; None for anything else."""
    return WORDS.get(str(value).strip().lower().removesuffix(".0"))


def list_of_flags(value: Any, name: str) -> list[Any] | None:
    """A list of flags, or text of one, as a cell of a table holds it: [0, 1], 0 0 1, or 001 in a mask; None for anything else."""
    if isinstance(value, str) and (IN_TEXT.match(value) or "mask" in name.lower() and WITHOUT_GAPS.match(value)):
        return re.findall(r"[01]", value)
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = parse_list(value)
        except ValueError:
            return None
    return value if isinstance(value, list) and value else None


@functools.lru_cache(4096)
def liked(keys: tuple[str, ...]) -> tuple[str, ...]:
    """The columns that may say whether an answer is liked."""
    return tuple(key for key in keys if squashed(key) in (LIKED, LABEL))


def flags_in(row: Mapping[str, Any], parts: Parts) -> tuple[str, ...]:
    """Return the columns of a row that are flags.

    A column of this name with another number (the loss of an earlier model, the weight of a sample) is none, and is
    reported as not used. A label is one beside a completion (TRL), or where it is true or false.
    """
    names = [name for name in parts.flags if list_of_flags(row[name], name) or flag_word(row[name]) is not None]
    for name in liked(tuple(row)):
        sure = squashed(name) == LIKED or "completion" in row or type(row[name]) is bool
        if sure and flag_word(row[name]) is not None:
            names.append(name)
    return tuple(names)
