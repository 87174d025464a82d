"""What reaches the terminal: no name in a file and no word of a model moves its cursor, changes its title or hides a line.
Floor 0.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator

# control characters but for tab and line feed, marks that turn the direction of writing, halves of surrogate pairs; and a
# carriage return in the middle of a line, which writes over its beginning
UNSAFE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\ud800-\udfff]|(?<!^)\r(?![\n\r]|$)"
)
UP = re.compile(r"(?:\x1b\[A)*")  # how tqdm goes back to the line of a bar
COLOURED = ("click", "wandb", "swanlab", "trackio", "rich")  # libraries that colour lines of their own


def cleaned(text: str) -> str:
    """A text with what a terminal would obey written out: ESC becomes \\x1b."""
    return UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text) if UNSAFE.search(text) else text


def open_what_is_closed() -> None:
    """A stream that whoever started us has closed (>&-) leads nowhere from here on. Else the next file that is opened would get
    its number, and hold what is written there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, errors="replace"))  # noqa: SIM115 (for as long as the process lives)


@contextlib.contextmanager
def clean_output() -> Iterator[None]:
    """Clean all that is printed, to standard output and error alike, until the block ends."""
    open_what_is_closed()
    changed = []
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # there is none, or it is no real stream
            if "write" not in vars(stream):
                vars(stream)["write"] = writer(stream.write)
                changed.append(stream)
    try:
        yield
    finally:
        for stream in changed:
            del stream.write


def writer(write):
    def clean(text: str) -> int:
        if UNSAFE.search(text) and not UP.fullmatch(text) and not is_coloured():
            write(cleaned(text))
            return len(text)
        return write(text)

    return clean


def is_coloured() -> bool:
    """Whether a library writes that colours its lines."""
    return sys._getframe(2).f_globals.get("__name__", "").partition(".")[0] in COLOURED
