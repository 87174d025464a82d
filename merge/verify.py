"""The result of a merge, read back from the disk and compared with what it should be, before it is called done.

Some rows at a time, like the merge itself. Every changed layer is also asked the adapter's own question: does the merged
matrix answer as base + adapter did in training? That is computed by `forward`, not by the `merge` that made the file.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_peft import checkpoint
from rwkv_peft.adapters import attach
from rwkv_peft.adapters.registry import ADAPTERS
from rwkv_peft.checkpoint import Archive, ByRows, Change
from rwkv_peft.errors import UserError
from rwkv_peft.model.arch import Geometry
from rwkv_peft.model.layers import Linear

from .fold import Part
from .rows import ROWS, cut

PROBES = 16  # random inputs that each changed layer is asked
ROUNDINGS = 4  # allowed difference of outputs, in roundings of the base's number format (seen: 0.5, whatever the width)


@dataclass(frozen=True)
class Checked:
    """What was seen of one tensor. difference: of the outputs, None where no adapter could be asked."""

    sound: bool
    changed: bool = False
    difference: float | None = None


def verify(
    base: Path,
    target: Path,
    change: Change,
    added: Mapping[str, Tensor],
    parts: Sequence[Part],
    weights: Sequence[float] | None,
    geometry: Geometry,
) -> Iterator[str]:
    """Sentences about what was checked. UserError if anything is not as it should be."""
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
                if (make := change(name)) is None:
                    return Checked(identical(old, new, name))
                by_rows = isinstance(make, ByRows) and old.described[name].whole and new.described[name].whole
                # memory has room for one whole tensor and what its change takes
                with contextlib.nullcontext() if by_rows else one_at_a_time:
                    rows = in_rows(name, make, old, new) if by_rows else at_once(name, old, new)
                    return check_changed(name, make, rows, parts, weights, geometry)
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
    yield (
        f"{len(wanted)} tensors read back: {changed} changed as the formula says, {len(wanted) - changed} identical to the "
        f"base{more}"
    )
    asked = [checked.difference for checked in found.values() if checked.difference is not None]
    if asked:
        form = str(wanted["emb.weight"].dtype).removeprefix("torch.")
        yield f"every merged layer answers as base + adapter: outputs differ by {max(asked):.1e} at most (rounding to {form})"


def identical(old: Archive, new: Archive, name: str) -> bool:
    """Whether a tensor is the base's. Records are compared by their checksums, which reading them puts to the test: the
    base's was read, and so tested, when it was copied."""
    if not (old.described[name].whole and new.described[name].whole):
        return torch.equal(old.tensor(name), new.tensor(name))
    for _ in new.pieces(name):
        pass
    return old.info(name).CRC == new.info(name).CRC and old.info(name).file_size == new.info(name).file_size


# which rows, and how these are in the base and in the result
Rows = tuple[slice, Tensor, Tensor]


def in_rows(name: str, make: ByRows, old: Archive, new: Archive) -> Iterator[Rows]:
    blocks = make.blocks(old.described[name].shape)
    # the base's checksum was tested when the result was made from it
    yield from zip(blocks, old.rows(name, blocks, test=False), new.rows(name, blocks), strict=True)


def at_once(name: str, old: Archive, new: Archive) -> Iterator[Rows]:
    before = old.tensor(name)
    yield slice(0, len(before) if before.dim() else 1), before, new.tensor(name)


def check_changed(
    name: str,
    make: Callable[[Tensor], Tensor],
    rows: Iterator[Rows],
    parts: Sequence[Part],
    weights: Sequence[float] | None,
    geometry: Geometry,
) -> Checked:
    """A changed tensor. That the file holds what was written its checksum says, which was taken from what was computed;
    whether that was right, the adapter says, or where there is none, the formula, asked again."""
    ask = any(part.layer(name) for part in parts)
    sound, asked = True, torch.zeros(3, dtype=torch.float64)
    bad = moved = False
    for block, before, after in rows:
        some = [cut(part, name, block) for part in parts] if isinstance(make, ByRows) else parts
        if ask:
            asked += squares(name, before, after, some, weights, geometry)
        else:
            meant = make.rows(before, block) if isinstance(make, ByRows) else make(before)
            sound &= torch.equal(after, meant.to(before.dtype))
        bad |= not finite(after)
        moved = moved or not torch.equal(before, after)
        kind = before.dtype
    if bad:
        raise UserError(
            f"{name} would hold NaN or infinity: what the run learnt is too large for the base's numbers, or "
            "alpha is. Nothing was written; take an earlier epoch."
        )
    if not ask:
        return Checked(sound, moved)
    difference = relative(asked)
    return Checked(difference <= ROUNDINGS * torch.finfo(kind).eps, moved, difference)


def finite(tensor: Tensor) -> bool:
    """Whether all numbers are. A sum is, where they all are and small enough, and takes a tenth of the time."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def relative(squares: Tensor) -> float:
    """Difference of outputs, relative to the larger of the base's and the adapter's (which may undo its base)."""
    difference, base, theirs = squares.sqrt().tolist()
    return difference / max(base, theirs, 1e-30)


@functools.lru_cache
def probes(inputs: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(PROBES, inputs, generator=torch.Generator().manual_seed(0)).to(dtype)


@torch.no_grad()
def squares(
    name: str,
    before: Tensor,
    after: Tensor,
    parts: Sequence[Part],
    weights: Sequence[float] | None,
    geometry: Geometry,
) -> Tensor:
    """Squared lengths [3] of the difference between the merged layer's outputs and those of the base's layer with its
    adapters; of the base's outputs (as normal inputs make them on average); of those with the adapters. For some rows of
    a weight these add up to the whole's.

    Computed in so wide a format that what is left is the rounding of the file: float32 for 16 bit, else float64.
    """
    kind = torch.float32 if before.dtype.itemsize == 2 else torch.float64
    x = probes(before.shape[1], kind)
    first = weight = before.to(kind)
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
    else:
        base = F.linear(x, first)
        theirs = base
        for part, share in zip(parts, weights, strict=True):
            if part.layer(name):
                theirs = theirs + share * (answer(part, name, first, x) - base)
            elif name in part.tensors:
                theirs = theirs + share * F.linear(x, part.tensors[name].to(kind) - first)
    ours, numbers = F.linear(x, after.to(kind)), first.view(-1)
    base_square = PROBES * torch.dot(numbers, numbers).double()
    return torch.stack([length(ours - theirs), base_square, length(theirs)])


def length(outputs: Tensor) -> Tensor:
    """Squared."""
    return outputs.double().square().sum()


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
