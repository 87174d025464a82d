"""A file as one long text, cut into windows of CTX_LEN targets.

For DATALOAD=get, with or without MAGIC_PRIME, and PACK=concat. A window is one sequence. Inside it, documents follow
one another without a reset, as native RWKV models are pretrained; only the mask knows where one ends.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from .sampling import TokenSpan


def documents_between(bounds: np.ndarray, begin: int, end: int) -> range:
    """Return the documents with tokens in begin..end of a stream.

    Args:
        bounds: where documents begin and the last ends, [N + 1].
        begin: first token.
        end: end of the range.
    """
    first = int(np.searchsorted(bounds, begin, side="right")) - 1
    return range(first, int(np.searchsorted(bounds, end, side="left")))


class Windows:
    """DATALOAD=get: a grid of CTX_LEN targets over the file, moved by a new offset every pass and closed to a ring.

    The window that runs over the end of the file is split there and continues at its beginning, as a second sequence.

    Args:
        starts: first tokens of the documents and the end, int64 [N + 1].
        ctx_len: targets of a window.
        key: seeds the order, together with the number of the pass.
        shuffle: draw an order.

    Attributes:
        rows: windows in a pass.
    """

    def __init__(self, starts: np.ndarray, ctx_len: int, key: tuple[int, ...], shuffle: bool):
        self.starts, self.ctx_len, self.key, self.shuffle = starts, ctx_len, key, shuffle
        self.targets = int(starts[-1]) - 1
        self.rows = -(-self.targets // ctx_len)
        self.one_pass = functools.lru_cache(maxsize=2)(self.make_pass)

    def make_pass(self, number: int) -> tuple[int, np.ndarray]:
        """Return the offset of the grid, and the order of its windows."""
        order = np.arange(self.rows, dtype=np.int32)
        if not self.shuffle:
            return 0, order
        random = np.random.default_rng([*self.key, number])
        return int(random.integers(self.ctx_len)) % self.targets, random.permutation(order)

    def row(self, number: int) -> list[TokenSpan]:
        """Return the spans of row `number` of the endless stream."""
        turn, i = divmod(number, self.rows)
        offset, order = self.one_pass(turn)
        begin = offset + int(order[i]) * self.ctx_len
        end = min(begin + self.ctx_len, offset + self.targets)
        around = self.targets
        parts = (begin, min(end, around)), (max(begin, around) - around, end - around)
        return [piece for a, b in parts if a < b for piece in self.sequence(a, b + 1)]

    def sequence(self, begin: int, end: int) -> list[TokenSpan]:
        """Return tokens begin..end of the file, document by document."""
        pieces: list[TokenSpan] = []
        for document in documents_between(self.starts, begin, end):
            a, b = max(begin, int(self.starts[document])), min(end, int(self.starts[document + 1]))
            if a < b:
                pieces.append(TokenSpan(document, a, b, False, bool(pieces)))
        return pieces


class MagicPrime(Windows):
    """MAGIC_PRIME=1: the sampling of RWKV-LM.

    Window (f n^3) mod p for n = 1, 2, ..., with p the largest prime that is 2 mod 3 and less than the number of whole
    windows, and f the golden section of p. As 3 does not divide p-1, cubing is a permutation: every window below p
    comes once, and in the same order in every pass.

    Source: RWKV-v7/train_temp/src/dataset.py and RWKV-v5/make_data.py in BlinkDL/RWKV-LM. rows is 0 if there is no p.
    """

    def __init__(self, starts: np.ndarray, ctx_len: int, key: tuple[int, ...], shuffle: bool):
        super().__init__(starts, ctx_len, key, shuffle)
        self.windows = self.rows
        self.rows = magic_prime(int(starts[-1]) // ctx_len)
        self.factor = int(self.rows * (math.sqrt(5) - 1) / 2)

    def row(self, number: int) -> list[TokenSpan]:
        """Return the spans of row `number` of the endless stream."""
        window = self.factor * pow(number + 1, 3, self.rows) % self.rows
        return self.sequence(window * self.ctx_len, (window + 1) * self.ctx_len + 1)


def magic_prime(windows: int) -> int:
    """Return the largest prime p < windows with p % 3 == 2, or 0."""
    return next((p for p in range(windows - 1, 1, -1) if p % 3 == 2 and is_prime(p)), 0)


def is_prime(n: int) -> bool:
    """Return whether a number is prime."""
    return n > 1 and all(n % i for i in range(2, math.isqrt(n) + 1))


class ConcatWindows:
    """PACK=concat: the documents in a new order every pass, one after another, cut into rows of CTX_LEN targets.

    Each is followed by a token 0 (added, and not trained, where the file has none); the last row is shorter. The
    caller leaves out a token 0 that a document begins with (BOS): the end of the document before is one.

    Args:
        sizes: tokens of the documents [N].
        starts: their first tokens, int64 [N].
        unended: bool [N], documents that do not end with token 0.
        ctx_len: targets of a row.
        key: seeds the order, together with the number of the pass.
        shuffle: draw an order.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        starts: np.ndarray,
        unended: np.ndarray,
        ctx_len: int,
        key: tuple[int, ...],
        shuffle: bool,
    ):
        self.documents = np.flatnonzero(sizes).astype(np.int32)
        self.sizes, self.starts, self.unended = sizes, starts, unended
        self.ctx_len, self.key, self.shuffle = ctx_len, key, shuffle
        self.targets = int(sizes.sum(dtype=np.int64)) + int(unended[self.documents].sum()) - 1
        self.rows = -(-self.targets // ctx_len)
        self.one_pass = functools.lru_cache(maxsize=2)(self.make_pass)

    def make_pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the documents in their order, and where each begins in the stream, [N + 1]."""
        order = self.documents
        if self.shuffle:
            order = np.random.default_rng([*self.key, number]).permutation(order)
        bounds = np.zeros(len(order) + 1, dtype=np.int64)
        np.cumsum(self.sizes[order] + self.unended[order], out=bounds[1:])
        return order, bounds

    def row(self, number: int) -> list[TokenSpan]:
        """Return the spans of row `number` of the endless stream."""
        turn, i = divmod(number, self.rows)
        order, bounds = self.one_pass(turn)
        begin = i * self.ctx_len
        end = min(begin + self.ctx_len, self.targets) + 1
        pieces: list[TokenSpan] = []
        for place in documents_between(bounds, begin, end):
            document, at = int(order[place]), int(bounds[place])
            start, size = int(self.starts[document]), int(self.sizes[document])
            a, b = max(begin - at, 0), min(end - at, int(bounds[place + 1]) - at)
            pieces.append(TokenSpan(document, start + min(a, size), start + min(b, size), b > size, bool(pieces)))
        return pieces
