"""Blocks of rows -> encoded blocks in the same order, on one core or on many; the bytes are the same."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from rwkv_peft.common.errors import UserError

from .pipeline import EncodeConfig, EncodedBlock, RowEncoder
from .reader import Block

SHARE = 16 << 20  # bytes that are worth a further process: starting one takes about a second
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
AHEAD = 3  # blocks per worker that may wait, so that none is idle and memory stays small


def number_of_workers(wanted: int | str, size: int) -> int:
    """WORKERS, with auto resolved: every core, as far as there is work for it. size: bytes to read."""
    if isinstance(wanted, int):
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, size // SHARE))


def encoded_blocks(blocks: Iterable[Block], recipe: EncodeConfig, workers: int) -> Iterator[EncodedBlock]:
    """Encode every block, in their order."""
    if workers == 1:
        encoder = RowEncoder(recipe)
        with no_garbage_hunts():
            yield from map(encoder.block, blocks)
        return
    # children of fork share what is loaded already, the vocabulary above all: 230 MB and a second for each otherwise. They are
    # started before anything is read, when no library has started threads that a child would wait for without end
    global ENCODER
    if sys.platform == "linux":
        ENCODER = load(recipe)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, prepare, (recipe,))
    waiting: deque = deque()
    try:
        pool.submit(int).result()
        for block in blocks:
            waiting.append(pool.submit(encode_block, block))
            if len(waiting) >= AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "A worker was ended from outside, most likely because the memory was full. WORKERS=1 needs the least."
        ) from None
    finally:
        impatient = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would find the pool half shut
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGINT, impatient)
        ENCODER = None


class no_garbage_hunts:  # noqa: N801 - reads as what it does
    """Without the collector of reference cycles: rows make none, and looking for them costs a tenth of the time."""

    def __enter__(self) -> None:
        self.was_on = gc.isenabled()
        gc.disable()

    def __exit__(self, *_exception) -> None:
        if self.was_on:
            gc.enable()


ENCODER: RowEncoder | None = None  # of this worker


def load(recipe: EncodeConfig) -> RowEncoder:
    """A encoder with all that it needs in memory."""
    encoder = RowEncoder(recipe)
    encoder.block(Block("", 0, [(0, {"text": "User: Hi\n\nAssistant: Hello"})], 0))
    return encoder


def prepare(recipe: EncodeConfig) -> None:
    """A worker begins. Ctrl-C is for the parent, which ends the workers."""
    global ENCODER
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":  # a worker does not outlive its parent, however that ends
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    gc.disable()
    ENCODER = ENCODER if ENCODER and ENCODER.recipe == recipe else load(recipe)


def encode_block(block: Block) -> EncodedBlock:
    """Encode a block in a worker."""
    assert ENCODER, "prepare has run in this worker"
    return ENCODER.block(block)
