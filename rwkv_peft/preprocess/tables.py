"""Rows of tables: .csv and .tsv, .parquet and .arrow."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import math
import re
import resource
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rwkv_peft.common.errors import UserError, pip_command, resource_limit
from rwkv_peft.common.formatting import first_line, plural
from rwkv_peft.common.paths import display_path, is_utf8

from . import reader as reading
from .file_kinds import ROW_KEYS
from .reader import Block, Note, grouped, not_utf8, unpacked
from .schemas import Row, RowError
from .table_header import LOOKED_AT, Header, header_row, trimmed, value_text
from .values import TableRow

TIMES = 1000  # a sound table asks for less than so many times the size of its file at once
FIELDS_LIMIT = 1 << 27  # characters of a cell that Python's reader takes; RowLines ends what is no row long before


@dataclass(frozen=True)
class Dialect:
    r"""How a table is written.

    Attributes:
        quotes: standard ("" for a quote), backslash (\" for one), spaced (blanks around quoted cells), or none (a quote
            is a letter).
        all_escaped: A backslash itself is written as two.
    """

    quotes: str = "standard"
    all_escaped: bool = False

    def line(self, line: str) -> str:
        """A line as the standard reader wants it."""
        if self.quotes == "spaced":
            if '"' in line:
                line = CLOSES.sub(r"\1", OPENS.sub(r"\1\2", SPACED.sub(r"\1\2", line)))
            return line
        return BACKSLASHES.sub(self.without_backslash, line) if self.quotes == "backslash" and "\\" in line else line

    def without_backslash(self, match: re.Match) -> str:
        """Return a match's text in standard quotes."""
        size = len(match[1])
        if match[2]:
            return "\\" * (size // 2) + ('""' if size % 2 else '"')
        return "\\" * -(-size // 2) if self.all_escaped else match[0]

    def reader(self, lines: RowLines, mark: str):
        """Return csv's reader of this dialect."""
        if self.quotes == "none":
            return csv.reader(lines, delimiter=mark, quoting=csv.QUOTE_NONE)
        return csv.reader(lines, delimiter=mark, strict=True)


SPACED = re.compile(r'(^|[,;\t|])[ \u00a0]*("(?:[^"]|"")*")[ \u00a0]*(?=[,;\t|]|\r?\n?\Z)')
# a quoted cell that continues in the next line, and one that ends in this one
OPENS = re.compile(r'([,;\t|])[ \u00a0]+("(?:[^"]|"")*)\Z')
CLOSES = re.compile(r'\A([^"]*(?:""[^"]*)*[^",;\t| ]")[ \u00a0]+(?=[,;\t|]|\r?\n?\Z)')
IS_SPACED = re.compile(rb'(?:^|[,;\t|]) +"|" +(?:[,;\t|]|\r?$)', re.M)
BACKSLASHES = re.compile(r'(\\+)("?)')
CELLS = 1 << 18  # of an Arrow table that are read at once
PART_BYTES = 32 << 20  # of texts that become rows at once
MARKS = ",;\t|"  # what may stand between cells
QUOTED_SO = {
    "backslash": 'quotes inside cells are written \\" in it, not "", and are read as quotes',
    "spaced": "blanks stand around the quotes of its cells, and are left out",
    "none": "its quotes do not enclose cells, and are read as letters",
}


def table(path: Path) -> Iterator[Block]:
    """Yield the rows of a .csv or .tsv file; the first line names the columns.

    Cells with lists are parsed where lists are wanted.
    """
    csv.field_size_limit(FIELDS_LIMIT)
    name, notes = display_path(path), []
    with unpacked(path) as (file, read):
        try:
            opened = Table(file, Dialect(), path)
        except UserError:  # of a header that another dialect may read
            dialect = best_dialect(path, "")
            if dialect.quotes == "standard":
                raise
        else:
            dialect = best_dialect(path, opened.mark)
        if dialect.quotes == "standard":
            yield from grouped(path, opened.rows(), read)
            notes, size = opened.notes(), read()
    if dialect.quotes != "standard":
        with unpacked(path) as (file, read):
            opened = Table(file, dialect, path)
            yield from grouped(path, opened.rows(), read)
            notes, size = [*opened.notes(), Note("note", name, QUOTED_SO[dialect.quotes])], read()
    if notes:
        yield Block(name, 1, [], size, notes=tuple(notes))


def best_dialect(path: Path, mark: str) -> Dialect:
    """Return the dialect in which most of a table can be read; the file is read beforehand only where quotes are unusual.

    mark: the separator, if it is known.
    """
    if not path.is_file():  # a pipe can be read only once
        return Dialect()
    escaped = lone = quoted = spaced = False
    before = b""
    with unpacked(path) as (file, _):
        while piece := file.read(reading.BLOCK):
            piece = before + piece
            escaped = escaped or b'\\"' in piece
            lone = lone or b"\\" in piece and re.search(rb'(?<!\\)(?:\\\\)*\\[^"\\\r\n]', piece) is not None
            quoted = quoted or b'"' in piece
            spaced = spaced or IS_SPACED.search(piece) is not None
            before = piece[-1:]
    others = [Dialect("backslash", all_escaped=not lone)] * escaped
    others += [Dialect("spaced")] * spaced
    others += [Dialect("none")] * (quoted and mark == "\t")
    if not others:
        return Dialect()
    faults = faults_of(path, Dialect())
    for dialect in others:
        if faults and faults_of(path, dialect) < (1 if dialect.quotes == "none" else faults):
            return dialect
    return Dialect()


def faults_of(path: Path, dialect: Dialect) -> int:
    """Rows that cannot be read in a dialect. Cells that are enclosed in quotes speak against one without quotes."""
    with unpacked(path) as (file, _):
        try:
            rows = (row for _, row in Table(file, dialect, path).rows())
            if dialect.quotes != "none":
                return sum(
                    row.reason == "not CSV" if isinstance(row, RowError) else any(map(keeps_quotes, row.values()))
                    for row in rows
                )
            return sum(
                row.reason == "not CSV" if isinstance(row, RowError) else any(map(is_enclosed, row.values()))
                for row in rows
            )
        except UserError:
            return 1 << 60


def keeps_quotes(cell: str | None) -> bool:
    """Whether a cell has quotes around it behind a blank, which were meant to enclose it."""
    return cell is not None and cell[:1] == " " and is_enclosed(cell.strip(" "))


def is_enclosed(cell: str | None) -> bool:
    """Return whether a cell is between quotes."""
    return cell is not None and len(cell) > 1 and cell[0] == cell[-1] == '"'


class Table:
    """A table that is open: its header is read, and its rows can be read."""

    def __init__(self, file: IO[bytes], dialect: Dialect, path: Path):
        text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
        # (a line that is too long comes in pieces, of which the first one is refused)
        self.lines = RowLines(iter(functools.partial(text.readline, reading.LINE_LIMIT + 1), ""), dialect.line)
        self.dialect, self.path, self.warnings = dialect, path, []
        head = []
        try:
            for line in itertools.islice(self.lines, LOOKED_AT):
                head.append(line)
                self.lines.size = 0
        except csv.Error:
            limit = f"{reading.LINE_LIMIT >> 20} MB"
            raise UserError(
                f"{display_path(path)}: line {len(head) + 1} is longer than {limit}; it is no table."
            ) from None
        separator = re.fullmatch(r"sep=(.)\s*", head[0]) if head else None  # Excel's way to name the separator
        skip = 1 if separator else 0
        marks = separator[1] if separator else MARKS
        cells = [split_plainly(line, best_mark(line, marks)) for line in head[skip:]]
        place = skip + header_row(cells) if cells else skip
        first = head[place] if place < len(head) else ""
        self.mark = best_mark(first, marks)
        again = self.lines.row[place:]  # as they are in the file: they will be changed when they are read again
        self.lines.begin()
        self.lines.again.extend(again)
        try:
            names: list[str] = next(dialect.reader(self.lines, self.mark), [])
        except csv.Error as error:
            raise UserError(
                f"{display_path(path)}: its first line, which names the columns, is not valid CSV: {error}."
            ) from None
        self.header = Header(names, display_path(path))
        self.number = place + 1 + len(self.lines.row)
        if place > skip:
            self.warnings = self.header.skipped_above(cells[: place - skip])

    def rows(self) -> Iterator[tuple[int, Row | RowError]]:
        """Yield the rows with their line numbers."""
        return table_rows(self.lines, self.header, self.dialect, self.mark, self.number)

    def notes(self) -> list[Note]:
        """Return notes about the table."""
        name = display_path(self.path)
        remarks = [("warning", words) for words in self.warnings] + self.header.notes()
        if ".tsv" in self.path.suffixes and self.mark != "\t" and self.header.size > 1:
            remarks.append(("note", f"{self.mark!r} stands between its cells, not tabs"))
        return [Note(level, name, words) for level, words in remarks]


def split_plainly(line: str, mark: str) -> list[str]:
    """Split a line at a mark, with csv's quotes if they are sound."""
    try:
        return next(csv.reader([line], delimiter=mark), [])
    except csv.Error:
        return line.split(mark)


def best_mark(line: str, marks: str) -> str:
    """Return the separator of a header's cells: what gives the most known names, else what is there most often."""
    bare = re.sub(r'"[^"]*"', "", line)

    def known(mark: str) -> int:
        return sum(trimmed(cell).lower() in ROW_KEYS for cell in line.split(mark)) if mark in bare else 0

    return max(marks, key=lambda mark: (known(mark), bare.count(mark)))


class RowLines:
    """The lines of a table, one by one, with those of the row at hand kept: they can be given back."""

    def __init__(self, lines: Iterator[str], change: Callable[[str], str]):
        self.lines, self.change = lines, change
        self.again: deque[str] = deque()
        self.begin()

    def begin(self) -> None:
        """A new row begins."""
        self.row: list[str] = []
        self.size = 0

    def __iter__(self) -> RowLines:
        return self

    def __next__(self) -> str:
        line = self.again.popleft() if self.again else next(self.lines)
        if line.startswith("\ufeff"):  # of a file that was joined to the one above
            line = line.lstrip("\ufeff")
        self.row.append(line)
        self.size += len(line)
        if self.size > reading.LINE_LIMIT:
            raise csv.Error("a quote that is opened here is never closed")
        return self.change(line)

    def give_back_all_but_one(self) -> None:
        """Only the first line of the row is at fault: the others are rows of their own."""
        self.again.extendleft(reversed(self.row[1:]))


def table_rows(
    lines: RowLines, header: Header, dialect: Dialect, mark: str, number: int
) -> Iterator[tuple[int, Row | RowError]]:
    """Rows with their lines, from line `number` on. A quote that is not closed spoils its own line and no other."""
    rows = dialect.reader(lines, mark)
    while True:
        lines.begin()
        wrong, cells = "", []
        try:
            cells = next(rows)
            if cells and len(cells) != header.size:
                if header.is_other(without_empty_end(cells), number):
                    cells = []
                elif len(cells) > header.size and not any(cells[header.size :]):
                    del cells[header.size :]  # empty columns that only some lines have
                elif any(cells):
                    names = f"line {header.changed[-1][0]}" if header.changed else "the first line"
                    wrong = f"has {plural(len(cells), 'cell')}, but {names} names {header.size}"
                    if len(cells) > header.size:
                        wrong += f"; a cell that holds {mark!r} must stand in quotes"
                else:
                    cells = []
        except StopIteration:
            return
        except csv.Error as error:
            ends = "unexpected end" in str(error)
            wrong = f"is not valid CSV: {'a quote that is opened here is never closed' if ends else error}"
        if wrong:
            yield number, RowError("not CSV", wrong)
            lines.give_back_all_but_one()
            number, rows = number + 1, dialect.reader(lines, mark)
            continue
        if any(not cell.isascii() and not is_utf8(cell) for cell in cells):
            yield number, not_utf8(",".join(cells).encode("utf-8", "surrogateescape"))
        elif cells:
            row = header.row(cells, number)
            if row is not None:
                yield number, TableRow(row)
        number += len(lines.row)


def without_empty_end(cells: list[str]) -> list[str]:
    """Drop empty cells at the end."""
    filled = [i for i, cell in enumerate(cells, 1) if cell]
    return cells[: filled[-1]] if filled else []


def columnar(path: Path) -> Iterator[Block]:
    """Rows of a .parquet or .arrow file."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(
            f"{display_path(path)}: reading {path.suffix} needs the package pyarrow: {pip_command('pyarrow')}"
        ) from None

    with open(path, "rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    changed: Counter[str] = Counter()  # columns whose values are changed -> how many

    def batches():
        if is_parquet or path.suffix.lower() == ".parquet":
            # texts that are there once and meant a million times stay so until their rows are made
            with pq.ParquetFile(path) as file:
                words = [
                    file.schema.column(i).path
                    for i in range(len(file.schema))
                    if file.schema.column(i).physical_type == "BYTE_ARRAY" and "." not in file.schema.column(i).path
                ]
            with pq.ParquetFile(path, read_dictionary=words) as file:
                yield from file.iter_batches(batch_size=max(1, min(reading.ROWS, CELLS // max(1, len(file.schema)))))
            return
        with pa.OSFile(str(path)) as source:  # not mapped: a damaged file would end the process without a word
            try:  # files that may be read from any place, or streams (what the `datasets` package writes)
                reader = pa.ipc.open_file(source)
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pa.ArrowInvalid:
                source.seek(0)
                yield from pa.ipc.open_stream(source)

    number = 1
    size = path.stat().st_size
    try:
        for batch in batches():
            batch.validate(full=True)
            odd = [
                name for name, kind in zip(batch.schema.names, batch.schema.types, strict=True) if ODD.search(str(kind))
            ]
            twice = [name for name, times in Counter(batch.schema.names).items() if times > 1]
            if twice:
                raise UserError(f"{display_path(path)}: it has two columns called {twice[0]!r}.")
            for part in in_parts(batch):
                rows = part.to_pylist()
                for row in rows:
                    for column in odd:
                        value = row[column]
                        row[column] = plain_value(value)
                        changed[column] += value is not None and row[column] is None
                yield Block(display_path(path), number, list(enumerate(rows, number)), 0)
                number += len(rows)
    except MemoryError as error:
        asked = re.search(r"of size (\d+)", str(error))
        if asked and int(asked[1]) < TIMES * path.stat().st_size and resource_limit(resource.RLIMIT_AS) is not None:
            raise  # its message names the limit
        raise UserError(
            f"{display_path(path)}: cannot be read as {path.suffix[1:]}: it asks for more memory than "
            f"there is. It is damaged, or has "
            "rows that are too large."
        ) from None
    except (pa.ArrowException, OSError, ValueError, SystemError, OverflowError) as error:
        if isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno is not None:
            raise  # it says nothing of the file
        raise UserError(f"{display_path(path)}: cannot be read as {path.suffix[1:]}: {first_line(error)}.") from None
    notes = tuple(
        Note("warning", display_path(path), f"{plural(rows, 'value')} NaN in the column {column!r} taken as null (empty)")
        for column, rows in changed.items() if rows
    )  # fmt: skip
    yield Block(display_path(path), number, [], size, notes=notes)


def in_parts(batch) -> Iterator[Any]:
    """The rows of an Arrow batch, so many at a time that what is made of them is not too large."""
    for begin in range(0, batch.num_rows, reading.ROWS):
        part = batch.slice(begin, reading.ROWS)
        if sum(map(text_bytes, part.columns)) <= PART_BYTES:
            yield part
        else:
            yield from (part.slice(i, 1) for i in range(len(part)))


def text_bytes(column) -> int:
    """Bytes of a column when its values stand there, each for itself."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_dictionary(column.type) or pa.types.is_nested(column.type.value_type):
        return column.nbytes
    sizes = pc.binary_length(column.dictionary.cast(pa.large_binary()))
    return pc.sum(sizes.take(column.indices)).as_py() or 0


# types of columns whose values are no JSON: bytes, dates, exact numbers; and fractions, which may be NaN
ODD = re.compile(r"binary|date|time|duration|decimal|float|double|map<")


def plain_value(value: Any) -> Any:
    """A value of an Arrow column as JSON has it: bytes and dates as text, NaN as null. Bytes that are no text stay."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        if value and all(isinstance(one, tuple) and len(one) == 2 for one in value):  # a map
            return {str(key): plain_value(one) for key, one in value}
        return [plain_value(one) for one in value]
    if isinstance(value, dict):
        return {key: plain_value(one) for key, one in value.items()}
    return value if value is None or isinstance(value, str | bool | int) else value_text(value)
