"""Check an .idx file, and the length of its .bin: report every fault with its exact place.

Unlike rwkv_peft.data.binidx.Reader, which refuses a pair at the first fault. Files are read in blocks, whatever their
size.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from rwkv_peft.common import paths
from rwkv_peft.common.formatting import plural

from .binidx import DTYPES, HEADER, MAGIC, Header

BLOCK = 1 << 16  # tokens, sizes or offsets that are in memory at once; larger blocks exceed the processor's cache
LISTED = 10  # faults of one kind that are reported; the rest are counted


class Faults:
    """Faults by kind; at most LISTED of a kind are kept as sentences."""

    def __init__(self):
        self.sentences: dict[str, list[str]] = defaultdict(list)
        self.counts: Counter[str] = Counter()

    def add(self, kind: str, sentence: str) -> None:
        """Add one fault."""
        self.add_all(kind, 1, iter([sentence]))

    def add_all(self, kind: str, number: int, sentences: Iterator[str]) -> None:
        """Add faults of one kind.

        Args:
            kind: of the faults.
            number: of faults.
            sentences: one for each; only those that are kept are made.
        """
        room = max(LISTED - len(self.sentences[kind]), 0)
        self.sentences[kind] += itertools.islice(sentences, room)
        self.counts[kind] += number

    def __bool__(self) -> bool:
        return any(self.counts.values())

    def lines(self) -> list[str]:
        """Return the sentences, and how many more there are of each kind."""
        out = []
        for kind, sentences in self.sentences.items():
            out += sentences
            if self.counts[kind] > len(sentences):
                out.append(f"... and {self.counts[kind] - len(sentences):,} more of this kind ({kind})")
        return out


@dataclass(frozen=True)
class IndexedPair:
    """A pair whose header could be read.

    Attributes:
        prefix: path without ending.
        header: of the .idx.
        dtype: of the tokens; None if its code is unknown.
        tokens: number of tokens in the .bin.
        sound: the .idx and the length of the .bin fit together, so rows can be found.
    """

    prefix: Path
    header: Header
    dtype: np.dtype | None
    tokens: int
    sound: bool

    @property
    def idx(self) -> Path:
        """Path of the .idx."""
        return Path(f"{self.prefix}.idx")

    @property
    def bin(self) -> Path:
        """Path of the .bin."""
        return Path(f"{self.prefix}.bin")

    def sizes(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the sizes of the rows in blocks."""
        return read_blocks(self.idx, "<i4", HEADER, self.header.rows)


