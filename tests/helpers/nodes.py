"""Several nodes that meet, as threads of this process."""

from __future__ import annotations

import socket
import threading

from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.distributed import launch, rendezvous


def free_port() -> int:
    with socket.socket() as result:
        result.bind(("127.0.0.1", 0))
        return result.getsockname()[1]


def parties(*does, address="127.0.0.1", ports=None, also=UserError):
    """What each of several nodes that meet has to say in the end: what it did, or the error. ports: gets the port. also: an
    error that is expected beside those of users."""
    port, said = free_port(), [None] * len(does)
    if ports is not None:
        ports.append(port)

    def one(node: int) -> None:
        try:
            where = launch.ProcessInfo(node, 0, node, len(does))
            with rendezvous.open_rendezvous(where, len(does), address, port, lambda _: None) as met:
                said[node] = does[node](met)
        except (SettingErrors, UserError, also) as error:
            said[node] = str(error)

    threads = [threading.Thread(target=one, args=(node,)) for node in range(len(does))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return said
