"""The items or windows of one file that are trained under one sampling mode and one mask, and their statistics."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .token_source import TokenSource
from .truncate import RowSpans, truncate_documents
from .windows import ConcatWindows, MagicPrime, Windows


@dataclass(frozen=True)
class DataStats:
    """Statistics of one file before training, for the plan that the user sees.

    Attributes:
        documents: number of documents.
        tokens: number of tokens.
        targets: loss tokens of one pass.
        untrained: documents without a target under this mask. This and the rest: where documents stay whole.
        overlong: other documents that are longer than the context.
        lost: their tokens that are not used.
        emptied: overlong documents that are left without a target, and so left out.
        pieces: items that the rest of them became.
        unfinished: those of the pieces that end inside what is trained: no end is learnt from them.
    """

    documents: int
    tokens: int
    targets: int
    untrained: int = 0
    overlong: int = 0
    lost: int = 0
    emptied: int = 0
    pieces: int = 0
    unfinished: int = 0


@dataclass(frozen=True)
class SourceData:
    """One source under one sampling mode and mask.

    Attributes:
        source: the file.
        facts: its statistics.
        items: the items to train.
        counts: loss tokens of each item, int32 [I].
        windows: the rows, if they are windows; there are no items then.
    """

    source: TokenSource
    facts: DataStats
    items: RowSpans = field(default_factory=RowSpans.empty)
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    windows: Windows | ConcatWindows | None = None


def window_data(
    source: TokenSource, mode: str, mask: str, ctx_len: int, key: tuple[int, ...], shuffle: bool
) -> SourceData:
    """Return a source whose rows ignore where documents end."""
    starts, end = source.starts, int(source.starts[-1])
    heads = has_bos(source)
    windows: Windows | ConcatWindows
    if mode == "concat":
        unended = source.tokens[np.maximum(starts[1:] - 1, 0)] != 0
        # without BOS: the end of the document before is a token 0 as well
        windows = ConcatWindows(source.sizes - heads, starts[:-1] + heads, unended, ctx_len, key, shuffle)
    elif mode == "magic":
        windows = MagicPrime(starts, ctx_len, key, shuffle)
        end = windows.rows * ctx_len + 1
    else:
        windows = Windows(starts, ctx_len, key, shuffle)
    if mask == "none" and mode == "concat":
        targets = end - 1 - int(heads.sum())
    elif mask == "none":  # every token but the first one of all, and a BOS
        targets = end - 1 - int(heads[(starts[:-1] > 0) & (starts[:-1] < end)].sum())
    else:
        heads = heads if mode == "concat" else np.zeros_like(heads)
        documents = np.flatnonzero(source.sizes)
        stops = np.minimum(starts[documents + 1], end)
        begins = np.minimum(starts[documents] + 1 + heads[documents], stops)
        targets = int(source.count_trained(begins, stops, documents, mask).sum())
    return SourceData(source, DataStats(len(source), int(starts[-1]), targets), windows=windows)


def has_bos(source: TokenSource) -> np.ndarray:
    """Return 1 for every document that begins with token 0 (BOS), else 0: int32 [N]."""
    first = np.asarray(source.tokens)[np.minimum(source.starts[:-1], source.starts[-1] - 1)]
    return ((source.sizes > 1) & (first == 0)).astype(np.int32)


def item_data(source: TokenSource, mask: str, ctx_len: int, overlong: str) -> SourceData:
    """Return a source whose documents stay whole, except those that OVERLONG applies to.

    Documents without loss tokens are left out.
    """
    sizes, starts = source.sizes.astype(np.int64), source.starts
    documents = np.flatnonzero(sizes > 1)
    whole = np.zeros(len(sizes), dtype=np.int64)  # trained targets of the documents as they are
    whole[documents] = source.count_trained(starts[documents] + 1, starts[documents + 1], documents, mask)
    items = truncate_documents(sizes, starts, ctx_len, overlong)
    counts, too_long = whole[items.document], sizes - 1 > ctx_len
    touched = np.flatnonzero(too_long[items.document])
    pieces, stop = items.take(touched), items.stop()[touched]
    counts[touched] = source.count_trained(pieces.start + 1, stop, pieces.document, mask)
    # of items that lost their end: whether the part that was cut off continues text that the item is trained on
    inner = np.flatnonzero((stop < starts[pieces.document + 1]) & (overlong == "truncate"))
    last, whose = stop[inner] - 1, pieces.document[inner]
    unfinished = int((source.is_trained(last, whose, mask) & source.is_trained(last + 1, whose, mask)).sum())
    over = np.flatnonzero(too_long & (whole > 0))
    left = np.bincount(items.document, counts, minlength=len(sizes))
    lost = {"split": 0, "drop": int(sizes[over].sum())}.get(overlong, int((sizes[over] - (ctx_len + 1)).sum()))
    keep = np.flatnonzero(counts)
    items, counts = items.take(keep), counts[keep].astype(np.int32)
    facts = DataStats(
        documents=len(sizes),
        tokens=int(starts[-1]),
        targets=int(counts.sum(dtype=np.int64)),
        untrained=len(sizes) - int((whole > 0).sum()),
        overlong=len(over),
        lost=lost,
        emptied=int((left[over] == 0).sum()),
        pieces=int(np.isin(items.document, over).sum()),
        unfinished=unfinished,
    )
    return SourceData(source, facts, items, counts)
