"""From rows to batches: tokens one after another with the bounds of their sequences, and which of them are trained.

Every batch can be computed from its number alone, so any worker, rank or resumed run makes the same one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rwkv_peft.common.errors import SettingError, SettingErrors
from rwkv_peft.common.formatting import plural

from .buckets import STEP, BucketPlan, BucketRows, Buckets, bucket_plan
from .mixture import MixtureSchedule, integer_ratio
from .packing import Packs
from .sampling import AUTO_CTX_LIMIT, ItemRows, Plan, TokenSpan, auto_ctx_len
from .token_source import TokenSource
from .trainable import DataStats, SourceData, item_data, window_data

ITEM_MODES = ("pack", "pad", "only", "bucket")  # documents stay whole, and OVERLONG decides about long ones
FILL_TO = {"pad": 1, "bucket": STEP}  # rows of a micro-batch are padded to its longest, rounded up to this
FILLING = 16  # inputs of the batch of a rank that has no row left in a step
NO_ANSWER = (
    "finds nothing to train: no row of {} has an Assistant turn. Use LOSS_MASK=pad for plain text, or write rows as "
    '"User: ...", a blank line, "Assistant: ..."'
)

NAME_TOKENS = 16  # of a micro-batch, to identify it


@dataclass
class Batch:
    """One micro-batch of one rank.

    Attributes:
        ids: int64 [1, T], the inputs of all sequences one after another.
        cu_seqlens: sequence bounds, [S + 1] on the host.
        positions: int64 [R], the inputs whose target is trained.
        targets: int64 [R].
        step_targets: loss tokens of the whole optimizer step, over all micro-batches and ranks.
        tokens: inputs without padding.
        beginning: the first tokens on the host, to identify the batch in messages.
    """

    ids: Tensor
    cu_seqlens: tuple[int, ...]
    positions: Tensor
    targets: Tensor
    step_targets: int
    tokens: int
    beginning: tuple[int, ...] = ()


class TokenDataset:
    """Tokenized files under one sampling mode and one mask.

    Args:
        sources: the files.
        mode: one of pack, pad, only, bucket, get, magic (get with MAGIC_PRIME=1), concat (pack with PACK=concat).
        mask: none, pad, qa, last; for se the roles say ASSISTANT for what is between the markers, and the mask is qa.
        ctx_len: most targets of a row, None for auto.
        overlong: OVERLONG.
        seed: of the order; several numbers where a stream has one data set after another.
        shuffle: draw a new order every pass.
        choose_buckets: from the lengths of all rows to Buckets; only used by bucket.
        limit: the setting that limits the length of a row, for messages.
        longest: the limit of ctx_len auto.

    Attributes:
        rows: of one pass over all files.
    """

    def __init__(
        self,
        sources: Sequence[TokenSource],
        mode: str,
        mask: str,
        ctx_len: int | None,
        overlong: str,
        seed: int | tuple[int, ...],
        shuffle: bool,
        choose_buckets: Callable[[np.ndarray], Buckets] | None = None,
        limit: str = "CTX_LEN",
        longest: int = AUTO_CTX_LIMIT,
    ):
        self.sources, self.mode, self.mask, self.overlong = list(sources), mode, mask, overlong
        self.ctx_len = ctx_len or auto_ctx_len(mode, np.concatenate([source.sizes for source in sources]), longest)
        if mask == "last":
            for source in sources:
                source.find_last_answers()
        key = seed if isinstance(seed, tuple) else (seed,)
        self.parts = [
            item_data(source, mask, self.ctx_len, overlong)
            if mode in ITEM_MODES
            else window_data(source, mode, mask, self.ctx_len, (*key, k), shuffle)
            for k, source in enumerate(sources)
        ]
        self.check_not_empty(limit)
        self.buckets = choose_buckets(np.concatenate([p.items.length for p in self.parts])) if choose_buckets else None
        self.streams = [part.windows or self.make_rows(part, (*key, k), shuffle) for k, part in enumerate(self.parts)]
        self.rows = sum(stream.rows for stream in self.streams)
        self.turns = MixtureSchedule(integer_ratio([source.weight for source in sources]))
        self.step_targets = functools.lru_cache(maxsize=4)(self.count_step)

    def make_rows(self, part: SourceData, key: tuple[int, ...], shuffle: bool) -> ItemRows:
        """Return the rows of a source whose documents stay whole."""
        if self.mode == "pack":
            return Packs(part.items, self.ctx_len, key, shuffle)
        if self.buckets:
            return BucketRows(part.items, self.buckets, key, shuffle)
        return ItemRows(part.items, len(part.items), key, shuffle)

    def check_not_empty(self, limit: str) -> None:
        """Check that every source has something to train.

        Raises:
            SettingErrors: one has not.
        """
        problems = []
        for part in self.parts:
            name, facts = part.source.path.name, part.facts
            if part.windows and not part.windows.rows:
                windows = f"{plural(facts.tokens // self.ctx_len, 'window')} of CTX_LEN={self.ctx_len} tokens"
                problems.append(SettingError("MAGIC_PRIME", f"needs 3 windows or more; {name} has {windows}. Use 0"))
            elif facts.targets:
                continue
            elif facts.overlong and self.overlong == "drop":
                what = f"OVERLONG=drop leaves out every row of {name} that has something to train"
                problems.append(SettingError(limit, f"is too short: {what}. Use auto"))
            elif facts.overlong:
                ends = f"{plural(self.ctx_len, 'token')} {'ends' if self.ctx_len == 1 else 'end'}"
                problems.append(SettingError(limit, f"is too short: {ends} before any answer begins. Use auto"))
            elif self.mask in ("pad", "none"):
                problems.append(
                    SettingError("DATA_PATH", f"has nothing to train: every row of {name} is a single token")
                )
            else:
                problems.append(SettingError("LOSS_MASK", NO_ANSWER.format(name)))
        if problems:
            raise SettingErrors(*problems)

    def make_plan(self, epoch_steps: int | None, micro_bsz: int, accumulate: int, world: int) -> Plan:
        """Make the plan of epochs, steps and micro-batches.

        Args:
            epoch_steps: micro-batches per rank and epoch, None for one pass.
            micro_bsz: rows of a micro-batch; bucket has its own.
            accumulate: micro-batches of an optimizer step on one rank.
            world: number of ranks.
        """
        if self.mode == "bucket":
            streams = [stream for stream in self.streams if isinstance(stream, BucketRows)]
            return bucket_plan(streams, [float(source.weight) for source in self.sources], epoch_steps)
        return Plan(self.rows, epoch_steps, micro_bsz, accumulate, world)

    def passes(self, plan: Plan, epochs: int) -> list[float]:
        """Return how often a run of so many epochs goes through each source."""
        if isinstance(plan, BucketPlan):
            drawn, each, turns = plan.optimizer_steps * epochs, [source.steps for source in plan.sources], plan.turns
        else:
            drawn, each, turns = plan.rows_per_epoch * epochs, [stream.rows for stream in self.streams], self.turns
        return [turns.count(k, drawn) / whole for k, whole in enumerate(each)]

    def locate(self, number: int) -> tuple[int, int]:
        """Return source and row in that source of row `number` of the run."""
        if self.mode == "bucket":  # the mixture takes turns by steps: see BucketPlan
            row, source = divmod(number, len(self.sources))
            return source, row
        return self.turns.locate(number)

    def parts_of(self, number: int) -> tuple[list[TokenSpan], list[np.ndarray], list[np.ndarray]]:
        """Return the spans of a row of the endless stream, their tokens, and whether each is trained as a target."""
        k, row = self.locate(number)
        pieces, source = self.streams[k].row(row), self.sources[k]
        return pieces, source.text(pieces), source.trained(pieces, self.mask)

    def row(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return tokens [n] and weights [n-1] of every sequence of a row of the endless stream."""
        pieces, text, trained = self.parts_of(number)
        lengths = sequence_lengths(pieces)
        bounds = np.cumsum(lengths)[:-1]
        both = np.split(np.concatenate(text), bounds), np.split(np.concatenate(trained), bounds)
        return [(tokens.astype(np.int64), flags[1:].astype(np.float32)) for tokens, flags in zip(*both, strict=True)]

    def count_row(self, number: int) -> int:
        """Return the loss tokens of a row."""
        k, row = self.locate(number)
        stream = self.streams[k]
        if isinstance(stream, ItemRows):
            return int(self.parts[k].counts[stream.items_of(row)].sum())
        pieces = stream.row(row)
        flags = self.sources[k].trained(pieces, self.mask)
        # the first token of a sequence is not a target
        return sum(int(np.count_nonzero(f)) - (not p.joined and bool(f[0])) for p, f in zip(pieces, flags, strict=True))

    def count_step(self, rows: range) -> int:
        """Return the loss tokens of all the rows of an optimizer step."""
        return sum(map(self.count_row, rows))

    def facts(self) -> DataStats:
        """Return the statistics of all sources together."""
        return DataStats(*map(sum, zip(*(dataclasses.astuple(part.facts) for part in self.parts), strict=True)))

    def batch(self, rows: Sequence[int], step_targets: int) -> Batch:
        """Make a batch of rows; in pad and bucket padded to one length with token 0."""
        return join_rows(map(self.parts_of, rows), step_targets, FILL_TO.get(self.mode))

    def filling(self, number: int, step_targets: int) -> Batch:
        """Return the batch of a rank that has no row left in a step: the beginning of a row, without targets."""
        pieces, text, trained = self.parts_of(number)
        length = min(sequence_lengths(pieces)[0], FILLING + 1)
        first = [np.concatenate(text)[:length]], [np.concatenate(trained)[:length]]
        return dummy_batch(make_batch(np.array([length]), *first, step_targets, None))


