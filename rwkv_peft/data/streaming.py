"""STREAMING=1: batches from documents that arrive one after another, without a file of tokens.

Documents are taken in chunks; a chunk is batched as a small file would be, and used up before the next one is read. So
packing, OVERLONG and the masks are those of files. The content after a number of steps is always the same: to resume
at micro-batch n, the stream is read again up to there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset

from rwkv_peft.common.errors import SettingErrors

from .dataset import FILL_TO, Batch, TokenDataset, dummy_batch, join_rows
from .sampling import Plan
from .token_source import Chunk, TokenSource

# contexts of tokens that are batched together: a larger chunk has fuller packs, and fewer left open at its end
CHUNK = 64
PATIENCE = 50  # chunks in a row without anything to train


class Row(NamedTuple):
    """A row of a chunk."""

    data: TokenDataset
    number: int


class Stream(IterableDataset):
    """The micro-batches of one rank.

    Args:
        name: of the stream.
        documents: begins the stream again; yields ids and roles of each document.
        make_data: from a TokenSource and the number of its chunk to the TokenDataset of its one pass.
        find_roles: from the tokens of a document to its roles, if the mask needs others than those recorded.
        vocab_size: of the model.
        ctx_len: most targets of a row.
        plan: of the run.
        rank: of this process.
        first: the first micro-batch.
    """

    def __init__(
        self,
        name: Path,
        documents: Callable[[], Iterator],
        make_data: Callable[[TokenSource, int], TokenDataset],
        find_roles: Callable[[np.ndarray], np.ndarray] | None,
        vocab_size: int,
        ctx_len: int,
        plan: Plan,
        rank: int,
        first: int = 0,
    ):
        self.name, self.documents, self.make_data, self.find_roles = name, documents, make_data, find_roles
        self.vocab_size, self.ctx_len, self.plan, self.rank, self.first = vocab_size, ctx_len, plan, rank, first

    def chunks(self) -> Iterator[TokenSource]:
        """Yield the chunks."""
        waiting: list[Any] = []
        size = 0
        for document in self.documents():
            waiting.append(document)
            size += len(document.ids)
            if size >= CHUNK * self.ctx_len:
                yield self.source(waiting)
                waiting, size = [], 0
        if waiting:
            yield self.source(waiting)

    def source(self, documents: list) -> TokenSource:
        """Make a source of documents."""
        ids = np.concatenate([d.ids for d in documents])
        chunk = Chunk(self.name, np.array([len(d.ids) for d in documents], dtype=np.int32), ids)
        return TokenSource(chunk, self.find_roles or np.concatenate([d.roles for d in documents]), self.vocab_size)

    def rows(self) -> Iterator[Row]:
        """Yield every row of the stream: one pass of each chunk.

        Raises:
            SettingErrors: many chunks in a row have nothing to train.
        """
        empty = 0
        for number, source in enumerate(self.chunks()):
            try:
                data = self.make_data(source, number)
            except SettingErrors:
                empty += 1
                if empty == PATIENCE or (number == 0 and source.starts[-1] < CHUNK * self.ctx_len):
                    raise
                continue
            empty = 0
            for row in range(data.rows):
                yield Row(data, row)

    def steps(self) -> Iterator[list[Row]]:
        """Yield the rows of every optimizer step, over all ranks; the last one may be short."""
        size = self.plan.micro_bsz * self.plan.accumulate * self.plan.world
        step: list[Row] = []
        for row in self.rows():
            step.append(row)
            if len(step) == size:
                yield step
                step = []
        if step:
            yield step

    def __iter__(self) -> Iterator[Batch]:
        plan = self.plan
        for number, step in zip(range(plan.optimizer_steps), self.steps(), strict=False):
            if (number + 1) * plan.accumulate <= self.first:
                continue
            targets = sum(data.count_row(row) for data, row in step)
            for part in range(plan.accumulate):
                if number * plan.accumulate + part < self.first:
                    continue
                begin = (part * plan.world + self.rank) * plan.micro_bsz
                mine = step[begin : begin + plan.micro_bsz]
                yield self.batch(mine, targets) if mine else dummy_batch(self.batch(step[:1], targets))

    def batch(self, rows: list[Row], step_targets: int) -> Batch:
        """Make a batch of rows."""
        parts = (data.parts_of(number) for data, number in rows)
        return join_rows(parts, step_targets, FILL_TO.get(rows[0].data.mode))

    def sequences(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield tokens and weights of every sequence, to inspect them."""
        for data, number in self.rows():
            yield from data.row(number)
