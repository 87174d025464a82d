"""Packing: items in packs of at most CTX_LEN targets, as few as best fit decreasing makes, with equal lengths apart.

Which lengths share a pack depends on the lengths alone, so it is computed once; every pass then draws again which of
the items of a length takes which of its places. Packs fill by length, not by item: a million items take a second.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable

import numpy as np

from .sampling import ItemRows, Pass, reorder_groups
from .truncate import RowSpans

SPREADING = (1.0, 0.75, 0.5, 0.25, 0.0)  # shares of the packs that may be opened before they are needed


class OpenPacks:
    """Open packs by the room that they have left; the fullest that still fits is taken first."""

    def __init__(self, capacity: int):
        self.capacity, self.opened = capacity, 0
        self.packs: dict[int, list[int]] = {}
        self.sorted: list[int] = []

    def put(self, room: int, packs: list[int]) -> None:
        """Return packs with this room left."""
        if room > 0 and packs:  # a full pack is never needed again
            if room not in self.packs:
                self.packs[room] = []
                bisect.insort(self.sorted, room)
            self.packs[room] += packs

    def take(self, room: int, most: int) -> list[int]:
        """Take up to `most` of the packs that have exactly this room."""
        packs = self.packs[room]
        taken = packs[-most:]
        del packs[-most:]
        if not packs:
            del self.packs[room]
            self.sorted.pop(bisect.bisect_left(self.sorted, room))
        return taken

    def open(self, most: int) -> list[int]:
        """Begin new packs."""
        self.opened += most
        return list(range(self.opened - most, self.opened))


def best_fit(lengths: Iterable[tuple[int, int]], capacity: int) -> tuple[np.ndarray, int]:
    """Best fit decreasing: each item, the longest first, goes into the fullest pack that still has room for it.

    Args:
        lengths: (length, number of items), from the longest to the shortest.
        capacity: of a pack.

    Returns:
        The pack of every item in that order, int32 [n], and the number of packs.
    """
    rooms, placed = OpenPacks(capacity), []
    for length, items in lengths:
        while items:
            at = bisect.bisect_left(rooms.sorted, length)
            room = rooms.sorted[at] if at < len(rooms.sorted) else capacity
            # a pack that has taken one is now the fullest that fits, so it takes items until the length no longer fits
            each = min(room // length, items)
            most = max(1, items // each)
            packs = rooms.take(room, most) if at < len(rooms.sorted) else rooms.open(most)
            placed.append(np.repeat(np.array(packs, dtype=np.int32), each))
            rooms.put(room - each * length, packs)
            items -= each * len(packs)
    return np.concatenate(placed) if placed else np.zeros(0, dtype=np.int32), rooms.opened


def spread_fit(lengths: Iterable[tuple[int, int]], capacity: int, early: int) -> tuple[np.ndarray, int]:
    """Like `best_fit`, but a pack takes a second item of one length only if no other pack can take it.

    Args:
        lengths: (length, number of items), from the longest to the shortest.
        capacity: of a pack.
        early: with fewer packs than this, a new one is begun rather than giving a pack the same length again.
    """
    rooms, placed = OpenPacks(capacity), []
    for length, items in lengths:
        while items:  # one round: each pack takes at most one
            moved: dict[int, list[int]] = {}
            for room in rooms.sorted[bisect.bisect_left(rooms.sorted, length) :]:
                packs = rooms.take(room, items)
                moved[room] = packs
                items -= len(packs)
                if not items:
                    break
            if items and (fresh := max(min(items, early - rooms.opened), 0 if moved else 1)):
                moved[capacity] = moved.get(capacity, []) + rooms.open(fresh)
                items -= fresh
            for room, packs in moved.items():
                placed.append(np.array(packs, dtype=np.int32))
                rooms.put(room - length, packs)
    return np.concatenate(placed) if placed else np.zeros(0, dtype=np.int32), rooms.opened


def assign_packs(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Return the pack of the longest item, of the next, ...: int32 [n], and the number of packs.

    There are as few packs as `best_fit` makes.

    Args:
        lengths: [n], none above capacity, in any order.
        capacity: of a pack.
    """
    unique, counts = np.unique(lengths, return_counts=True)
    by_length = list(zip(unique[::-1].tolist(), counts[::-1].tolist(), strict=True))
    plain, fewest = best_fit(by_length, capacity)
    if len(unique) < len(lengths):
        for share in SPREADING:
            apart, packs = spread_fit(by_length, capacity, int(share * fewest))
            if packs <= fewest:
                return apart, packs
    return plain, fewest


class Packs(ItemRows):
    """DATALOAD=pack: a row is a pack of items, each a sequence of its own."""

    def __init__(self, items: RowSpans, capacity: int, key: tuple[int, ...], shuffle: bool):
        pack, packs = assign_packs(items.length, capacity)
        self.by_pack = np.argsort(pack, kind="stable").astype(np.int32)  # ranks of the items by length, pack after pack
        self.first = np.zeros(packs + 1, dtype=np.int64)
        np.cumsum(np.bincount(pack, minlength=packs), out=self.first[1:])
        super().__init__(items, packs, key, shuffle)

    def make_pass(self, number: int) -> Pass:
        """Draw the order of a pass."""
        random = self.random(number)
        order = random.permutation(len(self.items)) if self.shuffle else np.arange(len(self.items))
        longest_first = order[np.argsort(-self.items.length[order], kind="stable")]
        order = longest_first[self.by_pack].astype(np.int32)
        if self.shuffle:
            packs = random.permutation(self.rows)
        else:  # in the order of the earliest item in each
            packs = np.argsort(np.minimum.reduceat(order, self.first[:-1]), kind="stable")
        return Pass(*reorder_groups(order, self.first, packs))
