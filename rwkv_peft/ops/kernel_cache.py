"""Where what was made for this machine is kept from run to run: compiled kernels, and that they were found right."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch


def folder() -> Path:
    """A folder that can be written to: in the user's cache, or one that is gone with the process."""
    torchs = Path(torch.hub.get_dir()).absolute().parent  # ~/.cache/torch, or what TORCH_HOME says
    there = (torchs.parent if torchs.name == "torch" else torchs) / "rwkv-peft"
    try:
        there.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=there):
            return there
    except OSError:
        return Path(temporary().name)


@functools.cache
def temporary() -> tempfile.TemporaryDirectory:
    """Return a temporary folder of the kit."""
    return tempfile.TemporaryDirectory(prefix="rwkv-peft-")
