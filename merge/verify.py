"""The result of a merge, read back from the disk and compared with what it should be, before it is called done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from rwkv_peft import checkpoint
from rwkv_peft.adapters import attach
from rwkv_peft.errors import UserError
from rwkv_peft.model.rwkv import build
from rwkv_peft.ops import dispatch

from .fold import Change

LOGITS_LIMIT = 1 << 30  # bytes of the base up to which both models are run; above, the tensors themselves must do
PROBE = "User: Hello!\n\nAssistant: 你好，1 + 1 = 2."  # English, Chinese, digits


def verify(base: Path, target: Path, adapter: Path, change: Change, sidecar: dict, geometry) -> Iterator[str]:
    """Sentences about what was checked. UserError, and the result is removed, if anything is not as it should be."""
    described, wanted = checkpoint.describe(target), checkpoint.describe(base)
    same = {n: (s.shape, s.dtype) for n, s in described.items()} == {n: (s.shape, s.dtype) for n, s in wanted.items()}
    old, new = checkpoint.load(base), checkpoint.load(target)
    changed = wrong = 0
    for name in old:
        expected = change(name, old[name])
        changed += expected is not old[name]
        wrong += not same or not torch.equal(new[name], expected.to(old[name].dtype))
        wrong += not bool(torch.isfinite(new[name]).all())
    if wrong or not same:
        target.unlink()
        raise UserError(
            f"{target}: {wrong} tensors are not what they should be when read back; removed. Is the disk sound?"
        )
    untouched = len(old) - changed
    yield f"{len(old)} tensors read back: {changed} changed as the formula says, {untouched} identical to the base, all finite"
    if sidecar["method"] != "full" and base.stat().st_size <= LOGITS_LIMIT:
        difference, span, agree = compare_logits(old, new, adapter, sidecar, geometry)
        yield (
            f"merged and base + adapter answer alike: logits of {len(probe_ids(geometry))} tokens differ by at most "
            f"{difference:.4f} of {span:.1f} (rounding to the base's number format), same likeliest token in {agree}"
        )


def probe_ids(geometry) -> list[int]:
    from rwkv_peft.tokenizer import encode

    return [i for i in encode(PROBE) if i < geometry.vocab_size] or [1]


def compare_logits(old, new, adapter: Path, sidecar: dict, geometry) -> tuple[float, float, str]:
    """Largest difference of logits between base + adapter and merged, their span, and how often they agree; in float32."""
    wkv, ids = dispatch.wkv7("auto")[1], torch.tensor([probe_ids(geometry)])
    with torch.inference_mode():
        merged, _ = build(geometry, new, wkv)(ids)
        adapted = build(geometry, old, wkv)
        attach.attach_checkpoint(adapted, checkpoint.load(adapter), sidecar, str(adapter))
        tuned, _ = adapted.eval()(ids)
    agree = int((merged.argmax(-1) == tuned.argmax(-1)).sum())
    return float((merged - tuned).abs().max()), float(tuned.max() - tuned.min()), f"{agree} of {ids.numel()}"
