"""A column called split (or subset, where it holds such names): which part of a data set a row belongs to."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from rwkv_peft.common.formatting import plural

from .json_keys import key_ends
from .pipeline import items, parse
from .reader import Block, Note
from .schemas import Row, RowError
from .splits import HELD_OUT, OF_NAME, is_wanted, split_of
from .values import TableRow

NAMES = ("split", "Split", "SPLIT")
# these count where they hold the name of a split, no more
EXACT = tuple(
    form
    for name in ("subset", "partition", "data_split", "dataset_split")
    for form in (name, name.capitalize(), name.upper(), name.title())
)
LAST = frozenset(name[-2:].encode() for name in (*NAMES, *EXACT))  # letters
LONGEST = 40  # characters of a value; a longer one is a text of its own
TRAIN, OTHER = "train", "other"


def by_column(blocks: Iterable[Block], again: Callable[[], Iterable[Block]] | None, wanted: str) -> Iterator[Block]:
    """Yield the blocks without the rows that are not for training, which are named at the end.

    Rows of the split `wanted` are held out. Where no row is for training, all but the wanted ones are.

    Args:
        blocks: Of the file.
        again: Reads the file once more, from its beginning; None where that cannot be done.
        wanted: VALID_SPLIT.
    """
    seen: dict[str, Counter[str]] = {HELD_OUT: Counter(), OTHER: Counter()}
    name, read = "", 0
    others_are = ""  # what becomes of rows that are not for training; decided at the first one
    for block in blocks:
        name, read = block.file, max(read, block.read)
        if block.held_out or not has_column(block):
            yield block
            continue
        parts: dict[str, list[tuple[int, bytes | Row | RowError]]] = {TRAIN: [], HELD_OUT: [], OTHER: []}
        for number, item in items(block):
            value = value_of(item)
            use = use_of(value, wanted)
            if use != TRAIN:
                seen[use][value] += 1
            parts[use].append((number, item))
        if parts[OTHER] and not others_are:
            others_are = OTHER if parts[TRAIN] or again is None or any_for_training(again(), wanted) else TRAIN
        if others_are == TRAIN and not parts[HELD_OUT] or not (parts[HELD_OUT] or parts[OTHER]):
            yield block
            continue
        if others_are == TRAIN:
            parts[TRAIN] = sorted(parts[TRAIN] + parts[OTHER], key=lambda row: row[0])
        notes = block.notes
        for use in (TRAIN, HELD_OUT):
            if parts[use]:
                yield dataclasses.replace(
                    block, first=parts[use][0][0], data=parts[use], held_out=use == HELD_OUT, notes=notes
                )
                notes = ()
        if notes:
            yield dataclasses.replace(block, data=[], notes=notes)
    if others := seen[OTHER]:
        many = ", ".join(f"{value} ({plural(rows, 'row')})" for value, rows in others.most_common())
        if others_are == TRAIN:
            words = f"read as training data, because no row is for training by the split that a column names: {many}"
        else:
            words = (
                f"{plural(others.total(), 'row')} not used, because a column names their split: {many}. "
                f"VALID_SPLIT={next(iter(others))} makes held-out data of such rows"
            )
        yield Block(name, 1, [], read, notes=(Note("warning", name, words),))


def has_column(block: Block) -> bool:
    """Whether a row of a block may have such a column."""
    if isinstance(block.data, bytes):
        return may_have_key(block.data)
    rows = [item for _, item in block.data if isinstance(item, dict)]
    if rows and type(rows[0]) is TableRow:  # (there are many, and looking into them further takes time)
        return any(name in row for row in rows for name in (*NAMES, *EXACT))
    return any(column(row) is not None for row in rows) or may_have_key(
        b"\n".join(item for _, item in block.data if isinstance(item, bytes))
    )


def may_have_key(data: bytes) -> bool:
    """Whether a key may be one of the names, by its last two letters."""
    ends, sure = key_ends(data, wide=True)
    ends = ends[ends > 1]
    text = np.frombuffer(data, np.uint8)
    pairs = np.unique(text[ends - 2].astype(np.uint16) << 8 | text[ends - 1])
    return not sure.all() or any(int(pair).to_bytes(2, "big") in LAST for pair in pairs)


def column(row: Row) -> Any:
    """The value of the column; of a conversation that was put together from messages, that of its first one."""
    messages = row.get("messages")
    first = messages[0] if isinstance(messages, list) and messages and isinstance(messages[0], dict) else {}
    for one in (row, first):
        for name in NAMES:
            if (value := one.get(name)) is not None:
                return value
        for name in EXACT:
            if isinstance(value := one.get(name), str) and value.strip().lower() in OF_NAME:
                return value
    return None


def value_of(item: bytes | Row | RowError) -> str:
    """The split that a row names, or ""."""
    if isinstance(item, RowError):
        return ""
    try:
        value = column(parse(item))
    except RowError:
        return ""
    return value.strip() if isinstance(value, str) and len(value) <= LONGEST else ""


def use_of(value: str, wanted: str) -> str:
    """Return what becomes of the rows of a split."""
    if value and is_wanted(value, wanted):
        return HELD_OUT
    return OTHER if split_of(value) in ("valid", "test") else TRAIN


def any_for_training(blocks: Iterable[Block], wanted: str) -> bool:
    """Return whether a row of a file is for training."""
    return any(
        not block.held_out and not isinstance(item, RowError) and use_of(value_of(item), wanted) == TRAIN
        for block in blocks
        for _, item in items(block)
    )
