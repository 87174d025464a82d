"""Rows of files as tokens, encoded while they are read, shuffled within a buffer.

Endless for files, which are read again and again; a pipe is read once.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rwkv_peft.common.errors import UserError
from rwkv_peft.common.formatting import plural
from rwkv_peft.common.paths import display_path

from . import files, reader
from .encode import Tokens
from .foreign_headings import KINDS
from .pipeline import EncodeConfig, RowEncoder, items
from .reader import Block, Note
from .schemas import Row, RowError

TOGETHER = 256  # rows that are encoded at once
REPORTED = 10  # rejected rows that are reported; a run may go through millions


@dataclass(frozen=True)
class RowStream:
    """Documents from files, in the same order for the same seed. buffer: rows that wait for their turn (1: file order)."""

    paths: Sequence[Path]
    recipe: EncodeConfig
    txt_mode: str
    seed: int
    buffer: int
    say: Callable[[str], None]
    encoding: str = "auto"
    valid_split: str = ""  # the part of the files that is not trained on
    said: set[Note] = field(default_factory=set, compare=False)

    def documents(self) -> Iterator[Tokens]:
        """Every row that can be used, pass after pass. UserError if a whole pass has none."""
        encoder, reported = RowEncoder(self.recipe), 0
        unused: Counter[tuple[str, str]] = Counter()
        warned: set[str] = set()
        for file, encoding in reader.settle(self.paths, self.encoding).items():
            self.say(f"note: {file} is {encoding}; it was read as such")
        for number in itertools.count():
            used, reject = 0, None
            rows = shuffled(self.rows(), np.random.default_rng([self.seed, number]), self.buffer)
            while some := list(itertools.islice(rows, TOGETHER)):
                # a row's place in this list stands for its file and line, which the list knows
                made = encoder.block(Block("", 0, [(i, item) for i, (_, _, item) in enumerate(some)], 0))
                for reject in made.rejects:
                    reported += 1
                    if number == 0 and reported <= REPORTED:
                        file, line, _ = some[reject.line]
                        self.say(f"left out  {file}:{line}: {reject.message}")
                for what in [kind for kind in KINDS if kind in made.places and kind not in warned]:
                    warned.add(what)
                    place = made.places[what][0]
                    file, line, _ = some[place.line]
                    todo = "CONVERT_HEADINGS=1 in make_tokenize.sh rewrites such rows where they can be read in one way only"
                    self.say(
                        f"warning   {file}:{line}: a row {KINDS[what].name} ({place.note}): {KINDS[what].effect}. "
                        f"{todo if KINDS[what].rewritten else KINDS[what].instead}. Others like it are not named"
                    )
                used += len(made.sizes)
                if number == 0:
                    unused.update(made.unused)
                ends = np.cumsum(made.sizes)
                for begin, end in zip((ends - made.sizes).tolist(), ends.tolist(), strict=True):
                    yield Tokens(made.ids[begin:end], made.roles[begin:end])
            if not used:
                why = f": {reject.message}" if reject else ""
                raise UserError(f"{display_path(self.paths[0])}: holds no row that can be used{why}.")
            for (level, key), rows_of_it in unused.most_common(REPORTED) if number == 0 else ():
                self.say(f'warning   {level} "{key}" is not used ({plural(rows_of_it, "row")})')
            if number == 0 and reported > REPORTED:
                self.say(f"left out  {reported:,} rows of the first pass; the first {REPORTED} are told above")
            if not all(path.is_file() for path in self.paths):  # a pipe is empty now
                return

    def say_once(self, note: Note) -> None:
        """Print a note that was not printed yet."""
        if note not in self.said:
            self.said.add(note)
            self.say(f"{note.level:<9} {note.file}: {note.words}")

    def rows(self) -> Iterator[tuple[str, int, bytes | Row | RowError]]:
        """File, number and content of every row, in the order of the files."""
        for path in self.paths:
            for block in files.blocks(path, self.txt_mode, self.valid_split, columns=self.recipe.columns):
                for note in block.notes:
                    self.say_once(note)
                if block.held_out:
                    continue
                for number, item in items(block):
                    yield block.file, number, item


def shuffled(rows: Iterator, random: np.random.Generator, buffer: int) -> Iterator:
    """Each row takes a random place among the `buffer` that wait, and the one that was there goes."""
    waiting = list(itertools.islice(rows, buffer))
    for row in rows:
        place = int(random.integers(len(waiting)))
        yield waiting[place]
        waiting[place] = row
    yield from (waiting[i] for i in random.permutation(len(waiting)))
