"""Rows -> batches: tokens behind one another with the borders of their sequences, and which of them are trained.

Every batch can be computed from its number alone, so any worker, rank or resumed run makes the same one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..errors import Problem, Problems, UserError
from .binidx import Reader
from .masking import target_weights
from .sampling import Pass, Plan, auto_ctx_len, number_of_rows, one_pass

COUNT_TOKENS = 1 << 22  # documents are looked through in blocks of about this many tokens


@dataclass
class Batch:
    """One micro-batch of one rank.

    ids: int64 [1, T], the inputs of all sequences behind one another. cu_seqlens: their borders, [S + 1] on the host.
    positions: int64 [R], the inputs whose target is trained. targets: int64 [R].
    step_targets: trained targets of the whole optimizer step, over all micro-batches and ranks.
    tokens: inputs without filling.
    """

    ids: Tensor
    cu_seqlens: tuple[int, ...]
    positions: Tensor
    targets: Tensor
    step_targets: int
    tokens: int


@dataclass(frozen=True)
class Facts:
    """What is known of the data before training, for the plan that the user sees."""

    documents: int
    trained_documents: int  # that have a target under this mask
    tokens: int
    targets: int  # trained in one pass
    truncated: int  # documents longer than the context
    lost: int  # tokens behind their ends


class Data:
    """A tokenized file under one sampling mode and one mask.

    roles: Reader of NAME.roles, or a function from the tokens of a document to its roles for files that have none.
    """

    def __init__(
        self,
        reader: Reader,
        roles: Reader | Callable[[np.ndarray], np.ndarray],
        mode: str,
        mask: str,
        ctx_len: int | None,
        seed: int,
        shuffle: bool,
        vocab_size: int,
    ):
        self.reader, self.roles, self.mode, self.mask = reader, roles, mode, mask
        self.seed, self.shuffle = seed, shuffle
        if isinstance(roles, Reader) and not np.array_equal(roles.sizes, reader.sizes):
            raise UserError(f"{roles.path}: describes other rows than {reader.path}. Tokenize the data again.")
        sizes = reader.sizes
        if not len(sizes) or sizes.sum(dtype=np.int64) < 2:
            raise UserError(f"{reader.path}: holds no text to train on.")
        self.ctx_len = ctx_len or auto_ctx_len(mode, sizes)
        self.starts = np.zeros(len(sizes) + 1, dtype=np.int64)
        np.cumsum(sizes, out=self.starts[1:])
        self.counts = self.count_targets(vocab_size)
        self.keep = np.flatnonzero(self.counts)
        if not len(self.keep) and (mode, mask) != ("get", "none"):
            raise Problems(self.nothing_to_train(vocab_size))
        self.rows = number_of_rows(mode, sizes, self.ctx_len, self.keep)
        # passes and steps are asked for in order; two passes are alive at their border
        self.one_pass = functools.lru_cache(maxsize=2)(self.make_pass)
        self.step_targets = functools.lru_cache(maxsize=4)(self.count_step)

    def nothing_to_train(self, vocab_size: int) -> Problem:
        if self.mask in ("pad", "none"):
            return Problem("DATA_PATH", f"has nothing to train: every row of {self.reader.path.name} is a single token")
        cut, self.ctx_len = self.ctx_len, int(self.reader.sizes.max())
        if self.count_targets(vocab_size).any():
            return Problem("CTX_LEN", f"is too short: {cut} tokens end before any answer begins. Use auto")
        return Problem(
            "LOSS_MASK",
            f"finds nothing to train: no row of {self.reader.path.name} has an Assistant turn. Use LOSS_MASK=pad for plain "
            'text, or write rows as "User: ...", a blank line, "Assistant: ..."',
        )

    def make_pass(self, number: int) -> Pass:
        return one_pass(self.mode, self.reader.sizes, self.ctx_len, self.keep, self.seed, number, self.shuffle)

    def count_targets(self, vocab_size: int) -> np.ndarray:
        """Trained targets per document within the context, int64 [N]; also checks that every id is in the vocabulary."""
        sizes, counts = self.reader.sizes, np.zeros(len(self.reader), dtype=np.int64)
        limit = int(sizes.max()) if self.mode == "get" else self.ctx_len + 1
        begin = 0
        while begin < len(sizes):
            end = max(begin + 1, int(np.searchsorted(self.starts, self.starts[begin] + COUNT_TOKENS, side="right")) - 1)
            span = slice(self.starts[begin], self.starts[end])
            tokens = self.reader.tokens[span]
            outside = (tokens >= vocab_size) | (tokens < 0)
            if outside.any():
                bad = int(np.flatnonzero(outside)[0])
                row = int(np.searchsorted(self.starts, self.starts[begin] + bad, side="right")) - 1
                raise UserError(
                    f"{self.reader.path}: row {row} holds token {int(tokens[bad])}, but the model's vocabulary ends at "
                    f"{vocab_size - 1}. The data were made with another vocabulary."
                )
            first = np.zeros(len(tokens), dtype=bool)
            first[self.starts[begin:end] - self.starts[begin]] = True
            weights = np.zeros(len(tokens))
            if len(tokens) > 1:
                mask = "pad" if self.mask == "none" else self.mask
                weights[1:] = target_weights(self.roles_between(span.start, span.stop), mask, first)
            place = np.arange(len(tokens)) - np.repeat(self.starts[begin:end] - self.starts[begin], sizes[begin:end])
            document = np.repeat(np.arange(begin, end), sizes[begin:end])
            counts[begin:end] = np.bincount(document - begin, weights * (place < limit), minlength=end - begin)
            begin = end
        return counts

    def roles_between(self, start: int, stop: int) -> np.ndarray:
        if isinstance(self.roles, Reader):
            return np.asarray(self.roles.tokens[start:stop])
        # a foreign file: look at whole documents, a role depends on the heading before it
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        last = int(np.searchsorted(self.starts, stop, side="left"))
        found = np.concatenate([self.roles(self.reader.row(i)) for i in range(first, last)])
        return found[start - self.starts[first] : stop - self.starts[first]]

    def weights(self, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start - 1] for the targets of a piece."""
        begin, end = start, stop
        if self.mask == "last":  # which answer is the last of its document shows only in the whole of it
            begin = int(self.starts[np.searchsorted(self.starts, start, side="right") - 1])
            end = int(self.starts[np.searchsorted(self.starts, stop, side="left")])
        first = np.zeros(end - begin, dtype=bool)
        inside = self.starts[np.searchsorted(self.starts, begin) : np.searchsorted(self.starts, end)]
        first[inside - begin] = True
        return target_weights(self.roles_between(begin, end), self.mask, first)[start - begin : stop - begin - 1]

    def row(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens [n] and weights [n-1] of every piece of a row of the endless stream."""
        turn, i = divmod(number, self.rows)
        pieces = self.one_pass(turn).row(i)
        return [(self.reader.tokens[a:b].astype(np.int64), self.weights(a, b)) for a, b in pieces]

    def count_step(self, rows: range) -> int:
        """Trained targets of all the rows of an optimizer step."""
        total = 0
        for number in rows:
            turn, i = divmod(number, self.rows)
            one = self.one_pass(turn)
            if self.mode == "get":
                total += sum(int(self.weights(a, b).sum()) for a, b in one.row(i))
            else:
                total += int(self.counts[one.documents[one.first[i] : one.first[i + 1]]].sum())
        return total

    def facts(self) -> Facts:
        sizes = self.reader.sizes.astype(np.int64)
        over = np.zeros(0, dtype=np.int64) if self.mode == "get" else sizes[self.keep] - (self.ctx_len + 1)
        targets = int(self.counts.sum())
        if self.mode == "get" and self.mask == "none":
            targets = int(sizes.sum()) - 1
        return Facts(
            len(sizes), len(self.keep), int(sizes.sum()), targets, int((over > 0).sum()), int(over[over > 0].sum())
        )


def make_batch(rows: list[list[tuple[np.ndarray, np.ndarray]]], step_targets: int, fill: bool) -> Batch:
    """rows: pieces (tokens, weights) of every row. fill: make all pieces as long as the longest, with token 0."""
    pieces = [piece for row in rows for piece in row]
    longest = max(len(tokens) for tokens, _ in pieces) - 1
    ids, targets, weights, borders, real = [], [], [], [0], 0
    for tokens, weight in pieces:
        length = longest if fill else len(tokens) - 1
        filling = (0, length - (len(tokens) - 1))
        ids.append(np.pad(tokens[:-1], filling))
        targets.append(np.pad(tokens[1:], filling))
        weights.append(np.pad(weight, filling))
        borders.append(borders[-1] + length)
        real += len(tokens) - 1
    flat_targets, positions = np.concatenate(targets), np.flatnonzero(np.concatenate(weights))
    return Batch(
        ids=torch.from_numpy(np.concatenate(ids))[None],
        cu_seqlens=tuple(borders),
        positions=torch.from_numpy(positions),
        targets=torch.from_numpy(flat_targets[positions]),
        step_targets=step_targets,
        tokens=real,
    )


class Batches(Dataset):
    """Micro-batch i of a rank, i counted over the whole run (epoch * micro-batches of an epoch + number)."""

    def __init__(self, data: Data, plan: Plan, rank: int):
        self.data, self.plan, self.rank = data, plan, rank

    def __len__(self) -> int:
        return self.plan.micro_batches

    def __getitem__(self, i: int) -> Batch:
        epoch, number = divmod(i, self.plan.micro_batches)
        mine = self.plan.rows_of_micro_batch(epoch, number, self.rank)
        step = self.plan.rows_of_step(epoch, number // self.plan.accumulate)
        rows = [self.data.row(n) for n in mine]
        if not rows:  # this rank has nothing left in the epoch's last step: run something, count nothing
            rows = [[(tokens, np.zeros_like(weights)) for tokens, weights in self.data.row(step[0])]]
        batch = make_batch(rows, self.data.step_targets(step), fill=self.data.mode == "pad")
        return batch if mine else dataclasses.replace(batch, tokens=0)


class InOrder(Sampler):
    """The numbers of an epoch's micro-batches; Lightning calls set_epoch before each epoch."""

    def __init__(self, length: int):
        self.length, self.epoch = length, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch * self.length, (self.epoch + 1) * self.length))
