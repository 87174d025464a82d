"""Run I/O and computation on several tensors in parallel threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

_FREED_BLOCK = 24 << 20  # bytes; glibc ignores blocks above 32 MB
_MAX_THREADS = 8  # more would wait for the disk

T = TypeVar("T")
R = TypeVar("R")


def parallel_map(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return [work(item) for item in items], computed for several items at a time, each on one core."""
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    # after this block is freed, glibc keeps as much memory for later blocks, instead of asking the system every time
    torch.empty(_FREED_BLOCK, dtype=torch.uint8)
    # one thread more than cores: a file takes one write at a time, and a thread that waits for it does not compute
    with ThreadPoolExecutor(min(cores + 1, _MAX_THREADS), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
            torch.set_num_threads(threads)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
