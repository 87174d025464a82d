"""What MAP_KEYS names: keys of messages under their usual names, and what is inside an object beside the rest of a row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .keys import HARMLESS_NAMES, Columns, squashed
from .values import RowError, is_nothing, short

Row = Mapping[str, Any]


def renamed_keys(one: Row, given: Mapping[str, str]) -> Row:
    """Return a message with the keys that MAP_KEYS names under their usual names.

    A key that had such a name by itself is not used, and is reported as that.
    """
    there = {part: name for name, part in given.items() if name in one}
    kept = {
        f"{key} (MAP_KEYS takes {there[key]})" if key in there else key: value
        for key, value in one.items()
        if key not in there.values()
    }
    return {part: one[name] for part, name in there.items()} | kept


def lifted(row: Row, names: Iterable[str]) -> Row:
    """Return the row with what is inside an object beside the rest, where MAP_KEYS names it as "body.messages".

    Raises:
        RowError: a key inside and one beside the object disagree.
    """
    paths = {name: name.split(".") for name in names if "." in name and name not in row}
    values = {name: value for name, path in paths.items() if (value := inside(row, path)) is not ABSENT}
    if not values:
        return row
    outers = dict.fromkeys(paths[name][0] for name in values)
    rest = {key: value for key, value in row.items() if key not in outers}
    for outer in outers:
        left = without(row[outer], [paths[name][1:] for name in values if paths[name][0] == outer])
        for key, value in left.items():
            if is_nothing(rest.get(key)):
                rest[key] = value
            elif rest[key] != value and not is_nothing(value) and squashed(key) not in HARMLESS_NAMES:
                says = f"{short(rest[key])} and {short(value)}"
                raise RowError("two values", f'its "{key}" and "{outer}.{key}" disagree: {says}')
    return rest | values


def usual(message: Row, columns: Columns) -> Row:
    """A message with the keys that MAP_KEYS names under their usual names, also those inside an object. RowError as `lifted`."""
    given = columns.of_messages
    return renamed_keys(lifted(message, given), given) if given else message


ABSENT = object()


def occurs(value: Any, name: str) -> bool:
    """Return whether any object inside a value has what MAP_KEYS calls `name`, also as JSON in a text or in bytes."""
    path, waiting = name.split("."), [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if name in one or inside(one, path) is not ABSENT:
                return True
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
        elif isinstance(one, bytes):
            waiting.append(one.decode("utf-8", "replace"))
        elif isinstance(one, str) and (f'"{path[-1]}"' in one or f"'{path[-1]}'" in one):
            return True
    return False


def inside(row: Any, path: Sequence[str]) -> Any:
    """Return what is at the end of a path of keys; ABSENT if nothing is."""
    for key in path:
        if not isinstance(row, dict) or key not in row:
            return ABSENT
        row = row[key]
    return row


def without(row: Row, paths: Sequence[Sequence[str]]) -> Row:
    """Return an object without what is at the ends of these paths."""
    gone = {path[0] for path in paths if len(path) == 1}
    deeper = {key: [path[1:] for path in paths if path[0] == key] for key in {p[0] for p in paths if len(p) > 1} - gone}
    return {
        key: without(value, deeper[key]) if key in deeper else value for key, value in row.items() if key not in gone
    }
