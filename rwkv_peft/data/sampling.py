"""Which tokens are row i of pass p over the data: pure numpy, seeded by (seed, pass) only.

A row is what MICRO_BSZ counts. It consists of pieces, each a run of tokens [start, stop) that is one sequence: the first
stop-start-1 tokens are inputs, the last stop-start-1 are targets. A pass uses every document exactly once.

    get    windows of CTX_LEN targets over the whole file, documents or not; the grid is moved every pass
    pad    one document a row; rows of a batch are filled up to its longest
    only   one document a row, as long as it is
    pack   several documents a row, as many as fit into CTX_LEN, each kept apart from the others
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np

AUTO_CTX_LIMIT = 4096  # the longest context that CTX_LEN=auto takes
AUTO_PACK_CTX = 512  # packs of short documents are this long: a fuller row costs the same and loses less ...
AUTO_LEAST_ROWS = 16  # ... but a pass has at least so many of them, if the longest document allows it


@dataclass(frozen=True)
class Pass:
    """One pass: pieces [P, 2] (start and stop token in the .bin), and which of them make row i: first[i]..first[i+1]."""

    pieces: np.ndarray
    first: np.ndarray
    documents: np.ndarray  # [P] the document of each piece; -1 for windows that ignore documents

    def __len__(self) -> int:
        return len(self.first) - 1

    def row(self, i: int) -> np.ndarray:
        return self.pieces[self.first[i] : self.first[i + 1]]


def auto_ctx_len(mode: str, sizes: np.ndarray) -> int:
    """The longest document, rounded up to 16, up to 4096. Packs are at least 512 long, where the data fill 16 such."""
    longest = int(sizes.max()) - 1 if len(sizes) else 1
    fair_share = int(sizes.sum(dtype=np.int64)) // AUTO_LEAST_ROWS // 16 * 16
    least = min(AUTO_PACK_CTX, fair_share) if mode in ("pack", "get") else 16
    return min(max(-(-longest // 16) * 16, least, 16), AUTO_CTX_LIMIT)


def number_of_rows(mode: str, sizes: np.ndarray, ctx_len: int, keep: np.ndarray) -> int:
    """How many rows a pass has; the same for every pass."""
    if mode == "get":
        return max(0, -(-(int(sizes.sum(dtype=np.int64)) - 1) // ctx_len))
    if mode == "pack":
        return len(best_fit(np.minimum(sizes[keep] - 1, ctx_len), ctx_len))
    return len(keep)


def one_pass(
    mode: str, sizes: np.ndarray, ctx_len: int, keep: np.ndarray, seed: int, number: int, shuffle: bool
) -> Pass:
    """Pass `number` over the data.

    sizes: tokens per document [N]. keep: the documents that take part (those with a target to train). shuffle: a new
    order every pass; without it rows come in the order of the file.
    """
    random = np.random.default_rng([seed, number])
    if mode == "get":
        return windows(int(sizes.sum(dtype=np.int64)), ctx_len, random, shuffle)
    starts = np.zeros(len(sizes), dtype=np.int64)
    np.cumsum(sizes[:-1], out=starts[1:])
    lengths = np.minimum(sizes.astype(np.int64), ctx_len + 1)
    order = random.permutation(keep) if shuffle else keep
    if mode == "pack":
        rows = [order[row] for row in best_fit(lengths[order] - 1, ctx_len)]
        rows = [rows[i] for i in random.permutation(len(rows))] if shuffle else sorted(rows, key=lambda r: r[0])
        documents = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
        first = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    else:
        documents, first = order, np.arange(len(order) + 1)
    pieces = np.stack([starts[documents], starts[documents] + lengths[documents]], axis=1)
    return Pass(pieces, first, documents)


def windows(tokens: int, ctx_len: int, random: np.random.Generator, shuffle: bool) -> Pass:
    """Every target of the file once: a grid of CTX_LEN targets from a random offset, closed to a ring.

    The window that runs over the end of the file is cut there and goes on at its beginning, as a second piece.
    """
    targets = tokens - 1
    count = -(-targets // ctx_len)
    offset = int(random.integers(ctx_len)) % targets if shuffle else 0
    order = random.permutation(count) if shuffle else np.arange(count)
    pieces, first = [], [0]
    for i in order:
        begin = offset + int(i) * ctx_len
        end = min(begin + ctx_len, offset + targets)
        for start, stop in ((begin, min(end, targets)), (max(begin, targets) - targets, end - targets)):
            if start < stop:
                pieces.append((start, stop + 1))
        first.append(len(pieces))
    return Pass(np.array(pieces, dtype=np.int64), np.array(first), np.full(len(pieces), -1))


def best_fit(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Rows of at most `capacity`, the longest items first, each into the fullest row that still has room for it.

    lengths: [n], none above capacity. Returns for every row the positions of its items. How many rows there are depends
    on the lengths alone, not on their order; among equal lengths the order decides who goes where.
    """
    rows: list[list[int]] = []
    room: dict[int, list[int]] = {}  # free space -> rows that have exactly that much
    spaces: list[int] = []  # the keys of room, sorted
    for i in np.argsort(-lengths, kind="stable"):
        length = int(lengths[i])
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            row, free = len(rows), capacity
            rows.append([])
        else:
            free = spaces[at]
            row = room[free].pop()
            if not room[free]:
                del room[free]
                spaces.pop(at)
        rows[row].append(int(i))
        left = free - length
        if left > 0:
            if left not in room:
                room[left] = []
                bisect.insort(spaces, left)
            room[left].append(row)
    return [np.array(row, dtype=np.int64) for row in rows]


@dataclass(frozen=True)
class Plan:
    """How the endless stream of rows (pass after pass) is cut into epochs, optimizer steps and micro-batches.

    An optimizer step takes micro_bsz * accumulate * world consecutive rows, whatever the split: so batch 8 is 4 x 2
    accumulated is 2 ranks x 4. A short last step of an epoch is filled up with rows of weight zero.
    """

    rows: int  # in one pass
    epoch_steps: int | None  # micro-batches per rank and epoch; None: one pass is one epoch
    micro_bsz: int
    accumulate: int
    world: int

    @property
    def rows_per_epoch(self) -> int:
        return self.rows if self.epoch_steps is None else self.epoch_steps * self.micro_bsz * self.world

    @property
    def micro_batches(self) -> int:
        """Per rank and epoch."""
        return -(-self.rows_per_epoch // (self.micro_bsz * self.world))

    @property
    def optimizer_steps(self) -> int:
        """Per epoch."""
        return -(-self.micro_batches // self.accumulate)

    def rows_of_step(self, epoch: int, step: int) -> range:
        """Numbers in the endless stream: row n is row n % rows of pass n // rows."""
        size = self.micro_bsz * self.accumulate * self.world
        begin, end = epoch * self.rows_per_epoch, (epoch + 1) * self.rows_per_epoch
        return range(begin + step * size, min(begin + (step + 1) * size, end))

    def rows_of_micro_batch(self, epoch: int, number: int, rank: int) -> range:
        """Those of micro-batch `number` (counted within the epoch) on one rank; may be empty at an epoch's end."""
        step, part = divmod(number, self.accumulate)
        rows = self.rows_of_step(epoch, step)
        begin = (part * self.world + rank) * self.micro_bsz
        return rows[begin : begin + self.micro_bsz]
