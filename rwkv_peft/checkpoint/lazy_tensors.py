"""Tensors that are made whole when they are asked for: how a run whose weights lie in pieces over processes is saved."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class LazyTensor(NamedTuple):
    """A tensor that may lie in pieces. get: makes it whole; where it lies in pieces, all processes have to call it at once."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    get: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each made whole when it is asked for, on the host, and never kept. announce: is told the number of one
    before it is made."""

    def __init__(self, wholes: Mapping[str, LazyTensor], announce: Callable[[LazyTensor], None] = lambda _: None):
        self.wholes, self.announce, self.one_at_a_time = wholes, announce, threading.Lock()

    def __getitem__(self, name: str) -> Tensor:
        with self.one_at_a_time:
            self.announce(self.wholes[name])
            return self.wholes[name].get().detach().cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self.wholes)

    def __len__(self) -> int:
        return len(self.wholes)
