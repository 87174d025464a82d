"""Format parts of messages: counts, lists, sizes, times, and suggestions for a mistyped word."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import PurePath

from .names import escape_invisible
from .terminal import clean_text

_LONGEST_LINE = 2000  # characters of a line that is shown; names in damaged files may have any length
_LISTED = 8  # names that a message lists; the rest are counted


def plural(n: int, noun: str) -> str:
    """Format a count with its noun: 1 row, 2 rows, 1,000 rows."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def is_or_are(n: int) -> str:
    """Return the verb after a count."""
    return "is" if n == 1 else "are"


def join_names(names: Iterable[str], most: int = _LISTED) -> str:
    """List names in order, as in: a, b and 3 more. Returns "nothing" if there are none.

    Numbers in names are ordered by value: x-2 comes before x-10.
    """

    def order(name: str) -> list[tuple[bool, int | str]]:
        return [(not part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", name)]

    ordered = sorted(names, key=order)
    more = f" and {len(ordered) - most:,} more" if len(ordered) > most else ""
    return ", ".join(map(escape_invisible, ordered[:most])) + more or "nothing"


def did_you_mean(word: str, known: Iterable[object]) -> str:
    """Return "; did you mean SEED?" with the nearest known word, or "". Case and file suffixes are ignored."""
    # (of names that differ only in their suffix, the shortest)
    by_stem = {PurePath(k).stem.upper(): k for k in sorted(map(str, known), key=len, reverse=True)}
    near = difflib.get_close_matches(PurePath(word).stem.upper(), by_stem, n=1, cutoff=0.6)
    return f"; did you mean {escape_invisible(by_stem[near[0]])}?" if near else ""


def format_size(number: float) -> str:
    """Format a number of bytes: 800 bytes, 300 kB, 1.1 MB, 2.50 GB."""
    for unit, least, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 0)):
        if number >= least:
            return f"{number / least:,.{digits}f} {unit}"
    return plural(int(number), "byte")


def printable(words: str) -> str:
    r"""Make text that quotes foreign files fit to print: control characters become \x1b, long lines are truncated."""
    lines = clean_text(words).split("\n")
    return "\n".join(
        line
        if len(line) <= _LONGEST_LINE
        else f"{line[:_LONGEST_LINE]} ... ({plural(len(line) - _LONGEST_LINE, 'character')} more)"
        for line in lines
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; the name of its class if it has none."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def format_duration(seconds: float) -> str:
    """Format a time: 1:05 or 2:00:00."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
