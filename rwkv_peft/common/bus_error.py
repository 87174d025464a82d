"""SIGBUS: a program reads a part of a mapped file that is not there any more, because the file was cut or its disk is gone. The
system ends it without a word. Here it says why, first. Floor 0.

Python's own signal handlers do not help: they wait for the instruction that failed, which fails again and again. So this one is
the C library's. It calls Python from that instruction, which is sound for reads by numpy and torch: their thread either holds
Python's lock, or no thread that holds it waits for them.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
from collections.abc import Callable, Iterator

HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


@contextlib.contextmanager
def handled(leave: Callable[[], object]) -> Iterator[None]:
    """leave: says why, and ends the process, if it knows why. If it returns, the process ends as it would have."""
    try:
        set_handler = ctypes.CDLL(None).signal
        set_handler.restype, set_handler.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    except (AttributeError, OSError, TypeError):  # a system without these
        yield
        return

    first = threading.Lock()

    def handle(number: int) -> None:
        # (a second SIGBUS of this thread, in here, ends the process at once: the signal is blocked)
        if not first.acquire(blocking=False):
            threading.Event().wait()  # another thread has met the same and is just saying why: ending now would silence it
        try:
            leave()
        finally:
            set_handler(number, int(signal.SIG_DFL))  # the same instruction now ends the process

    handler = HANDLER(handle)
    before = set_handler(signal.SIGBUS, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        set_handler(signal.SIGBUS, before)
