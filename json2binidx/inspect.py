"""python -m json2binidx.inspect: what a .bin/.idx pair holds, and every place where it is damaged.

usage: python -m json2binidx.inspect NAME [--rows N]

  NAME        as in DATA_PATH: a name in data/, or any path, with or without .bin or .idx. Files of json2binidx_tool,
              RWKV-LM and Megatron are understood as well (all of them are MMIDIDX)
  --rows N    show the first N rows as text (2). What LOSS_MASK=qa trains stands [[like this]], <end> is the end of a document
  --help      this text

Changes nothing. Answers 0 when the files are sound, and 2 when they are not, with the place of every fault.
"""

from __future__ import annotations

import codecs
import contextlib
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkv_peft import project, tokenizer
from rwkv_peft.data.binidx import DTYPES, HEADER, MAGIC, Header
from rwkv_peft.data.masking import target_weights
from rwkv_peft.errors import UserError, door, leave
from rwkv_peft.roles import Role
from rwkv_peft.rows.encode import roles_in_text
from rwkv_peft.shell_vars import whole_number
from rwkv_peft.templates.headings import spans_of_text
from rwkv_peft.words import count, did_you_mean, listed

BLOCK = 1 << 16  # tokens, sizes or pointers that are in memory at once; larger blocks leave the processor's cache
LISTED = 10  # faults of one kind that are told; the rest are counted
LAST_WORLD_ID = 65529  # 65530..65535 are reserved
SHOWN_TOKENS = 400  # of a row
SHOWN_CHARACTERS = 1200


def main(arguments: list[str]) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # not a real stream (tests)
            stream.reconfigure(errors="replace")
    with door():
        if {"-h", "--help"} & set(arguments):
            print(__doc__)
            return
        inspect(*command_line(arguments))


def command_line(arguments: list[str]) -> tuple[Path, int]:
    """The path without ending, and the number of rows to show."""
    words, rows, rest = [], 2, list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--rows" or word.startswith("--rows="):
            given = word.partition("=")[2] if "=" in word else (rest.pop(0) if rest else "")
            rows = whole_number("--rows", given, 0)
        elif word.startswith("--"):
            meant = did_you_mean(word, ["--rows", "--help"])
            raise UserError(f"{word}: is not an option{meant or '.'} There are --rows N and --help.")
        else:
            words.append(word)
    if len(words) != 1 or not words[0]:
        leave(__doc__, 2)
    return find_pair(words[0]), rows


def find_pair(name: str) -> Path:
    prefix = project.data_prefix(name)
    base = Path(str(prefix).removesuffix(".roles"))
    if base != prefix and Path(f"{base}.idx").is_file():  # the roles are told with their tokens
        prefix = base
    index = Path(f"{prefix}.idx")
    if index.is_file():
        return prefix
    there = project.data_names()
    is_alone = Path(f"{prefix}.bin").is_file()
    alone = f" {prefix.name}.bin is there, but nothing can be read without its .idx." if is_alone else ""
    raise UserError(
        f"{project.shown(index)}: there is no such file{did_you_mean(prefix.name, there) or '.'}{alone} "
        f"In data/ there is: {listed(there)}."
    )


class Faults:
    """What is wrong, by kind; at most LISTED of a kind are kept as sentences."""

    def __init__(self):
        self.told: dict[str, list[str]] = defaultdict(list)
        self.counts: Counter[str] = Counter()

    def add(self, kind: str, sentence: str) -> None:
        self.add_all(kind, [0], lambda _: sentence)

    def add_all(self, kind: str, where: Sequence[int] | np.ndarray, tell: Callable[[int], str]) -> None:
        """where: numbers of rows, tokens or entries. tell: from one of them to its sentence."""
        room = max(LISTED - len(self.told[kind]), 0)
        self.told[kind] += [tell(int(w)) for w in where[:room]]
        self.counts[kind] += len(where)

    def __bool__(self) -> bool:
        return any(self.counts.values())

    def lines(self) -> list[str]:
        out = []
        for kind, sentences in self.told.items():
            out += sentences
            if self.counts[kind] > len(sentences):
                out.append(f"... and {self.counts[kind] - len(sentences):,} more of this kind ({kind})")
        return out


