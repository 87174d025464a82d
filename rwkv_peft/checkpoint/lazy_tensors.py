"""Tensors that are gathered when they are accessed, so that a run with sharded weights can be saved."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class LazyTensor(NamedTuple):
    """A tensor that may be sharded.

    Attributes:
        shape: of the whole tensor.
        dtype: of the whole tensor.
        get: gathers it; if it is sharded, all ranks must call this at the same time.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    get: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each gathered to the host when it is accessed, and never kept.

    Args:
        wholes: the tensors.
        announce: called with a tensor before it is gathered.
    """

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
