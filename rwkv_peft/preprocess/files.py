"""Files of any format of the field -> blocks of rows that know their file and line, read as a stream.

A file of any size takes the memory of a few blocks. What cannot be read as a row is passed on as a RowError, so that it is
counted and reported with its place; a file that is broken as a whole raises UserError.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from rwkv_peft.common import paths as project
from rwkv_peft.common.errors import UserError
from rwkv_peft.common.formatting import did_you_mean, join_names
from rwkv_peft.common.paths import display_path

from . import file_kinds, reader, splits
from .json_files import json_array, json_lines, no_such_split
from .keys import Columns
from .one_message import NO_COLUMNS, conversations
from .reader import Block, Note, grouped, skip_line, text_row, too_long, unpacked
from .row_advice import HEADER, seems_data
from .schemas import Row, RowError
from .split_column import by_column
from .tables import columnar, table
from .values import TableRow
from .workbooks import workbook


def plain(path: Path, mode: str) -> Iterator[Block]:
    """Documents of a .txt file: the file, every line, or every paragraph (a blank line ends one)."""
    with unpacked(path) as (file, read):
        yield from grouped(path, documents(file, mode), read)


def documents(file: IO[bytes], mode: str) -> Iterator[tuple[int, Row | RowError]]:
    """Yield the documents of a text file with their first lines, as TXT_MODE says."""
    if mode == "file":
        data = file.read(reader.LINE_LIMIT + 1)
        if len(data) > reader.LINE_LIMIT:
            law = "TXT_MODE=file takes a file as one document; with line or paragraph it becomes many"
            yield 1, RowError("too long", f"is longer than {reader.LINE_LIMIT >> 20} MB. {law}")
        elif data.strip():
            yield 1, text_row(data)
        return
    number, begun, size = 0, 1, 0
    pending: list[bytes] = []
    while line := file.readline(reader.LINE_LIMIT + 1):
        number += 1
        if len(line) > reader.LINE_LIMIT or size > reader.LINE_LIMIT:
            yield begun if pending else number, too_long(f"Every {mode} is one document")
            pending, size = [], 0
            if not line.endswith(b"\n"):
                skip_line(file)
            continue
        if mode == "line":
            if line.strip():
                yield number, text_row(line.rstrip(b"\n"))
            continue
        if line.strip():
            begun = begun if pending else number
            pending.append(line)
            size += len(line)
        elif pending:
            yield begun, text_row(b"".join(pending).rstrip(b"\n"))
            pending, size = [], 0
    if pending:
        yield begun, text_row(b"".join(pending).rstrip(b"\n"))


READERS: dict[str, Callable[..., Iterator[Block]]] = {
    ".jsonl": json_lines,
    ".json": json_array,
    ".csv": table,
    ".tsv": table,
    ".parquet": columnar,
    ".arrow": columnar,
    ".txt": plain,
    ".xlsx": workbook,
    ".xlsm": workbook,
    ".xlsb": workbook,
    ".xls": workbook,
    ".ods": workbook,
    ".ndjson": json_lines,
    ".jsonlines": json_lines,
    ".ldjson": json_lines,
    ".feather": columnar,
}
WITH_SPLITS = (json_array, workbook)  # readers of files that may hold several splits, each with a name
PACKED = (".gz", ".zst")
# what the `datasets` library and dataset pages leave beside data: facts about them, no rows
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
OURS = (".rejects.jsonl", ".report.json")  # what make_tokenize.sh leaves beside data is never data


def format_of(path: Path) -> str:
    """The ending that says how a file is read (.jsonl.gz is .jsonl; a pipe without one is .jsonl), or ""."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        return (
            suffixes[-2]
            if len(suffixes) > 1 and suffixes[-2] in READERS and suffixes[-2] not in file_kinds.BINARY
            else ""
        )
    if suffixes and suffixes[-1] in READERS:
        return suffixes[-1]
    return ".jsonl" if path.is_fifo() else ""


def stem_of(path: Path) -> Path:
    """The path without the endings that say how it is read."""
    path = path.with_suffix("") if path.suffix.lower() in PACKED else path
    return path.with_suffix("") if path.suffix.lower() in READERS else path


def find(source: Path) -> tuple[list[Path], list[Path]]:
    """The files of a file or folder that can be read, sorted, and those of a folder that cannot."""
    if not source.is_dir():
        return [source], []
    files = sorted(
        p
        for p in source.rglob("*")
        if p.is_file()
        and not any(part.startswith(".") for part in p.relative_to(source).parts)
        and not p.name.endswith(OURS)
    )
    known = [p for p in files if format_of(p)]
    return known, [p for p in files if not format_of(p)]


