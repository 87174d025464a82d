"""What one file gives under one way to batch and one mask: the items or the windows that are trained, and facts to show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .token_source import Source
from .truncate import RowSpans, cut
from .windows import Concatenated, MagicPrime, Windows


@dataclass(frozen=True)
class DataStats:
    """What is known of one file before training, for the plan that the user sees."""

    documents: int
    tokens: int
    targets: int  # trained in one pass
    # where documents stay whole:
    untrained: int = 0  # documents without a target under this mask
    overlong: int = 0  # others that are longer than the context ...
    lost: int = 0  # ... and their tokens that are not used
    emptied: int = 0  # ... those of them that are left without a target, and so left out
    pieces: int = 0  # ... and what the rest became
    unfinished: int = 0  # ... and those of them that end inside what is trained: no end is learnt from them


@dataclass(frozen=True)
class Part:
    """One source under one mode and mask. items, counts: what is trained whole, and its targets; None where rows are windows,
    which then are the source's rows already."""

    source: Source
    facts: DataStats
    items: RowSpans | None = None
    counts: np.ndarray | None = None  # int32 [I]
    windows: Windows | Concatenated | None = None


def window_part(source: Source, mode: str, mask: str, ctx_len: int, key: tuple[int, ...], shuffle: bool) -> Part:
    """A source whose rows ignore where documents end."""
    starts, end = source.starts, int(source.starts[-1])
    heads = begins_with_zero(source)
    if mode == "concat":
        unended = source.tokens[np.maximum(starts[1:] - 1, 0)] != 0
        # (without them: the end of the document before is a token 0 as well)
        windows = Concatenated(source.sizes - heads, starts[:-1] + heads, unended, ctx_len, key, shuffle)
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
    return Part(source, DataStats(len(source), int(starts[-1]), targets), windows=windows)


def begins_with_zero(source: Source) -> np.ndarray:
    """1 for every document that begins with token 0 (BOS), else 0: int32 [N]."""
    first = np.asarray(source.tokens)[np.minimum(source.starts[:-1], source.starts[-1] - 1)]
    return ((source.sizes > 1) & (first == 0)).astype(np.int32)


def item_part(source: Source, mask: str, ctx_len: int, overlong: str) -> Part:
    """A source whose documents stay whole, but for those that OVERLONG is about. What has nothing to train is left out."""
    sizes, starts = source.sizes.astype(np.int64), source.starts
    documents = np.flatnonzero(sizes > 1)
    whole = np.zeros(len(sizes), dtype=np.int64)  # trained targets of the documents as they are
    whole[documents] = source.count_trained(starts[documents] + 1, starts[documents + 1], documents, mask)
    items = cut(sizes, starts, ctx_len, overlong)
    counts, too_long = whole[items.document], sizes - 1 > ctx_len
    touched = np.flatnonzero(too_long[items.document])
    pieces, stop = items.take(touched), items.stop()[touched]
    counts[touched] = source.count_trained(pieces.start + 1, stop, pieces.document, mask)
    # of pieces that lost their end: whether the part cut off continues text that the piece is trained on
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
    return Part(source, facts, items, counts)
