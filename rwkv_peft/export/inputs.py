"""What an export starts from: a whole model, or a learnt state. Anything else is refused with a sentence.

A learnt state is the WKV matrix of every block before the first token, blocks.{i}.att.time_state [head, value, key], as
state tuning saves it and as RWKV-LM's kernels read it. Its full-state variant has learnt the two token shifts as well:
blocks.{i}.att.ts_state and blocks.{i}.ffn.ts_state, [C].
"""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from rwkv_peft.checkpoint import pth
from rwkv_peft.checkpoint.pth import PthReader
from rwkv_peft.common.errors import UserError
from rwkv_peft.common.formatting import plural
from rwkv_peft.common.paths import display_path
from rwkv_peft.model import arch
from rwkv_peft.model.arch import Geometry


def must_be_model(archive: PthReader, geometry: Geometry) -> None:
    """Check that a file is a whole model of this geometry.

    Raises:
        UserError: it is not.
    """
    described = {name: stored.shape for name, stored in archive.described.items()}
    if not any(marker.marker in described for marker in arch.ARCHS.values()):
        raise UserError(f"{display_path(archive.path)}: {arch.what_it_is(described)}")
    if wrong := arch.misfits(described, arch.shapes(geometry)):
        raise UserError(f"{display_path(archive.path)}: is no whole {arch.arch_of(geometry).name} model: {wrong[0]}.")


def learnt_state(source: Path, geometry: Geometry) -> dict[str, Tensor]:
    """Return the learnt state in a file, by name, sorted by layer: n_layer matrices, and the token shifts if they were trained.

    The file may be a model that has one merged in.

    Raises:
        UserError: the file has no state of such a model.
    """
    tensors, wanted = pth.load(source), arch.state_shapes(geometry)
    states = {name: tensor for name, tensor in tensors.items() if arch.STATE_NAME.fullmatch(name)}
    if not any(name.endswith(".att.time_state") for name in states):
        raise UserError(
            f"{display_path(source)}: holds no learnt state (blocks.0.att.time_state). Only runs of state tuning make one."
        )
    matrices = {name: shape for name, shape in wanted.items() if name.endswith(".att.time_state")}
    wrong = arch.misfits({name: tuple(tensor.shape) for name, tensor in states.items()}, matrices)
    wrong += [f"{name} is too much" for name in states if name not in wanted]
    wrong += [
        f"{name} holds {tensor.numel()} numbers instead of {math.prod(wanted[name])}"
        for name, tensor in states.items()
        if name in wanted and tensor.numel() != math.prod(wanted[name])
    ]
    if wrong:
        size = f"{plural(geometry.n_layer, 'layer')}, {geometry.n_head} heads of {geometry.head_size}"
        raise UserError(f"{display_path(source)}: is no state of a model with {size}: {wrong[0]}.")
    return {name: states[name].reshape(wanted[name]) for name in wanted if name in states}
