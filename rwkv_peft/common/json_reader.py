"""JSON that somebody else may have written: a run folder that was shared, a file of settings, a report. Every file of JSON that
the kit reads comes through here, but for rows (rows/). Floor 0.

What is refused would be lost, be misread, or end the program later: a key that is there twice, NaN and infinity, numbers that no
64 bits hold, half of a surrogate pair, values nested so deep that whatever walks through them runs out of stack.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from .atomic_io import reading
from .errors import UserError
from .paths import display_path

MOST_BYTES = 16 << 20  # of a file: the largest of ours, the report of tokenized data, has some hundred kB
DEEPEST = 64  # brackets that are open at once: ours have 6, parameters of tools some 20
SHOWN = 60  # characters of a value that a message shows
BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.S)
HALF = re.compile(r"\\u[dD][89a-fA-F]")

Schema = Mapping[str, Callable[[Any], bool]]  # key -> whether a value is one that it may have


def parse(text: bytes | str, most: int = MOST_BYTES) -> Any:
    """The value that JSON text holds. ValueError in the user's words, with the line where there is one, for all that is not one
    plain value. most: bytes.
    """
    if len(text) > most:
        raise ValueError(f"is longer than {most >> 20} MB, which nothing of this kind is")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise ValueError(f"is not UTF-8 in line {line} (byte {error.start:,})") from None
    text = text.removeprefix("\ufeff")
    must_be_flat(text)
    try:
        value = json.loads(
            text, object_pairs_hook=unique, parse_constant=refuse_constant, parse_float=finite, parse_int=whole
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON in line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError(too_deep()) from None
    is_odd = HALF.search(text) or not is_storable(text)
    if is_odd and not is_storable(json.dumps(value, ensure_ascii=False)):
        raise ValueError("holds half of a surrogate pair, which no file can store")
    return value


def load(path: str | os.PathLike, most: int = MOST_BYTES) -> Any:
    """The value that a file of JSON holds. ValueError without the file's name; OSError if it cannot be read."""
    with reading(path) as file:
        return parse(file.read(most + 1), most)


def read(path: str | os.PathLike, what: str = "", schema: Schema | None = None, wanted: tuple[str, ...] = ()) -> Any:
    """The value of a file; with `what`, an object. UserError with the file's name, and what is wrong where.

    what: the file, for messages, like "sidecar of this kit". schema: what values may be, of the keys that it has. wanted: keys
    that must be there.
    """
    try:
        value = load(path)
    except OSError as error:
        raise UserError(f"{display_path(path)}: cannot be read ({error.strerror or error}).") from None
    except ValueError as error:
        raise UserError(f"{display_path(path)}: is not readable as JSON: it {error}.") from None
    if what:
        check(path, value, what, schema or {}, wanted)
    return value


def check(path: str | os.PathLike, value: Any, what: str, schema: Schema, wanted: tuple[str, ...] = ()) -> None:
    """UserError unless a value of a file is an object of a schema."""
    if wrong := why_not(value, schema, what, wanted):
        raise UserError(f"{display_path(path)}: {wrong}")


def why_not(value: Any, schema: Schema, what: str, wanted: tuple[str, ...] = ()) -> str:
    """A sentence about why a value is no object of this schema; "" if it is one."""
    if not isinstance(value, dict):
        return f"holds no JSON object; it is not a {what}."
    if missing := [key for key in wanted if key not in value]:
        return f"does not say {', '.join(missing)}; it is not a {what}."
    wrong = [key for key, fits in schema.items() if key in value and not fits(value[key])]
    return f"{wrong[0]} cannot be {short(value[wrong[0]])}. Was the file edited?" if wrong else ""


def short(value: Any) -> str:
    """A value as JSON, cut off where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def must_be_flat(text: str) -> None:
    """ValueError for text with more brackets open at once than are followed. Brackets inside of texts do not count."""
    if text.count("[") + text.count("{") <= DEEPEST:
        return
    depth = 0
    for part in BRACKETS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(part[0], 0)
        if depth > DEEPEST:
            line = text.count("\n", 0, part.start()) + 1
            raise ValueError(f"{too_deep()} (line {line})")


def too_deep() -> str:
    return f"is nested deeper than {DEEPEST} levels"


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"has the key {short(key)} twice")
            seen.add(key)
    return found


def refuse_constant(word: str) -> None:
    raise ValueError(f"holds {word}, which is no number of JSON")


def finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"holds {text[:SHOWN]}, which is too large for a number")
    return number


def whole(text: str) -> int:
    if len(text) > 20 or not -(1 << 63) <= (number := int(text)) < 1 << 64:
        raise ValueError(f"holds a whole number of {len(text.lstrip('-')):,} digits, which is too large")
    return number


def is_storable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# what fields of a schema may be


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_path(value: Any) -> bool:
    """Whether a value is text that a path may be."""
    return isinstance(value, str) and "\0" not in value


def is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def is_whole(value: Any, least: int = 0, most: int = 1 << 63) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


def is_hash(value: Any) -> bool:
    """Whether a value is a SHA-256 as it is written."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def is_none_or(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)
