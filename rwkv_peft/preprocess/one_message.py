"""Files that have one message in every row -> rows that are whole conversations.

Rows of one conversation have the same conversation_id (or the like), or they are the nodes of trees by message_id and
parent_id (OASST). Such a file is read as a whole before its first conversation is complete. An answer that several paths of a
tree share is learnt in the first of them only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rwkv_peft.common.errors import UserError
from rwkv_peft.text.roles import Role

from . import reader
from .keys import ROLE_NAMES, Columns, Parts, parts_of, squashed
from .mapped_columns import usual
from .message_order import rank_of
from .pipeline import items, parse, with_keys
from .reader import Block, Note
from .values import RowError, is_nothing, short

CONVERSATION = {squashed(name): i for i, name in enumerate((
    "conversation_id", "conv_id", "conversation", "dialogue_id", "dialog_id", "chat_id", "session_id", "thread_id", "group_id",
    "对话id", "会话id", "id", "编号"))}  # fmt: skip
ROLES = tuple(map(squashed, ("role", "speaker", "角色", "说话人")))
UNSURE = ("id", "编号")  # these name a conversation only where rows share a value
TURN = tuple(
    map(
        squashed,
        ("turn", "turn_id", "turn_index", "turn_number", "position", "order", "seq", "message_index", "step", "轮次"),
    )
)
LONGEST_PATH = 10_000  # messages from a root to a leaf
NO_PARENT = ("0", "-1", "none", "null", "nan", "root")
NO_COLUMNS = Columns()
SAMPLED = 32  # rows at the beginning of a file that show its kind


def conversations(blocks: Iterable[Block], columns: Columns = NO_COLUMNS) -> Iterator[Block]:
    """Yield the blocks of a file, with messages put together where it has one in every row.

    Raises:
        UserError: they do not have the conversation_id of MAP_KEYS.
    """
    blocks = iter(blocks)
    for first in blocks:
        if first.data:
            break
        yield first  # something to be said of the file
    else:
        return
    key = grouping(first, columns)
    every = itertools.chain([first], blocks)
    if not key:
        if columns.given.get("conversation_id"):
            words = "MAP_KEYS names a conversation_id, which is not used: its rows are no single messages"
            yield Block(first.file, 1, [], 0, notes=(Note("warning", first.file, words),))
        yield from every
        return
    for held_out, part in itertools.groupby(every, key=lambda block: block.held_out):
        yield from together(list(part), key, held_out, columns)


def together(blocks: Sequence[Block], key: tuple[str, ...], held_out: bool, columns: Columns) -> Iterator[Block]:
    """The conversations of some blocks of messages."""
    messages: list[tuple[int, dict[str, Any]]] = []
    rows: list[tuple[int, Any]] = []
    for block in blocks:
        for number, item, keys in with_keys(block):
            try:
                message = dict(parse(item, keys=keys))
                usual(message, columns)  # RowError where what it maps disagrees
                messages.append((number, message))
            except RowError as error:
                rows.append((number, error))
    if messages:
        rows += trees(messages, *key, columns) if len(key) == 2 else groups(messages, key[0])
    rows.sort(key=lambda row: row[0])
    notes = tuple(note for block in blocks for note in block.notes)
    last = blocks[-1]
    yield Block(last.file, 1, [], 0, held_out, notes)
    for begin in range(0, len(rows), reader.ROWS):
        some = rows[begin : begin + reader.ROWS]
        yield Block(last.file, some[0][0], some, last.read, held_out)


def grouping(block: Block, columns: Columns) -> tuple[str, ...]:
    """Return the columns that show which messages belong together.

    (message_id, parent_id), (conversation_id,), or () if the rows are no single messages.
    """
    mapped = columns.given.get("conversation_id")
    seen: dict[str, list[Any]] = {}
    for _, item in itertools.islice(items(block), SAMPLED):
        try:
            row = usual(parse(item), columns)
        except RowError:
            continue
        parts = parts_of(tuple(row))
        if not is_single_message(row, parts):
            return ()
        if mapped and mapped in row:
            return (mapped,)
        names = {squashed(key): key for key in row}
        if "messageid" in names and "parentid" in names:
            return names["messageid"], names["parentid"]
        for name in sorted(names, key=lambda name: CONVERSATION.get(name, 99)):
            if name in CONVERSATION:
                seen.setdefault(names[name], []).append(row[names[name]])
    if mapped:
        raise UserError(
            f"{block.file}: MAP_KEYS names the column {mapped!r} as conversation_id, but its first rows lack it."
        )
    for key, values in seen.items():
        if squashed(key) not in UNSURE or len(set(map(str, values))) < len(values):
            return (key,)
    return ()


def is_single_message(row: Any, parts: Parts) -> bool:
    """Whether a row is a message: it has a role and a text, and no conversation."""
    said = any(row[key] is None or isinstance(row[key], str | list) for key in parts.said)
    lists = any(isinstance(row[key], list) for key in parts.messages)
    # (an author or a sender may be anybody; a role or a speaker is one of a conversation, known or not)
    sure = any(isinstance(row[key], str) and row[key].strip() and squashed(key) in ROLES for key in parts.speaker)
    role = next((row[key] for key in parts.speaker if isinstance(row[key], str)), "")
    return said and not lists and (sure or role.strip().lower() in ROLE_NAMES)


def whole(messages: list[tuple[int, dict[str, Any]]]) -> tuple[int, dict[str, Any]]:
    """Return one row of these messages, with what belongs to the whole conversation beside them."""
    row: dict[str, Any] = {"messages": [message for _, message in messages]}
    for _, message in messages:
        parts = parts_of(tuple(message))
        for key in (*parts.system, *parts.tools):
            if key not in parts.said and not is_nothing(value := message.pop(key)):
                row.setdefault(key, value)
    return messages[0][0], row


def groups(messages: list[tuple[int, dict[str, Any]]], key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Messages of one id, in the order of the file or of their turn numbers. A row without an id has that of the row before."""
    by_name: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    name = ""
    for number, message in messages:
        if not is_nothing(value := message.pop(key, None)):
            name = str(value)
        by_name.setdefault(name, []).append((number, message))
    for group in by_name.values():
        turn = next((k for k in group[0][1] if squashed(k) in TURN), None)
        if turn and all(is_number(message.get(turn)) for _, message in group):
            group.sort(key=lambda pair: float(pair[1][turn]))
        for _, message in group:
            if turn:
                message.pop(turn, None)
        yield whole(group)


