"""The result of a merge, read back from the disk and compared with what it should be, before it is called done.

One tensor at a time, like the merge itself. Every changed layer is also asked the adapter's own question: does the merged
matrix answer as base + adapter did in training? That is computed by `forward`, not by the `merge` that made the file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_peft import checkpoint
from rwkv_peft.adapters.registry import ADAPTERS
from rwkv_peft.checkpoint import Change
from rwkv_peft.errors import UserError
from rwkv_peft.model.layers import Linear

PROBES = 16  # random inputs that each changed layer is asked
ROUNDINGS = 4  # allowed difference of outputs, in roundings of the base's number format (seen: 0.5, whatever the width)


def verify(base: Path, target: Path, tensors: Mapping[str, Tensor], change: Change, sidecar: dict) -> Iterator[str]:
    """Sentences about what was checked. UserError if anything is not as it should be."""
    described, wanted = checkpoint.describe(target), checkpoint.describe(base)
    same = {n: (s.shape, s.dtype) for n, s in described.items()} == {n: (s.shape, s.dtype) for n, s in wanted.items()}
    changed, wrong, worst = 0, [] if same else ["the list of tensors"], 0.0
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
                if sound and (layer := adapter_of(name, tensors, sidecar)):
                    difference = compare(before, after, layer, sidecar)
                    worst = max(worst, difference)
                    sound = difference <= ROUNDINGS * torch.finfo(before.dtype).eps
            if not sound:
                wrong.append(name)
    if wrong:
        raise UserError(
            f"{wrong[0]} and {len(wrong) - 1} others are not what they should be when the result is read back from the disk; "
            "it was removed. Is the disk sound?"
        )
    same = len(wanted) - changed
    yield f"{len(wanted)} tensors read back: {changed} changed as the formula says, {same} identical to the base"
    if sidecar["method"] != "full":
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


def adapter_of(name: str, tensors: Mapping[str, Tensor], sidecar: dict) -> dict[str, Tensor]:
    """The trained tensors of the layer whose weight this is; empty if it has none."""
    if sidecar["method"] not in ADAPTERS or not name.endswith(".weight"):
        return {}
    layer = name.removesuffix(".weight")
    leaves = ADAPTERS[sidecar["method"]].tensors
    return {leaf: tensors[f"{layer}.{leaf}"] for leaf in leaves if f"{layer}.{leaf}" in tensors}


def compare(before: Tensor, after: Tensor, layer: Mapping[str, Tensor], sidecar: dict) -> float:
    """Difference between the merged layer's outputs and those of the base's layer with its adapter, relative to the larger
    of the base's outputs and these (an adapter may undo its base). In float64: what is left is the rounding of the file."""
    linear = Linear(before.shape[1], before.shape[0])
    linear.weight = nn.Parameter(before)  # layers compute in the dtype of their input
    adapted = ADAPTERS[sidecar["method"]](linear, sidecar["rank"], sidecar["alpha"])
    x = torch.randn(PROBES, before.shape[1], generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for leaf, tensor in layer.items():
            getattr(adapted, leaf).copy_(tensor)
        base, ours, theirs = linear(x), F.linear(x, after.double()), adapted.eval()(x)
        return float((ours - theirs).norm() / max(base.norm(), theirs.norm()).clamp_min(1e-30))
