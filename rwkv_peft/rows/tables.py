"""Rows of tables: .csv and .tsv, .parquet and .arrow."""

from __future__ import annotations

import csv
import io
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError, install
from ..project import shown
from ..words import count
from . import reading
from .reading import Block, grouped, is_utf8, not_utf8, unpacked
from .schemas import Row, RowError

FIELDS_LIMIT = 1 << 27  # characters of a cell that Python's reader takes; RowLines ends what is no row long before


def table(path: Path) -> Iterator[Block]:
    """Rows of a .csv or .tsv file; the first line names the columns. Cells that hold JSON lists are read where they are
    wanted as lists."""
    csv.field_size_limit(FIELDS_LIMIT)
    with unpacked(path) as (file, read):
        text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
        lines, number = RowLines(text), 2
        first = next(lines, "")
        told = re.fullmatch(r"sep=(.)\s*", first)  # Excel's way to say what stands between cells
        if told:
            first, number = next(lines, ""), 3
        bare = re.sub(r'"[^"]*"', "", first)
        marks = told[1] if told else "\t" if ".tsv" in path.suffixes else max(",;\t", key=bare.count)
        lines.again.append(first)
        lines.begin()
        try:
            header = next(csv.reader(lines, delimiter=marks, strict=True), [])
        except csv.Error as error:
            raise UserError(
                f"{shown(path)}: its first line, which names the columns, is not valid CSV: {error}."
            ) from None
        twice = sorted({name for name in header if header.count(name) > 1})
        if not any(header) or twice:
            wrong = f"names {twice[0]!r} twice" if twice else "must name the columns"
            raise UserError(f"{shown(path)}: its first line {wrong}.")
        yield from grouped(path, table_rows(lines, header, marks, number - 1 + len(lines.row)), read)


class RowLines:
    """The lines of a table, one by one, with those of the row at hand kept: they can be given back."""

    def __init__(self, lines: Iterator[str]):
        self.lines, self.again = lines, deque()
        self.begin()

    def begin(self) -> None:
        """A new row begins."""
        self.row: list[str] = []
        self.size = 0

    def __iter__(self) -> RowLines:
        return self

    def __next__(self) -> str:
        line = self.again.popleft() if self.again else next(self.lines)
        self.row.append(line)
        self.size += len(line)
        if self.size > reading.LINE_LIMIT:
            raise csv.Error("a quote that is opened here is never closed")
        return line

    def give_back_all_but_one(self) -> None:
        """Only the first line of the row is at fault: the others are rows of their own."""
        self.again.extendleft(reversed(self.row[1:]))


def table_rows(lines: RowLines, header: list[str], marks: str, number: int) -> Iterator[tuple[int, Row | RowError]]:
    """Rows with their lines, from line `number` on. A quote that is not closed spoils its own line and no other."""
    rows = csv.reader(lines, delimiter=marks, strict=True)
    while True:
        lines.begin()
        wrong, cells = "", []
        try:
            cells = next(rows)
            if cells and len(cells) != len(header):
                wrong = f"has {count(len(cells), 'cell')}, but the first line names {len(header)}"
        except StopIteration:
            return
        except csv.Error as error:
            ends = "unexpected end" in str(error)
            wrong = f"is not valid CSV: {'a quote that is opened here is never closed' if ends else error}"
        if wrong:
            yield number, RowError("not CSV", wrong)
            lines.give_back_all_but_one()
            number, rows = number + 1, csv.reader(lines, delimiter=marks, strict=True)
            continue
        if any(not cell.isascii() and not is_utf8(cell) for cell in cells):
            yield number, not_utf8(",".join(cells).encode("utf-8", "surrogateescape"))
        elif cells:
            yield number, dict(zip(header, (cell or None for cell in cells), strict=True))
        number += len(lines.row)


def columnar(path: Path) -> Iterator[Block]:
    """Rows of a .parquet or .arrow file."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(
            f"{shown(path)}: reading {path.suffix} needs the package pyarrow: {install('pyarrow')}"
        ) from None

    def batches():
        if path.suffix.lower() == ".parquet":
            with pq.ParquetFile(path) as file:
                yield from file.iter_batches(batch_size=reading.ROWS)
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
            for begin in range(0, batch.num_rows, reading.ROWS):
                rows = batch.slice(begin, reading.ROWS).to_pylist()
                yield Block(shown(path), number, list(enumerate(rows, number)), 0)
                number += len(rows)
    except (pa.ArrowException, OSError, ValueError, SystemError, OverflowError) as error:
        raise UserError(f"{shown(path)}: cannot be read as {path.suffix[1:]}: {str(error).splitlines()[0]}.") from None
    yield Block(shown(path), number, [], size)
