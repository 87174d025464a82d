"""OVERLONG: turn documents with more than CTX_LEN targets into items, the units that rows take whole.

    truncate        the first part
    truncate-left   the last part
    drop            nothing
    split           several items, one after the other: every target once

Truncation adds nothing: an item that loses its end has no end, and the model does not learn to stop there. A document
with exactly CTX_LEN targets fits. All arrays are numpy; a document of n tokens has n-1 targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RowSpans:
    """Runs of tokens, in the order of the file. An item of `length` targets has length+1 tokens.

    Attributes:
        document: int32 [I].
        start: int64 [I], its first token in the .bin.
        length: int32 [I].
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray

    @classmethod
    def empty(cls) -> RowSpans:
        """Return no items."""
        return cls(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int32))

    def __len__(self) -> int:
        return len(self.start)

    def stop(self) -> np.ndarray:
        """Return where their run in the file ends, int64 [I]."""
        return self.start + self.length + 1

    def take(self, which: np.ndarray) -> RowSpans:
        """Return some of the items."""
        return RowSpans(self.document[which], self.start[which], self.length[which])


def truncate_documents(sizes: np.ndarray, starts: np.ndarray, ctx_len: int, overlong: str) -> RowSpans:
    """Return every document that has a target, as OVERLONG says.

    Args:
        sizes: tokens per document [N].
        starts: their first tokens in the .bin, [N + 1].
        ctx_len: most targets of an item.
        overlong: OVERLONG.
    """
    document = np.flatnonzero(sizes > 1).astype(np.int32)
    targets = sizes[document].astype(np.int64) - 1
    over = targets > ctx_len
    if overlong == "drop":
        document, targets, over = document[~over], targets[~over], over[~over]
    parts = np.where(over, -(-targets // ctx_len), 1) if overlong == "split" else np.ones(len(document), dtype=np.int64)
    # part j of a document begins at its target j * ctx_len: for all but split there is only part 0
    begins = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum(parts, out=begins[1:])
    offset = (np.arange(begins[-1]) - np.repeat(begins[:-1], parts)) * ctx_len
    length = np.minimum(np.repeat(targets, parts) - offset, ctx_len)
    document, over = np.repeat(document, parts), np.repeat(over, parts)
    start = starts[document] + offset
    if overlong == "truncate-left":
        start = np.where(over, starts[document + 1] - (ctx_len + 1), start)
    return RowSpans(document, start, length.astype(np.int32))
