"""A JSONL file -> its rows with line numbers; and a row -> text with the spans of who said what.

A row that cannot be used raises RowError with the reason; the caller knows the file and the line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from rwkv_peft import templates
from rwkv_peft.errors import UserError
from rwkv_peft.roles import Span

LINE_LIMIT = 32 << 20  # bytes; a longer line is a file without line breaks, not a row


class RowError(Exception):
    """Why a row cannot be used."""


def lines(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """Number (from 1), content without its line break, and bytes read so far, for every line that is not blank."""
    read = 0
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(LINE_LIMIT + 1):
            number += 1
            read += len(line)
            if number == 1:
                if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise UserError(f"{path}: is UTF-16. Save it as UTF-8 (in an editor: Save as, encoding UTF-8).")
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) > LINE_LIMIT:
                raise UserError(
                    f"{path}:{number}: is longer than {LINE_LIMIT >> 20} MB. Every line must be one JSON object; "
                    "split this one into several rows."
                )
            if line.strip():
                yield number, line.rstrip(b"\r\n"), read


def parse(line: bytes) -> dict[str, Any]:
    """The JSON object of a line."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if not is_utf8(line):
            raise RowError("is not valid UTF-8; save the file as UTF-8") from None
        raise RowError(f"is not valid JSON: {error.msg}, column {error.colno}") from None
    if not isinstance(row, dict):
        raise RowError(f'must be a JSON object like {{"text": "..."}}, not {kind(row)}')
    return row


def is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


FORMS = """Every line must be one whole JSON object, with no comma behind it and no [ ] around the file, like one of these:
  {"text": "User: Hi\\n\\nAssistant: Hello!"}
  {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}"""


def from_text(row: dict[str, Any]) -> tuple[str, list[Span]]:
    """{"text": ...}: taken as it is; turns are found by their headings."""
    text = row["text"]
    if not isinstance(text, str):
        raise RowError(f'its "text" must be a string, not {kind(text)}')
    if not text.strip():
        raise RowError('its "text" is empty')
    return text, templates.spans_of_text(text.encode("utf-8"))


def from_messages(key: str) -> Callable[[dict[str, Any]], tuple[str, list[Span]]]:
    """{"messages": [...]} or {"conversations": [...]}: role and content, or from and value."""

    def handler(row: dict[str, Any]) -> tuple[str, list[Span]]:
        try:
            return templates.render(templates.messages_of(row[key]))
        except UserError as error:
            raise RowError(str(error)) from None

    return handler


# the key that a row is recognised by -> what reads it; the first that a row has
SCHEMAS: dict[str, Callable[[dict[str, Any]], tuple[str, list[Span]]]] = {
    "messages": from_messages("messages"),
    "conversations": from_messages("conversations"),
    "text": from_text,
}


def rendered(row: dict[str, Any]) -> tuple[str, str, list[Span]]:
    """The schema's name, the text, and its spans."""
    there = [key for key in SCHEMAS if key in row]
    if there:  # exports of both kinds have all the columns, and null in those that are not used
        key = next((key for key in there if row[key] is not None), there[0])
        return key, *SCHEMAS[key](row)
    has = ", ".join(map(repr, list(row)[:6])) or "nothing"
    raise RowError(f"has none of the keys {', '.join(SCHEMAS)}; it has {has}")
