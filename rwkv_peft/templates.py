"""Conversations -> the text that RWKV models were trained on, and who said which bytes of it.

The whole conversation is rendered first and encoded once, because the World tokenizer joins "。" with a newline that
follows: encoding turn by turn would give other ids. So everything here speaks in byte spans of the final text.

    System: ...\\n\\nUser: ...\\n\\nAssistant: ...\\n\\nUser: ...\\n\\nAssistant: ...

A prompt ends exactly at "Assistant:" (no space: a space would be the wrong first token of the answer). The answer's span
begins at the space after it and includes the blank line that ends the turn.
Source: the model card of BlinkDL/rwkv-7-world and RWKV7-G1x-templates.txt in BlinkDL/RWKV-LM.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import UserError
from .roles import Role, Span


@dataclass(frozen=True)
class Message:
    role: Role
    content: str


HEADINGS = {Role.SYSTEM: "System", Role.USER: "User", Role.ASSISTANT: "Assistant"}

# the names that data sets give to the three roles
ROLE_NAMES = {
    "system": Role.SYSTEM,
    "user": Role.USER,
    "human": Role.USER,
    "assistant": Role.ASSISTANT,
    "gpt": Role.ASSISTANT,
    "bot": Role.ASSISTANT,
    "model": Role.ASSISTANT,
}


def clean(content: str) -> str:
    """No blank line inside a turn: a blank line is what ends one."""
    return re.sub(r"\n\s*\n", "\n", content.replace("\r\n", "\n").replace("\r", "\n")).strip()


def render(messages: Sequence[Message], open_answer: bool = False) -> tuple[str, list[Span]]:
    """The conversation as one text, with the spans of its turns.

    open_answer: end with "Assistant:", the prompt of an answer that is still to come.
    """
    parts: list[str] = []
    spans: list[Span] = []
    at = 0

    def add(text: str, role: Role) -> None:
        nonlocal at
        size = len(text.encode("utf-8"))
        parts.append(text)
        spans.append(Span(at, at + size, role))
        at += size

    for i, message in enumerate(messages):
        last = i == len(messages) - 1 and not open_answer
        add(HEADINGS[message.role] + ":", Role.HEADING)
        add(" " + clean(message.content) + ("" if last else "\n\n"), message.role)
    if open_answer:
        add(HEADINGS[Role.ASSISTANT] + ":", Role.HEADING)
    return "".join(parts), spans


# a heading stands at the start of the text or after a blank line, with a half- or full-width colon
HEADING = re.compile("(?:\\A|(?<=\n\n)|(?<=\n\r\n))(System|User|Assistant)(?::|：)".encode())
ROLE_OF_HEADING = {word.encode(): role for role, word in HEADINGS.items()}


def spans_of_text(data: bytes) -> list[Span]:
    """The turns that a ready text (UTF-8) holds, found by their headings; one TEXT span where it has none."""
    spans: list[Span] = []
    role, start = Role.TEXT, 0
    for heading in HEADING.finditer(data):
        if heading.start() > start:
            spans.append(Span(start, heading.start(), role))
        spans.append(Span(*heading.span(), Role.HEADING))
        role, start = ROLE_OF_HEADING[heading[1]], heading.end()
    if len(data) > start:
        spans.append(Span(start, len(data), role))
    return spans


# what looks like a turn's beginning to a reader: the word at the start of a line, in any case
LIKE_A_HEADING = re.compile("^[ \t]*(?:system|user|assistant)[ \t]*(?::|：)".encode(), re.I | re.M)


def overlooked_heading(data: bytes, spans: Sequence[Span]) -> str:
    """The first line of a ready text that looks like a heading but is not what the models know as one: no blank line
    before it, another case, a full-width colon (which does count as a turn here, for who says what). Or ""."""
    known = {span.start for span in spans if span.role is Role.HEADING and data[span.end - 1 : span.end] == b":"}
    found = next((m for m in LIKE_A_HEADING.finditer(data) if m.start() not in known), None)
    return found[0].decode("utf-8").strip() if found else ""


def messages_of(rows: object) -> list[Message]:
    """Messages from [{"role": ..., "content": ...}, ...] (or "from"/"value"). Raises UserError with the reason."""
    if not isinstance(rows, list) or not rows:
        raise UserError("its conversation must be a list of messages with at least one in it")
    messages = []
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"message {i} must be an object with role and content")
        name, content = row.get("role", row.get("from")), row.get("content", row.get("value"))
        role = ROLE_NAMES.get(name.strip().lower()) if isinstance(name, str) else None
        if role is None:
            raise UserError(f"message {i} has the role {name!r}; known are {', '.join(ROLE_NAMES)}")
        if not isinstance(content, str):
            raise UserError(f"message {i} ({name}) has no text in content")
        if not clean(content):
            raise UserError(f"message {i} ({name}) is empty")
        messages.append(Message(role, content))
    if not any(m.role is Role.ASSISTANT for m in messages):
        raise UserError("the conversation has no assistant message")
    return messages
