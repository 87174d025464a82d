"""Rows of workbooks: .xlsx and its relatives, read by python-calamine."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import lzma
import re
import subprocess
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rwkv_peft.common.errors import UserError, pip_command
from rwkv_peft.common.formatting import first_line, plural
from rwkv_peft.common.paths import display_path

from . import reader
from .file_kinds import ROW_KEYS
from .json_files import no_such_split
from .reader import Block, Note
from .schemas import Row, RowError
from .splits import HELD_OUT, is_wanted, split_of
from .table_header import Header, cell_text, header_row, trimmed
from .values import TableRow

UNREADABLE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, OSError, ValueError,
)  # fmt: skip
NOT_TRAINING = ("valid", "test")
# of a sheet's rectangle, beside what it holds: a stray cell in the last corner would ask for 17 thousand million
CELLS_LIMIT = 28_000_000
PIECE, LONGEST_TAG = 1 << 20, 200  # bytes of XML that are looked at together, and that a row's or a cell's tag has
ROW = re.compile(rb"<(?:\w+:)?row\s[^>]{0,200}?\br=[\"'](\d{1,9})")
FAR = re.compile(rb"\sr=[\"']([A-Z]{2,4})(\d{1,9})[\"']")  # a cell behind column Z
MOST_MEMORY = 4 << 30  # bytes, for the cells of a workbook and what they are read from
SMALL = 256 << 20  # bytes that a workbook may unpack to, to be read without a trial


def workbook(path: Path, valid_split: str = "") -> Iterator[Block]:
    """Yield the rows of all sheets with the same columns.

    Other sheets are named, and so are those whose names say that they are for testing. valid_split: the name of the
    sheet whose rows are held out.
    """
    try:
        import python_calamine as calamine
    except ImportError:
        raise UserError(
            f"{display_path(path)}: reading {path.suffix} needs the package python-calamine: {pip_command('python-calamine')}"
        ) from None
    name, size = display_path(path), path.stat().st_size
    small = False
    with contextlib.suppress(*UNREADABLE):  # (the library says what is wrong with it)
        small = is_small(path, name)
    if not small:
        must_fit_memory(path, name)
    try:
        with calamine.CalamineWorkbook.from_path(str(path)) as book:
            yield from sheets(book, name, size, valid_split)
    except calamine.PasswordError:
        raise UserError(f"{name}: is protected by a password. Save it without one.") from None
    except (calamine.CalamineError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{name}: cannot be read as a workbook: {first_line(error)}.") from None


# reads a workbook and its sheets, with less memory than a machine has, and nothing more
PROBE = f"""
import resource, sys
import python_calamine
most = {MOST_MEMORY}
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (most if hard < 0 else min(most, hard), hard))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
book = python_calamine.CalamineWorkbook.from_path(sys.argv[1])
for title in book.sheet_names:
    try:
        book.get_sheet_by_name(title)
    except Exception:  # the caller reads the sheet once more, and reports it
        pass
