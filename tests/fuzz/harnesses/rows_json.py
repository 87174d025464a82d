"""JSON files: a list of rows, an object of columns or splits, objects over several lines, comments, Python's
literals."""

from __future__ import annotations

import random

from fuzz import mutate
from fuzz.rows import NAMES, Rows

WORDS = (
    b"//", b"/*", b"*/", b"#", b"'", b"None", b"True", b"NaN", b"[", b"]", b"{", b"}", b",", b":", b"\xef\xbb\xbf",
    b"\\u0000", b'"train"', b'"test"', b'"data"', b'"rows"', b"}{", b"}\n{",
)  # fmt: skip


class It(Rows):
    ending = ".json"
    cases = ("*.json", "p04-*.jsonl")

    def mutate(self, data: bytes, random: random.Random, other: bytes) -> bytes:
        if random.random() < 0.4:
            return mutate.of_lines(data, random, other, WORDS)
        return mutate.of_json(
            data, random, other, (*NAMES, "train", "test", "data"), indent=random.choice((None, None, 1))
        )
