"""Two questions about a merge, before it is called done.

Is it right? Every changed layer is asked the adapter's own question: does the merged matrix answer as base + adapter did in
training? What it should answer is computed by the adapter's `forward`, not by the `merge` that makes the file, while the
base's rows are in hand for merging, and compared before the sums are rounded to the file's numbers: rounding to bfloat16 would
hide what a short run has learnt.

Is it on the disk? The result is read back: checksums, and the answers again, from what the file holds.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_peft import checkpoint
from rwkv_peft.adapters import attach
from rwkv_peft.adapters.registry import ADAPTERS
from rwkv_peft.checkpoint import Archive, ByRows, Change, Stored
from rwkv_peft.errors import UserError
from rwkv_peft.model.arch import Geometry
from rwkv_peft.model.layers import Linear
from rwkv_peft.pieces import side_by_side

from .fold import Part
from .rows import ROWS, cut

PROBES = 4  # random inputs that each changed layer is asked
ROUNDINGS = (
    4  # allowed difference of the file's outputs, in roundings of its number format (seen: 0.5, whatever the width)
)
ROW = 3e-5  # allowed difference of one output before rounding, relative to its row of weights (seen: 2e-6)
SHARE = 1e-3  # allowed share of what the adapter changes that is missing or too much (seen: 1e-5)
SURE = 6  # standard deviations that noise stays within


class Answers:
    """A change that, while it is made, notes for every layer with an adapter what base + adapter answer to the probes."""

    def __init__(
        self,
        change: Change,
        base: Mapping[str, Stored],
        parts: Sequence[Part],
        weights: Sequence[float] | None,
        geometry: Geometry,
    ):
        self.change, self.parts, self.weights, self.geometry = change, parts, weights, geometry
        wrapped = [name for name in base if any(part.layer(name) for part in parts)]
        # [PROBES, outputs] by tensor; at once: kept between the blocks, small pieces would cut malloc's free memory up
        self.theirs = {n: torch.empty(PROBES, base[n].shape[0], dtype=kind_of(base[n].dtype)) for n in wrapped}
        self.square = dict.fromkeys(wrapped, 0.0)  # by tensor: the squared length of the base's outputs
        # by tensor, of what merging makes of each checkpoint: what is off before rounding
        self.off = {n: [Off() for _ in parts] for n in wrapped}

    def __call__(self, name: str):
        make = self.change(name)
        if make is None or name not in self.theirs:
            return make

        def rows(before: Tensor, block: slice) -> Tensor:
            first = before.to(kind_of(before.dtype))
            made = make.rows(first if before.dtype.itemsize == 2 else before, block)
            self.note(name, block, first, made, [cut(part, name, block) for part in self.parts])
            return made.to(before.dtype)

        def whole(before: Tensor) -> Tensor:
            made = make(before)
            self.note(name, slice(None), before.to(kind_of(before.dtype)), made, self.parts)
            return made

        return ByRows(rows, make.unit) if isinstance(make, ByRows) else whole

    @torch.no_grad()
    def note(self, name: str, block: slice, first: Tensor, made: Tensor, parts: Sequence[Part]) -> None:
        """What these rows of the base's weight, `first`, answer together with the adapters, and how far `made` is from it."""
        stages = averaged if self.weights else in_turn
        for number, before, theirs, ours in stages(
            name, first, made.to(first.dtype), parts, self.weights, self.geometry
        ):
            if theirs is not None:
                self.off[name][number].add(before, theirs, ours)
        x = probes(first.shape[1], first.dtype)
        # what the rounded rows are compared with: what the adapter says, or where the last one is none, what was made
        self.theirs[name][:, block] = F.linear(x, ours) if theirs is None else theirs
        numbers = first.reshape(-1)
        self.square[name] += PROBES * float(torch.dot(numbers, numbers))  # as normal inputs make them on average

    def difference(self, name: str, ours: Tensor) -> float:
        """By how much the result's outputs [PROBES, outputs] differ from what they should be, relative to the
        larger of the base's and the adapter's (which may undo its base). NaN or infinite if the result is."""
        theirs = self.theirs[name].double()
        off = torch.linalg.vector_norm(ours.double() - theirs)
        return float(off) / max(self.square[name] ** 0.5, float(torch.linalg.vector_norm(theirs)), 1e-30)

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
    and difference^2; count: of outputs.
    """

    row: float = 0.0
    along: float = 0.0
    change: float = 0.0
    square: float = 0.0
    count: int = 0

    def add(self, before: Tensor, theirs: Tensor, ours: Tensor) -> None:
        """before, ours: weights [rows, inputs]; theirs: outputs [PROBES, rows]."""
        x = probes(before.shape[1], before.dtype)
        change = (theirs - F.linear(x, before)).double()
        off = (F.linear(x, ours) - theirs).double()
        length = torch.maximum(torch.linalg.vector_norm(before, dim=1), torch.linalg.vector_norm(ours, dim=1))
        rows = torch.linalg.vector_norm(off, dim=0) / (PROBES**0.5 * length.double().clamp_min(1e-30))
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
        """NaN is a matter of what is read back."""
        noise = (self.square / self.count / self.change) ** 0.5 if self.change else 0.0
        return not (self.row > ROW or abs(self.share) > SHARE + SURE * noise)


@dataclass(frozen=True)
class Checked:
    """What was seen of one tensor. difference: of the outputs, None where no adapter could be asked."""

    sound: bool
    changed: bool = False
    difference: float | None = None


def verify(base: Path, target: Path, answers: Answers, added: Mapping[str, Tensor]) -> Iterator[str]:
    """Sentences about what was checked. UserError if anything is not as it should be.

    answers: the change that the target was made with.
    """
    described, wanted = checkpoint.describe(target), checkpoint.describe(base)
    shapes = {n: (s.shape, s.dtype) for n, s in wanted.items()}
    shapes |= {n: (tuple(t.shape), t.dtype) for n, t in added.items()}
    same = {n: (s.shape, s.dtype) for n, s in described.items()} == shapes
    found: dict[str, Checked] = {} if same else {"the list of tensors": Checked(False)}
    one_at_a_time = threading.Lock()
    if wrong := list(answers.wrong()):
        raise UserError(
            f"{wrong[0]} and {len(wrong) - 1} others do not answer as base + adapter would. Nothing was written. Your files are "
            "not to blame: this is a fault of this program, please report it with the lines above."
        )
    with Archive(base) as old, Archive(target) as new:

        def check(name: str) -> Checked:
            try:
                if name in added:
                    return Checked(torch.equal(new.tensor(name), added[name]))
                if answers.change(name) is None:
                    return Checked(identical(old, new, name))
                return check_changed(name, old, new, answers, one_at_a_time)
            except checkpoint.Damaged:
                return Checked(False)

        for info in new.zip.infolist():  # torch needs more than tensors: versions, the list of them
            if not info.filename.startswith(f"{new.folder}data/"):
                for _ in new.read(info, []):
                    pass
        checkpoint.load(target)
        names = list(shapes) if same else []
        found |= dict(zip(names, side_by_side(check, names), strict=True))
    wrong = [name for name, checked in found.items() if not checked.sound]
    if wrong:
        raise UserError(
            f"{wrong[0]} and {len(wrong) - 1} others are not what they should be when the result is read back from the disk; "
            "it was removed. Is the disk sound?"
        )
    changed = sum(checked.changed for checked in found.values())
    more = f", {len(added)} added" if added else ""
    if not changed and not added:
        yield "careful: nothing in it differs from the base; what was learnt is nothing, or less than the base's numbers can hold"
    yield f"{len(wanted)} tensors read back: {changed} changed, {len(wanted) - changed} identical to the base{more}"
    asked = [checked.difference for checked in found.values() if checked.difference is not None]
    if asked:
        form = str(wanted["emb.weight"].dtype).removeprefix("torch.")
        yield f"every merged layer answers as base + adapter: outputs differ by {max(asked):.1e} at most (rounding to {form})"


def identical(old: Archive, new: Archive, name: str) -> bool:
    """Whether a tensor is the base's. Records are compared by their checksums, which reading them puts to the test; where the
    result's is the base's, what was read from the base to make it was right as well."""
    if not (old.described[name].whole and new.described[name].whole):
        return torch.equal(old.tensor(name), new.tensor(name))
    for _ in new.pieces(name):
        pass
    return same_record(old, new, name)


def same_record(old: Archive, new: Archive, name: str) -> bool:
    return old.info(name).CRC == new.info(name).CRC and old.info(name).file_size == new.info(name).file_size


def check_changed(name: str, old: Archive, new: Archive, answers: Answers, one_at_a_time: threading.Lock) -> Checked:
    """A changed tensor. That the file holds what was written its checksum says, which was taken from what was computed;
    whether that was right, the adapter's answers say."""
    stored, ask = new.described[name], name in answers.theirs
    moved = not same_record(old, new, name) if old.described[name].whole else True
    kind, sound = kind_of(stored.dtype), True
    ours = torch.empty_like(answers.theirs[name]) if ask else None

    # a tensor that one run has trained whole goes in as it is
    [only] = answers.parts if len(answers.parts) == 1 and not answers.weights else [None]
    as_it_is = only.tensors.get(name) if only and not only.quantised else None

    def look(block: slice, rows: Tensor) -> bool:
        if ours is None:
            meant = (
                None if as_it_is is None else as_it_is[block].to(rows.dtype) if rows.dim() else as_it_is.to(rows.dtype)
            )
            return finite(rows) and (meant is None or torch.equal(rows, meant))
        ours[:, block] = F.linear(probes(rows.shape[1], kind), rows.to(kind))
        return finite(ours[:, block])  # an input of normal numbers lets no NaN and no infinity through unseen

    make = answers.change(name)
    if isinstance(make, ByRows) and stored.whole and stored.shape:
        blocks = make.blocks(stored.shape)
        for block, rows in zip(blocks, new.rows(name, blocks), strict=True):
            sound = look(block, rows) and sound
    else:
        with one_at_a_time:  # memory has room for one whole tensor
            sound = look(slice(None), new.tensor(name))
    if not sound:
        if as_it_is is not None and finite(as_it_is):
            return Checked(False)
        raise UserError(
            f"{name} would hold NaN or infinity: what the run learnt is too large for the base's numbers, or "
            "alpha is, or the base holds such numbers itself. Nothing was written; take an earlier epoch."
        )
    if ours is None:
        return Checked(True, moved)
    difference = answers.difference(name, ours)
    return Checked(difference <= ROUNDINGS * torch.finfo(stored.dtype).eps, moved, difference)


