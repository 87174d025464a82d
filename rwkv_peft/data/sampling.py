"""Which tokens are row n of a file's endless stream of rows, and how rows become epochs, steps and micro-batches.

Pure numpy, seeded by (seed, source, pass) only, and every row can be computed from its number. A row is what MICRO_BSZ
counts. It consists of spans of documents; spans that are joined make one sequence: its tokens but the last are inputs,
its tokens but the first are targets. The stream goes through the file again and again; a pass uses everything exactly
once.

    pad, only   one document a row (here)
    pack        several documents a row, each a sequence of its own (packing.py)
    bucket      one document a row, rows of similar length one after another (buckets.py)
    get, magic  windows of CTX_LEN targets over the whole file (windows.py)
    concat      the same over the documents in a new order every pass (windows.py)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .truncate import RowSpans

AUTO_CTX_LIMIT = 4096  # the longest context of CTX_LEN=auto
AUTO_PACK_CTX = 512  # packs of short documents are this long: a fuller row costs the same and loses less ...
AUTO_LEAST_ROWS = 16  # ... but a pass has at least so many of them, if the longest document allows it
FILLED = ("pack", "concat", "get", "magic")  # modes whose rows are CTX_LEN long, whatever the documents


class TokenSpan(NamedTuple):
    """Tokens start..stop of the .bin (stop not included), all of one document.

    Attributes:
        document: number of the document.
        start: first token.
        stop: end.
        ended: a token 0 is put after them, which only separates documents (PACK=concat): it is never trained.
        joined: they continue the sequence of the span before, at the beginning of another document.
    """

    document: int
    start: int
    stop: int
    ended: bool
    joined: bool


def auto_ctx_len(mode: str, sizes: np.ndarray, most: int = AUTO_CTX_LIMIT) -> int:
    """Return the longest document, rounded up to 16, up to `most`.

    Packs are at least 512 long, if the data fill 16 of them.
    """
    longest = int(sizes.max()) - 1 if len(sizes) else 1
    fair_share = int(sizes.sum(dtype=np.int64)) // AUTO_LEAST_ROWS // 16 * 16
    least = min(AUTO_PACK_CTX, fair_share) if mode in FILLED else 16
    return min(max(-(-longest // 16) * 16, least, 16), most)


@dataclass(frozen=True)
class Pass:
    """One pass over items.

    Attributes:
        order: the items, int32 [I], row after row.
        first: row i is order[first[i]..first[i+1]]; None if every row is one item.
    """

    order: np.ndarray
    first: np.ndarray | None = None

    def row(self, i: int) -> np.ndarray:
        """Return the items of row `i`."""
        return self.order[i : i + 1] if self.first is None else self.order[self.first[i] : self.first[i + 1]]


def reorder_groups(values: np.ndarray, first: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return groups of an array in another order, and their new bounds.

    Args:
        values: the array.
        first: group i is values[first[i]..first[i+1]].
        which: the groups in their new order.
    """
    sizes = np.diff(first)[which]
    bounds = np.zeros(len(which) + 1, dtype=np.int64)
    np.cumsum(sizes, out=bounds[1:])
    return values[np.repeat(first[which] - bounds[:-1], sizes) + np.arange(bounds[-1])], bounds


class ItemRows:
    """DATALOAD=pad and only, and the base of all modes whose rows are made of items: one item a row, shuffled.

    Args:
        items: the items.
        rows: in a pass, the same in every pass.
        key: seeds the order, together with the number of the pass.
        shuffle: draw an order.
    """

    def __init__(self, items: RowSpans, rows: int, key: tuple[int, ...], shuffle: bool):
        self.items, self.rows, self.key, self.shuffle = items, rows, key, shuffle
        # rows are requested in order; two passes are in use where one follows the other
        self.one_pass = functools.lru_cache(maxsize=2)(self.make_pass)

    def random(self, number: int) -> np.random.Generator:
        """Return the random number generator of a pass."""
        return np.random.default_rng([*self.key, number])

    def make_pass(self, number: int) -> Pass:
        """Draw the order of a pass."""
        rows = np.arange(self.rows, dtype=np.int32)
        return Pass(self.random(number).permutation(rows) if self.shuffle else rows)

    def items_of(self, number: int) -> np.ndarray:
        """Return the items of row `number` of the endless stream."""
        turn, i = divmod(number, self.rows)
        return self.one_pass(turn).row(i)

    def row(self, number: int) -> list[TokenSpan]:
        """Return the spans of row `number` of the endless stream."""
        items, pieces = self.items, []
        for i in self.items_of(number).tolist():
            start = int(items.start[i])
            pieces.append(TokenSpan(int(items.document[i]), start, start + int(items.length[i]) + 1, False, False))
        return pieces


@dataclass(frozen=True)
class Plan:
    """How the endless stream of rows is cut into epochs, optimizer steps and micro-batches.

    An optimizer step takes micro_bsz * accumulate * world consecutive rows, however they are distributed: so batch 8
    is 4 x 2 accumulated or 2 ranks x 4. A short last step of an epoch is padded with rows of weight zero.

    Attributes:
        rows: in one pass over everything.
        epoch_steps: micro-batches per rank and epoch; None: one pass is one epoch.
        micro_bsz: rows of a micro-batch.
        accumulate: micro-batches of an optimizer step on one rank.
        world: number of ranks.
    """

    rows: int
    epoch_steps: int | None
    micro_bsz: int
    accumulate: int
    world: int

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch, over all ranks."""
        return self.rows if self.epoch_steps is None else self.epoch_steps * self.micro_bsz * self.world

    @property
    def micro_batches(self) -> int:
        """Per rank and epoch."""
        return -(-self.rows_per_epoch // (self.micro_bsz * self.world))

    @property
    def optimizer_steps(self) -> int:
        """Per epoch."""
        return -(-self.micro_batches // self.accumulate)

    @property
    def passes_per_epoch(self) -> float:
        """Passes over everything in an epoch."""
        return self.rows_per_epoch / self.rows

    def most_tokens(self, ctx_len: int) -> int:
        """Return the inputs of the largest micro-batch."""
        return self.micro_bsz * ctx_len

    def rows_of_step(self, epoch: int, step: int) -> range:
        """Return the numbers of a step's rows in the endless stream."""
        size = self.micro_bsz * self.accumulate * self.world
        begin, end = epoch * self.rows_per_epoch, (epoch + 1) * self.rows_per_epoch
        return range(begin + step * size, min(begin + (step + 1) * size, end))

    def micro_bsz_of_step(self, _epoch: int, _step: int) -> int:
        """Return the rows of a micro-batch in a step."""
        return self.micro_bsz

    def rows_of_micro_batch(self, epoch: int, number: int, rank: int) -> range:
        """Return the rows of micro-batch `number` (counted within the epoch) on one rank.

        May be empty if a step is short.
        """
        step, part = divmod(number, self.accumulate)
        rows, size = self.rows_of_step(epoch, step), self.micro_bsz_of_step(epoch, step)
        begin = (part * self.world + rank) * size
        return rows[begin : begin + size]
