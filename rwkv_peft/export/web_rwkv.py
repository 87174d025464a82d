"""A model as Ai00 and other clients of web-rwkv load it: safetensors, float16.

The rules are those of web-rwkv's converter (convert_safetensors.py, as Ai00-X/ai00_server carries it in assets/scripts)
and of its loader (cryscan/web-rwkv, src/runtime/loader.rs):

- names in lower case, with time_faaaa called time_first and time_maa called time_mix;
- the low-rank matrices, which the .pth has as [in, out], go in as [out, in] (the last two axes change places), and so
  does a learnt state that was merged in: [head, value, key] -> [head, key, value];
- every tensor is float16; shapes stay otherwise, [1, 1, C] as well; tensors it does not know do no harm.

The loader finds the version by names and the sizes by shapes, the rank of v by layer 1: an RWKV-7 of one layer cannot be
loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from rwkv_peft.checkpoint import safetensors_io
from rwkv_peft.checkpoint.prompt_format import PromptFormat
from rwkv_peft.checkpoint.pth import PthReader
from rwkv_peft.common.errors import UserError
from rwkv_peft.common.paths import display_path
from rwkv_peft.model.arch import Geometry

from .cast import fitted, numbers
from .inputs import must_be_model

RENAMED = {"time_faaaa": "time_first", "time_maa": "time_mix"}
TRANSPOSED = {
    *("att.w1", "att.w2", "att.a1", "att.a2", "att.v1", "att.v2", "att.g1", "att.g2"),
    *("att.time_maa_w1", "att.time_maa_w2", "att.time_decay_w1", "att.time_decay_w2"),
    "att.time_state",
}


def new_name(name: str) -> str:
    """Return a tensor's name in the file."""
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name.lower()


def is_transposed(name: str) -> bool:
    """blocks.3.att.w1: what counts is the name within the block."""
    return name.startswith("blocks.") and name.split(".", 2)[2] in TRANSPOSED


def write(source: Path, target: Path, geometry: Geometry, prompting: PromptFormat) -> Iterator[str]:
    """Write a model's .st file. Yields sentences about it; UserError if the source is no model or does not fit float16."""
    with PthReader(source) as archive:
        must_be_model(archive, geometry)
        if geometry.version == "x070" and geometry.n_layer < 2:
            raise UserError(f"{display_path(source)}: has one layer only; web-rwkv loads RWKV-7 from two layers on.")
        sources: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, stored in archive.described.items():
            swap = stored.shape[-2:][::-1] if is_transposed(name) else stored.shape[-2:]
            if other := sources.get(new_name(name)):
                raise UserError(
                    f"{display_path(source)}: {name} and {other} would both be called {new_name(name)} there."
                )
            sources[new_name(name)], shapes[new_name(name)] = name, (*stored.shape[:-2], *swap)

        def pieces(new: str):
            name = sources[new]
            if not is_transposed(name):
                return numbers(archive, name, torch.float16)
            tensor = archive.tensor(name).transpose(-2, -1)
            return [fitted(tensor, torch.float16, f"{display_path(source)}: {name}")]

        safetensors_io.write_safetensors(target, shapes, torch.float16, pieces, metadata=prompting.metadata())
    yield f"All {len(shapes):,} tensors are float16 under web-rwkv's names; the safetensors library opens the file."
    yield "Load it in Ai00 (put it into its folder of models, name it in Config.toml) or in the WebGPU mode of RWKV-Runner."