def kind_of(dtype: torch.dtype) -> torch.dtype:
    """So wide a format that what is left of a difference is the rounding of the file."""
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def finite(tensor: Tensor) -> bool:
    """Whether all numbers are. A sum is, where they all are and small enough, and takes a tenth of the time."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


@functools.lru_cache
def probes(inputs: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(PROBES, inputs, generator=torch.Generator().manual_seed(0)).to(dtype)


# for each checkpoint that an adapter can be asked about: its number, the weight before it, the outputs of that weight with the
# adapter (None where it is no adapter), and the weight after it
Stages = Iterator[tuple[int, Tensor, Tensor | None, Tensor]]


def in_turn(name: str, first: Tensor, made: Tensor, parts: Sequence[Part], _weights, geometry: Geometry) -> Stages:
    """Every checkpoint's part in a merge, one behind the other: earlier ones are not trusted for later ones' sake."""
    x, weight = probes(first.shape[1], first.dtype), first
    mine = [(i, part) for i, part in enumerate(parts) if part.quantised or part.layer(name) or name in part.tensors]
    for i, part in mine:
        if part.quantised:
            first = weight = part.compressed(name, weight, geometry)
        theirs = answer(part, name, weight, x) if part.layer(name) else None
        before, weight = weight, made if part is mine[-1][1] else part.apply(name, weight, first)
        yield i, before, theirs, weight


def averaged(
    name: str, first: Tensor, made: Tensor, parts: Sequence[Part], weights: Sequence[float], _geometry
) -> Stages:
    """The mean of several checkpoints is one change."""
    x = probes(first.shape[1], first.dtype)
    base = F.linear(x, first)
    theirs = base
    for part, share in zip(parts, weights, strict=True):
        if part.layer(name):
            theirs = theirs + share * (answer(part, name, first, x) - base)
        elif name in part.tensors:
            theirs = theirs + share * F.linear(x, part.tensors[name].to(first.dtype) - first)
    yield 0, first, theirs, made


def answer(part: Part, name: str, weight: Tensor, x: Tensor) -> Tensor:
    """What a layer of this weight with the part's adapter answers to x, by the adapter's own forward."""
    tensors, method = part.layer(name), ADAPTERS[part.setup.method]
    start = {leaf: tensors[leaf] for leaf in method.starts(**part.setup.options)}
    # our own can be made without numbers: none are drawn that would only be thrown away
    empty = part.setup.method in ROWS and not method.changes_base
    with torch.device("meta"):
        linear = Linear(weight.shape[1], weight.shape[0])
    linear.weight = linear.weight if empty else nn.Parameter(weight.clone(), requires_grad=False)
    adapted = attach.make(part.setup, linear, start)
    if empty:
        adapted.linear.weight = nn.Parameter(weight, requires_grad=False)
    for leaf in adapted.tensors:
        if empty:
            setattr(adapted, leaf, nn.Parameter(tensors[leaf], requires_grad=False))
        else:
            getattr(adapted, leaf).copy_(tensors[leaf])
    return adapted.eval()(x)
