"""Check that a merge is right: the merged matrix must answer as base + adapter did in training.

Every changed layer gets a few random inputs. The expected answer is computed by the adapter's `forward`, not by the formula
that makes the file, while the base's rows are read for merging, and compared before the sums are rounded to the file's
numbers: rounding to bfloat16 would hide what a short run has learnt. The answers of the rounded rows are compared as well.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_peft.adapters import inject
from rwkv_peft.adapters.registry import ADAPTERS
from rwkv_peft.checkpoint.pth import TensorInfo
from rwkv_peft.checkpoint.pth_rewrite import RowwiseUpdate, TensorUpdate
from rwkv_peft.model.arch import Geometry
from rwkv_peft.model.layers import Linear
from rwkv_peft.ops import dispatch
from rwkv_peft.ops.lowrank_merge import QUESTIONS

from . import fold
from .by_rows import cut
from .fold import MergeInput

ROW = 3e-5  # allowed difference of one output before rounding, relative to its row of weights (seen: 2e-6)
LEAST = 2e-6  # of a row of weights: smaller changes get lost in sums of float32, rightly
SHARE = 1e-3  # allowed share of what the adapter changes that is missing or too much (seen: 1e-5)
AT_ONCE = 1 << 21  # numbers of a weight, where the kernel keeps to its cache by itself
SURE = 6  # standard deviations that noise stays within


class OutputCheck:
    """A tensor update that compares, while it runs, the merged output of every adapted layer with that of base + adapter.

    The layers get QUESTIONS random inputs.
    """

    def __init__(
        self,
        change: TensorUpdate,
        base: Mapping[str, TensorInfo],
        parts: Sequence[MergeInput],
        weights: Sequence[float] | None,
        geometry: Geometry,
    ):
        self.change, self.parts, self.weights, self.geometry = change, parts, weights, geometry
        self.ops = dispatch.choose("auto", geometry.version, head_size=geometry.head_size)
        wrapped = [name for name in base if any(part.layer(name) for part in parts)]
        # by tensor, of what merging makes of each checkpoint: what is off before rounding; and of what is written
        self.off = {n: [Off() for _ in parts] for n in wrapped}
        self.written = {n: Written() for n in wrapped}

    def __call__(self, name: str):
        """Return the update of a tensor; None if it stays as it is."""
        make = self.change(name)
        if make is None or name not in self.off:
            return make
        alone = self.low_rank(name)

        def rows(before: Tensor, block: slice) -> Tensor:
            assert isinstance(make, RowwiseUpdate)
            if alone is not None and before.dtype.itemsize == 2:
                return self.folded(name, alone, before, block)
            first = before.to(kind_of(before.dtype))
            made = make.rows(first if before.dtype.itemsize == 2 else before, block)
            return self.note(name, before, first, made, [cut(part, name, block) for part in self.parts])

        def whole(before: Tensor) -> Tensor:
            return self.note(name, before, before.to(kind_of(before.dtype)), make(before), self.parts)

        return (
            RowwiseUpdate(rows, make.unit, make.block if alone is None else AT_ONCE)
            if isinstance(make, RowwiseUpdate)
            else whole
        )

    def low_rank(self, name: str) -> int | None:
        """Return the number of the only checkpoint that changes a weight by W + B A: one kernel merges and checks it."""
        mine = [i for i, part in enumerate(self.parts) if fold.touches(part, name, self.geometry)]
        if len(mine) != 1 or self.weights:
            return None
        part = cut(self.parts[mine[0]], name, slice(0, 1))
        return None if part.quantised or not product_of(part, name) else mine[0]

    @torch.no_grad()
    def folded(self, name: str, number: int, before: Tensor, block: slice) -> Tensor:
        """Merge and check rows of a weight with one kernel."""
        x, part = questions(before.shape[1], torch.float32), cut(self.parts[number], name, block)
        factors = product_of(part, name)
        assert factors is not None
        made, exact, rounded, squares = self.ops.fold(before, factors[0], factors[1], x)
        theirs = answer(part, name, before, x, self.ops.linear)
        # (what the adapter changes is the difference of two sums in one order: in another, roundings would look like a change)
        self.off[name][number].add(theirs, self.ops.linear(x, before), exact, squares)
        self.written[name].add(theirs, rounded, float(squares[0].sum()))
        return made

    @torch.no_grad()
    def note(self, name: str, before: Tensor, first: Tensor, made: Tensor, parts: Sequence[MergeInput]) -> Tensor:
        """`made` in the base's format. Looks at how far it is from what the base's rows answer together with the adapters.

        before, first: these rows as they are stored, and as sums are computed.
        """
        x = questions(first.shape[1], first.dtype)
        made_here = made.to(first.dtype)
        stages = (
            averaged(name, first, made_here, parts, self.weights, self.geometry)
            if self.weights
            else in_turn(name, first, made_here, parts, self.weights, self.geometry)
        )
        for number, weight, theirs, ours in stages:
            if theirs is not None:
                squares = torch.stack([torch.linalg.vector_norm(w, dim=1).square() for w in (weight, ours)])
                self.off[name][number].add(theirs, F.linear(x, weight), F.linear(x, ours), squares)
        rounded = made.to(before.dtype)
        numbers = first.reshape(-1)
        # the rounded rows are compared with what the adapter says, or where the last one is none, with what was made
        theirs = F.linear(x, ours) if theirs is None else theirs
        self.written[name].add(theirs, F.linear(x, rounded.to(x.dtype)), float(torch.dot(numbers, numbers)))
        return rounded

    def wrong(self) -> Iterator[str]:
        """Sentences about layers that do not answer as base + adapter."""
        for name, stages in self.off.items():
            for part, off in zip(self.parts, stages, strict=True):
                if not off.is_noise():
                    yield f"{name} with {part.where} ({100 * off.share:+.2f} % of what it learnt, one output by {off.row:.1e})"


@dataclass
class Off:
    """By how much the outputs of a merged layer differ from those of base + adapter, before rounding.

    row: of one output at most, relative to its row of weights. along, change, square: sums of difference * change, change^2
    and difference^2; count: of outputs. small: what change^2 has to be for more than rounding.
    """

    row: float = 0.0
    along: float = 0.0
    change: float = 0.0
    square: float = 0.0
    count: int = 0
    small: float = 0.0

    def add(self, theirs: Tensor, before: Tensor, ours: Tensor, squares: Tensor) -> None:
        """Add the answers and lengths of some rows.

        Args:
            theirs: Answers [QUESTIONS, rows] of base + adapter.
            before: Answers of the weight before the merge.
            ours: Answers of the merged weight.
            squares: The squared lengths of the rows of these two, [2, rows].
        """
        change, off = (theirs - before).double(), (ours - theirs).double()
        lengths = QUESTIONS * squares.double().amax(0).clamp_min(1e-60)
        rows = (off.square().sum(0) / lengths).sqrt()
        self.small += LEAST**2 * float(lengths.sum())
        self.row = max(self.row, float(rows.max()))
        self.along += float((off * change).sum())
        self.change += float((change * change).sum())
        self.square += float((off * off).sum())
        self.count += off.numel()

    @property
    def share(self) -> float:
        """The share of the change that is missing (below 0) or too much."""
        return self.along / self.change if self.change else 0.0

    def is_noise(self) -> bool:
        """NaN is a matter of what is written."""
        if not self.change > self.small:
            return not self.row > ROW
        noise = (self.square / self.count / self.change) ** 0.5
        return not (self.row > ROW or abs(self.share) > SHARE + SURE * noise)


@dataclass
class Written:
    """The outputs of what goes into the file.

    Attributes:
        off: Their squared difference from the expected outputs.
        theirs: The squared length of the expected outputs.
        base: The squared length of the base's outputs, as normal inputs make them on average.
    """

    off: float = 0.0
    theirs: float = 0.0
    base: float = 0.0

    def add(self, theirs: Tensor, ours: Tensor, base: float) -> None:
        """theirs, ours: answers [QUESTIONS, rows]; base: the squared length of the base's rows."""
        theirs, ours = theirs.double(), ours.double()
        self.off += float((ours - theirs).square().sum())
        self.theirs += float(theirs.square().sum())
        self.base += QUESTIONS * base

    @property
    def sound(self) -> bool:
        """Whether all numbers are numbers: an input of normal ones lets no NaN and no infinity through unseen."""
        return math.isfinite(self.off)

    @property
    def difference(self) -> float:
        """Relative to the larger of the base's and the adapter's outputs (which may undo its base)."""
        return math.sqrt(self.off) / max(math.sqrt(self.base), math.sqrt(self.theirs), 1e-30)


