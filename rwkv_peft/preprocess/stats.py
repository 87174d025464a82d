"""What is counted while rows become tokens: what the report is made of."""

from __future__ import annotations

import array
from collections import Counter
from typing import Any

import numpy as np

from rwkv_peft.text.roles import Role

from .pipeline import EncodedBlock, Place, Reject
from .reader import Note

SHOW = 10  # places that are listed; the rest are counted
KEYS = (
    200  # different keys of a file that are counted one by one; data sets with a key for each row have no end of them
)


class CorpusStats:
    """Sums over all blocks.

    Attributes:
        sizes: Tokens of every row that is written, in order.
        hashes: Of their content.
        documents: Hashes of all that was made of the same row.
    """

    def __init__(self, keep_documents: bool = False):
        self.keep_documents = keep_documents  # only the held-out part asks which rows were made of the same one
        self.counts: Counter[str] = Counter()
        self.scripts = np.zeros(257, np.int64)
        self.sizes, self.hashes, self.documents = array.array("i"), array.array("Q"), array.array("Q")
        self.learnt = 0  # tokens that LOSS_MASK=qa trains
        self.rejects: list[Reject] = []
        self.places: dict[str, list[Place]] = {}
        self.seen: set[str] = set()
        self.unused: dict[str, Counter[tuple[str, str]]] = {}  # file -> (level, key) -> rows in which it is not used
        self.held_out = array.array("b")  # of every row that is written: whether VALID_SPLIT names its part
        self.notes: list[Note] = []

    def add(self, one: EncodedBlock) -> None:
        """Add a block."""
        self.counts += one.counts
        self.scripts += one.scripts
        self.sizes.frombytes(one.sizes.astype(np.int32).tobytes())
        self.hashes.frombytes(one.hashes.astype(np.uint64).tobytes())
        if self.keep_documents:
            self.documents.frombytes(one.documents.astype(np.uint64).tobytes())
        self.learnt += int(np.count_nonzero(one.roles == Role.ASSISTANT))
        self.rejects += one.rejects[: SHOW - len(self.rejects)]
        for what, examples in one.places.items():
            kept = self.places.setdefault(what, [])
            kept += examples[: SHOW - len(kept)]
        self.seen |= one.seen
        if one.unused:
            keys = self.unused.setdefault(one.file, Counter())
            for key, rows in one.unused.items():
                keys[key if key in keys or len(keys) < KEYS else (key[0], "")] += rows
        self.held_out.frombytes(bytes([one.held_out]) * len(one.sizes))
        self.notes += one.notes

    def unused_keys(self) -> dict[str, list[list]]:
        """File -> [level, key, rows] of what is not used, the most frequent first."""
        return {
            file: [[level, key, rows] for (level, key), rows in keys.most_common()]
            for file, keys in self.unused.items()
        }

    def group(self, prefix: str) -> dict[str, int]:
        """The counts whose names begin so, the largest first: "rejected: not JSON" -> {"not JSON": ...}."""
        numbers = {name[len(prefix) :]: n for name, n in self.counts.items() if name.startswith(prefix) and n}
        return dict(sorted(numbers.items(), key=lambda item: (-item[1], item[0])))


# the script by the first byte of a character in UTF-8; for E3 the next byte decides
SCRIPTS = {
    "Latin": [*range(0x41, 0x5B), *range(0x61, 0x7B), *range(0xC3, 0xCA)],
    "Chinese characters": range(0xE4, 0xEA),
    "Japanese kana": (),
    "Korean": range(0xEA, 0xEE),
    "Cyrillic": range(0xD0, 0xD4),
    "Greek": range(0xCE, 0xD0),
    "Hebrew and Arabic": range(0xD6, 0xDC),
    "Indian and Thai": (0xE0,),
    "emoji and rare characters": range(0xF0, 0xF5),
    "digits": range(0x30, 0x3A),
}


def script_shares(scripts: np.ndarray) -> dict[str, float]:
    """Share of each script among the characters that belong to one (no spaces, no punctuation), largest first."""
    by_script: dict[str, Any] = {name: int(scripts[list(which)].sum()) for name, which in SCRIPTS.items()}
    by_script["Japanese kana"] = int(scripts[256])
    total = sum(by_script.values()) or 1
    return {name: round(n / total, 4) for name, n in sorted(by_script.items(), key=lambda item: -item[1]) if n}
