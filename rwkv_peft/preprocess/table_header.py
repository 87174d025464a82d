"""What the tables of all formats share: the header with its names, rows of cells, and cells as text."""

from __future__ import annotations

import datetime
import decimal
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rwkv_peft.common.errors import UserError
from rwkv_peft.common.formatting import plural

from .file_kinds import ROW_KEYS
from .keys import HARMLESS_NAMES, PROMPTS, RESPONSES, TABLES, squashed

INVISIBLE = " \t\r\n\ufeff\u200b\u200c\u200d\u2060\u00a0\u3000"  # what may stand around a name without being seen
ASKED, ANSWERED = frozenset(map(squashed, PROMPTS)), frozenset(map(squashed, RESPONSES))
KNOWN = HARMLESS_NAMES.union(*TABLES.values())
LONGEST = 40  # characters that a name of a column in the middle of a table may have
RULE = re.compile(r":?-{3,}:?")
LOOKED_AT = 20  # rows in which a header may be
REPORTED = 8  # line numbers that a note lists


def trimmed(name: str) -> str:
    """A column's name without what cannot be seen around it, and without quotes that were doubled by mistake."""
    name = name.strip(INVISIBLE)
    while len(name) > 1 and name[0] == name[-1] and name[0] in "\"'":
        name = name[1:-1].strip(INVISIBLE)
    return name


def header_row(rows: Sequence[Sequence[str]]) -> int:
    """Return which row names the columns.

    It is the first that is not empty; or, where only titles of one cell are above it, the first of several cells with a known
    name among them, within 20 rows.
    """
    filled = [i for i, row in enumerate(rows[:LOOKED_AT]) if any(cell.strip(INVISIBLE) for cell in row)]
    for i in filled:
        cells = [cell for cell in rows[i] if cell.strip(INVISIBLE)]
        if len(cells) > 1:
            return i if i == filled[0] or any(trimmed(cell).lower() in ROW_KEYS for cell in cells) else filled[0]
        if trimmed(cells[0]).lower() in ROW_KEYS:
            return i
    return filled[0] if filled else next((i for i, row in enumerate(rows) if any(row)), 0)


def is_name(cell: str) -> bool:
    """Whether a cell is a name that columns of rows have."""
    return len(cell) <= LONGEST and squashed(trimmed(cell)) in KNOWN


def names_both(names: Sequence[str]) -> bool:
    """Whether there are names of a question and, after it, of an answer among these. One letter is no name."""
    short = [squashed(name) for name in names if len(name) > 1]
    asked = next((i for i, name in enumerate(short) if name in ASKED), len(short))
    return any(name in ANSWERED for name in short[asked + 1 :])


