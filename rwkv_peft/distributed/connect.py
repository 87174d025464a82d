"""The store in which the parties of a training meet: the first one has it, the others find it at MASTER_ADDR.

torch's store waits for ever where a program accepts a connection and says nothing, and for a first party that has stopped:
whatever asks it here has a time limit of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from threading import Thread
from typing import TypeVar

from torch.distributed import Store, TCPStore

from rwkv_peft.common.errors import SettingError, SettingErrors
from rwkv_peft.common.hashing import BackgroundTask

T = TypeVar("T")
LOOPBACK = "127.0.0.1"
TOKEN = "rwkv-peft/token"  # the key of a value that identifies the store of rank 0
LATER = 1.05  # of torch's own limit, which it keeps in most cases
HEARD = 3.0  # seconds to hear what a stranger says
stuck: list[Thread] = []  # threads that had no answer in time


def in_time(work: Callable[[], T], seconds: float, soon: float = 0.0, say: Callable[[], None] | None = None) -> T:
    """Return what `work` returns, or raise what it raises.

    Args:
        work: Runs in a thread, which ends with this process if it takes too long.
        seconds: The time limit.
        soon: Seconds after which `say` is called, if it has not ended by then.
        say: Is called once.

    Raises:
        TimeoutError: it takes longer.
    """
    waiting = BackgroundTask(work)
    if say:
        waiting.thread.join(min(soon, seconds))
        if waiting.thread.is_alive():
            say()
    waiting.thread.join(seconds - (soon if say else 0))
    if waiting.thread.is_alive():
        stuck.append(waiting.thread)
        raise TimeoutError
    return waiting.result()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Without what torch writes on standard error for each try: its own stack, a page long."""
    sys.stderr.flush()
    with open(os.devnull, "wb") as nowhere:
        before = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def connect(address: str, port: int, limit: float, first: bool = False) -> Store:
    """Connect to a store; first: serve it."""
    return TCPStore(address, port, None, first, timedelta(seconds=limit), wait_for_workers=False)


def open_store(address: str, port: int, limit: float) -> Store:
    """The store of the first party, which is this one. Problems where the port is in use, or the others would not find it."""
    try:
        with silence():
            store = in_time(lambda: connect(LOOPBACK, port, limit, True), LATER * limit)
    except (RuntimeError, TimeoutError) as error:
        name = re.search(r"name: (E\w+)", str(error))
        known = {
            "EADDRINUSE": "is in use on this machine, by another training or another program. Take another number, on all nodes",
            "EACCES": "may not be used with your rights, as numbers below 1024. Take a larger one, on all nodes",
        }
        reason = str(error).partition("\n")[0] or "no answer"
        words_of_error = known.get(
            name[1] if name else "", f"cannot be used here ({reason}). Take another number, on all nodes"
        )
        raise SettingErrors(SettingError("MASTER_PORT", words_of_error)) from None
    token = secrets.token_hex(8)
    store.set(TOKEN, token)

    def leads_here() -> bool:
        other = connect(address, port, limit)
        return other.check([TOKEN]) and other.get(TOKEN).decode() == token

    try:
        with silence():
            if in_time(leads_here, LATER * limit):
                return store
        there = f"node 0 of another training answers at {address}, port {port}"
    except (RuntimeError, TimeoutError):
        there = who_is_there(address, port)[1]
    words = f"does not lead to this machine, but NODE_RANK=0 is the machine of that address: {there}"
    advice = "hostname -I tells the addresses of this machine; NODE_RANK counts the others from 1"
    raise SettingErrors(SettingError("MASTER_ADDR", f"{words}. {advice}"))


def find_store(address: str, port: int, limit: float, say: Callable[[], None]) -> Store:
    """The store of the first party, on another machine. Problems where it is not found. say: is called if that takes a while."""
    try:
        with silence():
            return in_time(lambda: connect(address, port, limit), LATER * limit, limit / 20, say)
    except (RuntimeError, TimeoutError):
        listens, there = who_is_there(address, port)
    if listens:
        advice = "End it, or take another number, on all nodes; if that machine is not node 0, MASTER_ADDR is wrong"
        raise SettingErrors(SettingError("MASTER_PORT", f"{there}. {advice}"))
    words = (
        f"nobody answers at {address}, port {port} ({there}). Is ./training.sh running on node 0, is this that machine's "
        "address (hostname -I tells it there), and does a firewall let the port through?"
    )
    raise SettingErrors(SettingError("MASTER_ADDR", words))


def who_is_there(address: str, port: int) -> tuple[bool, str]:
    """Whether a program listens at an address that is no first party's, and words for that."""
    listens = f"another program than ./training.sh of node 0 listens at {address}, port {port}:"
    try:
        with socket.create_connection((address, port), HEARD) as line:
            try:
                line.sendall(b"\r\n\r\n")  # what asks for an answer in most languages
                said = line.recv(40)
            except TimeoutError:
                return True, f"{listens} it accepts and says nothing (or node 0 stands still)"
            except OSError:
                said = b""
    except (socket.gaierror, UnicodeError):
        return False, "no machine of this name is known here"
    except ConnectionResetError:
        return True, f"{listens} it closes the connection at once"
    except ConnectionRefusedError:
        return False, "nothing listens there"
    except TimeoutError:
        return False, "no answer to a connection"
    except OSError as error:
        return False, f"{error.strerror or error}"
    if not said:
        return True, f"{listens} it closes the connection at once"
    words = said.split(b"\r")[0].decode("ascii", "replace")
    return True, f"{listens} it says {words!r}"
