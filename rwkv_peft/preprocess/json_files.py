"""Rows of JSON files: one on every line, or one text over all of the file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rwkv_peft.common.errors import UserError
from rwkv_peft.common.formatting import join_names, plural
from rwkv_peft.common.paths import display_path

from . import reader
from .file_kinds import PREFERENCE, ROW_KEYS, is_message, is_row_of_messages, value_of
from .keys import MESSAGES
from .reader import Block, Note, skip_line, too_long, unpacked
from .schemas import Row, RowError
from .splits import HELD_OUT, is_wanted, split_of


def json_lines(path: Path) -> Iterator[Block]:
    """Lines of a .jsonl file in blocks of whole lines."""
    name = display_path(path)
    with unpacked(path) as (file, read):
        number = 1
        while piece := file.read(reader.BLOCK):
            if not piece.endswith(b"\n"):
                piece += file.readline(reader.LINE_LIMIT + 1)
            if number == 1 and begins_a_list(piece):
                raise UserError(
                    f"{name}: is one JSON list over many lines; a .jsonl has an object on every line. Give it the ending .json"
                )
            end = piece.rfind(b"\n") + 1
            is_too_long = len(piece) - end > reader.LINE_LIMIT
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


# a JSON text is cut at its brackets; texts and comments are stepped over as a whole; a lone mark begins one that was cut
JSON_PARTS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]]|"|//[^\n]*\n?|/\*.*?\*/|/\*?|#[^\n]*\n?', re.S)
PYTHON_PARTS = re.compile(JSON_PARTS.pattern + rb"|'[^'\\]*(?:\\.[^'\\]*)*'|'", re.S)
LONE = (b'"', b"'", b"/*")  # what follows is cut off, or ambiguous
PYTHON = re.compile(rb"[\s\[{]*\{\s*'")  # how a file begins that Python has printed
MARK = b"\xef\xbb\xbf"  # of byte order; files that were joined have one in the middle
TOGETHER = 512  # rows of one object that holds many


@dataclass(frozen=True)
class Shape:
    """Where the rows of a file are.

    Attributes:
        level: Brackets around a row.
        holder: The bracket right around rows.
        opener: The brackets that begin a row.
        named: The rows are in lists that have names.
    """

    level: int
    holder: bytes = b"["
    opener: bytes = b"{["
    named: bool = False


def json_array(path: Path, valid_split: str = "") -> Iterator[Block]:
    """The rows of a .json file: of a list, of an object that holds lists, or simply one behind another.

    The file is cut where an object ends, without reading it as a whole, so that one bad object spoils only itself.
    valid_split: the name of the list whose rows are held out; without it such a list is passed over and named.
    """
    name = display_path(path)
    with unpacked(path) as (file, read):
        head = file.peek(reader.HEAD)
        shape = shape_of(head, name)
        python = bool(PYTHON.match(without_comments(head)))
        lists = Lists(path, shape, python, valid_split)
        batch: list[tuple[int, bytes | Row | RowError]] = []
        size, held_out, alone, comments = 0, False, None, 0
        for key, line, item in cut(file, shape, name, python):
            if item is None:
                comments += 1
                continue
            use = lists.use(key) if shape.named else "train"
            if use == "":
                continue
            if batch and (size >= reader.BLOCK or held_out != (use == HELD_OUT)):
                yield Block(name, batch[0][0], batch, read(), held_out)
                batch, size = [], 0
            held_out = use == HELD_OUT
            alone = item if alone is None and shape.level == 0 and isinstance(item, bytes) else b""
            batch.append((line, item))
            size += len(item) if isinstance(item, bytes) else 0
        notes = [Note("note", name, f"{plural(comments, 'comment')} between rows skipped")] if comments else []
        if alone and len(batch) == 1:
            whole = rows_of_object(alone, name)
            if whole is not None:
                yield from blocks_of_object(path, whole, valid_split, read())
                yield Block(name, 1, [], read(), notes=tuple(notes))
                return
        lists.must_be_there()
        notes += lists.notes()
        if batch or notes:
            yield Block(name, batch[0][0] if batch else 1, batch, read(), held_out, tuple(notes))


def cut(file: IO[bytes], shape: Shape, name: str, python: bool) -> Iterator[tuple[str, int, bytes | RowError | None]]:
    """(name of the list, line, row) of everything in a file; None instead of a row for a comment between rows."""
    parts = PYTHON_PARTS if python else JSON_PARTS
    level, holder = shape.level, shape.holder
    between = b" \t\r\n," + MARK + (b"[]" if level == 1 and holder == b"[" else b"")
    text, at, key = b"", 0, ""
    stack: list[bytes] = []
    gap: int = 0
    start: int | None = None  # where the text between two objects began, and the object at hand
    line, counted = 1, 0  # line breaks before text[counted] are in line

    def line_at(place: int) -> int:
        nonlocal line, counted
        line += text.count(b"\n", counted, place)
        counted = place
        return line

    def odd(end: int) -> tuple[str, int, RowError] | None:
        """Return the error about what is between two rows and should not be there."""
        words = text[gap:end].strip(between)
        if not words or level == 2 or shape.named or holder == b"{":
            return None
        start_of_words = words[:40].decode("utf-8", "replace")
        return key, line_at(end), RowError("wrong type", f"must be a JSON object, not {start_of_words}")

    last = False
    while not last:
        # (as much again as is open: a text without an end is looked through a few times, not for each block)
        piece = file.read(max(reader.BLOCK, len(text)))
        last = not piece
        text += piece
        for part in parts.finditer(text, at):
            token, begin, at = part[0], part.start(), part.end()
            first = token[:1]
            if first in b"/#" or token in (b'"', b"'"):
                cut_off = token in (b'"', b"'", b"/", b"/*") or (first in b"/#" and not token.endswith((b"\n", b"*/")))
                if cut_off and not last:
                    at = begin
                    break
                if first in b"/#" and token != b"/" and start is None:
                    if wrong := odd(begin):
                        yield wrong
                    yield key, line_at(begin), None
                    gap = at if not token.endswith(b"\n") else at - 1
                    if token == b"/*":  # it never ends
                        at = gap = len(text)
                        break
                elif token in (b'"', b"'"):
                    at = begin
                    break
            elif first in b"\"'":
                if len(stack) == 1 and start is None:
                    key = token[1:-1].decode("utf-8", "replace")
            elif token in b"{[":
                if (
                    start is None
                    and len(stack) == level
                    and token in shape.opener
                    and (not level or stack[-1] == holder)
                ):
                    if wrong := odd(begin):
                        yield wrong
                    start = begin
                stack.append(token)
            else:
                if stack:
                    stack.pop()
                if len(stack) <= level and start is not None:
                    yield key, line_at(start), text[start:at]
                    start, gap = None, at
        keep = gap if start is None else start
        line_at(keep)
        text, at, counted, gap = text[keep:], at - keep, 0, 0
        start = None if start is None else 0
        if len(text) > reader.LINE_LIMIT:
            raise UserError(
                f"{name}:{line}: what begins here is longer than {reader.LINE_LIMIT >> 20} MB, or its brackets do not "
                "close. Rows must be objects in a list."
            )
    if start is not None:
        raise UserError(
            f"{name}:{line}: the object that begins here never ends: a quote or a bracket is missing in it, or the file was "
            "cut off. What comes behind it cannot be told apart; mend it, or write one object per line (.jsonl)."
        )
    if wrong := odd(len(text)):
        yield wrong
    if stack:
        yield key, line_at(len(text)), RowError("not JSON", "is not valid JSON: the file ends inside its list")


class Lists:
    """The named lists of an object, {"train": [...], "test": [...]}: which are read, and what is to be said of them."""

    def __init__(self, path: Path, shape: Shape, python: bool, wanted: str):
        self.path, self.shape, self.python, self.wanted = path, shape, python, wanted
        self.uses: dict[str, str] = {}  # name -> "train", HELD_OUT, or "" for one that is passed over
        self.rows: Counter[str] = Counter()
        self.names: list[str] | None = None

    def use(self, key: str) -> str:
        """Return what becomes of a list's rows, and count one."""
        if key not in self.uses:
            self.uses[key] = self.decide(key)
        self.rows[key] += 1
        return self.uses[key]

    def decide(self, key: str) -> str:
        """Return what becomes of a list's rows."""
        if is_wanted(key, self.wanted):
            return HELD_OUT
        if split_of(key) not in ("valid", "test"):
            return "train"
        # a list for testing is passed over where there is another one
        return "" if any(split_of(other) not in ("valid", "test") for other in self.all_names()) else "train"

    def all_names(self) -> list[str]:
        """The names of all lists that hold rows; the file is gone through for that once, where it can be."""
        if self.names is None:
            self.names = ["train"]  # (of a pipe nothing is known)
            if self.path.is_file():
                with unpacked(self.path) as (file, _):
                    pieces = cut(file, self.shape, display_path(self.path), self.python)
                    self.names = list(dict.fromkeys(key for key, _, item in pieces if isinstance(item, bytes)))
        return self.names

    def must_be_there(self) -> None:
        """UserError if VALID_SPLIT names no list of this file, which has lists for training and testing."""
        if self.wanted and self.uses and HELD_OUT not in self.uses.values():
            raise UserError(no_such_split(display_path(self.path), self.wanted, list(self.uses)))

    def notes(self) -> list[Note]:
        """Return notes about lists that are not used, or used together."""
        name = display_path(self.path)
        said = [
            Note("warning", name, f'its list "{key}" ({plural(self.rows[key], "row")}) is not used: by its name it is not for '
                 f"training. VALID_SPLIT={key} makes held-out data of it")
            for key, use in self.uses.items() if use == ""
        ]  # fmt: skip
        used = [key for key, use in self.uses.items() if use == "train"]
        if len(used) > 1:
            many = ", ".join(f'"{key}" ({plural(self.rows[key], "row")})' for key in used)
            said.append(Note("warning", name, f"holds several lists, and all are read as training data: {many}"))
        elif used and split_of(used[0]) in ("valid", "test"):
            said.append(Note("warning", name, f'its only list is called "{used[0]}"; it is read as training data'))
        return said