@dataclass(frozen=True)
class Pair:
    """A pair whose header could be read. rows: how many its .idx tells. tokens: what the .bin holds.

    sound: the .idx and the length of the .bin fit together, so rows can be found. dtype: None if its code is unknown.
    """

    prefix: Path
    header: Header
    dtype: np.dtype | None
    tokens: int
    sound: bool

    @property
    def idx(self) -> Path:
        return Path(f"{self.prefix}.idx")

    @property
    def bin(self) -> Path:
        return Path(f"{self.prefix}.bin")

    def sizes(self) -> Iterator[tuple[int, np.ndarray]]:
        return values(self.idx, "<i4", HEADER, self.header.rows)


def values(path: Path, dtype, at: int, number: int) -> Iterator[tuple[int, np.ndarray]]:
    """`number` values of a file from byte `at` on, block by block, with the number of the first; fewer if the file ends.

    Reads rather than maps: pages of a map count as memory of this process.
    """
    first = 0
    with open(path, "rb") as file:
        if at >= path.stat().st_size:  # a damaged header asks for places that no file has
            return
        file.seek(at)
        while first < number:
            block = np.fromfile(file, dtype, min(BLOCK, number - first))
            if not len(block):
                return
            yield first, block
            first += len(block)


# ---- the index ----


