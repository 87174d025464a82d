"""Clean what is printed: no name in a file and no output of a model can control the terminal.

It could otherwise move the cursor, change the title or hide a line.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator

# control characters except tab and line feed, marks that change the direction of writing, lone surrogates; and a
# carriage return in the middle of a line, which writes over its beginning
_UNSAFE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\ud800-\udfff]|(?<!^)\r(?![\n\r]|$)"
)
_CURSOR_UP = re.compile(r"(?:\x1b\[A)*")  # tqdm moves to the line of a bar with it
_COLOURING_LIBRARIES = ("click", "wandb", "swanlab", "trackio", "rich")


def clean_text(text: str) -> str:
    r"""Write out the characters that a terminal would obey: ESC becomes \x1b."""
    return _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text) if _UNSAFE.search(text) else text


def _open_closed_streams() -> None:
    """Open standard streams that the parent process has closed (>&-) on /dev/null.

    Otherwise the next file that is opened would get the stream's number, and receive what is printed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, errors="replace"))  # noqa: SIM115 (for as long as the process lives)


@contextlib.contextmanager
def clean_output() -> Iterator[None]:
    """Clean all that is printed to standard output and standard error until the block ends."""
    _open_closed_streams()
    changed = []
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # there is no stream, or no real one
            if "write" not in vars(stream):
                vars(stream)["write"] = _cleaning_write(stream.write)
                changed.append(stream)
    try:
        yield
    finally:
        for stream in changed:
            del vars(stream)["write"]


def _cleaning_write(write: Callable[[str], int]) -> Callable[[str], int]:
    def clean(text: str) -> int:
        if _UNSAFE.search(text) and not _CURSOR_UP.fullmatch(text):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.partition(".")[0] not in _COLOURING_LIBRARIES:
                write(clean_text(text))
                return len(text)
        return write(text)

    return clean