def no_such_split(name: str, wanted: str, there: list[str]) -> str:
    """Return the message about a VALID_SPLIT that the file does not have."""
    return f"{name}: VALID_SPLIT={wanted} names no part of it; there is {join_names(there)}."


def without_comments(head: bytes) -> bytes:
    """The beginning of a file without comments and byte order mark before its first bracket."""
    while True:
        head = head.lstrip(b" \t\r\n" + MARK)
        comment = re.match(rb"//[^\n]*|#[^\n]*|/\*.*?\*/", head, re.S)
        if not comment:
            return head
        head = head[comment.end() :]


def shape_of(head: bytes, name: str) -> Shape:
    """Where the rows of a file that begins so are."""
    head = without_comments(head)
    if head[:1] == b"[":
        first = first_object(head, 1)
        return Shape(0) if is_message(first) else Shape(1)
    if head[:1] != b"{":
        return Shape(0)
    whole = first_object(head, 0)
    if isinstance(whole, dict):
        if ROW_KEYS & whole.keys() or is_row_of_messages(whole):
            return Shape(0)
        lists = {k: v for k, v in whole.items() if isinstance(v, list) and v and isinstance(v[0], dict | list)}
        if not lists or "columns" in whole or head_goes_on(head):
            return Shape(0)
        by_conversation = all(is_message(v[0]) and not split_of(k) for k, v in lists.items()) and len(lists) == len(
            whole
        )
        return Shape(1, b"{", b"[") if by_conversation else Shape(2, named=True)
    return wrapped_shape(head)


