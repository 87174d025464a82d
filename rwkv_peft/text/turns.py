"""Texts that are ready: who says what is found by the headings that stand in them."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

from .roles import Role, Span

WORLD = {"System": Role.SYSTEM, "User": Role.USER, "Assistant": Role.ASSISTANT}


def is_mark(heading: str) -> bool:
    """Whether a heading needs no colon: Bot✿, which stands at the start of a line, or ### User, which is one."""
    return bool(re.fullmatch(r"\w+✿|### \w[\w ]*", heading))


@functools.cache
def patterns(words: tuple[str, ...]) -> tuple[re.Pattern[bytes], re.Pattern[bytes]]:
    """What is a heading: at the start of the text or after a blank line, with a half- or full-width colon. And what looks
    like one to a reader: the word at the start of a line, in any case.
    """
    any_word = "|".join(re.escape(word) for word in words if not is_mark(word))
    marks = "".join(f"|^{re.escape(word)}" + "$" * word.startswith("#") for word in words if is_mark(word))
    return (
        re.compile(f"(?:\\A|(?<=\n\n)|(?<=\n\r\n))(?:{any_word})(?::|：){marks}".encode(), re.M),
        re.compile(f"^[ \t]*(?:{any_word})[ \t]*(?::|：)".encode(), re.I | re.M),
    )


def spans_of_text(data: bytes, words: Mapping[str, Role] = WORLD) -> list[Span]:
    """The turns that a ready text (UTF-8) holds, found by their headings; one TEXT span where it has none.

    words: what stands before the colon (or is a mark by itself) -> who speaks.
    """
    spans: list[Span] = []
    role, start = Role.TEXT, 0
    for heading in patterns(tuple(words))[0].finditer(data) if words else ():
        if heading.start() > start:
            spans.append(Span(start, heading.start(), role))
        spans.append(Span(*heading.span(), Role.HEADING))
        text = heading[0].decode()
        role, start = words[text if text in words else text[:-1]], heading.end()
    if len(data) > start:
        spans.append(Span(start, len(data), role))
    return spans


def overlooked_heading(data: bytes, spans: Sequence[Span], words: Mapping[str, Role] = WORLD) -> str:
    """The first line of a ready text that looks like a heading but is not what the models know as one: no blank line
    before it, another case, a full-width colon (which does count as a turn here, for who says what). Or "".
    """
    known = {span.start for span in spans if span.role is Role.HEADING and data[span.end - 1 : span.end] == b":"}
    alike = patterns(tuple(words))[1].finditer(data) if words else ()
    found = next((m for m in alike if m.start() not in known), None)
    return found[0].decode("utf-8").strip() if found else ""
