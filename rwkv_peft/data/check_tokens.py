"""Check the tokens of a .bin and the roles beside it, and count facts about them.

Files are read in blocks, whatever their size.
"""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkv_peft.common import paths
from rwkv_peft.common.formatting import plural
from rwkv_peft.text import tokenizer
from rwkv_peft.text.roles import Role

from .binidx import HEADER, MAGIC
from .check_index import Faults, IndexedPair, read_blocks, read_pair

LAST_WORLD_ID = 65529  # 65530..65535 are reserved


@dataclass(frozen=True)
class TokenBlock:
    """A block of tokens.

    Attributes:
        ids: int64 [n], -1 for what is not a whole number.
        at: number of the first token in the .bin.
        ends: where rows end in it, 0..n, rising.
        row: number of the row at the beginning of the block.
        row_at: where that row began in the .bin.
    """

    ids: np.ndarray
    at: int
    ends: np.ndarray
    row: int
    row_at: int

    def place(self, i: int) -> tuple[int, int]:
        """Return the row of token `i` of this block, and its number in that row."""
        before = int(np.searchsorted(self.ends, i, side="right"))
        return self.row + before, self.at + int(i) - (self.at + int(self.ends[before - 1]) if before else self.row_at)

    def starts(self) -> np.ndarray:
        """Return where the rows begin that end here: below 0 for one that began in an earlier block."""
        return np.concatenate([[self.row_at - self.at], self.ends[:-1]]) if len(self.ends) else self.ends


def token_blocks(pair: IndexedPair) -> Iterator[TokenBlock]:
    """Yield the tokens of a sound pair with the ends of their rows; of another pair, without them."""
    sizes = pair.sizes() if pair.sound else iter(())
    ends, total, row, row_at = np.zeros(0, np.int64), 0, 0, 0
    for at, block in read_blocks(pair.bin, "<u2" if pair.dtype is None else pair.dtype, 0, pair.tokens):
        while not len(ends) or ends[-1] <= at + len(block):
            _, more = next(sizes, (0, None))
            if more is None:
                break
            ends = np.concatenate([ends, total + np.cumsum(more, dtype=np.int64)])
            total = int(ends[-1])
        here = ends[: np.searchsorted(ends, at + len(block), side="right")]
        yield TokenBlock(to_integers(block), at, here - at, row, row_at)
        if len(here):
            row, row_at, ends = row + len(here), int(here[-1]), ends[len(here) :]


def to_integers(block: np.ndarray) -> np.ndarray:
    """Convert a block to int64; -1 for what is not a whole number."""
    if block.dtype.kind == "f":
        whole = np.isfinite(block) & (block == np.floor(block)) & (np.abs(block) < 2**62)
        return np.where(whole, block, -1).astype(np.int64)
    return block.astype(np.int64)


class Utf8Rows:
    """Counts the rows whose bytes are not UTF-8.

    A row may be larger than a block: an incomplete character waits for its rest.
    """

    def __init__(self):
        # one more than the vocabulary: a line break between rows, which no character can span
        self.table = [*tokenizer.token_bytes(), b"\n"]
        self.waiting, self.open_is_bad = b"", False
        self.bad = 0
        self.first_bad: int | None = None

    def push(self, piece: TokenBlock) -> None:
        """Process the next block."""
        if not self.open_is_bad:
            data = self.waiting + self.joined(np.insert(piece.ids, piece.ends, len(self.table) - 1))
            with contextlib.suppress(UnicodeDecodeError):
                self.waiting = data[codecs.utf_8_decode(data, "strict", False)[1] :]
                return
        begin, size = 0, len(piece.ids)
        for i, end in enumerate([*piece.ends.tolist(), size]):
            last = i < len(piece.ends)
            if not self.open_is_bad:
                data = self.waiting + self.joined(piece.ids[begin:end])
                try:
                    self.waiting = data[codecs.utf_8_decode(data, "strict", last)[1] :]
                except UnicodeDecodeError:
                    self.bad, self.open_is_bad = self.bad + 1, True
                    self.first_bad = piece.row + i if self.first_bad is None else self.first_bad
            if last:
                self.waiting, self.open_is_bad = b"", False
            begin = end

    def joined(self, ids: np.ndarray) -> bytes:
        """Return the bytes of tokens."""
        return b"".join(map(self.table.__getitem__, ids.tolist()))