def largest_batch(tokens: int, rows: int) -> Batch:
    """Return a batch of so many rows of so many inputs, all of them trained: no micro-batch takes more memory."""
    text = np.zeros(tokens + 1, dtype=np.uint16)
    flags = np.ones(tokens + 1, dtype=bool)
    return make_batch(np.full(rows, tokens + 1), [text] * rows, [flags] * rows, tokens * rows, None)


def dummy_batch(batch: Batch) -> Batch:
    """Return a batch that is run and of which nothing counts."""
    nothing = torch.zeros(0, dtype=torch.long)
    return dataclasses.replace(batch, positions=nothing, targets=nothing, tokens=0)


def join_rows(
    rows: Iterable[tuple[list[TokenSpan], list[np.ndarray], list[np.ndarray]]], step_targets: int, fill_to: int | None
) -> Batch:
    """Join rows, as `TokenDataset.parts_of` returns them, in one batch."""
    lengths, text, trained = [], [], []
    for pieces, tokens, flags in rows:
        lengths += sequence_lengths(pieces)
        text += tokens
        trained += flags
    return make_batch(np.array(lengths), text, trained, step_targets, fill_to)


def sequence_lengths(pieces: Sequence[TokenSpan]) -> list[int]:
    """Return the tokens of each sequence."""
    lengths: list[int] = []
    for _, start, stop, ended, joined in pieces:
        if joined:
            lengths[-1] += stop - start + ended
        else:
            lengths.append(stop - start + ended)
    return lengths


