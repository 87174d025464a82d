"""DATALOAD=bucket: rows of similar length together, so that there is little padding.

All micro-batches of an optimizer step, on all ranks, take rows of one bucket: every rank has the same amount of work.
A bucket has an edge (TRAIN_LENGTHS: the most targets of a row in it) and a number of rows in a micro-batch
(TRAIN_BATCH_SIZES). A pass draws a new order within the buckets and a new order of the steps; the last step of a
bucket is short, and the missing rows are left empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .mixture import MixtureSchedule, nearest_integer_ratio
from .sampling import ItemRows, Pass, Plan, reorder_groups
from .truncate import RowSpans

STEP = 16  # edges, and the lengths that rows are padded to, are multiples of this, for GPU kernels
MOST_BUCKETS = 6
ROWS_PER_BUCKET = 64  # on average, or there are fewer buckets
WORTH = 0.02  # of all tokens: what one more bucket must save
CANDIDATES = 512  # edges that are tried; longer contexts are tried more coarsely
AUTO_TOKENS = 4096  # TOKEN_BUDGET=auto: tokens of a micro-batch, as for MICRO_BSZ=auto ...
AUTO_LEAST_STEPS = 16  # ... but a pass has at least so many optimizer steps, if the data allow it
TURNS = 10_000  # steps of a mixture before the schedule repeats


@dataclass(frozen=True)
class Buckets:
    """Edges, multiples of 16 in rising order, and the rows of a micro-batch for each."""

    edges: tuple[int, ...]
    sizes: tuple[int, ...]
    accumulate: int
    world: int

    def step_rows(self) -> np.ndarray:
        """Return the rows of a full optimizer step in each bucket."""
        return np.array(self.sizes, dtype=np.int64) * self.accumulate * self.world

    def of(self, lengths: np.ndarray) -> np.ndarray:
        """Return the bucket of each length."""
        return np.searchsorted(self.edges, lengths)


def make_buckets(
    lengths: np.ndarray, edges: Sequence[int], sizes: Sequence[int], budget: int | None, accumulate: int, world: int
) -> Buckets:
    """Make buckets for rows of these lengths. What is not given (empty, None) is chosen.

    Args:
        lengths: targets of each row.
        edges: most targets of a row in each bucket.
        sizes: rows of a micro-batch for each bucket.
        budget: tokens of a micro-batch, if `sizes` is empty.
        accumulate: micro-batches of an optimizer step on one rank.
        world: number of ranks.
    """
    edges = tuple(edges) or best_edges(lengths)
    if not sizes:
        padded = int(np.array(edges)[np.searchsorted(edges, lengths)].sum())
        auto = max(STEP, min(AUTO_TOKENS, padded // (AUTO_LEAST_STEPS * accumulate * world)))
        sizes = [max(1, (budget or auto) // edge) for edge in edges]
    return Buckets(edges, tuple(sizes), accumulate, world)


def best_edges(lengths: np.ndarray) -> tuple[int, ...]:
    """Return the edges with the least padding.

    Dynamic programming over the multiples of 16 that occur; as few edges as possible, if each removed one costs less
    than 2% of all tokens.
    """
    longest = int(lengths.max())
    step = STEP * max(1, -(-longest // (STEP * CANDIDATES)))
    histogram = np.bincount(-(-lengths // step))
    edges = np.flatnonzero(histogram) * step
    counts = np.concatenate([[0], np.cumsum(histogram[histogram > 0])])
    most = max(1, min(MOST_BUCKETS, len(edges), len(lengths) // ROWS_PER_BUCKET))
    # cost[i, j]: tokens of one bucket with the edges i..j in it, padded to edge j
    cost = np.where(np.tri(len(edges)).T > 0, (counts[1:] - counts[:-1, None]) * edges, np.inf)
    best, cuts = cost[0], []  # best[j]: tokens of the rows up to edge j with the buckets so far
    totals = [best[-1]]
    for _ in range(1, most):
        with_cut = np.concatenate([[np.inf], best[:-1]])[:, None] + cost
        cuts.append(with_cut.argmin(axis=0))
        best = with_cut.min(axis=0)
        totals.append(best[-1])
    buckets = next((n for n in range(1, most) if totals[n - 1] - totals[n] < WORTH * totals[n]), most)
    chosen, at = [], len(edges) - 1
    for cut in reversed(cuts[: buckets - 1]):
        chosen.append(int(edges[at]))
        at = int(cut[at]) - 1
    return (*reversed([*chosen, int(edges[at])]),)


@dataclass(frozen=True)
class StepPass(Pass):
    """A pass whose rows are in the order of the optimizer steps.

    Attributes:
        bounds: first row of each step, and the end, [S + 1].
        bucket: of each step, [S].
    """

    bounds: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    bucket: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


class BucketRows(ItemRows):
    """One item a row, in the order of the optimizer steps.

    Attributes:
        steps: optimizer steps of a pass.
    """

    def __init__(self, items: RowSpans, buckets: Buckets, key: tuple[int, ...], shuffle: bool):
        super().__init__(items, len(items), key, shuffle)
        self.buckets = buckets
        self.bucket = buckets.of(items.length).astype(np.int16)
        counts = np.bincount(self.bucket, minlength=len(buckets.edges))
        self.steps_of_bucket = -(-counts // buckets.step_rows())
        self.steps = int(self.steps_of_bucket.sum())

    def make_pass(self, number: int) -> StepPass:
        """Draw the order of a pass."""
        random = self.random(number)
        order = np.arange(self.rows, dtype=np.int32)
        if self.shuffle:
            order = random.permutation(order)
        order = order[np.argsort(self.bucket[order], kind="stable")]
        bucket = np.repeat(np.arange(len(self.steps_of_bucket)), self.steps_of_bucket)
        # every step of a bucket is full but the last
        step_rows = self.buckets.step_rows()
        begins = np.concatenate([[0], np.cumsum(np.bincount(self.bucket, minlength=len(step_rows)))])
        number_in_bucket = np.arange(self.steps) - (np.cumsum(self.steps_of_bucket) - self.steps_of_bucket)[bucket]
        first = np.append(begins[bucket] + number_in_bucket * step_rows[bucket], self.rows)
        # not shuffled: in the order of the first row in each
        steps = random.permutation(self.steps) if self.shuffle else np.argsort(order[first[:-1]], kind="stable")
        order, bounds = reorder_groups(order, first, steps)
        return StepPass(order, None, bounds, bucket[steps])


@dataclass(frozen=True)
class BucketPlan(Plan):
    """A plan whose steps are those of the buckets. Epochs are whole steps; a mixture takes turns step by step.

    Row m of source k has the number m * sources + k.
    """

    sources: tuple[BucketRows, ...]
    turns: MixtureSchedule

    @property
    def buckets(self) -> Buckets:
        """The buckets, common to all sources."""
        return self.sources[0].buckets

    @property
    def steps(self) -> int:
        """Optimizer steps of one pass over everything."""
        return sum(source.steps for source in self.sources)

    @property
    def rows_per_epoch(self) -> int:
        """On average: steps differ in their rows."""
        return round(self.rows * self.passes_per_epoch)

    @property
    def micro_batches(self) -> int:
        """Per rank and epoch."""
        return self.epoch_steps or self.steps * self.accumulate

    @property
    def passes_per_epoch(self) -> float:
        """Passes over everything in an epoch."""
        return self.optimizer_steps / self.steps

    def most_tokens(self, _ctx_len: int) -> int:
        """Return the inputs of the largest micro-batch."""
        return max(edge * size for edge, size in zip(self.buckets.edges, self.buckets.sizes, strict=True))

    def locate(self, epoch: int, step: int) -> tuple[int, int, StepPass, int]:
        """Return source, pass, the content of that pass, and the step in it."""
        source, number = self.turns.locate(epoch * self.optimizer_steps + step)
        turn, i = divmod(number, self.sources[source].steps)
        one = self.sources[source].one_pass(turn)
        assert isinstance(one, StepPass)
        return source, turn, one, i

    def rows_of_step(self, epoch: int, step: int) -> range:
        """Return the numbers of a step's rows in the endless stream."""
        source, turn, one, i = self.locate(epoch, step)
        begin, sources = turn * self.sources[source].rows, len(self.sources)
        first, end = begin + int(one.bounds[i]), begin + int(one.bounds[i + 1])
        return range(first * sources + source, end * sources + source, sources)

    def micro_bsz_of_step(self, epoch: int, step: int) -> int:
        """Return the rows of a micro-batch in a step."""
        _, _, one, i = self.locate(epoch, step)
        return self.buckets.sizes[int(one.bucket[i])]


def bucket_plan(sources: Sequence[BucketRows], shares: Sequence[float], epoch_steps: int | None) -> BucketPlan:
    """Make a plan over the buckets of all sources.

    Args:
        sources: the rows of each source.
        shares: of the rows, one per source.
        epoch_steps: micro-batches per rank and epoch, a multiple of MINI_BSZ; None for one pass over everything.
    """
    buckets, rows = sources[0].buckets, sum(source.rows for source in sources)
    # a source whose steps hold fewer rows has more of them
    weights = [share * source.steps / source.rows for share, source in zip(shares, sources, strict=True)]
    turns = MixtureSchedule(nearest_integer_ratio(weights, TURNS))
    return BucketPlan(rows, epoch_steps, max(buckets.sizes), buckets.accumulate, buckets.world, tuple(sources), turns)
