"""Which implementation computes wkv7: the one table of backends, and what `auto` becomes."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import Problem, Problems
from . import chunked, reference

WKV7: dict[str, Callable] = {"reference": reference.wkv7, "torch": chunked.wkv7}

# backends of the field that this version does not have
ABSENT = {
    "cuda": "the CUDA kernels are not part of this version yet; use OP=auto, which runs on a GPU through torch",
    "fla": "flash-linear-attention is not part of this version yet; use OP=auto, which runs on a GPU through torch",
    "triton": "is not part of this version; use OP=auto, which runs on a GPU through torch",
    "cpu": "the C++ kernel is not part of this version yet; use OP=auto",
}


def wkv7(op: str) -> tuple[str, Callable]:
    """The backend's name and its function (the signature of reference.wkv7). Raises Problems for what is absent."""
    if op in ABSENT:
        raise Problems(Problem("OP", ABSENT[op]))
    name = "torch" if op == "auto" else op
    return name, WKV7[name]
