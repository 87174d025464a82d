"""Workbooks: a zip file of XML. Sound: as in fuzz/rows.py."""

from __future__ import annotations

import random

from fuzz import mutate
from fuzz.rows import Rows
from rwkv_peft.preprocess import workbooks

WORDS = (
    b'<row r="1">', b"</row>", b'<c r="A1" t="inlineStr"><is><t>x</t></is></c>', b'<c r="XFD1048576"><v>1</v></c>',
    b't="s"', b't="b"', b't="e"', b"<v>99999</v>", b"<v>1e400</v>", b"prompt", b"response", b"text", b"&amp;",
    b"&#0;", b"<f>A1</f>", b'r="B2000"', b'<mergeCell ref="A1:B2"/>', b"<sheets>",
    b'<sheet name="test" sheetId="9" r:id="rId1"/>',
)  # fmt: skip


class It(Rows):
    ending = ".xlsx"
    cases = ("*.xlsx",)
    starts = (workbooks.PROBE,)

    def mutate(self, data: bytes, random: random.Random, other: bytes) -> bytes:
        return mutate.of_zip(
            data, random, other, lambda _, content, source: mutate.of_bytes(content, source, b"", WORDS)
        )

    def grown(self, data: bytes, random: random.Random, size: int) -> bytes:
        result = mutate.members(data)
        if not result:
            return super().grown(data, random, size)
        at = random.randrange(len(result))
        result[at] = result[at][0], mutate.grown(result[at][1], random, size), result[at][2]
        return mutate.zipped(result)
