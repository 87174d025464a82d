"""Rows of .jsonl and .json files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from ..project import shown
from . import reading
from .reading import Block, skip_line, too_long, unpacked
from .schemas import ROW_KEYS as ROW_NAMES
from .schemas import Row, RowError


def json_lines(path: Path) -> Iterator[Block]:
    """Lines of a .jsonl file in blocks of whole lines."""
    name = shown(path)
    with unpacked(path) as (file, read):
        number = 1
        while piece := file.read(reading.BLOCK):
            if not piece.endswith(b"\n"):
                piece += file.readline(reading.LINE_LIMIT + 1)
            if number == 1 and begins_a_list(piece):
                raise UserError(
                    f"{name}: is one JSON list over many lines; a .jsonl has an object on every line. Give it the ending .json"
                )
            end = piece.rfind(b"\n") + 1
            is_too_long = len(piece) - end > reading.LINE_LIMIT
            whole = piece[:end] if is_too_long else piece
            if whole:
                yield Block(name, number, whole, read())
                number += whole.count(b"\n")
            if is_too_long:
                yield Block(name, number, [(number, too_long("Every line must be one JSON object"))], read())
                skip_line(file)
                number += 1


def begins_a_list(text: bytes) -> bool:
    """Whether a file that begins so is a list whose first line does not end it."""
    line = text.lstrip().partition(b"\n")[0].strip()
    return line[:1] == b"[" and line[1:].lstrip()[:1] in (b"", b"{") and not line.endswith(b"]")


# a JSON text is cut at its brackets; strings are stepped over as a whole; a lone quote begins a string that was cut
JSON_PARTS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]]|"', re.S)
ROW_KEYS = {b'"%s"' % key.encode() for key in ROW_NAMES}


def json_array(path: Path) -> Iterator[Block]:
    """The objects of a .json file: of a list, of an object that holds one list, or simply one behind another.

    The file is cut where an object ends, without reading it as a whole, so that one bad object spoils only itself.
    """
    name = shown(path)
    with unpacked(path) as (file, read):
        head = file.peek(reading.HEAD).lstrip()
        level = 2 if is_wrapped(head) else int(head.startswith(b"["))  # brackets around the rows
        between = b" \t\r\n," + (b"[]" if level == 1 else b"")
        text, at, depth = b"", 0, 0
        gap, start = 0, None  # where the text between two objects began, and the object at hand
        line, counted = 1, 0  # line breaks before text[counted] are in line
        found: list[tuple[int, bytes | Row | RowError]] = []
        size = 0

        def line_at(place: int) -> int:
            nonlocal line, counted
            line += text.count(b"\n", counted, place)
            counted = place
            return line

        def look_between(end: int) -> None:
            odd = text[gap:end].strip(between)
            if odd and level < 2:
                found.append(
                    (
                        line_at(end),
                        RowError("wrong type", f"must be a JSON object, not {odd[:40].decode('utf-8', 'replace')}"),
                    )
                )

        while piece := file.read(reading.BLOCK):
            text += piece
            for part in JSON_PARTS.finditer(text, at):
                token, begin, at = part[0], part.start(), part.end()
                if token == b'"':
                    at = begin
                    break
                if token in b"{[":
                    depth += 1
                    if depth == level + 1 and token == b"{" and start is None:
                        look_between(begin)
                        start = begin
                elif token in b"}]":
                    depth -= 1
                    if depth <= level and start is not None:
                        found.append((line_at(start), text[start:at]))
                        size += at - start
                        start, gap = None, at
                        if size >= reading.BLOCK:
                            yield Block(name, found[0][0], found, read())
                            found, size = [], 0
            keep = gap if start is None else start
            line_at(keep)
            text, at, counted, gap = text[keep:], at - keep, 0, 0
            start = None if start is None else 0
            if len(text) > reading.LINE_LIMIT:
                raise UserError(
                    f"{name}:{line}: what begins here is longer than {reading.LINE_LIMIT >> 20} MB, or its brackets do not "
                    "close. Rows must be objects in a list."
                )
        if start is not None:
            raise UserError(
                f"{name}:{line}: the object that begins here never ends: a quote or a bracket is missing in it, or the file was "
                "cut off. What comes behind it cannot be told apart; mend it, or write one object per line (.jsonl)."
            )
        look_between(len(text))
        if depth > 0:
            found.append((line_at(len(text)), RowError("not JSON", "is not valid JSON: the file ends inside its list")))
        if found:
            yield Block(name, found[0][0], found, read())


def is_wrapped(head: bytes) -> bool:
    """Whether a file that begins so is one object around a list of rows: {"data": [{...}, ...]}."""
    depth, lists, last = 0, 0, b""
    for part in JSON_PARTS.finditer(head):
        token = part[0]
        if token[:1] == b'"':
            if depth == 1 and token in ROW_KEYS:
                return False
        elif token in b"{[":
            lists += depth == 2 and token == b"{" and last == b"["
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                return lists > 0 and not head[part.end() :].strip()
        last = token
    return lists > 0 and head.startswith(b"{")
