"""Large files made in pieces: several at a time, each written where it belongs. Floor 0."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

KEEP = 24 << 20  # bytes; of more than 32 MB glibc takes no notice
THREADS = 8  # at most; more would wait for the disk

T = TypeVar("T")
R = TypeVar("R")


def parallel_map(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """[work(item) for item in items], several items at a time and each on one core."""
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    # (one more than there are cores: a file takes one write at a time, and who waits for it works for nobody)
    # glibc keeps as much memory for the next block as it once saw given back; else it would ask the system every time
    torch.empty(KEEP, dtype=torch.uint8)
    with ThreadPoolExecutor(min(cores + 1, THREADS), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
            torch.set_num_threads(threads)


def tensor_bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
