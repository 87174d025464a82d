"""The result of a merge, read back from the disk and compared with what it should be, before it is called done.

Every changed layer is asked the adapter's own question: does the merged matrix answer as base + adapter did in training?
What the answer should be is computed by `forward`, not by the `merge` that makes the file, while the base's rows are in hand
for merging; the answer itself is the file's, computed from what is read back. So base and result are each read once.
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

from .fold import Part
from .rows import ROWS, cut

PROBES = 4  # random inputs that each changed layer is asked; each of them alone would show any difference
ROUNDINGS = 4  # allowed difference of outputs, in roundings of the base's number format (seen: 0.5, whatever the width)


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

    def __call__(self, name: str):
        make = self.change(name)
        if make is None or name not in self.theirs:
            return make

        def rows(before: Tensor, block: slice) -> Tensor:
            first = before.to(kind_of(before.dtype))
            self.note(name, block, first, [cut(part, name, block) for part in self.parts])
            return make.rows(first if before.dtype.itemsize == 2 else before, block).to(before.dtype)

        def whole(before: Tensor) -> Tensor:
            self.note(name, slice(None), before.to(kind_of(before.dtype)), self.parts)
            return make(before)

        return ByRows(rows, make.unit) if isinstance(make, ByRows) else whole

    @torch.no_grad()
    def note(self, name: str, block: slice, first: Tensor, parts: Sequence[Part]) -> None:
        """What these rows of the base's weight, `first`, answer together with the adapters."""
        self.theirs[name][:, block] = expected(name, first, parts, self.weights, self.geometry)
        numbers = first.reshape(-1)
        self.square[name] += PROBES * float(torch.dot(numbers, numbers))  # as normal inputs make them on average

    def difference(self, name: str, ours: Tensor) -> float:
        """By how much the result's outputs [PROBES, outputs] differ from what they should be, relative to the
        larger of the base's and the adapter's (which may undo its base). NaN or infinite if the result is."""
        theirs = self.theirs[name].double()
        off = torch.linalg.vector_norm(ours.double() - theirs)
        return float(off) / max(self.square[name] ** 0.5, float(torch.linalg.vector_norm(theirs)), 1e-30)


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

        names = list(shapes) if same else []
        found |= dict(zip(names, checkpoint.side_by_side(check, names), strict=True))
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

    def look(block: slice, rows: Tensor) -> bool:
        if ours is None:
            return finite(rows)
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
        raise UserError(
            f"{name} would hold NaN or infinity: what the run learnt is too large for the base's numbers, or "
            "alpha is. Nothing was written; take an earlier epoch."
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


def expected(
    name: str, first: Tensor, parts: Sequence[Part], weights: Sequence[float] | None, geometry: Geometry
) -> Tensor:
    """What a layer of the base's weight `first`, or some rows of it, answers to the probes together with the adapters."""
    x, weight, kind = probes(first.shape[1], first.dtype), first, first.dtype
    if weights is None:
        for part in parts:
            if part.quantised:
                # quantised in float32, as in training
                weight = part.compressed(name, weight.float(), geometry).to(kind)
                theirs = F.linear(x, weight)
            if part.layer(name):
                theirs = answer(part, name, weight, x)
                weight = part.apply(name, weight, first) if part is not parts[-1] else weight
            elif name in part.tensors:  # a weight that was trained whole
                weight = part.apply(name, weight, first)
                theirs = F.linear(x, weight)
        return theirs
    base = F.linear(x, first)
    theirs = base
    for part, share in zip(parts, weights, strict=True):
        if part.layer(name):
            theirs = theirs + share * (answer(part, name, first, x) - base)
        elif name in part.tensors:
            theirs = theirs + share * F.linear(x, part.tensors[name].to(kind) - first)
    return theirs


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
