"""The roles of a conversation, and spans of bytes that have one."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Role(enum.IntEnum):
    """The role of a token; its value is the byte that NAME.roles.bin holds for the token."""

    TEXT = 0  # plain text without a speaker
    HEADING = 1  # "User:", "Assistant:": the layout itself
    SYSTEM = 2
    USER = 3
    ASSISTANT = 4
    TOOL = 5  # the result of a tool
    UNTRAINED = 6  # an answer of the assistant that is not trained: weight 0, or the history under MASK_HISTORY


@dataclass(frozen=True)
class Span:
    """Bytes start..end (end not included) of a text, and their role."""

    start: int
    end: int
    role: Role
