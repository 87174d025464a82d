"""The keys of JSON rows, found in their bytes without parsing: a quote, blanks perhaps, and a colon."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BLANKS = np.isin(np.arange(256), list(b" \t\r\n"))
QUOTE, APOSTROPHE, BACKSLASH, COLON = b"\"'\\:"
WIDE_COLON = "：".encode()
FARTHEST = 64  # blanks or backslashes that are walked over
UNKNOWN = -1


def key_ends(data: bytes, wide: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return where keys may end, and whether that is sure.

    Values that begin with a colon are among them. wide: full-width colons count too.

    Returns:
        The places of quotes before a colon, ascending int64 [keys]; and bool [keys]: of others it is not known whether
        they are quotes.
    """
    text = np.frombuffer(data, np.uint8)
    at = np.flatnonzero(text[1:] == COLON)  # the places before colons
    if wide:
        at = np.sort(np.concatenate([at, wide_colons(text)]))
    walking = np.flatnonzero(BLANKS[text[at]])
    for _ in range(FARTHEST):
        walking = walking[at[walking] > 0]
        if not len(walking):
            break
        at[walking] -= 1
        walking = walking[BLANKS[text[at[walking]]]]
    sure = np.ones(len(at), dtype=bool)
    sure[walking] = False
    quotes = (text[at] == QUOTE) | (text[at] == APOSTROPHE) | ~sure
    return at[quotes], sure[quotes]


def wide_colons(text: np.ndarray) -> np.ndarray:
    """The places before full-width colons, which people type for others."""
    at = np.flatnonzero(text[3:] == WIDE_COLON[2]) + 3
    return at[(text[at - 1] == WIDE_COLON[1]) & (text[at - 2] == WIDE_COLON[0])] - 3


def counts(rows: Sequence[bytes]) -> list[int]:
    """Return how many keys the bytes of every row have, [rows]; UNKNOWN where that needs parsing.

    A value that begins with a colon counts as one.
    """
    data = b"\n".join(rows)
    at, sure = key_ends(data)
    text = np.frombuffer(data, np.uint8)
    double = text[at] == QUOTE
    at, sure = at[double | ~sure], sure[double | ~sure]
    # a quote behind an odd number of backslashes belongs to a text
    slashes, before = np.zeros(len(at), dtype=np.int64), at.copy()
    walking = np.arange(len(at))
    for _ in range(FARTHEST):
        walking = walking[before[walking] > 0]
        before[walking] -= 1
        walking = walking[text[before[walking]] == BACKSLASH]
        if not len(walking):
            break
        slashes[walking] += 1
    sure[walking] = False
    ends = np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)) + 1)
    row = np.searchsorted(ends, at, side="right")
    numbers = np.bincount(row[slashes % 2 == 0], minlength=len(rows))
    numbers[row[~sure]] = UNKNOWN
    return numbers.tolist()
