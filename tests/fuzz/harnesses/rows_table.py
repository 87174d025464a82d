"""Tables of text (.csv, .tsv by content): marks, quotes, headers, empty cells, cells that hold lists."""

from __future__ import annotations

import random

from fuzz import mutate
from fuzz.rows import Rows

WORDS = (
    b",", b";", b"\t", b"|", b'"', b'""', b'\\"', b' "', b'" ', b"\r\n", b"\r", b"\n", b"nan", b"NULL", b"None",
    b"#N/A", b"prompt", b"response", b"text", b"messages", b"split", b"test",
    b"\"[{'role': 'user', 'content': 'a'}]\"", b"system", b"\xef\xbb\xbf", b"image", b"instruction,input,output\n",
    b"Unnamed: 0", b"sep=;\n", b"\\", b"'",
)  # fmt: skip


class It(Rows):
    ending = ".csv"
    cases = ("*.csv", "*.tsv")
    words = WORDS

    def mutate(self, data: bytes, random: random.Random, other: bytes) -> bytes:
        if random.random() < 0.15:  # another mark between cells
            return data.replace(*random.sample((b",", b";", b"\t", b"|"), 2))
        return mutate.of_lines(data, random, other, WORDS)
