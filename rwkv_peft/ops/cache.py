"""Where what was made for this machine is kept from run to run: compiled kernels, and that they were found right."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch


def folder() -> Path:
    """A folder that can be written to: beside torch's own cache, or one that is gone with the process."""
    there = Path(torch.hub.get_dir()).parent.parent / "rwkv-peft"
    try:
        there.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=there):
            return there
    except OSError:
        return Path(temporary().name)


@functools.cache
def temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="rwkv-peft-")
