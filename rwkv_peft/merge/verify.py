"""Check that a merge is on the disk: read the result back.

The list of its tensors is compared, and of every record the checksum that was taken from the computed values. Whether these
were right, output_check.py has checked while they were made.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rwkv_peft.checkpoint import pth
from rwkv_peft.checkpoint.base_model import are_finite
from rwkv_peft.checkpoint.pth import PthReader
from rwkv_peft.checkpoint.pth_rewrite import RowwiseUpdate
from rwkv_peft.common.errors import UserError
from rwkv_peft.common.formatting import plural
from rwkv_peft.common.parallel_io import parallel_map

from .output_check import OutputCheck

ROUNDINGS = (
    4  # allowed difference of the file's outputs, in roundings of its number format (seen: 0.5, whatever the width)
)


@dataclass(frozen=True)
class Checked:
    """What was seen of one tensor. difference: of the outputs, None where no adapter could be asked."""

    sound: bool
    changed: bool = False
    difference: float | None = None


def verify(base: Path, target: Path, answers: OutputCheck, added: Mapping[str, Tensor]) -> Iterator[str]:
    """Sentences about what was checked. UserError if anything is not as it should be.

    answers: the change that the target was made with.
    """
    described, wanted = pth.read_header(target), pth.read_header(base)
    shapes = {n: (s.shape, s.dtype) for n, s in wanted.items()}
    shapes |= {n: (tuple(t.shape), t.dtype) for n, t in added.items()}
    same = {n: (s.shape, s.dtype) for n, s in described.items()} == shapes
    results: dict[str, Checked] = {} if same else {"the list of tensors": Checked(False)}
    one_at_a_time = threading.Lock()
    if wrong := list(answers.wrong()):
        raise UserError(
            f"{first_of(wrong, 'does', 'do')} not answer as base + adapter would. Nothing was written. Your files are not "
            "to blame: this is a fault of this program, please report it with the lines above."
        )
    with PthReader(base) as old, PthReader(target, straight=True) as new:

        def check(name: str) -> Checked:
            try:
                if name in added:
                    moved = name in wanted and not torch.equal(old.tensor(name), added[name])
                    return Checked(torch.equal(new.tensor(name), added[name]), moved)
                if answers.change(name) is None:
                    return Checked(identical(old, new, name))
                return check_changed(name, old, new, answers, one_at_a_time)
            except pth.CorruptCheckpoint:
                return Checked(False)

        assert new.zip is not None, "what was written is a zip file"
        for info in new.zip.infolist():  # torch needs more than tensors: versions, the list of them
            if not info.filename.startswith(f"{new.folder}data/"):
                for _ in new.read(info, []):
                    pass
        pth.load(target)
        names = list(shapes) if same else []
        results |= dict(zip(names, parallel_map(check, names), strict=True))
    wrong = [name for name, checked in results.items() if not checked.sound]
    if wrong:
        raise UserError(
            f"{first_of(wrong, 'is', 'are')} not as written when the result is read back from the disk; the result was "
            "removed. Is the disk sound?"
        )
    changed = sum(checked.changed for checked in results.values())
    fresh = [name for name in added if name not in wanted]
    more = f", {len(fresh)} added" if fresh else ""
    if not changed and not fresh:
        yield "warning: nothing in it differs from the base; what was learnt is nothing, or less than the base's numbers can hold"
    yield f"{len(wanted)} tensors read back: {changed} changed, {len(wanted) - changed} identical to the base{more}"
    asked = [checked.difference for checked in results.values() if checked.difference is not None]
    if asked:
        form = str(wanted["emb.weight"].dtype).removeprefix("torch.")
        yield f"every merged layer answers as base + adapter: outputs differ by {max(asked):.1e} at most (rounding to {form})"


def first_of(wrong: Sequence[object], one: str, several: str) -> str:
    """The first of what is wrong, how many others there are, and the verb."""
    return f"{wrong[0]} and {plural(len(wrong) - 1, 'other')} {several}" if len(wrong) > 1 else f"{wrong[0]} {one}"


def identical(old: PthReader, new: PthReader, name: str) -> bool:
    """Return whether a tensor is the base's.

    Records are compared by their checksums, which are checked by reading them; where the result's is the base's, what
    was read from the base to make it was right as well.
    """
    if not (old.described[name].whole and new.described[name].whole):
        return torch.equal(old.tensor(name), new.tensor(name))
    for _ in new.pieces(name):
        pass
    return same_record(old, new, name)


def same_record(old: PthReader, new: PthReader, name: str) -> bool:
    """Return whether two files have the same record of a tensor."""
    return old.info(name).file_size == new.info(name).file_size and old.checksum(name) == new.checksum(name)


def check_changed(
    name: str, old: PthReader, new: PthReader, answers: OutputCheck, one_at_a_time: threading.Lock
) -> Checked:
    """Check a changed tensor.

    The record's checksum, taken from the computed values, shows that the file has what was written; tensors that no adapter
    changes are compared.
    """
    moved = not same_record(old, new, name) if old.described[name].whole else True
    if name in answers.written:
        for _ in new.pieces(name):
            pass
        written = answers.written[name]
        if not written.sound:
            raise no_numbers(name)
        within = ROUNDINGS * torch.finfo(new.described[name].dtype).eps
        return Checked(written.difference <= within, moved, written.difference)
    # a tensor that one run has trained whole goes in as it is
    [only] = answers.parts if len(answers.parts) == 1 and not answers.weights else [None]
    meant = only.tensors.get(name) if only and not only.quantised else None
    finite, same = True, True
    for block, rows in of_changed(name, new, answers, one_at_a_time):
        finite &= are_finite(rows)
        same &= meant is None or torch.equal(rows, (meant[block] if rows.dim() else meant).to(rows.dtype))
    if not finite and (meant is None or not are_finite(meant.to(new.described[name].dtype))):
        raise no_numbers(name)
    return Checked(finite and same, moved)


def of_changed(name: str, new: PthReader, answers: OutputCheck, one_at_a_time: threading.Lock):
    """A tensor's rows, in the blocks that its change is made in."""
    stored, make = new.described[name], answers.change(name)
    if isinstance(make, RowwiseUpdate) and stored.whole and stored.shape:
        blocks = make.blocks(stored.shape)
        yield from zip(blocks, new.rows(name, blocks), strict=True)
    else:
        with one_at_a_time:  # memory has room for one whole tensor
            yield slice(None), new.tensor(name)


def no_numbers(name: str) -> UserError:
    """Return the error about NaN or infinity in a result."""
    return UserError(
        f"{name} would hold NaN or infinity: what the run learnt is too large for the base's numbers, or "
        "alpha is, or the base holds such numbers itself. Nothing was written; take an earlier epoch."
    )