def product_of(part: MergeInput, name: str) -> tuple[Tensor, Tensor] | None:
    """B and A, where a part's adapter on a weight makes W + B A of it."""
    layer = part.layer(name)
    return ADAPTERS[part.setup.method].product(layer, part.setup.options) if layer else None


def kind_of(dtype: torch.dtype) -> torch.dtype:
    """So wide a format that what is left of a difference is the rounding of the file."""
    return torch.float32 if dtype.itemsize == 2 else torch.float64


@functools.lru_cache
def questions(inputs: int, dtype: torch.dtype) -> Tensor:
    """Return fixed random inputs, [QUESTIONS, inputs]."""
    return torch.randn(QUESTIONS, inputs, generator=torch.Generator().manual_seed(0)).to(dtype)


# for each checkpoint that an adapter can be asked about: its number, the weight before it, the outputs of that weight with the
# adapter (None where it is no adapter), and the weight after it
Stages = Iterator[tuple[int, Tensor, Tensor | None, Tensor]]


def in_turn(
    name: str, first: Tensor, made: Tensor, parts: Sequence[MergeInput], _weights, geometry: Geometry
) -> Stages:
    """Every checkpoint's part in a merge, one behind the other: earlier ones are not trusted for later ones' sake."""
    x, weight = questions(first.shape[1], first.dtype), first
    mine = [(i, part) for i, part in enumerate(parts) if part.quantised or part.layer(name) or name in part.tensors]
    for i, part in mine:
        if part.quantised:
            first = weight = part.compressed(name, weight, geometry)
        theirs = answer(part, name, weight, x) if part.layer(name) else None
        before, weight = weight, made if part is mine[-1][1] else part.apply(name, weight, first)
        yield i, before, theirs, weight