def read_blocks(path: Path, dtype: DTypeLike, at: int, number: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield `number` values of a file from byte `at` in blocks, with the number of the first; fewer if the file ends.

    Reads rather than maps: pages of a map count as memory of this process.
    """
    first = 0
    with open(path, "rb") as file:
        if at >= path.stat().st_size:  # a damaged header can give positions beyond the file
            return
        file.seek(at)
        while first < number:
            block = np.fromfile(file, dtype, min(BLOCK, number - first))
            if not len(block):
                return
            yield first, block
            first += len(block)


def read_pair(prefix: Path, faults: Faults) -> IndexedPair | None:
    """Check an .idx and the length of its .bin. Return None if there is not even a header."""
    idx, bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    name, length = paths.display_path(idx), idx.stat().st_size
    with open(idx, "rb") as file:
        head = file.read(HEADER)
    before = sum(faults.counts.values())
    magic_is_right = head[: len(MAGIC)] == MAGIC[: len(head)]
    if not magic_is_right:
        first = next(i for i, (a, b) in enumerate(zip(head, MAGIC, strict=False)) if a != b)
        faults.add(
            "magic", f"{name}, byte {first}: an .idx file begins with {MAGIC!r}, this one with {head[: len(MAGIC)]!r}."
        )
    if len(head) < HEADER:
        faults.add("header", f"{name}, byte {length}: the file ends inside its header, which has {HEADER} bytes.")
        return None
    header = Header.parse(head)
    if not magic_is_right and (header.version != 1 or header.end != length):
        return None  # another kind of file: the rest of it means nothing
    if header.version != 1:
        faults.add("version", f"{name}, byte {len(MAGIC)}: the version is {header.version}; only 1 is known.")
    if header.code not in DTYPES:
        faults.add("dtype", f"{name}, byte {len(MAGIC) + 8}: the dtype code is {header.code}; known are 1 to 8.")
    dtype = header.dtype if header.code in DTYPES else None
    counts_fit = check_length(name, length, header, faults)
    have = bin_path.stat().st_size if bin_path.is_file() else None
    if have is None:
        faults.add(
            "missing", f"{paths.display_path(bin_path)}: there is no such file; it holds the tokens of {idx.name}."
        )
    if counts_fit:
        check_rows(idx, length, header, dtype, bin_path, have, faults)
        check_documents(idx, header, faults)
    sound = sum(faults.counts.values()) == before
    return IndexedPair(prefix, header, dtype, (have or 0) // dtype.itemsize if dtype else 0, sound)


def check_length(name: str, length: int, header: Header, faults: Faults) -> bool:
    """Check the length of an .idx against the counts in its header.

    Returns:
        Whether the counts are credible: the file is as long as they say, or is incomplete.
    """
    if length == header.end:
        return True
    asks = f"its header ({plural(header.rows, 'row')} by byte 18, {header.documents:,} document borders by byte 26)"
    if length > header.end:
        more = plural(length - header.end, "byte")
        faults.add("length", f"{name}, byte {header.end:,}: {asks} describes {header.end:,} bytes; {more} follow.")
        return False
    if length < header.offsets_at:
        where = f"the size of row {(length - HEADER) // 4:,}"
    elif length < header.documents_at:
        where = f"the pointer of row {(length - header.offsets_at) // 8:,}"
    else:
        where = f"entry {(length - header.documents_at) // 8:,} of the document index"
    rows, left = divmod(length - HEADER - 8, 20)  # one document per row, as nearly all writers have it
    fits = f" Its length would fit {plural(rows, 'row')}: these counts may be wrong." if left == 0 <= rows else ""
    faults.add("length", f"{name}, byte {length:,}: ends before {where}; {asks} asks for {header.end:,} bytes.{fits}")
    return not fits


def check_rows(
    idx: Path, length: int, header: Header, dtype: np.dtype | None, bin_path: Path, have: int | None, faults: Faults
) -> None:
    """Check sizes and offsets together, then the length of the .bin.

    Args:
        idx: the .idx.
        length: of the .idx, which may be incomplete.
        header: of the .idx.
        dtype: of the tokens.
        bin_path: the .bin.
        have: bytes of the .bin, None if it is missing.
        faults: gets what is wrong.
    """
    name, item = paths.display_path(idx), dtype.itemsize if dtype else 0
    there = min(header.rows, (length - HEADER) // 4)
    pointers = read_blocks(idx, "<i8", header.offsets_at, header.rows)
    cut_row: tuple[int, int] | None = None
    total, gaps, negative = 0, (0, 0), 0  # gaps: errors of the offsets of the two rows before
    for first, sizes in read_blocks(idx, "<i4", HEADER, there):
        wrong = np.flatnonzero(sizes < 0)
        negative += len(wrong)
        faults.add_all(
            "size",
            len(wrong),
            (
                f"{name}, byte {HEADER + 4 * (first + i):,}: row {first + i:,} has {sizes[i]} tokens."
                for i in wrong.tolist()
            ),
        )
        ends = total + np.cumsum(sizes, dtype=np.int64)
        if have is not None and item and cut_row is None and int(ends[-1]) * item > have:
            at = int(np.flatnonzero(ends * item > have)[0])
            cut_row = first + at, have // item - (int(ends[at]) - int(sizes[at]))
        _, offsets = next(pointers, (0, np.zeros(0, np.int64)))
        if dtype and len(offsets):
            n = len(offsets)
            starts = (ends[:n] - sizes[:n]) * item
            off = np.concatenate([np.array(gaps, np.int64), offsets - starts])
            # a wrong offset is reported once: not again where the following rows are off as far, or right again
            wrong = np.flatnonzero((off[2:] != 0) & (off[2:] != off[1:-1]) & (off[2:] != off[:-2]))
            expected = offsets - (off[2:] - off[1:-1])
            faults.add_all(
                "pointer",
                len(wrong),
                (describe_pointer(name, header, first + i, offsets[i], expected[i]) for i in wrong.tolist()),
            )
            gaps = int(off[-2]), int(off[-1])
        total = int(ends[-1])
    if have is None or not item or negative or there < header.rows:
        return
    need, bin_name = total * item, paths.display_path(bin_path)
    if cut_row:  # have < need
        row, token = cut_row
        faults.add(
            "bin",
            f"{bin_name}, byte {have:,}: ends in row {row:,}, token {token:,}; {idx.name} describes {need:,} bytes.",
        )
    if have > need:
        more = plural(have - need, "byte")
        faults.add("bin", f"{bin_name}, byte {need:,}: {more} more than {idx.name} describes ({need:,}).")


def describe_pointer(name: str, header: Header, row: int, offset: int, expected: int) -> str:
    """Return the sentence for a wrong offset."""
    before = f", where row {row - 1:,} ends (its size: byte {HEADER + 4 * (row - 1):,})" if row else ""
    return (
        f"{name}, byte {header.offsets_at + 8 * row:,}: row {row:,} points to byte {offset:,} of the .bin, "
        f"but must begin at {expected:,}{before}."
    )


def check_documents(idx: Path, header: Header, faults: Faults) -> None:
    """Check the document index: row numbers that begin with 0, never fall, and end with the number of rows."""
    name, rows = paths.display_path(idx), header.rows
    if not header.documents:
        faults.add(
            "document index", f"{name}, byte 26: the document index is empty; it must hold 0 and {rows} at least."
        )
    previous = 0
    for first, bounds in read_blocks(idx, "<i8", header.documents_at, header.documents):
        known = (bounds >= 0) & (bounds <= rows)
        # one entry that is too large does not make all of those after it wrong
        before = np.concatenate([[previous], np.where(known, bounds, 0)[:-1]])
        right = known & (bounds >= before)
        if first == 0:
            right[0] = bounds[0] == 0
        if first + len(bounds) == header.documents:
            right[-1] &= bounds[-1] == rows
        wrong = np.flatnonzero(~right).tolist()
        faults.add_all(
            "document index",
            len(wrong),
            (
                f"{name}, byte {header.documents_at + 8 * (first + i):,}: entry {first + i:,} of the document index is "
                f"{bounds[i]:,}; {expected_entry(first + i, header, int(before[i]))}."
                for i in wrong
            ),
        )
        previous = int(bounds[-1]) if known[-1] else 0


def expected_entry(entry: int, header: Header, before: int) -> str:
    """Return what an entry of the document index must be."""
    if entry == 0:
        return "the first must be 0"
    if entry == header.documents - 1:
        return f"the last must be the number of rows, {header.rows:,}"
    return f"it must lie between {before:,} (the one before) and {header.rows:,} (the rows)"
