"""Read JSON that somebody else may have written: a shared run folder, a file of settings, a report.

The kit reads every JSON file with it, except rows (preprocess/). It refuses what would be lost, be misread, or crash the
program later: duplicate keys, NaN and infinity, numbers beyond 64 bits, lone surrogates, and values nested so deep
that a recursive function runs out of stack.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from .atomic_io import open_regular
from .errors import UserError
from .paths import display_path, is_utf8

_MAX_BYTES = 16 << 20  # of a file: the kit's largest, the report of tokenized data, has some hundred kB
_MAX_DEPTH = 64  # of brackets: the kit's own files have 6, parameters of tools some 20
_SHOWN = 60  # characters of a value that a message shows
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.S)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Schema = Mapping[str, Callable[[Any], bool]]  # key -> whether a value is one that it may have


def parse_json(text: bytes | str, most: int = _MAX_BYTES) -> Any:
    """Return the value of a JSON text.

    Args:
        text: the text.
        most: its maximal length in bytes.

    Raises:
        ValueError: it is not one plain value. The message is for users, with the line where there is one.
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
    _check_depth(text)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_to_dict,
            parse_constant=_refuse_constant,
            parse_float=_parse_float,
            parse_int=_parse_int,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON in line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    may_be_unpaired = _SURROGATE.search(text) or not is_utf8(text)
    if may_be_unpaired and not is_utf8(json.dumps(value, ensure_ascii=False)):
        raise ValueError("holds half of a surrogate pair, which no file can store")
    return value


def load_json(path: str | os.PathLike[str], most: int = _MAX_BYTES) -> Any:
    """Return the value of a JSON file, of at most `most` bytes.

    Raises:
        ValueError: as `parse`; the message does not name the file.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        return parse_json(file.read(most + 1), most)


def read_json(
    path: str | os.PathLike[str], what: str = "", schema: Schema | None = None, wanted: tuple[str, ...] = ()
) -> Any:
    """Return the value of a JSON file, and check it.

    Args:
        path: the file.
        what: what the file should be, for messages: "sidecar of this kit". It must then hold an object.
        schema: which values its keys may have.
        wanted: keys that it must have.

    Raises:
        UserError: it cannot be read, or something in it is wrong.
    """
    try:
        value = load_json(path)
    except OSError as error:
        raise UserError(f"{display_path(path)}: cannot be read ({error.strerror or error}).") from None
    except ValueError as error:
        raise UserError(f"{display_path(path)}: is not readable as JSON: it {error}.") from None
    if what:
        check_schema(path, value, what, schema or {}, wanted)
    return value


def check_schema(
    path: str | os.PathLike[str], value: Any, what: str, schema: Schema, wanted: tuple[str, ...] = ()
) -> None:
    """Check that the value of a file is an object of a schema; the arguments are those of `read`.

    Raises:
        UserError: it is not.
    """
    if wrong := describe_mismatch(value, schema, what, wanted):
        raise UserError(f"{display_path(path)}: {wrong}")


def describe_mismatch(value: Any, schema: Schema, what: str, wanted: tuple[str, ...] = ()) -> str:
    """Return a sentence about why a value is no object of this schema; "" if it is one."""
    if not isinstance(value, dict):
        return f"holds no JSON object; it is not a {what}."
    if missing := [key for key in wanted if key not in value]:
        return f"does not say {', '.join(missing)}; it is not a {what}."
    wrong = [key for key, fits in schema.items() if key in value and not fits(value[key])]
    return f"{wrong[0]} cannot be {_shorten(value[wrong[0]])}. Was the file edited?" if wrong else ""


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


_TOO_DEEP = f"is nested deeper than {_MAX_DEPTH} levels"


def _check_depth(text: str) -> None:
    """Raise ValueError for too many open brackets. Those inside of strings do not count."""
    if text.count("[") + text.count("{") <= _MAX_DEPTH:
        return
    depth = 0
    for part in _BRACKETS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(part[0], 0)
        if depth > _MAX_DEPTH:
            line = text.count("\n", 0, part.start()) + 1
            raise ValueError(f"{_TOO_DEEP} (line {line})")


def _to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"has the key {_shorten(key)} twice")
        content[key] = value
    return content


def _refuse_constant(word: str) -> None:
    raise ValueError(f"holds {word}, which is no number of JSON")


def _parse_float(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"holds {text[:_SHOWN]}, which is too large for a number")
    return number


def _parse_int(text: str) -> int:
    if len(text) > 20 or not -(1 << 63) <= (number := int(text)) < 1 << 64:
        raise ValueError(f"holds a whole number of {len(text.lstrip('-')):,} digits, which is too large")
    return number


# values of a Schema


def is_text(value: Any) -> bool:
    """Return whether a value is text."""
    return isinstance(value, str)


def is_path(value: Any) -> bool:
    """Return whether a value is text that can be a path."""
    return isinstance(value, str) and "\0" not in value


def is_bool(value: Any) -> bool:
    """Return whether a value is true or false."""
    return isinstance(value, bool)


def is_object(value: Any) -> bool:
    """Return whether a value is an object."""
    return isinstance(value, dict)


def is_whole(value: Any, least: int = 0, most: int = 1 << 63) -> bool:
    """Return whether a value is an integer from `least` to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: Any) -> bool:
    """Return whether a value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    """Return whether a value is a list of values that all fit."""
    return isinstance(value, list) and all(map(fits, value))


def is_hash(value: Any) -> bool:
    """Return whether a value is a SHA-256 in hexadecimal digits."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def is_none_or(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return a check that accepts null too."""
    return lambda value: value is None or fits(value)
