"""The data loader: batches prepared on request by this process, or by workers that live as long as the run."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

AHEAD = 4  # batches that a worker prepares in advance


class OrderedSampler(Sampler):
    """The numbers of an epoch's micro-batches. Lightning calls set_epoch before each epoch.

    Args:
        length: micro-batches of an epoch.
        epoch: the first epoch.
        first: the first micro-batch of that epoch, for a run that resumes.
    """

    def __init__(self, length: int, epoch: int, first: int):
        self.length, self.epoch, self.first = length, epoch, first

    def set_epoch(self, epoch: int) -> None:
        """Move to an epoch."""
        if epoch != self.epoch:
            self.epoch, self.first = epoch, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch * self.length + self.first, (self.epoch + 1) * self.length))


def make_loader(batches: Dataset, workers: int, epoch: int = 0, first: int = 0) -> DataLoader:
    """Make a loader of batches in order.

    Workers are forked: they share the mapped files and all derived data instead of getting copies.

    Args:
        batches: the data set.
        workers: processes that prepare batches and live as long as the run; 0: this process does it, on request.
        epoch: the first epoch; a stream has its own position.
        first: the first micro-batch of that epoch.
    """
    stream = isinstance(batches, IterableDataset)
    sampler = None if stream else OrderedSampler(len(batches), epoch, first)  # type: ignore[arg-type]  # the stub of Dataset lacks __len__
    # every iterator draws a seed: from this generator, so that dropout does not depend on how often one is made
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
        worker_init_fn=ignore_signals,
    )


def ignore_signals(_worker: int) -> None:
    """Ignore stop signals in a worker.

    Ctrl-C and a closing terminal reach every process; the training process decides whether and when to stop. A worker
    ends when it gets the order, and by itself within seconds when its run has ended.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # a file was truncated: the training process reports it, not torch in other words
    signal.signal(signal.SIGBUS, signal.SIG_DFL)


def end_workers(loader: DataLoader) -> None:
    """End the workers now, however the run ended."""
    iterator, loader._iterator = loader._iterator, None
    if iterator and hasattr(iterator, "_shutdown_workers"):
        with contextlib.suppress(Exception):  # it has already ended
            iterator._shutdown_workers()
