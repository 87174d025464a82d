"""Find the turns of a text that is already formatted, by its headings."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

from .roles import Role, Span

WORLD = {"System": Role.SYSTEM, "User": Role.USER, "Assistant": Role.ASSISTANT}


def is_mark(heading: str) -> bool:
    """Return whether a heading needs no colon: Bot✿, which begins a line, or ### User, which is a whole line."""
    return bool(re.fullmatch(r"\w+✿|### \w[\w ]*", heading))


@functools.cache
def _patterns(words: tuple[str, ...]) -> tuple[re.Pattern[bytes], re.Pattern[bytes]]:
    """Return the pattern of headings, and that of lines that look like one.

    A heading is at the start of the text or after a blank line, with a half- or full-width colon. A line looks like one to
    a reader if it begins with the word, in any case.
    """
    any_word = "|".join(re.escape(word) for word in words if not is_mark(word))
    marks = "".join(f"|^{re.escape(word)}" + "$" * word.startswith("#") for word in words if is_mark(word))
    return (
        re.compile(f"(?:\\A|(?<=\n\n)|(?<=\n\r\n))(?:{any_word})(?::|：){marks}".encode(), re.M),
        re.compile(f"^[ \t]*(?:{any_word})[ \t]*(?::|：)".encode(), re.I | re.M),
    )


def spans_of_text(data: bytes, words: Mapping[str, Role] = WORLD) -> list[Span]:
    """Return the turns of a formatted text, found by their headings; one TEXT span if it has none.

    Args:
        data: the text in UTF-8.
        words: the word before the colon (or a mark without one) -> the role of the turn.
    """
    spans: list[Span] = []
    role, start = Role.TEXT, 0
    for heading in _patterns(tuple(words))[0].finditer(data) if words else ():
        if heading.start() > start:
            spans.append(Span(start, heading.start(), role))
        spans.append(Span(*heading.span(), Role.HEADING))
        text = heading[0].decode()
        role, start = words[text if text in words else text[:-1]], heading.end()
    if len(data) > start:
        spans.append(Span(start, len(data), role))
    return spans


def overlooked_heading(data: bytes, spans: Sequence[Span], words: Mapping[str, Role] = WORLD) -> str:
    """Return the first line of a formatted text that looks like a heading but is none to the models; "" if there is none.

    It has no blank line before it, another case, or a full-width colon (which does begin a turn in `spans_of_text`).
    """
    known = {span.start for span in spans if span.role is Role.HEADING and data[span.end - 1 : span.end] == b":"}
    alike = _patterns(tuple(words))[1].finditer(data) if words else ()
    overlooked = next((m for m in alike if m.start() not in known), None)
    return overlooked[0].decode("utf-8").strip() if overlooked else ""
