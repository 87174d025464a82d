"""A column called split, which says of every row which part of a data set it belongs to."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..words import count
from .reading import Block, Note, TableRow
from .recipe import items, parse
from .schemas import Row, RowError
from .splits import is_wanted, split_of

NAMES = ("split", "Split", "SPLIT")
IN_BYTES = tuple(f"{name}{quote}".encode() for name in NAMES for quote in "\"'")
LONGEST = 40  # characters of a value; a longer one is a text of its own
TRAIN, HELD, OTHER = "train", "held", "other"


def by_column(blocks: Iterable[Block], again: Callable[[], Iterable[Block]] | None, wanted: str) -> Iterator[Block]:
    """The blocks without the rows that are not for training, which are named at the end; those of the split `wanted` are held
    out. Where no row is for training, all but the wanted ones are.

    again: reads the file once more, from its beginning; None where that cannot be done.
    """
    seen: dict[str, Counter[str]] = {HELD: Counter(), OTHER: Counter()}
    name, read = "", 0
    others_are = ""  # what becomes of rows that are not for training; decided at the first one
    for block in blocks:
        name, read = block.file, max(read, block.read)
        if block.held_out or not has_column(block):
            yield block
            continue
        parts: dict[str, list[tuple[int, bytes | Row | RowError]]] = {TRAIN: [], HELD: [], OTHER: []}
        for number, item in items(block):
            value = value_of(item)
            use = use_of(value, wanted)
            if use != TRAIN:
                seen[use][value] += 1
            parts[use].append((number, item))
        if parts[OTHER] and not others_are:
            others_are = OTHER if parts[TRAIN] or again is None or any_for_training(again(), wanted) else TRAIN
        if others_are == TRAIN and not parts[HELD] or not (parts[HELD] or parts[OTHER]):
            yield block
            continue
        if others_are == TRAIN:
            parts[TRAIN] = sorted(parts[TRAIN] + parts[OTHER], key=lambda row: row[0])
        notes = block.notes
        for use in (TRAIN, HELD):
            if parts[use]:
                yield dataclasses.replace(
                    block, first=parts[use][0][0], data=parts[use], held_out=use == HELD, notes=notes
                )
                notes = ()
        if notes:
            yield dataclasses.replace(block, data=[], notes=notes)
    if found := seen[OTHER]:
        many = ", ".join(f"{value} ({count(rows, 'row')})" for value, rows in found.most_common())
        if others_are == TRAIN:
            words = f'read as training data, because no row is for training by its column "split": {many}'
        else:
            words = (
                f'{count(found.total(), "row")} not used, because of the column "split", which says: {many}. '
                f"VALID_SPLIT={next(iter(found))} makes held-out data of such rows"
            )
        yield Block(name, 1, [], read, notes=(Note("warning", name, words),))


def has_column(block: Block) -> bool:
    """Whether a row of a block may have such a column."""
    if isinstance(block.data, bytes):
        return may_have_column(block.data)
    for _, item in block.data:
        if type(item) is TableRow:  # (there are many, and looking into them further takes time)
            if "split" in item or "Split" in item or "SPLIT" in item:
                return True
        elif may_have_column(item):
            return True
    return False


def may_have_column(item: bytes | Row | RowError) -> bool:
    if isinstance(item, bytes):  # two searches for what the six have in common are enough for nearly all
        return (b"plit" in item or b"PLIT" in item) and any(form in item for form in IN_BYTES)
    return isinstance(item, dict) and column(item) is not None


def column(row: Row) -> Any:
    """The value of the column; of a conversation that was put together from messages, that of its first one."""
    for name in NAMES:
        if (value := row.get(name)) is not None:
            return value
    messages = row.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[0], dict):
        return next((messages[0][name] for name in NAMES if messages[0].get(name) is not None), None)
    return None


def value_of(item: bytes | Row | RowError) -> str:
    """The split that a row names, or ""."""
    if isinstance(item, RowError) or not may_have_column(item):
        return ""
    try:
        value = column(parse(item))
    except RowError:
        return ""
    return value.strip() if isinstance(value, str) and len(value) <= LONGEST else ""


def use_of(value: str, wanted: str) -> str:
    if value and is_wanted(value, wanted):
        return HELD
    return OTHER if split_of(value) in ("valid", "test") else TRAIN


def any_for_training(blocks: Iterable[Block], wanted: str) -> bool:
    return any(
        not block.held_out and not isinstance(item, RowError) and use_of(value_of(item), wanted) == TRAIN
        for block in blocks
        for _, item in items(block)
    )
