"""Which implementation computes wkv: the one table of backends, and what `auto` becomes."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import Problem, Problems
from . import chunked, chunked6, reference

# version -> backend -> function; the signatures are those of the reference
OPS: dict[str, dict[str, Callable]] = {
    "x070": {"reference": reference.wkv7, "torch": chunked.wkv7},
    "x060": {"reference": reference.wkv6, "torch": chunked6.wkv6},
    "x052": {"reference": reference.wkv5, "torch": chunked6.wkv5},
}

# backends of the field that this version does not have
ABSENT = {
    "cuda": "the CUDA kernels are not part of this version yet; use OP=auto, which runs on a GPU through torch",
    "fla": "flash-linear-attention is not part of this version yet; use OP=auto, which runs on a GPU through torch",
    "triton": "is not part of this version; use OP=auto, which runs on a GPU through torch",
    "cpu": "the C++ kernel is not part of this version yet; use OP=auto",
}


def wkv(op: str, version: str) -> tuple[str, Callable]:
    """The backend's name and its function for a version (x070 ...). Raises Problems for what is absent."""
    if op in ABSENT:
        raise Problems(Problem("OP", ABSENT[op]))
    name = "torch" if op == "auto" else op
    return name, OPS[version][name]
