"""Who prepares batches: this process as they are asked for, or workers that live as long as the run."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

AHEAD = 4  # batches that a worker prepares in advance


class InOrder(Sampler):
    """The numbers of an epoch's micro-batches; Lightning calls set_epoch before each epoch. A run that goes on begins with
    micro-batch `first` of its first epoch."""

    def __init__(self, length: int, epoch: int, first: int):
        self.length, self.epoch, self.first = length, epoch, first

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.first = epoch, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch * self.length + self.first, (self.epoch + 1) * self.length))


def make_loader(batches: Dataset, workers: int, epoch: int = 0, first: int = 0) -> DataLoader:
    """Batches in order, prepared by `workers` processes that live as long as the run; 0: by this one, as they are asked for.

    Workers are forked: they share the mapped files and all that is known of them, instead of getting copies. epoch, first: where
    it begins; a stream knows that itself.
    """
    stream = isinstance(batches, IterableDataset)
    sampler = None if stream else InOrder(len(batches), epoch, first)
    # every iterator draws a seed: from here, so that dropout's numbers do not depend on how often one is made
    generator = torch.Generator()
    if not workers:
        return DataLoader(batches, batch_size=None, sampler=sampler, generator=generator)
    return DataLoader(
        batches,
        batch_size=None,
        sampler=sampler,
        generator=generator,
        num_workers=workers,
        persistent_workers=True,
        prefetch_factor=AHEAD,
        multiprocessing_context="fork",
        worker_init_fn=leave_signals_to_the_run,
    )


def leave_signals_to_the_run(_worker: int) -> None:
    """Ctrl-C and a closing terminal reach every process; whether and when to stop is for the training process to decide.

    A worker ends when it is told to, and within seconds by itself when its run is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(
        signal.SIGBUS, signal.SIG_DFL
    )  # a file was cut: the training process says so, not torch in other words


def end_workers(loader: DataLoader) -> None:
    """End the workers now, however the run ended."""
    iterator, loader._iterator = loader._iterator, None
    if hasattr(iterator, "_shutdown_workers"):
        with contextlib.suppress(Exception):  # one that is gone already
            iterator._shutdown_workers()
