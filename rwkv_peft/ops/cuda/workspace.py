"""How inputs lie in memory for the kernels: formats, head sizes, sequences, and how far kept states are apart."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

EVERY = 64  # tokens from one kept state to the next, as in device.h
SIZES = (16, 32, 64, 128)  # head sizes that there are kernels for
NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}

Spans = tuple[tuple[int, int], ...]  # first token of each sequence, and behind the last one


def fits(r: Tensor) -> bool:
    """Whether there is a kernel for these inputs; for others there is the torch backend."""
    return r.numel() > 0 and r.shape[-1] in SIZES and r.dtype != torch.float64


def format_of(r: Tensor) -> torch.dtype:
    """What r, k, v and the like lie in."""
    return r.dtype if r.dtype in NAMES else torch.float32


def on_device(rows: list[tuple[int, ...]], device: torch.device) -> Tensor:
    """A table of integers; the host does not wait until it is there."""
    table = torch.tensor(rows, dtype=torch.int32)
    return table.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else table.to(device)


keepers: list[list[object]] = []


@contextlib.contextmanager
def keeping() -> Iterator[list[object]]:
    """A list of all tables that are asked for inside: what has recorded their addresses keeps them."""
    keepers.append([])
    try:
        yield keepers[-1]
    finally:
        keepers.pop()


def remembered(make: Callable) -> Callable:
    """A cache of tables: every layer, and the backward pass, asks for the same one."""
    cached = functools.lru_cache(maxsize=8)(make)

    @functools.wraps(make)
    def asked(*how):
        made = cached(*how)
        for kept in keepers:
            kept.append(made)
        return made

    return asked


@remembered
def tables(spans: Spans, device: torch.device) -> tuple[Tensor, Tensor]:
    """[sequences, 3]: first token, behind the last one, first chunk. [chunks, 3]: first token, behind the last one, sequence."""
    rows: list[tuple[int, ...]] = []
    chunks: list[tuple[int, ...]] = []
    for number, (begin, end) in enumerate(spans):
        rows.append((begin, end, len(chunks)))
        chunks += [(at, min(at + EVERY, end), number) for at in range(begin, end, EVERY)]
    return on_device(rows, device), on_device(chunks, device)
