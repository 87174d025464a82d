"""A model as an .npz file, float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rwkv_peft.checkpoint import pth
from rwkv_peft.common.atomic_io import atomic_write
from rwkv_peft.model.arch import Geometry


def write(source: Path, target: Path, geometry: Geometry, prompting) -> Iterator[str]:
    """Write the file. Yields sentences about it."""
    tensors = {name: tensor.float().numpy() for name, tensor in pth.load(source).items()}
    with atomic_write(target) as file:
        np.savez(file, **tensors)
    yield f"It holds {len(tensors)} arrays."
