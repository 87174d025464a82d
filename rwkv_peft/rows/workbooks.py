"""Rows of workbooks: .xlsx and its relatives, read by python-calamine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError, install
from ..project import shown
from . import reading
from .columns import Header, cell_text, header_row
from .reading import Block, Note, TableRow
from .schemas import Row, RowError

CELLS_LIMIT = 200_000_000  # of a sheet's rectangle: a stray cell in its last corner would ask for 17 thousand million


def workbook(path: Path) -> Iterator[Block]:
    """Rows of the sheets that have the header of the first one with anything in it; other sheets are named."""
    try:
        import python_calamine as calamine
    except ImportError:
        raise UserError(
            f"{shown(path)}: reading {path.suffix} needs the package python-calamine: {install('python-calamine')}"
        ) from None
    name, size = shown(path), path.stat().st_size
    try:
        with calamine.CalamineWorkbook.from_path(str(path)) as book:
            yield from sheets(book, name, size)
    except calamine.PasswordError:
        raise UserError(f"{name}: is protected by a password. Save it without one.") from None
    except (calamine.CalamineError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{name}: cannot be read as a workbook: {str(error).splitlines()[0]}.") from None


def sheets(book, name: str, size: int) -> Iterator[Block]:
    first: Header | None = None
    several = len(book.sheet_names) > 1
    others: list[str] = []
    for title in book.sheet_names:
        try:
            sheet = book.get_sheet_by_name(title)
        except Exception as error:  # a sheet that holds a chart
            if type(error).__name__ not in ("WorksheetNotFound", "CalamineError"):
                raise
            continue
        if sheet.end is None:
            continue
        if (sheet.end[0] + 1) * (sheet.end[1] + 1) > CELLS_LIMIT:
            raise UserError(f"{name}: the sheet {title} has a cell at row {sheet.end[0] + 1:,}, column {sheet.end[1] + 1:,}: "
                            "far more cells than are read. Delete what is outside the table.")  # fmt: skip
        cells = [[cell_text(cell) for cell in row] for row in sheet.to_python(skip_empty_area=False)]
        if not any(any(row) for row in cells):
            continue
        place = header_row(cells)
        header = Header(cells[place], f"{name}, sheet {title}" if several else name)
        if first is not None and header.named() != first.named():
            others.append(title)
            continue
        first = first or header
        yield from sheet_blocks(cells, place, header, f"{name}:{title}" if several else name, size)
    if first is None:
        return
    if others:
        words = f"not used: {', '.join(others)} (other columns than the first sheet; save each as a file of its own)"
        yield Block(name, 1, [], size, notes=(Note("warning", name, f"sheets {words}"),))


def sheet_blocks(cells: list[list[str]], place: int, header: Header, name: str, size: int) -> Iterator[Block]:
    """The rows of a sheet; their numbers are those that the program shows beside them."""
    notes = [Note("warning", name, words) for words in header.skipped_above(cells[:place])]
    found: list[tuple[int, Row | RowError]] = []
    for number, row in enumerate(cells[place + 1 :], place + 2):
        made = header.row(row, number)
        if made is not None:
            found.append((number, TableRow(made)))
        if len(found) == reading.ROWS:
            yield Block(name, found[0][0], found, 0)
            found = []
    notes += [Note(level, name, words) for level, words in header.notes()]
    yield Block(name, found[0][0] if found else 1, found, size, notes=tuple(notes))
