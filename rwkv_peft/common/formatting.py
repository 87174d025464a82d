"""Small pieces of the sentences that the user reads: counts, lists, times, and what a mistyped word may have meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import PurePath

from .names import visible
from .terminal import cleaned

LONGEST_LINE = 2000  # characters of a line that is shown; names in damaged files may have any length
LISTED = 8  # names that a message lists; the rest are counted


def plural(n: int, noun: str) -> str:
    """1 row, 2 rows, 1,000 rows."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def is_or_are(n: int) -> str:
    return "is" if n == 1 else "are"


def join_names(names: Iterable[str], most: int = LISTED) -> str:
    """a, b and 3 more; numbers in names count as numbers (x-2 before x-10). Nothing at all is called "nothing"."""
    ordered = sorted(
        names, key=lambda n: [(not p.isdigit(), int(p) if p.isdigit() else p) for p in re.split(r"(\d+)", n)]
    )
    more = f" and {len(ordered) - most:,} more" if len(ordered) > most else ""
    return ", ".join(map(visible, ordered[:most])) + more or "nothing"


def did_you_mean(word: str, known: Iterable[object]) -> str:
    """The words "; did you mean SEED?" for the nearest known word, or nothing. Case and the endings of files do not count."""
    # (of names that only their endings tell apart, the shortest)
    by_stem = {PurePath(k).stem.upper(): k for k in sorted(map(str, known), key=len, reverse=True)}
    near = difflib.get_close_matches(PurePath(word).stem.upper(), by_stem, n=1, cutoff=0.6)
    return f"; did you mean {visible(by_stem[near[0]])}?" if near else ""


def format_size(number: float) -> str:
    """800 bytes, 300 kB, 1.1 MB, 2.50 GB."""
    for unit, least, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 0)):
        if number >= least:
            return f"{number / least:,.{digits}f} {unit}"
    return plural(int(number), "byte")


def readable(words: str) -> str:
    """Words that quote what foreign files hold, as they may be shown: control characters as \\x1b, and lines with an end."""
    lines = cleaned(words).split("\n")
    return "\n".join(
        line
        if len(line) <= LONGEST_LINE
        else f"{line[:LONGEST_LINE]} ... ({plural(len(line) - LONGEST_LINE, 'character')} more)"
        for line in lines
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's words; what kind of error it is, where it has none."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def format_duration(seconds: float) -> str:
    """1:05 or 2:00:00."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