def read_pair(prefix: Path, faults: Faults) -> Pair | None:
    """Everything that the .idx, and the length of the .bin, tell; None where there is not even a header."""
    idx, bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    name, length = project.shown(idx), idx.stat().st_size
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
        return None  # another kind of file: nothing in it means anything
    if header.version != 1:
        faults.add("version", f"{name}, byte {len(MAGIC)}: the version is {header.version}; only 1 is known.")
    if header.code not in DTYPES:
        faults.add("dtype", f"{name}, byte {len(MAGIC) + 8}: the dtype code is {header.code}; known are 1 to 8.")
    dtype = header.dtype if header.code in DTYPES else None
    counts_fit = check_length(name, length, header, faults)
    have = bin_path.stat().st_size if bin_path.is_file() else None
    if have is None:
        faults.add("missing", f"{project.shown(bin_path)}: there is no such file; it holds the tokens of {idx.name}.")
    if counts_fit:
        check_rows(idx, length, header, dtype, bin_path, have, faults)
        check_documents(idx, header, faults)
    sound = sum(faults.counts.values()) == before
    return Pair(prefix, header, dtype, (have or 0) // dtype.itemsize if dtype else 0, sound)


def check_length(name: str, length: int, header: Header, faults: Faults) -> bool:
    """Whether the counts in the header can be believed: the file is as long as they say, or was cut off."""
    if length == header.end:
        return True
    asks = f"its header ({count(header.rows, 'row')} by byte 18, {header.documents:,} document borders by byte 26)"
    if length > header.end:
        more = count(length - header.end, "byte")
        faults.add("length", f"{name}, byte {header.end:,}: {asks} describes {header.end:,} bytes; {more} follow.")
        return False
    if length < header.offsets_at:
        where = f"the size of row {(length - HEADER) // 4:,}"
    elif length < header.documents_at:
        where = f"the pointer of row {(length - header.offsets_at) // 8:,}"
    else:
        where = f"entry {(length - header.documents_at) // 8:,} of the document index"
    rows, left = divmod(length - HEADER - 8, 20)  # one document per row, as nearly all writers have it
    fits = f" Its length would fit {count(rows, 'row')}: these counts may be wrong." if left == 0 <= rows else ""
    faults.add("length", f"{name}, byte {length:,}: ends before {where}; {asks} asks for {header.end:,} bytes.{fits}")
    return not fits


def check_rows(idx, length, header: Header, dtype, bin_path: Path, have: int | None, faults: Faults) -> None:
    """Sizes and pointers, side by side; then the length of the .bin. length: of the .idx, which may have been cut off."""
    name, item = project.shown(idx), dtype.itemsize if dtype else 0
    there = min(header.rows, (length - HEADER) // 4)
    pointers = values(idx, "<i8", header.offsets_at, header.rows)
    total, gaps, negative, cut_row = 0, (0, 0), 0, None  # gaps: of the two rows before, how far they lie off
    for first, sizes in values(idx, "<i4", HEADER, there):
        wrong = np.flatnonzero(sizes < 0)
        negative += len(wrong)
        faults.add_all(
            "size",
            wrong,
            lambda i, first=first, sizes=sizes: (
                f"{name}, byte {HEADER + 4 * (first + i):,}: row {first + i:,} has {sizes[i]} tokens."
            ),
        )
        ends = total + np.cumsum(sizes, dtype=np.int64)
        if have is not None and item and cut_row is None and int(ends[-1]) * item > have:
            at = int(np.flatnonzero(ends * item > have)[0])
            cut_row = first + at, have // item - (int(ends[at]) - int(sizes[at]))
        _, found = next(pointers, (0, np.zeros(0, np.int64)))
        if dtype and len(found):
            n = len(found)
            starts = (ends[:n] - sizes[:n]) * item
            off = np.concatenate([np.array(gaps, np.int64), found - starts])
            # a row that lies off is told once: not again where the rows behind it lie off as far, or right again
            wrong = np.flatnonzero((off[2:] != 0) & (off[2:] != off[1:-1]) & (off[2:] != off[:-2]))
            expected = found - (off[2:] - off[1:-1])
            faults.add_all(
                "pointer",
                wrong,
                lambda i, first=first, found=found, expected=expected: wrong_pointer(
                    name, header, first + i, found[i], expected[i]
                ),
            )
            gaps = int(off[-2]), int(off[-1])
        total = int(ends[-1])
    if have is None or not item or negative or there < header.rows:
        return
    need, bin_name = total * item, project.shown(bin_path)
    if have < need:
        row, token = cut_row
        faults.add(
            "bin",
            f"{bin_name}, byte {have:,}: ends in row {row:,}, token {token:,}; {idx.name} describes {need:,} bytes.",
        )
    if have > need:
        more = count(have - need, "byte")
        faults.add("bin", f"{bin_name}, byte {need:,}: {more} more than {idx.name} describes ({need:,}).")


def wrong_pointer(name: str, header: Header, row: int, found: int, expected: int) -> str:
    before = f", where row {row - 1:,} ends (its size: byte {HEADER + 4 * (row - 1):,})" if row else ""
    return (
        f"{name}, byte {header.offsets_at + 8 * row:,}: row {row:,} points to byte {found:,} of the .bin, "
        f"but must begin at {expected:,}{before}."
    )


def check_documents(idx: Path, header: Header, faults: Faults) -> None:
    """The document index: row numbers that begin with 0, never fall, and end with the number of rows."""
    name, rows = project.shown(idx), header.rows
    if not header.documents:
        faults.add(
            "document index", f"{name}, byte 26: the document index is empty; it must hold 0 and {rows} at least."
        )
    previous = 0
    for first, borders in values(idx, "<i8", header.documents_at, header.documents):
        known = (borders >= 0) & (borders <= rows)
        # one border that is too large makes not all of those behind it wrong
        before = np.concatenate([[previous], np.where(known, borders, 0)[:-1]])
        right = known & (borders >= before)
        if first == 0:
            right[0] = borders[0] == 0
        if first + len(borders) == header.documents:
            right[-1] &= borders[-1] == rows
        faults.add_all(
            "document index",
            np.flatnonzero(~right),
            lambda i, first=first, borders=borders, before=before: (
                f"{name}, byte {header.documents_at + 8 * (first + i):,}: entry {first + i:,} of the document index is "
                f"{borders[i]:,}; {must_be(first + i, header, int(before[i]))}."
            ),
        )
        previous = int(borders[-1]) if known[-1] else 0


def must_be(entry: int, header: Header, before: int) -> str:
    if entry == 0:
        return "the first must be 0"
    if entry == header.documents - 1:
        return f"the last must be the number of rows, {header.rows:,}"
    return f"it must lie between {before:,} (the one before) and {header.rows:,} (the rows)"


# ---- the tokens ----


@dataclass(frozen=True)
class Piece:
    """A block of tokens. ids: int64 [n], -1 for what is no whole number. ends: where rows end in it, 0..n, rising.

    at: number of the first token in the .bin. row: number of the row that is open there, and where that row began.
    """

    ids: np.ndarray
    at: int
    ends: np.ndarray
    row: int
    row_at: int

    def place(self, i: int) -> tuple[int, int]:
        """Row, and number in that row, of token i of this block."""
        before = int(np.searchsorted(self.ends, i, side="right"))
        return self.row + before, self.at + int(i) - (self.at + int(self.ends[before - 1]) if before else self.row_at)

    def starts(self) -> np.ndarray:
        """Where the rows begin that end here: below 0 for one that began in an earlier block."""
        return np.concatenate([[self.row_at - self.at], self.ends[:-1]]) if len(self.ends) else self.ends


def pieces(pair: Pair) -> Iterator[Piece]:
    """The tokens of a sound pair with the borders of their rows; of another pair, without borders."""
    sizes = pair.sizes() if pair.sound else iter(())
    ends, total, row, row_at = np.zeros(0, np.int64), 0, 0, 0
    for at, block in values(pair.bin, pair.dtype, 0, pair.tokens):
        while not len(ends) or ends[-1] <= at + len(block):
            _, more = next(sizes, (0, None))
            if more is None:
                break
            ends = np.concatenate([ends, total + np.cumsum(more, dtype=np.int64)])
            total = int(ends[-1])
        here = ends[: np.searchsorted(ends, at + len(block), side="right")]
        yield Piece(whole_numbers(block), at, here - at, row, row_at)
        if len(here):
            row, row_at, ends = row + len(here), int(here[-1]), ends[len(here) :]


def whole_numbers(block: np.ndarray) -> np.ndarray:
    if block.dtype.kind == "f":
        whole = np.isfinite(block) & (block == np.floor(block)) & (np.abs(block) < 2**62)
        return np.where(whole, block, -1).astype(np.int64)
    return block.astype(np.int64)


class Utf8Rows:
    """Counts the rows whose bytes are no UTF-8. A row may be larger than a block: half a character waits for its rest."""

    def __init__(self):
        # one more than the vocabulary: a line break between rows, which no character can reach over
        self.table = [*tokenizer.token_bytes(), b"\n"]
        self.waiting, self.open_is_bad = b"", False
        self.bad, self.first_bad = 0, None

    def push(self, piece: Piece) -> None:
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
        return b"".join(map(self.table.__getitem__, ids.tolist()))


@dataclass
class Facts:
    """What was counted in the tokens of a pair."""

    outside: int = 0  # ids that no World vocabulary has
    lowest: int = 0
    highest: int = 0
    ended: int = 0  # rows that end with token 0
    not_text: int = 0  # rows that are no UTF-8
    first_not_text: int | None = None


def read_tokens(pair: Pair, faults: Faults, warnings: Faults) -> Facts:
    facts, rows = Facts(), Utf8Rows()
    name, item = project.shown(pair.bin), pair.dtype.itemsize
    for piece in pieces(pair):
        ids = piece.ids

        def place(i, piece=piece, ids=ids) -> str:
            at = f"{name}, byte {(piece.at + int(i)) * item:,}: "
            if not pair.sound:
                return f"{at}token {piece.at + int(i):,} of the file is {ids[i]}"
            row, token = piece.place(i)
            return f"{at}row {row:,}, token {token:,} is {ids[i]}"

        facts.lowest, facts.highest = min(facts.lowest, int(ids.min())), max(facts.highest, int(ids.max()))
        outside = np.flatnonzero((ids < 0) | (ids >= tokenizer.VOCAB_SIZE))
        facts.outside += len(outside)
        faults.add_all("id", outside, lambda i, tell=place: f"{tell(i)}; the World vocabulary ends at {LAST_WORLD_ID}.")
        reserved = np.flatnonzero((ids > LAST_WORLD_ID) & (ids < tokenizer.VOCAB_SIZE))
        warnings.add_all("reserved id", reserved, lambda i, tell=place: f"{tell(i)}, a reserved id without text.")
        if pair.sound:
            filled = piece.ends[piece.ends > piece.starts()]  # not of empty rows
            facts.ended += int((ids[filled - 1] == tokenizer.END_OF_DOC).sum())
            if not facts.outside:
                rows.push(piece)
    facts.not_text, facts.first_not_text = rows.bad, rows.first_bad
    return facts


def read_roles(roles: Pair, pair: Pair, faults: Faults) -> np.ndarray:
    """Tokens per role, int64 [roles]; tells values that are no role, and rows that are not those of the tokens."""
    tallies, name = np.zeros(256, np.int64), project.shown(roles.bin)
    for piece in pieces(roles):
        tallies += np.bincount(piece.ids, minlength=256)
        faults.add_all(
            "role",
            np.flatnonzero(piece.ids > max(Role)),
            lambda i, piece=piece: (
                f"{name}, byte {piece.at + int(i):,}: row {piece.place(i)[0]:,}, token {piece.place(i)[1]:,} has the role "
                f"{piece.ids[i]}; known are 0 to {int(max(Role))}."
            ),
        )
    if roles.header.rows != pair.header.rows:
        faults.add(
            "roles of other data",
            f"{project.shown(roles.idx)}, byte 18: describes {count(roles.header.rows, 'row')}, but {pair.idx.name} "
            f"{count(pair.header.rows, 'row')}: it belongs to other data.",
        )
    for (first, ours), (_, theirs) in zip(roles.sizes(), pair.sizes(), strict=False):
        n = min(len(ours), len(theirs))
        faults.add_all(
            "roles of other data",
            np.flatnonzero(ours[:n] != theirs[:n]),
            lambda i, first=first, ours=ours, theirs=theirs: (
                f"{project.shown(roles.idx)}, byte {HEADER + 4 * (first + i):,}: row {first + i:,} has "
                f"{count(int(ours[i]), 'role')} for {count(int(theirs[i]), 'token')}: they belong to other data."
            ),
        )
    return tallies[: max(Role) + 1]


# ---- what is shown ----


def inspect(prefix: Path, rows: int) -> None:
    faults, warnings = Faults(), Faults()
    pair = read_pair(prefix, faults)
    if pair:
        show_header(pair)
    facts = read_tokens(pair, faults, warnings) if pair and pair.dtype and pair.tokens else Facts()
    roles = find_roles(prefix, faults)
    if pair and pair.sound:
        show_lengths(pair, facts)
        if roles and roles.sound:
            tallies = read_roles(roles, pair, faults)
            show_roles(tallies)
        elif not Path(f"{prefix}.roles.idx").exists():
            print("roles     no .roles file: qa finds turns by the headings User: and Assistant: in the text")
    if facts.outside:
        print(
            f"text      the ids ({facts.lowest:,} to {facts.highest:,}) do not belong to the World vocabulary "
            f"(0 to {LAST_WORLD_ID}): these data were made with another tokenizer"
        )
    for line in warnings.lines():
        print(f"careful   {line}")
    if pair and pair.sound and not facts.outside:
        show_rows(pair, roles if roles and roles.sound and not faults else None, rows)
    if faults:
        sys.stdout.flush()
        many = count(sum(faults.counts.values()), "fault")
        told = "\n".join(f"  {line}" for line in faults.lines())
        raise UserError(
            f"{project.shown(prefix)} has {many}:\n{told}\nMake it again with ./make_tokenize.sh, or copy it again from "
            "where it came from."
        )
    print(f"sound     {project.shown(prefix)}: nothing is wrong with it")


def find_roles(prefix: Path, faults: Faults) -> Pair | None:
    path = Path(f"{prefix}.roles")
    idx, bin_path = Path(f"{path}.idx"), Path(f"{path}.bin")
    if not idx.is_file():
        if bin_path.is_file():
            faults.add("missing", f"{project.shown(idx)}: there is no such file, but {bin_path.name} is there.")
        return None
    pair = read_pair(path, faults)
    if pair and pair.dtype and pair.dtype != np.uint8:
        faults.add(
            "roles of other data",
            f"{project.shown(idx)}, byte {len(MAGIC) + 8}: roles are dtype code 1 (uint8), not {pair.header.code}.",
        )
        return None
    return pair


def show_header(pair: Pair) -> None:
    header = pair.header
    kind = pair.dtype.name if pair.dtype else "unknown"
    print(
        f"file      {project.shown(pair.prefix)}.bin/.idx, version {header.version}, dtype code {header.code} ({kind})"
    )
    per = "each row is one" if header.documents == header.rows + 1 else f"over {count(header.rows, 'row')}"
    print(f"holds     {count(header.rows, 'row')}, {count(max(header.documents - 1, 0), 'document')} ({per})")


def show_lengths(pair: Pair, facts: Facts) -> None:
    histogram: Counter[int] = Counter()  # few keys: n different lengths need n * n / 2 tokens
    for _, sizes in pair.sizes():
        histogram.update(dict(zip(*(a.tolist() for a in np.unique(sizes, return_counts=True)), strict=True)))
    n, lengths = pair.header.rows, sorted(histogram)
    if not n:
        print("tokens    none")
        return
    empty = f"; {count(histogram[0], 'row')} empty" if histogram[0] else ""
    below = np.cumsum([histogram[length] for length in lengths])

    def at(share: float) -> int:
        """The length that `share` of the rows do not exceed."""
        return lengths[int(np.searchsorted(below, share * n))]

    print(
        f"tokens    {pair.tokens:,}; per row min {lengths[0]:,}, median {at(0.5):,}, mean {pair.tokens / n:,.1f}, "
        f"95 % {at(0.95):,}, max {lengths[-1]:,}{empty}"
    )
    print(f"ends      {facts.ended:,} of {count(n, 'row')} with token 0, the end of a document")
    if facts.outside:
        return
    if not facts.not_text:
        print("text      valid UTF-8 in every row")
        return
    print(
        f"text      no valid UTF-8 in {facts.not_text:,} of {count(n, 'row')}, the first is row {facts.first_not_text:,}"
    )
    if facts.not_text > n / 2:
        print(
            "careful   most rows are no UTF-8: these may be ids of another vocabulary, or pieces cut at fixed lengths"
        )


def show_roles(tallies: np.ndarray) -> None:
    whole = max(int(tallies.sum()), 1)
    shares = [f"{role.name.lower()} {100 * tallies[role] / whole:.1f} %" for role in Role if tallies[role]]
    print(f"roles     {', '.join(shares) or 'none'}")


def show_rows(pair: Pair, roles: Pair | None, number: int) -> None:
    for row in range(min(number, pair.header.rows)):
        size = int(np.fromfile(pair.idx, "<i4", 1, offset=HEADER + 4 * row)[0])
        at = int(np.fromfile(pair.idx, "<i8", 1, offset=pair.header.offsets_at + 8 * row)[0])
        shown = min(size, SHOWN_TOKENS)
        ids = whole_numbers(np.fromfile(pair.bin, pair.dtype, shown, offset=at))
        place = at // pair.dtype.itemsize  # a role is one byte
        said = np.fromfile(roles.bin, np.uint8, shown, offset=place) if roles else roles_in_text(ids, spans_of_text)
        print(f"\nrow {row:,}: {count(size, 'token')}{f', the first {shown:,}' if shown < size else ''}")
        trained = np.concatenate([[False], target_weights(said, "qa") > 0]) if len(ids) else said
        text = tokenizer.marked(ids.tolist(), trained.tolist())
        if len(text) > SHOWN_CHARACTERS:
            text = f"{text[:SHOWN_CHARACTERS]} ... ({len(text) - SHOWN_CHARACTERS:,} characters more)"
        print("\n".join(f"  {line}" for line in text.split("\n")))
    print()


if __name__ == "__main__":
    main(sys.argv[1:])
