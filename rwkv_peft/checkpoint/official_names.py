"""The official names and shapes of a model's tensors, for files with slightly different ones. Floor 0.

Copies on Hugging Face hold the official names after the prefix "model." (RWKV/RWKV7-G1*), files of Lightning and
torch.compile after other prefixes; some have flattened the vectors that are [1, 1, C] in the official files. Nothing
else is changed, and nothing at all in files that are not a whole model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

Shape = tuple[int, ...]

# tensors that the official files hold as [1, 1, C]
VECTOR = re.compile(
    r"blocks\.\d+\.(att\.(x_[rwkvag]|[wav]0|k_k|k_a|time_maa_[xwkvrg]|time_mix_[kvrg])|ffn\.(x_k|time_maa_[kr]|time_mix_[kr]))"
)
DECAY = re.compile(r"blocks\.\d+\.att\.time_decay")  # [1, 1, C] in RWKV-6 alone


def map_to_official(shapes: Mapping[str, Shape]) -> dict[str, tuple[str, Shape]]:
    """Map the official name of each tensor of a file to its name in the file and its official shape.

    Args:
        shapes: names and shapes in the file.
    """
    prefix = name_prefix(shapes)
    names = {name.removeprefix(prefix): name for name in shapes if name.startswith(prefix)}
    names |= {name: name for name in shapes if not name.startswith(prefix) and name not in names}  # like the head
    if "head.weight" not in names and "lm_head.weight" in names and "emb.weight" in names:
        names["head.weight"] = names.pop("lm_head.weight")
    if len(names) < len(shapes):  # two tensors of one name: change nothing
        return {name: (name, shape) for name, shape in shapes.items()}
    whole = "emb.weight" in names and "blocks.0.ln1.weight" in names
    sixth = "blocks.0.att.time_maa_x" in names
    return {
        name: (old, official_shape(name, shapes[old], sixth) if whole else shapes[old]) for name, old in names.items()
    }


def name_prefix(names: Mapping[str, Shape]) -> str:
    """Return the prefix of all official names of a whole model; "" for none."""
    if "emb.weight" in names:
        return ""
    for name in names:
        prefix = name.removesuffix("emb.weight")
        if prefix != name and prefix.endswith(".") and f"{prefix}blocks.0.ln1.weight" in names:
            return prefix
    return ""


def official_shape(name: str, shape: Shape, sixth: bool) -> Shape:
    """Return the official shape of a tensor. sixth: the model is RWKV-6."""
    vector = VECTOR.fullmatch(name) or (sixth and DECAY.fullmatch(name))
    size = math.prod(shape)
    return (1, 1, size) if vector and size and size == max(shape) else shape
