"""The store of the rendezvous: party 0 hosts it, the others connect to it at MASTER_ADDR.

torch's store waits for ever where a program accepts a connection and sends nothing, and for a party 0 that has stopped:
every request here has its own time limit.
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
TOKEN = "rwkv-peft/token"  # the key of a random value that identifies a store
MARGIN = 1.05  # of torch's own time limit, which it keeps in most cases
HEARD = 3.0  # seconds to receive what an unknown program sends
stuck: list[Thread] = []  # threads that had no answer in time


def run_with_timeout(
    work: Callable[[], T], seconds: float, soon: float = 0.0, say: Callable[[], None] | None = None
) -> T:
    """Return what `work` returns, or raise what it raises.

    Args:
        work: runs in a thread, which ends with this process if it does not return in time.
        seconds: the time limit.
        soon: seconds after which `say` is called, if `work` has not ended by then.
        say: logs that this takes a while.

    Raises:
        TimeoutError: if `work` takes longer than `seconds`.
    """
    task = BackgroundTask(work)
    if say:
        task.thread.join(min(soon, seconds))
        if task.thread.is_alive():
            say()
    task.thread.join(seconds - (soon if say else 0))
    if task.thread.is_alive():
        stuck.append(task.thread)
        raise TimeoutError
    return task.result()


@contextlib.contextmanager
def _discard_stderr() -> Iterator[None]:
    # torch writes its own stack there for each try, a page long
    sys.stderr.flush()
    with open(os.devnull, "wb") as null:
        before = os.dup(2)
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def _connect(address: str, port: int, limit: float, hosts: bool = False) -> Store:
    return TCPStore(address, port, None, hosts, timedelta(seconds=limit), wait_for_workers=False)


def open_store(address: str, port: int, limit: float) -> Store:
    """Host the store.

    Args:
        address: where the others will connect.
        port: of the store.
        limit: seconds.

    Raises:
        SettingErrors: if the port is in use, or `address` is not this machine's.
    """
    try:
        with _discard_stderr():
            store = run_with_timeout(lambda: _connect(LOOPBACK, port, limit, True), MARGIN * limit)
    except (RuntimeError, TimeoutError) as error:
        name = re.search(r"name: (E\w+)", str(error))
        words = {
            "EADDRINUSE": "is in use on this machine, by another training or another program. Take another number, on all nodes",
            "EACCES": "may not be used with your rights, as numbers below 1024. Take a larger one, on all nodes",
        }
        reason = str(error).partition("\n")[0] or "no answer"
        message = words.get(
            name[1] if name else "", f"cannot be used here ({reason}). Take another number, on all nodes"
        )
        raise SettingErrors(SettingError("MASTER_PORT", message)) from None
    token = secrets.token_hex(8)
    store.set(TOKEN, token)

    def leads_here() -> bool:
        other = _connect(address, port, limit)
        return other.check([TOKEN]) and other.get(TOKEN).decode() == token

    try:
        with _discard_stderr():
            if run_with_timeout(leads_here, MARGIN * limit):
                return store
        there = f"node 0 of another training answers at {address}, port {port}"
    except (RuntimeError, TimeoutError):
        there = _identify_listener(address, port)[1]
    mismatch = f"does not lead to this machine, but NODE_RANK=0 is the machine of that address: {there}"
    fix = "hostname -I tells the addresses of this machine; NODE_RANK counts the others from 1"
    raise SettingErrors(SettingError("MASTER_ADDR", f"{mismatch}. {fix}"))


def connect_store(address: str, port: int, limit: float, say: Callable[[], None]) -> Store:
    """Connect to the store of party 0.

    Args:
        address: of party 0.
        port: of the store.
        limit: seconds.
        say: is called if this takes a while.

    Raises:
        SettingErrors: if no store answers there.
    """
    try:
        with _discard_stderr():
            return run_with_timeout(lambda: _connect(address, port, limit), MARGIN * limit, limit / 20, say)
    except (RuntimeError, TimeoutError):
        listens, there = _identify_listener(address, port)
    if listens:
        fix = "End it, or take another number, on all nodes; if that machine is not node 0, MASTER_ADDR is wrong"
        raise SettingErrors(SettingError("MASTER_PORT", f"{there}. {fix}"))
    words = (
        f"nobody answers at {address}, port {port} ({there}). Is ./training.sh running on node 0, is this that machine's "
        "address (hostname -I tells it there), and does a firewall let the port through?"
    )
    raise SettingErrors(SettingError("MASTER_ADDR", words))


def _identify_listener(address: str, port: int) -> tuple[bool, str]:
    # whether a program listens at an address where no store answers, and words for that
    listens = f"another program than ./training.sh of node 0 listens at {address}, port {port}:"
    try:
        with socket.create_connection((address, port), HEARD) as connection:
            try:
                connection.sendall(b"\r\n\r\n")  # most protocols answer this
                answer = connection.recv(40)
            except TimeoutError:
                return True, f"{listens} it accepts and says nothing (or node 0 stands still)"
            except OSError:
                answer = b""
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
    if not answer:
        return True, f"{listens} it closes the connection at once"
    words = answer.split(b"\r")[0].decode("ascii", "replace")
    return True, f"{listens} it says {words!r}"