def make_batch(
    lengths: np.ndarray, text: list[np.ndarray], trained: list[np.ndarray], step_targets: int, fill_to: int | None
) -> Batch:
    """Make a batch.

    Args:
        lengths: tokens of each sequence [S].
        text: the tokens of all sequences, in parts.
        trained: whether each token counts as a target, in parts.
        step_targets: loss tokens of the optimizer step.
        fill_to: pad all sequences with token 0 to the longest, rounded up to this; None for no padding.
    """
    tokens, flags = np.concatenate(text), np.concatenate(trained)
    ends = np.cumsum(lengths)
    keep = np.ones(len(tokens), dtype=bool)
    keep[ends - 1] = False  # the last token of a sequence is not an input
    ids = tokens[keep].astype(np.int64)
    flags[ends - lengths] = False  # its first token is not a target
    trained_tokens = np.flatnonzero(flags)
    # the target at position p of the text is predicted by the input before it; each sequence before has one input less
    sequence = np.searchsorted(ends, trained_tokens, side="right")
    positions = trained_tokens - 1 - sequence
    inputs = lengths - 1
    bounds = np.zeros(len(lengths) + 1, dtype=np.int64)
    if fill_to is None:
        np.cumsum(inputs, out=bounds[1:])
    else:
        width = -(-int(inputs.max()) // fill_to) * fill_to
        bounds = np.arange(len(lengths) + 1) * width
        moved = bounds[:-1] - (np.cumsum(inputs) - inputs)  # how far padding moves each sequence
        filled = np.zeros(int(bounds[-1]), dtype=np.int64)
        filled[np.arange(len(ids)) + np.repeat(moved, inputs)] = ids
        ids, positions = filled, positions + moved[sequence]
    return Batch(
        ids=torch.from_numpy(ids)[None],
        cu_seqlens=tuple(bounds.tolist()),
        positions=torch.from_numpy(positions),
        targets=torch.from_numpy(tokens[trained_tokens].astype(np.int64)),
        step_targets=step_targets,
        tokens=int(inputs.sum()),
        beginning=tuple(tokens[:NAME_TOKENS].tolist()),
    )


class Batches(Dataset):
    """Micro-batch i of a rank, i counted over the whole run (epoch * micro-batches of an epoch + number).

    Args:
        data: the data.
        plan: of the run.
        rank: of this process.
        whole_steps: pad a short last step of an epoch with micro-batches that train nothing.
    """

    def __init__(self, data: TokenDataset, plan: Plan, rank: int, whole_steps: bool = False):
        self.data, self.plan, self.rank = data, plan, rank
        self.of_epoch = plan.optimizer_steps * plan.accumulate if whole_steps else plan.micro_batches

    def __len__(self) -> int:
        return self.of_epoch

    def __getitem__(self, i: int) -> Batch:
        epoch, number = divmod(i, self.of_epoch)
        mine = self.plan.rows_of_micro_batch(epoch, number, self.rank)
        step = self.plan.rows_of_step(epoch, number // self.plan.accumulate)
        targets = self.data.step_targets(step)
        return self.data.batch(mine, targets) if mine else self.data.filling(step[0], targets)
