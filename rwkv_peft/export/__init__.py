"""Files that other clients load, written from a model's .pth or from a learnt state.

Each write(source, target, geometry, prompting) is a generator: it writes the whole file, atomically and a few MB at a time,
and then yields sentences about what is in it and what loads it. geometry is that of the model, or of the state's base.
prompting: how the model was trained to be asked; formats that have a place for it hold it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from rwkv_peft.checkpoint.prompt_format import Prompting
from rwkv_peft.export import gguf_export, rwkvcpp, state, web_rwkv
from rwkv_peft.model.arch import Geometry


@dataclass(frozen=True)
class Export:
    """ending: what stands behind the name of the model or run. what: "model" or "state", which the source must be."""

    kind: str
    ending: str
    what: str
    write: Callable[[Path, Path, Geometry, Prompting], Iterator[str]]


def gguf(dtype: torch.dtype) -> Callable[[Path, Path, Geometry, Prompting], Iterator[str]]:
    return functools.partial(gguf_export.write, dtype=dtype)


EXPORTS = {
    export.kind: export
    for export in (
        Export("safetensors", ".st", "model", web_rwkv.write),
        Export("gguf", ".gguf", "model", gguf(torch.float16)),
        Export("gguf-bf16", ".bf16.gguf", "model", gguf(torch.bfloat16)),
        Export("gguf-f32", ".f32.gguf", "model", gguf(torch.float32)),
        Export("state", ".pth", "state", state.write_pth),
        Export("state-ai00", ".state", "state", state.write_ai00),
        Export("rwkvcpp", ".rwkvcpp.bin", "state", rwkvcpp.write),
    )
}
