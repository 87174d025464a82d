"""A learnt state as clients load it: a .pth for RWKV-Runner and the rwkv package, a .state for Ai00 and web-rwkv.

Both hold n_layer matrices blocks.{i}.att.time_state and nothing else: RWKV-Runner counts the tensors. The .pth has them as
they were trained, float32 [head, value, key]; the .state has them float16 and transposed, [head, key, value], as the
converter of web-rwkv writes them. (RWKV-Runner backend-python and web-rwkv's read_state; the rwkv package's v7 takes the
.pth's matrices as they are, its v6 wants [head, key, value] in its list.) A state works with the base that it was trained
on, and with no other.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from rwkv_peft.checkpoint import pth, safetensors_io
from rwkv_peft.checkpoint.prompt_format import PromptFormat
from rwkv_peft.common.formatting import plural
from rwkv_peft.common.paths import display_path
from rwkv_peft.model.arch import Geometry

from .cast import fitted
from .inputs import learnt_state


def matrices(source: Path, geometry: Geometry, dtype: torch.dtype) -> tuple[dict[str, Tensor], int]:
    """The matrices of a learnt state [H, value, key] by name, and how many learnt token shifts these files have no place for."""
    states = learnt_state(source, geometry)
    chosen = {
        n: fitted(t, dtype, f"{display_path(source)}: {n}") for n, t in states.items() if n.endswith(".att.time_state")
    }
    return chosen, len(states) - len(chosen)


def left_out(shifts: int) -> Iterator[str]:
    """Yield a sentence about token shifts that have no place in the file."""
    if shifts:
        yield (
            f"{plural(shifts, 'learnt token shift')} of this full state had to be left out: these clients begin with zero "
            "there. ./chat.sh and rwkv.cpp (rwkvcpp) use them."
        )


def write_pth(source: Path, target: Path, geometry: Geometry, prompting: PromptFormat) -> Iterator[str]:
    """Write a state's .pth. Yields sentences about it; UserError if the source holds no state of such a model."""
    chosen, shifts = matrices(source, geometry, torch.float32)
    pth.save(target, chosen)
    yield from left_out(shifts)
    yield f"It holds the matrices of {plural(len(chosen), 'layer')}, float32 [head, value, key]."
    yield "Load it in RWKV-Runner: put it into its folder state-models and choose it as the state of its .pth base."


def write_ai00(source: Path, target: Path, geometry: Geometry, prompting: PromptFormat) -> Iterator[str]:
    """Write a state's .state. Yields sentences about it; UserError as above, or if a number does not fit float16."""
    chosen, shifts = matrices(source, geometry, torch.float16)
    turned = {name: tensor.transpose(1, 2) for name, tensor in chosen.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in turned.items()}
    safetensors_io.write_safetensors(
        target, shapes, torch.float16, lambda name: [turned[name]], metadata=prompting.metadata()
    )
    yield from left_out(shifts)
    yield f"It holds the matrices of {plural(len(chosen), 'layer')}, float16 [head, key, value]."
    yield "Load it in Ai00: name it under [[state]] in Config.toml, or send it to /api/models/state/load."
