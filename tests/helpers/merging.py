"""A run folder with a checkpoint to merge, and what ./merge.sh makes of it."""

from __future__ import annotations

import torch

from helpers import tiny
from helpers.adapters import OPTIONS, moved
from helpers.kit import ROOT
from helpers.scripts import shell_values
from rwkv_peft.adapters import inject
from rwkv_peft.adapters.inject import AdapterConfig
from rwkv_peft.adapters.specs import METHODS
from rwkv_peft.checkpoint import pth, run_dir
from rwkv_peft.cli import merge as door
from rwkv_peft.common import atomic_io, hashing, paths
from rwkv_peft.config.shell import Script
from rwkv_peft.model.rwkv import build

SHAPE = tiny.geometry(2, 32, 64, 16)


PARTS = ("att", "ffn", "ln")


X = torch.arange(1, 41)[None]


def merge(*typed, **changes):
    """What ./merge.sh does with these words behind it and these values in it."""
    values = shell_values(ROOT / "merge.sh") | changes
    door.command(Script(ROOT / "merge.sh", values).read(door.MergeConfig), [str(word) for word in typed])


def make_run(
    root,
    name="r",
    method="lora",
    version="x070",
    dtype=torch.float32,
    seed=5,
    quant="none",
    parts=PARTS,
    step=0.1,
    width=32,
):
    """A base with extra tensors in model/, and a run on it whose adapters are not fresh. Returns folder, base and model."""
    shape = tiny.geometry(2, width, 2 * width, 16, version)
    base, folder = root / "model" / "base.pth", root / "output" / name
    if not base.exists():
        extra = {"blocks.0.att.v0": torch.randn(1, 1, width), "note": torch.arange(3)}
        pth.save(base, {n: t.to(dtype) for n, t in tiny.tensors(0, shape).items()} | extra)
    model = build(shape, pth.load(base), tiny.ops(shape))
    parts = parts if METHODS[method].parts else ()
    begun = inject.inject_adapters(
        model, AdapterConfig(method, OPTIONS[method], parts, quant=quant, quant_parts=("att", "ffn"))
    )
    saved = moved(model, seed, step)
    if method == "lisa":
        saved = {n: p.detach() for n, p in model.named_parameters()}
    folder.mkdir()
    if begun:
        pth.save(run_dir.init_file(folder, method), begun)
    pth.save(folder / "rwkv-3.pth", saved)
    write_sidecar(folder, base, method=method, quant=quant, geometry=shape.as_dict(), **OPTIONS[method])
    (folder / "run.json").write_text("{}")
    run_dir.point_latest(folder)
    return folder, base, model.eval()


def write_sidecar(folder, file, /, **changes):
    content = {
        "method": "lora", "rank": 4, "alpha": 8.0, "base": "base.pth", "quant_parts": ["att", "ffn"],
        "base_sha256": hashing.sha256(file), "geometry": SHAPE.as_dict(), "epoch": 3, "step": 9, "versions": {},
    }  # fmt: skip
    if changes.get("method", "lora") not in ("lora", "dora"):
        del content["rank"], content["alpha"]
    atomic_io.write_json(folder / "rwkv-3.json", content | changes)


def result(name="base-r-3.pth"):
    return paths.ROOT / "merge" / name