def averaged(
    name: str, first: Tensor, made: Tensor, parts: Sequence[MergeInput], weights: Sequence[float], _geometry
) -> Stages:
    """The mean of several checkpoints is one change."""
    x = questions(first.shape[1], first.dtype)
    base = F.linear(x, first)
    theirs = base
    for part, share in zip(parts, weights, strict=True):
        if part.layer(name):
            theirs = theirs + share * (answer(part, name, first, x) - base)
        elif name in part.tensors:
            theirs = theirs + share * F.linear(x, part.tensors[name].to(first.dtype) - first)
    yield 0, first, theirs, made


def answer(part: MergeInput, name: str, weight: Tensor, x: Tensor, product=None) -> Tensor:
    """Return the answer to x of a layer with this weight and the part's adapter, by the adapter's own forward.

    product: multiplies x by a weight of another format.
    """
    tensors, method = part.layer(name), ADAPTERS[part.setup.method]
    start = {leaf: tensors[leaf] for leaf in method.starts(**part.setup.options)}
    # our own can be made without numbers: none are drawn that would only be thrown away
    empty = method.row_axes is not None and not method.changes_base
    with torch.device("meta"):
        linear = Linear(weight.shape[1], weight.shape[0])
    linear.product = product or linear.product
    linear.weight = linear.weight if empty else nn.Parameter(weight.clone(), requires_grad=False)
    adapted = inject.make(part.setup, linear, start)
    if empty:
        adapted.linear.weight = nn.Parameter(weight, requires_grad=False)
    for leaf in adapted.tensors:
        if empty:
            setattr(adapted, leaf, nn.Parameter(tensors[leaf], requires_grad=False))
        else:
            getattr(adapted, leaf).copy_(tensors[leaf])
    return adapted.eval()(x)
