"""The logs loss.jsonl and valid.jsonl: one object per line.

A power cut, an editor or another program may have left anything in them: what is not a record is skipped, and nothing
after it is lost. Floor 0.
"""

from __future__ import annotations

import bisect
import itertools
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_peft.common import json_reader
from rwkv_peft.common.atomic_io import atomic_write, fsync_file, open_append, open_regular

FILE = "loss.jsonl"  # in the folder of a run: an object for every optimizer step
DAMAGED = "loss-damaged.jsonl"  # the original log, where lines of it were not records
MOST_COUNT = (1 << 53) - 1  # which a float holds exactly
MOST_LINE = 1 << 20  # characters; a record has about 200
COUNTS = {"epoch": 0, "targets": 0}  # other fields of a record, and their values where they are missing
NUMBERS = {"lr": 0.0, "tokens_per_s": 0.0, "seconds": 0.0}


class Line(NamedTuple):
    """A line of a log.

    Attributes:
        text: as it is in the file, with one line end.
        record: None if the line is not a record.
    """

    text: str
    record: dict[str, Any] | None


def read_lines(path: Path, is_record: Callable[[dict], bool]) -> Iterator[Line]:
    """Yield the lines of a file, if it exists, except empty ones.

    UTF-16 is read where an editor has put its mark at the beginning.
    """
    if not path.exists():
        return
    with open_regular(path) as file:
        is_utf16 = file.read(4) in ("\ufeff{".encode(utf16) for utf16 in ("utf-16-le", "utf-16-be"))
    encoding = "utf-16" if is_utf16 else "utf-8-sig"
    with open_regular(path, "r", encoding=encoding, errors="surrogateescape", newline="\n") as file:
        while text := file.readline(MOST_LINE):
            if not text.endswith("\n") and len(text) == MOST_LINE:
                while (rest := file.readline(MOST_LINE)) and not rest.endswith("\n"):
                    pass
                yield Line("", None)
            elif text.strip():
                yield Line(text.rstrip("\r\n") + "\n", parse_line(text, is_record))


def parse_line(text: str, is_record: Callable[[dict], bool]) -> dict[str, Any] | None:
    """Return the record that a line holds, None if it is not one."""
    try:
        record = json_reader.parse_json(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) and is_record(record) else None


def is_count(value: object, least: int = 0) -> bool:
    """Return whether a value is a whole number from `least` that a float holds exactly."""
    return json_reader.is_whole(value, least, MOST_COUNT)


def is_number(value: object) -> bool:
    """Return whether a value is a finite number, and not less than 0."""
    return is_count(value) or (isinstance(value, float) and math.isfinite(value) and value >= 0)


def is_step(record: dict) -> bool:
    """Return whether an object is the record of an optimizer step."""
    return (
        is_count(record.get("step"), 1)
        and "loss" in record
        and (record["loss"] is None or is_number(record["loss"]))
        and all(is_count(record.get(name, default)) for name, default in COUNTS.items())
        and all(is_number(record.get(name, default)) for name, default in NUMBERS.items())
    )


def read_log(folder: Path, last: int | None = None) -> list[dict[str, Any]]:
    """Return the records of a run in the order of their steps, up to step `last`.

    Of two records of one step the later line counts.
    """
    return [record for record, _ in read_records(folder / FILE, last)]


def read_records(path: Path, last: int | None) -> list[tuple[dict[str, Any], str]]:
    """Return the records of a log and their lines, in the order of their steps."""
    by_step: dict[int, tuple[dict[str, Any], str]] = {}
    for text, record in read_lines(path, is_step):
        if record and (last is None or record["step"] <= last):
            by_step[record["step"]] = {**COUNTS, **NUMBERS, **record}, text
    return [by_step[step] for step in sorted(by_step)]


def truncate_log(folder: Path, last: int) -> tuple[list[dict[str, Any]], bool]:
    """Remove from loss.jsonl what comes after an optimizer step, and what is not a record.

    The lock on the file stays: it is changed in place.

    Returns:
        The records that are left, and whether more than the end of the file changed; the original log is then kept as
            DAMAGED.
    """
    path = folder / FILE
    with open_append(path, "a+b") as file:
        records = read_records(path, last)
        content = "".join(text for _, text in records).encode()
        file.seek(0)
        is_beginning = file.read(len(content)) == content
        if not is_beginning:
            with open_regular(path) as old, atomic_write(folder / DAMAGED) as copy:
                shutil.copyfileobj(old, copy)
            file.truncate(0)
            file.write(content)
        file.truncate(len(content))
        fsync_file(file)
    return [record for record, _ in records], not is_beginning


def missing_lines(path: Path, written: str) -> str:
    """Return what to append to a log so that it has all records of another one, whose text is `written`."""
    there = {record["step"] for record in read_log(path.parent)}
    parsed = [(parse_line(line, is_step), line) for line in written.split("\n")]
    more = "".join(line + "\n" for record, line in parsed if record and record["step"] not in there)
    with open_regular(path) as file:
        end = file.read()[-1:]
    return ("" if end in (b"", b"\n") else "\n") + more


def find_gaps(steps: Sequence[int], last: int) -> list[list[int]]:
    """Return the steps without a record up to `last`, as [first, last] of each gap.

    Args:
        steps: the steps that have a record, rising.
        last: the last step that should have one.
    """
    ends = itertools.pairwise([0, *steps, last + 1])
    return [[before + 1, after - 1] for before, after in ends if after - before > 1]


def find_new_gaps(log_gaps: Sequence[list[int]], known: object) -> list[list[int]]:
    """Return the gaps that are not part of those that a state records as reported.

    Args:
        log_gaps: the gaps of a log.
        known: as it is in the manifest.
    """
    reported = [gap for gap in known if isinstance(gap, list) and len(gap) == 2] if isinstance(known, list) else []
    reported = sorted(gap for gap in reported if all(is_count(end) for end in gap))
    begins, ends = (
        [first for first, _ in reported],
        list(itertools.accumulate((last for _, last in reported), max, initial=-1)),
    )
    return [[first, last] for first, last in log_gaps if last > ends[bisect.bisect_right(begins, first)]]


def describe_gaps(log_gaps: Sequence[list[int]]) -> str:
    """Format gaps as step 3, steps 5 to 9."""
    words = [f"step {first:,}" if first == last else f"steps {first:,} to {last:,}" for first, last in log_gaps]
    return ", ".join(words[:3]) + (f" and {len(words) - 3:,} more gaps" if len(words) > 3 else "")
