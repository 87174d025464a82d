"""JSON lines: rows of every schema, one on a line. See fuzz/rows.py for what is sound."""

from __future__ import annotations

import random

from fuzz.rows import Rows, json_rows


class It(Rows):
    ending = ".jsonl"
    cases = ("*.jsonl", "*.ndjson", "*.jsonl.txt")

    def mutate(self, data: bytes, random: random.Random, other: bytes) -> bytes:
        return json_rows(data, random, other)
