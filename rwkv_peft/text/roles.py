"""Who said what: the roles of a conversation, and spans of bytes that carry one. Floor 0: a fact that rooms share."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Role(enum.IntEnum):
    """Who said a token; the byte that NAME.roles.bin holds for it."""

    TEXT = 0  # plain text, nobody in particular
    HEADING = 1  # "User:", "Assistant:": the layout itself
    SYSTEM = 2
    USER = 3
    ASSISTANT = 4
    TOOL = 5  # what a tool gave back
    UNTRAINED = 6  # said by the assistant, but not to be learnt: weight 0, or the history under MASK_HISTORY


@dataclass(frozen=True)
class Span:
    """Bytes start..end (end not included) of a text, and who said them."""

    start: int
    end: int
    role: Role