def first_object(head: bytes, level: int) -> Any:
    """The first object at this depth, if all of it is in the head."""
    stack, start = 0, None
    parts = PYTHON_PARTS if PYTHON.match(head) else JSON_PARTS
    for part in parts.finditer(head):
        token = part[0]
        if token in LONE:
            return None
        if token in (b"{", b"["):
            if stack == level and start is None:
                if token == b"[":
                    return None
                start = part.start()
            stack += 1
        elif token in (b"}", b"]"):
            stack -= 1
            if stack == level and start is not None:
                return value_of(head[start : part.end()].decode("utf-8", "replace"))
    return None


def head_goes_on(head: bytes) -> bool:
    """Return whether something follows the first object."""
    depth = 0
    for part in JSON_PARTS.finditer(head):
        if part[0] in LONE:
            return False
        depth += (part[0] in (b"{", b"[")) - (part[0] in (b"}", b"]"))
        if depth == 0:
            return bool(without_comments(head[part.end() :]))
    return False


def wrapped_shape(head: bytes) -> Shape:
    """The shape of an object that is longer than what was read of it: {"data": [{...}, ..."""
    depth, last, key = 0, b"", ""
    holders: list[bytes] = []
    parts = PYTHON_PARTS if PYTHON.match(head) else JSON_PARTS
    for part in parts.finditer(head):
        token = part[0]
        if token in LONE:
            break
        if token[:1] in (b'"', b"'"):
            if depth == 1:
                key = token[1:-1].decode("utf-8", "replace")
                if key in ROW_KEYS or PREFERENCE.search(key):
                    return Shape(0)
        elif token in (b"{", b"["):
            if depth == 1 and key == "columns":
                return Shape(0)
            if depth == 2 and last == b"[" and holders[-1] == b"[":
                first = first_object(head[part.start() :], 0) if token == b"{" else None
                return Shape(1, b"{", b"[") if is_message(first) and not split_of(key) else Shape(2, named=True)
            depth += 1
            holders.append(token)
        elif token in (b"}", b"]"):
            depth -= 1
            if holders:
                holders.pop()
        last = token
    return Shape(0)


def rows_of_object(data: bytes, name: str) -> list[tuple[str, Row]] | None:
    """Return the rows of an object that has all of them, with the name of their split; None if it is a row itself.

    It may have a list or an object per column, an object per row, names and cells apart, or one of these inside another
    object.

    Raises:
        UserError: columns have different lengths.
    """
    value = value_of(data.decode("utf-8", "replace"))
    return rows_of_value(value, name, "") if isinstance(value, dict) else None