@dataclass
class TokenFacts:
    """Counts of the tokens of a pair."""

    outside: int = 0  # ids that no World vocabulary has
    lowest: int = 0
    highest: int = 0
    ended: int = 0  # rows that end with token 0
    not_text: int = 0  # rows that are not UTF-8
    first_not_text: int | None = None


def read_tokens(pair: IndexedPair, faults: Faults, warnings: Faults) -> TokenFacts:
    """Check the tokens of a pair, and count facts about them."""
    facts, rows = TokenFacts(), Utf8Rows()
    name, item = paths.display_path(pair.bin), pair.dtype.itemsize if pair.dtype else 1
    for piece in token_blocks(pair):
        ids = piece.ids

        def place(i: int, piece: TokenBlock = piece, ids: np.ndarray = ids) -> str:
            at = f"{name}, byte {(piece.at + i) * item:,}: "
            if not pair.sound:
                return f"{at}token {piece.at + i:,} of the file is {ids[i]}"
            row, token = piece.place(i)
            return f"{at}row {row:,}, token {token:,} is {ids[i]}"

        facts.lowest, facts.highest = min(facts.lowest, int(ids.min())), max(facts.highest, int(ids.max()))
        outside = np.flatnonzero((ids < 0) | (ids >= tokenizer.VOCAB_SIZE)).tolist()
        facts.outside += len(outside)
        words = f"; the World vocabulary ends at {LAST_WORLD_ID}."
        faults.add_all("id", len(outside), (place(i) + words for i in outside))
        reserved = np.flatnonzero((ids > LAST_WORLD_ID) & (ids < tokenizer.VOCAB_SIZE)).tolist()
        warnings.add_all("reserved id", len(reserved), (f"{place(i)}, a reserved id without text." for i in reserved))
        if pair.sound:
            ends = piece.ends[piece.ends > piece.starts()]  # without empty rows
            facts.ended += int((ids[ends - 1] == tokenizer.END_OF_DOC).sum())
            if not facts.outside:
                rows.push(piece)
    facts.not_text, facts.first_not_text = rows.bad, rows.first_bad
    return facts


def read_roles(roles: IndexedPair, pair: IndexedPair, faults: Faults) -> np.ndarray:
    """Check roles: values that are not a role, and rows that are not those of the tokens.

    Returns:
        Tokens per role, int64 [roles].
    """
    tallies, name = np.zeros(256, np.int64), paths.display_path(roles.bin)
    for piece in token_blocks(roles):
        tallies += np.bincount(piece.ids, minlength=256)
        wrong = np.flatnonzero(piece.ids > max(Role)).tolist()
        faults.add_all(
            "role",
            len(wrong),
            (
                f"{name}, byte {piece.at + i:,}: row {piece.place(i)[0]:,}, token {piece.place(i)[1]:,} has the role "
                f"{piece.ids[i]}; known are 0 to {int(max(Role))}."
                for i in wrong
            ),
        )
    if roles.header.rows != pair.header.rows:
        faults.add(
            "roles of other data",
            f"{paths.display_path(roles.idx)}, byte 18: describes {plural(roles.header.rows, 'row')}, but {pair.idx.name} "
            f"{plural(pair.header.rows, 'row')}: it belongs to other data.",
        )
    for (first, ours), (_, theirs) in zip(roles.sizes(), pair.sizes(), strict=False):
        n = min(len(ours), len(theirs))
        wrong = np.flatnonzero(ours[:n] != theirs[:n]).tolist()
        faults.add_all(
            "roles of other data",
            len(wrong),
            (
                f"{paths.display_path(roles.idx)}, byte {HEADER + 4 * (first + i):,}: row {first + i:,} has "
                f"{plural(int(ours[i]), 'role')} for {plural(int(theirs[i]), 'token')}: they belong to other data."
                for i in wrong
            ),
        )
    return tallies[: max(Role) + 1]


def find_roles(prefix: Path, faults: Faults) -> IndexedPair | None:
    """Return the pair with the roles of tokenized data; None if there is none that can be used."""
    path = Path(f"{prefix}.roles")
    idx, bin_path = Path(f"{path}.idx"), Path(f"{path}.bin")
    if not idx.is_file():
        if bin_path.is_file():
            faults.add("missing", f"{paths.display_path(idx)}: there is no such file, but {bin_path.name} is there.")
        return None
    pair = read_pair(path, faults)
    if pair and pair.dtype and pair.dtype != np.uint8:
        faults.add(
            "roles of other data",
            f"{paths.display_path(idx)}, byte {len(MAGIC) + 8}: roles are dtype code 1 (uint8), not {pair.header.code}.",
        )
        return None
    return pair
