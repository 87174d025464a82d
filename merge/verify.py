"""The result of a merge, read back from the disk and compared with what it should be, before it is called done.

One tensor at a time, like the merge itself. Every changed layer is also asked the adapter's own question: does the merged
matrix answer as base + adapter did in training? That is computed by `forward`, not by the `merge` that made the file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_peft import checkpoint
from rwkv_peft.adapters import attach
from rwkv_peft.adapters.registry import ADAPTERS
from rwkv_peft.checkpoint import Change
from rwkv_peft.errors import UserError
from rwkv_peft.model.arch import Geometry
from rwkv_peft.model.layers import Linear

from .fold import Part

PROBES = 16  # random inputs that each changed layer is asked
ROUNDINGS = 4  # allowed difference of outputs, in roundings of the base's number format (seen: 0.5, whatever the width)


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
    changed, wrong, worst, asked = 0, [] if same else ["the list of tensors"], 0.0, 0
    with checkpoint.Archive(base) as old, checkpoint.Archive(target) as new:
        for name in wanted if same else ():
            make = change(name)
            if make is None:
                sound = identical(old, new, name)
            else:
                before, changed = old.tensor(name), changed + 1
                after = read(new, name)
                sound = after is not None and torch.equal(after, make(before).to(before.dtype))
                if sound and not bool(torch.isfinite(after).all()):
                    raise UserError(
                        f"{name} would hold NaN or infinity: what the run learnt is too large for the base's numbers, or "
                        "alpha is. Nothing was written; take an earlier epoch."
                    )
                if sound and any(part.layer(name) for part in parts):
                    difference = compare(name, before, after, parts, weights, geometry)
                    worst, asked = max(worst, difference), asked + 1
                    sound = difference <= ROUNDINGS * torch.finfo(before.dtype).eps
            if not sound:
                wrong.append(name)
        for name, tensor in added.items() if same else ():
            after = read(new, name)
            if after is None or not torch.equal(after, tensor):
                wrong.append(name)
    if wrong:
        raise UserError(
            f"{wrong[0]} and {len(wrong) - 1} others are not what they should be when the result is read back from the disk; "
            "it was removed. Is the disk sound?"
        )
    more = f", {len(added)} added" if added else ""
    yield (
        f"{len(wanted)} tensors read back: {changed} changed as the formula says, {len(wanted) - changed} identical to the "
        f"base{more}"
    )
    if asked:
        form = str(wanted["emb.weight"].dtype).removeprefix("torch.")
        yield f"every merged layer answers as base + adapter: outputs differ by {worst:.1e} at most (rounding to {form})"


def read(archive: checkpoint.Archive, name: str) -> Tensor | None:
    try:
        return archive.tensor(name)
    except UserError:  # its checksum is wrong
        return None


def identical(old: checkpoint.Archive, new: checkpoint.Archive, name: str) -> bool:
    if not old.described[name].whole:
        return torch.equal(old.tensor(name), new.tensor(name))
    try:
        return all(a == b for a, b in itertools.zip_longest(old.pieces(name), new.pieces(name)))
    except UserError:
        return False


def compare(
    name: str,
    before: Tensor,
    after: Tensor,
    parts: Sequence[Part],
    weights: Sequence[float] | None,
    geometry: Geometry,
) -> float:
    """Difference between the merged layer's outputs and those of the base's layer with its adapters, relative to the larger
    of the base's outputs and these (an adapter may undo its base). In float64: what is left is the rounding of the file."""
    x = torch.randn(PROBES, before.shape[1], generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        first = before.double()
        base = F.linear(x, first)
        if weights is None:
            theirs, weight = base, first
            for part in parts:
                if part.quantised:
                    # quantised in float32, as in training
                    weight = part.compressed(name, weight.float(), geometry).double()
                    theirs = F.linear(x, weight)
                if part.layer(name):
                    theirs = answer(part, name, weight, x)
                    weight = part.apply(name, weight, first)
        else:
            theirs = base + sum(
                share * (answer(part, name, first, x) - base)
                for part, share in zip(parts, weights, strict=True)
                if part.layer(name)
            )
        ours = F.linear(x, after.double())
        return float((ours - theirs).norm() / max(base.norm(), theirs.norm()).clamp_min(1e-30))


def answer(part: Part, name: str, weight: Tensor, x: Tensor) -> Tensor:
    """What a layer of this weight with the part's adapter answers to x, by the adapter's own forward."""
    tensors = part.layer(name)
    method = ADAPTERS[part.setup.method]
    linear = Linear(weight.shape[1], weight.shape[0])
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    start = {leaf: tensors[leaf] for leaf in method.starts(**part.setup.options)}
    adapted = attach.make(part.setup, linear, start)
    for leaf in adapted.tensors:
        getattr(adapted, leaf).copy_(tensors[leaf])
    return adapted.eval()(x)