def rows_of_value(value: dict, name: str, split: str) -> list[tuple[str, Row]] | None:
    """Return the rows of one split, as `rows_of_object`."""
    columns, cells = value.get("columns"), value.get("data")
    if isinstance(columns, list) and isinstance(cells, list) and all(isinstance(row, list) for row in cells):
        names = [str(column) for column in columns]
        if any(len(row) != len(names) for row in cells):
            raise UserError(f"{name}: has {len(names)} columns, but a row of its data has another number of cells.")
        return [(split, dict(zip(names, row, strict=True))) for row in cells]
    lists = {k: v for k, v in value.items() if isinstance(v, list)}
    needed = [k for k in value if k in ROW_KEYS and k != "history"]
    # columns that have other names than rows usually have (MAP_KEYS may know them) are all of the object
    strange = len(lists) == len(value) > 1 and not any(split_of(k) or not is_column(k, v) for k, v in lists.items())
    several = len(lists) > 1 or any(len(cells) > 1 for cells in lists.values())  # {"text": ["a"]} is a row with a fault
    if several and all(k in lists and is_column(k, lists[k]) for k in needed) and (needed or strange):
        return from_columns(value, lists, name, split)
    if not value or not all(isinstance(v, dict) for v in value.values()):
        inner = [(k, v) for k, v in value.items() if isinstance(v, dict)]
        if len(inner) == 1 and not needed and not lists:
            return rows_of_value(inner[0][1], name, split) or lists_of_rows(inner[0][1])
        return None
    if needed and len({tuple(v) for v in value.values()}) == 1:  # an object per column, {"0": ..., "1": ...}
        keys = list(next(iter(value.values())))
        return [(split, {column: cells[key] for column, cells in value.items()}) for key in keys]
    if all(ROW_KEYS & v.keys() for v in value.values()) and not any(
        isinstance(one, list) and not isinstance(one[0] if one else {}, dict | list)
        for v in value.values() for one in v.values()
    ):  # fmt: skip
        return [(split, row) for row in value.values()]
    rows_with_split: list[tuple[str, Row]] = []
    for key, inside in value.items():  # a split with columns of its own
        rows = rows_of_value(inside, name, key if len(value) > 1 else split)
        if rows is None and len(value) == 1:
            rows = lists_of_rows(inside)
        if rows is None:
            return None
        rows_with_split += rows
    return rows_with_split


def is_column(key: str, cells: list) -> bool:
    """Whether a list is a column of rows, and no conversation."""
    if key in MESSAGES:
        return all(isinstance(cell, list) for cell in cells)
    return not any(isinstance(cell, dict) for cell in cells)


def from_columns(value: dict, lists: dict[str, list], name: str, split: str) -> list[tuple[str, Row]]:
    """Return rows of an object with a list per column."""
    sizes = {key: len(cells) for key, cells in lists.items()}
    if len(set(sizes.values())) > 1:
        lengths = ", ".join(f'"{key}" has {size:,}' for key, size in sizes.items())
        raise UserError(
            f"{name}: is one object with a list per column, but the lists are not equally long: {lengths}. Every row needs a "
            "cell in each."
        )
    rows = zip(*lists.values(), strict=True)
    return [(split, dict(zip(lists, row, strict=True))) for row in rows]


def lists_of_rows(value: dict) -> list[tuple[str, Row]] | None:
    """The rows of an object of lists: {"train": [{...}], "test": [{...}]}."""
    lists = {k: v for k, v in value.items() if isinstance(v, list) and v and all(isinstance(one, dict) for one in v)}
    return [(key, row) for key, rows in lists.items() for row in rows] or None


def blocks_of_object(path: Path, rows: list[tuple[str, Row]], wanted: str, read: int) -> Iterator[Block]:
    """The rows of one object in blocks, numbered from 1; those of other splits are passed over and named."""
    name = display_path(path)
    lists = Lists(path, Shape(0), False, wanted)
    lists.names = list(dict.fromkeys(split for split, _ in rows if split))
    some: dict[bool, list] = {False: [], True: []}
    for number, (split, row) in enumerate(rows, 1):
        use = lists.use(split) if split else "train"
        if use:
            some[use == HELD_OUT].append((number, row))
    lists.must_be_there()
    for held_out, some_rows in some.items():
        for begin in range(0, len(some_rows), TOGETHER):
            part = some_rows[begin : begin + TOGETHER]
            yield Block(name, part[0][0], part, read, held_out)
    words = f"is one object that holds {plural(len(rows), 'row')}; in messages their numbers stand in place of lines"
    yield Block(name, 1, [], read, notes=(Note("note", name, words), *lists.notes()))