"""


def must_fit_memory(path: Path, name: str) -> None:
    """Check that a workbook fits memory. The library ends the process that asks for too much, so another process tries it.

    Raises:
        UserError: it unpacks to more, or its last cell is so far out that the rectangle up to it is more.
    """
    tried = subprocess.run([sys.executable, "-c", PROBE, path], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if tried.returncode < 0 or b"MemoryError" in tried.stderr:
        raise UserError(
            f"{name}: cannot be read as a workbook: it needs more than {MOST_MEMORY >> 30} GB of memory. A cell may be far "
            "outside the table (delete what is there), or the file is made to unpack to far more than its size."
        )
    if b"panicked" in tried.stderr:
        raise UserError(f"{name}: cannot be read as a workbook: it is damaged.")


def sheets(book, name: str, size: int, valid_split: str = "") -> Iterator[Block]:
    """The sheet that is read is the first whose columns have a known name, else the first with anything in it."""
    tables: list[tuple[str, list[list[str]], int, list[str]]] = []
    for metadata in book.sheets_metadata:
        title = metadata.name
        try:
            sheet = book.get_sheet_by_name(title)
        except Exception as error:
            if type(error).__name__ not in ("WorksheetNotFound", "CalamineError"):
                raise
            if str(metadata.typ).endswith("WorkSheet"):
                words = f"{name}: is damaged: its sheet {title} cannot be read ({first_line(error)})."
                raise UserError(words) from None
            continue  # it holds nothing but a chart
        if sheet.end is None:
            continue
        if (sheet.end[0] + 1) * (sheet.end[1] + 1) > CELLS_LIMIT + 10 * size:  # of the formats that are no XML
            raise UserError(too_large(f"{name}: the sheet {title}", sheet.end[0] + 1, sheet.end[1] + 1))
        cells = [[cell_text(cell) for cell in row] for row in sheet.to_python(skip_empty_area=False)]
        if any(any(row) for row in cells):
            place = header_row(cells)
            tables.append((title, cells, place, [trimmed(cell) for cell in cells[place] if trimmed(cell)]))
    if not tables:
        return
    known = [columns for _, _, _, columns in tables if any(column.lower() in ROW_KEYS for column in columns)]
    wanted = known[0] if known else tables[0][3]
    same = [title for title, _, _, columns in tables if sorted(columns) == sorted(wanted)]
    others = [title for title, _, _, _ in tables if title not in same]
    uses = uses_of(same, name, valid_split)
    rows: Counter[str] = Counter()
    for title, cells, place, _ in tables:
        if title not in same:
            continue
        if not uses[title]:
            rows[title] = sum(any(row) for row in cells[place + 1 :])
            continue
        where = f"{name}:{title}" if len(tables) > 1 else name
        for block in sheet_blocks(cells, place, Header(cells[place], where), where, size):
            yield dataclasses.replace(block, held_out=uses[title] == HELD_OUT)
    notes = []
    read = [title for title in same if uses[title] == "train"]
    if len(read) > 1:
        notes.append(Note("note", name, f"{len(read)} sheets with the same columns are read: {', '.join(read)}"))
    for title in same:
        if not uses[title]:
            words = (
                f'its sheet "{title}" ({plural(rows[title], "row")}) is not used: by its name it is not for training'
            )
            notes.append(Note("warning", name, f"{words}. VALID_SPLIT={title} makes held-out data of it"))
    if passed_over := [title for title in read if split_of(title) in NOT_TRAINING]:
        words = "read as training data, because no sheet is for training by its name"
        notes.append(Note("warning", name, f"{words}: {', '.join(passed_over)}"))
    if others:
        words = f"not used, because their columns are others than those of {same[0]}: {', '.join(others)}"
        notes.append(Note("warning", name, f"{plural(len(others), 'sheet')} {words}"))
    yield Block(name, 1, [], size, notes=tuple(notes))


def is_small(path: Path, name: str) -> bool:
    """Return whether a workbook is of XML (.xlsx) and unpacks to little.

    Raises:
        UserError: a cell is so far away that the library, which makes room for the whole rectangle, would take all memory.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if sum(info.file_size for info in records) > SMALL:
            return False
        for info in records:
            if not re.fullmatch(r"xl/worksheets/[^/]*\.xml", info.filename):
                continue
            rows, columns = extent(archive.open(info))
            if rows * columns > CELLS_LIMIT + info.file_size:
                raise UserError(too_large(f"{name}: a sheet ({info.filename})", rows, columns))
        return "xl/workbook.xml" in archive.namelist()


def too_large(sheet: str, rows: int, columns: int) -> str:
    """Return the message about a cell that is too far out."""
    return (
        f"{sheet} has a cell at row {rows:,} or column {columns:,}, and more empty cells than can be read. Delete what is "
        "outside the table."
    )


def extent(file: IO[bytes]) -> tuple[int, int]:
    """The last row of a sheet of XML, and its last column; 26 for columns up to Z."""
    rows, columns, before = 0, 26, b""
    while piece := file.read(PIECE):
        data = before + piece
        rows = max(rows, *map(int, ROW.findall(data)), 0)
        for letters, row in FAR.findall(data):
            column = functools.reduce(lambda n, letter: 26 * n + letter - 64, letters, 0)
            rows, columns = max(rows, int(row)), max(columns, column)
        before = data[-LONGEST_TAG:]
    return rows, columns


def uses_of(titles: list[str], name: str, wanted: str) -> dict[str, str]:
    """Return what becomes of each sheet: "train", HELD_OUT, or "" for one that is not used.

    Raises:
        UserError: `wanted` names none of several.
    """
    uses = {title: HELD_OUT if is_wanted(title, wanted) else "train" for title in titles}
    if wanted and HELD_OUT not in uses.values() and any(map(split_of, titles)):
        raise UserError(no_such_split(name, wanted, titles))
    if any(use == "train" and split_of(title) not in NOT_TRAINING for title, use in uses.items()):
        uses |= {title: "" for title, use in uses.items() if use == "train" and split_of(title) in NOT_TRAINING}
    return uses


def sheet_blocks(cells: list[list[str]], place: int, header: Header, name: str, size: int) -> Iterator[Block]:
    """The rows of a sheet; their numbers are those that the program shows beside them."""
    notes = [Note("warning", name, words) for words in header.skipped_above(cells[:place])]
    batch: list[tuple[int, bytes | Row | RowError]] = []
    for number, row in enumerate(cells[place + 1 :], place + 2):
        made = header.row(row, number)
        if made is not None:
            batch.append((number, TableRow(made)))
        if len(batch) == reader.ROWS:
            yield Block(name, batch[0][0], batch, 0)
            batch = []
    notes += [Note(level, name, words) for level, words in header.notes()]
    yield Block(name, batch[0][0] if batch else 1, batch, size, notes=tuple(notes))
