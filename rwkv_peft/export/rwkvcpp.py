"""A learnt state as rwkv.cpp's rwkv_eval takes it: one buffer of float32, layer after layer.

A layer is [ffn_x (C) | att_x (C) | heads]: the channel mix's token shift comes first. The heads are matrices in the order of
rwkv.cpp's own operators: RWKV-7 [head, value, key] (rwkv_operators_wkv_v7.inc), RWKV-6 and -5 [head, key, value] (ggml's
wkv6). The token shifts are zero unless they were learnt. The file holds the buffer and nothing else:
n_layer * (2 C + C N) numbers, little-endian, which must be what rwkv_get_state_buffer_element_count says.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from rwkv_peft.checkpoint.prompt_format import PromptFormat
from rwkv_peft.common.atomic_io import atomic_write, check_disk_space
from rwkv_peft.common.paths import display_path
from rwkv_peft.model.arch import Geometry

from .cast import fitted
from .inputs import learnt_state

KEY_FIRST = {"x070": False, "x060": True, "x052": True}


def write(source: Path, target: Path, geometry: Geometry, prompting: PromptFormat) -> Iterator[str]:
    """Write the buffer. Yields sentences about it; UserError if the source holds no state of such a model."""
    states = {
        name: fitted(tensor, torch.float32, f"{display_path(source)}: {name}")
        for name, tensor in learnt_state(source, geometry).items()
    }
    zero = torch.zeros(geometry.n_embd)
    numbers = geometry.n_layer * geometry.n_embd * (2 + geometry.head_size)
    check_disk_space(target.parent, 4 * numbers)
    with atomic_write(target) as file:
        for i in range(geometry.n_layer):
            heads = states[f"blocks.{i}.att.time_state"]
            if KEY_FIRST[geometry.version]:
                heads = heads.transpose(1, 2)
            shifts = [states.get(f"blocks.{i}.{part}.ts_state", zero) for part in ("ffn", "att")]
            file.write(torch.cat([*shifts, heads.reshape(-1)]).numpy().astype("<f4").data)
    yield f"It holds {numbers:,} numbers, float32: read them into the buffer state_in of rwkv_eval."
    yield 'In Python: model.eval(token, numpy.fromfile(path, "float32")), with the RWKVModel of rwkv.cpp.'
