"""Files with one message per row, which are put together to conversations; as JSON lines. Sound: as in fuzz/rows.py."""

from __future__ import annotations

import random

from fuzz import mutate
from fuzz.rows import Rows

KEYS = (
    "conversation_id", "conv_id", "session_id", "turn_id", "turn", "index", "message_id", "parent_id",
    "message_tree_id", "role", "from", "speaker", "content", "text", "value", "user", "assistant", "prompter",
    "split", "rank", "lang",
)  # fmt: skip


class It(Rows):
    ending = ".jsonl"
    cases = ("k13*",)

    def mutate(self, data: bytes, random: random.Random, other: bytes) -> bytes:
        return mutate.of_json_lines(data, random, other, KEYS)