def is_number(value: Any) -> bool:
    """Return whether a value is a number or a text of one."""
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def trees(
    messages: list[tuple[int, dict[str, Any]]], own: str, parent: str, columns: Columns
) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Every path from a root to a leaf; of the children of a message, the one of the best rank comes first."""
    alive, twice = by_id(messages, own)
    yield from twice
    children: dict[str, list[str]] = {}
    for name, (_, message) in alive.items():
        parent_name = str(message.get(parent))
        children.setdefault(parent_name if parent_name in alive and parent_name != name else "", []).append(name)
    for some in children.values():
        some.sort(key=lambda name: rank_of(alive[name][1]))
    waiting = [(root, 0) for root in reversed(children.get("", []))]  # the next one last, and how many are above each
    seen: set[str] = set()
    used: set[str] = set()  # messages that an earlier path has
    path: list[str] = []
    while waiting:
        name, above = waiting.pop()
        seen.add(name)
        path[above:] = [name]
        number, root = alive[name][0], alive[path[0]][1]
        below = children.get(name, [])
        if len(path) < LONGEST_PATH:
            waiting += [(child, len(path)) for child in reversed(below)]
        if not begins(root, own, parent):
            where = "" if len(path) == 1 else f"is below line {alive[path[0]][0]}, which "
            yield (
                number,
                RowError("orphan", f"{where}follows the message {short(root[parent])}, which is not in the file"),
            )
        elif below and len(path) == LONGEST_PATH:
            yield number, RowError("too long", f"is message {LONGEST_PATH:,} of its conversation, and not the last")
        elif not below:
            answers = {name for name in path if is_answer(alive[name][1], columns)}
            if not answers or answers - used:
                yield whole(
                    [without_ids(*alive[name], (own, parent), name in used and name in answers) for name in path]
                )
                used.update(path)
    for name in alive.keys() - seen:
        words = f'its "{parent}" leads back to itself, or to a conversation that is too long'
        yield alive[name][0], RowError("no beginning", words)


def begins(message: dict[str, Any], own: str, parent: str) -> bool:
    """Whether a message whose parent is not in the file has none: it names nothing, itself, or the conversation as a whole."""
    value = message.get(parent)
    if is_nothing(value) or str(value).strip().lower() in NO_PARENT:
        return True
    return any(str(other) == str(value) for key, other in message.items() if key != parent)


def by_id(
    messages: list[tuple[int, dict[str, Any]]], own: str
) -> tuple[dict[str, tuple[int, dict[str, Any]]], list[tuple[int, RowError]]]:
    """The messages that were not deleted by their ids, and those whose id another one has."""
    known: dict[str, tuple[int, dict[str, Any]]] = {}
    twice = []
    for number, message in messages:
        if str(message.get("deleted")).lower() in ("true", "1"):
            continue
        name = (
            f" {number}" if is_nothing(message.get(own)) else str(message[own])
        )  # (nothing is below one without an id)
        if name in known:
            twice.append((number, RowError("two values", f"has the {own} {short(name)}, as line {known[name][0]} has")))
        else:
            known[name] = number, message
    return known, twice


def without_ids(number: int, message: dict[str, Any], ids: tuple[str, str], used: bool) -> tuple[int, dict[str, Any]]:
    """The message without the columns that make the tree. used: it is an answer that is learnt in another path."""
    kept = {key: value for key, value in message.items() if key not in ids}
    return number, kept | {"weight": 0} if used else kept


def is_answer(message: dict[str, Any], columns: Columns) -> bool:
    """Return whether a message is an assistant's."""
    one = usual(message, columns)
    role = next((one[key] for key in parts_of(tuple(one)).speaker if isinstance(one[key], str)), "")
    return {**ROLE_NAMES, **columns.roles}.get(role.strip().lower()) is Role.ASSISTANT