class Header:
    """The names of a table's columns, and what is noticed while its rows are made."""

    def __init__(self, cells: Sequence[str], where: str):
        """UserError if no column has a name, or two have the same."""
        self.names = [trimmed(cell) for cell in cells]
        self.size = len(self.names)
        given = self.named()
        twice = sorted(name for name, times in Counter(given).items() if times > 1)
        if not given or twice:
            wrong = f"names {twice[0]!r} twice" if twice else "must name the columns"
            raise UserError(f"{where}: its first line {wrong}.")
        self.unnamed = [i for i, name in enumerate(self.names) if not name]
        self.without_name: dict[int, int] = {}  # column -> rows that have something in it
        self.repeated: list[int] = []
        self.changed: list[tuple[int, list[str]]] = []  # line -> the names that hold from there on
        self.is_known = names_both(given)
        self.number_of_rows = 0

    def named(self) -> list[str]:
        """Return the names that are not empty."""
        return [name for name in self.names if name]

    def row(self, cells: Sequence[str], number: int) -> dict[str, str | None] | None:
        """The row of these cells, as many as there are names; None for an empty row and for a header that comes again."""
        if not any(cells):
            return None
        if self.number_of_rows == 0 and all(RULE.fullmatch(cell.strip()) for cell in cells if cell.strip()):
            return None  # the line under the header of a table in Markdown
        self.number_of_rows += 1
        if cells[0].strip(INVISIBLE) and [trimmed(cell) for cell in cells] == self.names or self.is_again(cells):
            self.repeated.append(number)
            return None
        if self.is_other(cells, number):
            return None
        for i in self.unnamed:
            if cells[i].strip(INVISIBLE):
                self.without_name[i] = self.without_name.get(i, 0) + 1
        return {name: cell or None for name, cell in zip(self.names, cells, strict=False) if name}

    def is_other(self, cells: Sequence[str], number: int) -> bool:
        """Return whether a row is the header of another table, as joined files have it: from there on its names hold.

        All of its cells are names that columns have, of a question and of an answer among them.
        """
        if not self.is_known or not cells or len(cells[-1]) > LONGEST or not is_name(cells[0] or cells[-1]):
            return False
        names = [trimmed(cell) for cell in cells]
        given = [name for name in names if name]
        if not names_both(given) or len(set(given)) < len(given) or not all(len(n) > 1 and is_name(n) for n in given):
            return False
        if sorted(given) == sorted(self.named()):
            return False  # the same names again, see `row`
        self.names, self.size = names, len(names)
        self.unnamed = [i for i, name in enumerate(names) if not name]
        self.changed.append((number, given))
        return True

    def is_again(self, cells: Sequence[str]) -> bool:
        """Whether a row is a header of the same columns in another order, from where on they have that order."""
        if cells[0] == self.names[0] or self.names[0] not in cells or len(self.named()) < 2:
            return False
        names = [trimmed(cell) for cell in cells]
        if sorted(names) != sorted(self.names):
            return False
        self.names = names
        self.unnamed = [i for i, name in enumerate(names) if not name]
        return True

    def skipped_above(self, rows: Sequence[Sequence[str]]) -> list[str]:
        """What to say of rows above the header."""
        filled = [i for i, row in enumerate(rows, 1) if any(cell.strip(INVISIBLE) for cell in row)]
        if not filled:
            return []
        first = " ".join(cell for cell in rows[filled[0] - 1] if cell)[:40]
        return [f"{plural(len(filled), 'line')} above the names of the columns not used ({first!r})"]

    def notes(self) -> list[tuple[str, str]]:
        """(level, words) of what was noticed in the rows."""
        remarks = []
        if self.repeated:
            lines = ", ".join(map(str, self.repeated[:REPORTED]))
            more = f" and {len(self.repeated) - REPORTED:,} more" if len(self.repeated) > REPORTED else ""
            many = plural(len(self.repeated), "line")
            words = f"{many} with the names of the columns again, as joined files have it, not used as rows: line {lines}{more}"
            remarks.append(("warning", words))
        for number, names in self.changed[:REPORTED]:
            words = f"line {number} names other columns, as joined files have it; they hold from there on: {', '.join(names)}"
            remarks.append(("warning", words))
        if len(self.changed) > REPORTED:
            remarks.append(("warning", f"{len(self.changed) - REPORTED:,} more lines name other columns"))
        empty = [i for i in self.unnamed if i not in self.without_name]
        if empty:
            remarks.append(("note", f"{plural(len(empty), 'column')} without a name and without content ignored"))
        for i, rows in sorted(self.without_name.items()):
            remarks.append(("warning", f"column {i + 1} has no name and is not used ({plural(rows, 'row')})"))
        return remarks


def cell_text(cell: Any) -> str:
    """A cell of a workbook as text: whole numbers without a decimal point, dates as 2026-11-30, truth as TRUE and FALSE."""
    if isinstance(cell, str):
        return cell
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "TRUE" if cell else "FALSE"
    if isinstance(cell, float):
        if not math.isfinite(cell):
            return ""
        return str(int(cell)) if cell.is_integer() and abs(cell) < 1e15 else repr(cell)
    return value_text(cell)


def value_text(value: Any) -> str:
    """Dates, times and exact numbers as text."""
    if isinstance(value, datetime.datetime):
        return (
            value.date().isoformat() if value.time() == datetime.time() and not value.tzinfo else value.isoformat(" ")
        )
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        seconds = round(value.total_seconds())
        return f"{'-' * (seconds < 0)}{abs(seconds) // 3600}:{abs(seconds) // 60 % 60:02}:{abs(seconds) % 60:02}"
    if isinstance(value, decimal.Decimal):
        return format(value, "f")
    return str(value)
