"""Explain SIGBUS before the process ends.

A program gets SIGBUS when it reads a part of a mapped file that no longer exists, because the file was truncated or its disk
is gone. The system then ends it without a message.

Python's own signal handlers do not help: they wait for the end of the instruction that failed, which fails again and again. So
the handler here is set by the C library. It calls Python from inside that instruction, which is safe for reads by numpy and
torch: their thread either holds Python's lock, or no thread that holds it waits for them.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
from collections.abc import Callable, Iterator

_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


@contextlib.contextmanager
def handle_bus_error(leave: Callable[[], object]) -> Iterator[None]:
    """Handle SIGBUS until the block ends.

    Args:
        leave: reports the reason and ends the process, if it knows the reason. If it returns, the process ends by the
            signal.
    """
    try:
        set_handler = ctypes.CDLL(None).signal
        set_handler.restype, set_handler.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    except (AttributeError, OSError, TypeError):  # the system has no such function
        yield
        return

    first = threading.Lock()

    def handle(number: int) -> None:
        # a second SIGBUS of this thread, in here, ends the process at once: the signal is blocked
        if not first.acquire(blocking=False):
            threading.Event().wait()  # another thread got SIGBUS first and is reporting: ending now would cut it off
        try:
            leave()
        finally:
            set_handler(number, int(signal.SIG_DFL))  # the same instruction now ends the process

    handler = _HANDLER(handle)
    before = set_handler(signal.SIGBUS, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        set_handler(signal.SIGBUS, before)
