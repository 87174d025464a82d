"""An adapter folder as the peft package saves it: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_peft.checkpoint import safetensors_io
from rwkv_peft.common.atomic_io import make_folder, make_own_folder, write_json


def write(target: Path, config: dict, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter folder.

    Args:
        target: The folder.
        config: Of adapter_config.json. It is written last: peft does not take a folder without one for an adapter.
        tensors: By peft's names; written in float32.
    """
    make_folder(target.parent)
    make_own_folder(target)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    weights = target / "adapter_model.safetensors"
    safetensors_io.write_safetensors(weights, shapes, torch.float32, lambda name: [tensors[name].float()])
    write_json(target / "adapter_config.json", config)