def named(name: str) -> Path:
    """What the user calls a file, pipe or folder of rows: a name in data/, or a path. UserError if it cannot be read."""
    source = project.resolve_path(name, "data")
    where, endings = display_path(source), ", ".join(READERS)
    if not source.exists() and (foreign := project.explain_foreign_path(name)):
        raise UserError(foreign)
    if source.is_symlink() and not source.exists():
        raise UserError(f"{where}: {project.describe_missing(source)}.")
    if not source.exists():
        there = [p.name for p in (project.ROOT / "data").glob("*") if format_of(p) and not p.name.endswith(OURS)]
        raise UserError(
            f"{where}: there is no such file{did_you_mean(source.name, there) or '.'} In data/ there is: {join_names(there)}."
        )
    if source.is_dir():
        if not find(source)[0]:
            raise UserError(f"{where}: holds no file that can be read ({endings}).")
    elif not format_of(source) and not file_kinds.kind_of(source, "")[0]:
        raise UserError(unknown_ending(source))
    return source


def blocks(
    path: Path, txt_mode: str = "file", valid_split: str = "", held_out: bool = False, columns: Columns = NO_COLUMNS
) -> Iterator[Block]:
    """The rows of one file, whatever its format. What is to be said of the file comes with them.

    valid_split: the split whose rows are held out where a file holds several. held_out: the file is held out as a whole.
    columns: MAP_KEYS, which may name those that put rows of one message together.
    """
    kind, notes = file_kinds.kind_of(path, format_of(path))
    if not kind:
        raise UserError(unknown_ending(path))
    if notes:
        yield Block(display_path(path), 1, [], 0, notes=tuple(notes))
    wanted = "" if held_out else valid_split

    def all_blocks() -> Iterator[Block]:
        if kind == ".txt":
            return plain(path, txt_mode)
        rows = READERS[kind](path, wanted) if READERS[kind] in WITH_SPLITS else READERS[kind](path)
        return conversations(with_doubts(rows, columns), columns)

    if held_out:
        yield from (dataclasses.replace(block, held_out=True) for block in all_blocks())
    else:
        yield from by_column(all_blocks(), all_blocks if path.is_file() else None, wanted)


def with_doubts(rows: Iterable[Block], columns: Columns) -> Iterator[Block]:
    """The blocks, and a warning where MAP_KEYS names columns of a table by cells of what seems to be its first row."""
    cells = [name for name in columns.of_rows if seems_data(name)]
    for block in rows:
        if cells and block.data and isinstance(block.data, list) and isinstance(row := block.data[0][1], TableRow):
            if doubtful := [name for name in cells if name in row]:
                words = f"MAP_KEYS names {join_names(map(repr, doubtful))} of its first line, which is not learnt"
                yield Block(
                    block.file, 1, [], 0, notes=(Note("warning", block.file, f"{words}. If it is data: {HEADER}"),)
                )
            cells = []
        yield block


def unknown_ending(path: Path) -> str:
    """Return the message about a file whose ending is not known."""
    return (
        f"{display_path(path)}: must end in one of {', '.join(READERS)} (or one of the text formats "
        f"with .gz or .zst behind it); its "
        "content shows no rows either."
    )


@dataclasses.dataclass(frozen=True)
class Source:
    """The files of a file or folder that is to be read.

    Attributes:
        train: Files whose rows are trained.
        held_out: Files whose rows are held out.
        left_out: Files that are not read.
        notes: Notes about that.
    """

    train: list[Path]
    held_out: list[Path]
    left_out: list[Path]
    notes: list[Note]


def chosen(source: Path, valid_split: str = "") -> Source:
    """The files to read: those for training, and those of VALID_SPLIT. UserError if there is no such split in a folder."""
    known, unknown = find(source)
    if not source.is_dir():
        return Source(known, [], unknown, [])
    metadata = [p for p in known if p.name in METADATA]
    known = [p for p in known if p.name not in METADATA]
    train, held_out, others, unnamed = splits.chosen(known, source, valid_split)
    name = display_path(source)

    def names(paths: list[Path]) -> str:
        return join_names(str(p.relative_to(source)) for p in paths)

    if valid_split and not held_out and others:
        raise UserError(no_such_split(name, valid_split, [str(p.relative_to(source)) for p in others]))
    if held_out and not train:
        raise UserError(f"{name}: VALID_SPLIT={valid_split} would hold out all of its files ({names(held_out)}).")
    notes = []
    if others:
        words = f"not used, because their names say that they are not for training: {names(others)}"
        which = splits.split_of_file(others[0], source)
        notes.append(Note("warning", name, f"{words}. VALID_SPLIT={which} makes held-out data of them"))
    if unnamed and (held_out or others):
        notes.append(
            Note("warning", name, f"read as training data, though their names do not say so: {names(unnamed)}")
        )
    elif unnamed:
        words = "read as training data, because there is nothing else, though their names say that they are held out"
        notes.append(Note("warning", name, f"{words}: {names(unnamed)}"))
    return Source(train, held_out, [*unknown, *others, *metadata], notes)
