"""Rendezvous before a run of several launchers: compares settings and files, and distributes what rank 0 has decided.

It uses a store of torch's at MASTER_ADDR (connect.py), which is closed before the process group of the run opens its own there.
A party is a process, or a node whose other processes the kit starts itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.distributed import PrefixStore, Store

from rwkv_peft.common.errors import SettingError, SettingErrors, UserError
from rwkv_peft.common.paths import PACKAGE
from rwkv_peft.config.shell import names_where
from rwkv_peft.config.train import TrainConfig

from .connect import connect_store, open_store, run_with_timeout
from .launch import ProcessInfo

REACH, PATIENCE = 120.0, 900.0  # seconds to connect to party 0; to wait for what another party does before it begins
POLL = 0.2  # seconds
PER_NODE = names_where(TrainConfig, per_node=True)


class Rendezvous:
    """The parties of a run, by their common store.

    Args:
        store: hosted by party 0.
        rank: number of this party, from 0.
        count: number of parties.
        called: what messages call a party: node or process.
        say: logs what is waited for.
        how: how to start a party, with {} for its number.
    """

    def __init__(self, store: Store, rank: int, count: int, called: str, say: Callable[[str], None], how: str = ""):
        self.store, self.rank, self.count, self.called, self.say, self.how = store, rank, count, called, say, how
        self.lost = False  # party 0 does not answer any more

    def request(self, method: str, *arguments: Any) -> Any:
        """Call a method of the store.

        Raises:
            UserError: if party 0 does not answer.
        """
        try:
            return run_with_timeout(lambda: getattr(self.store, method)(*arguments), REACH)
        except TimeoutError:
            words = (
                f"The first process has not answered for {REACH:.0f} seconds: it, or the network to it, stands still."
            )
        except RuntimeError as error:
            words = f"The first process has ended before all could begin ({str(error).partition(chr(10))[0]})."
        self.lost = True
        raise UserError(words)

    def publish(self, key: str, value: Any) -> None:
        """Publish a value that JSON can hold."""
        self.request("set", key, json.dumps(value))

    def wait_for(self, key: str, of: int = 0) -> Any:
        """Return the value that a party publishes, once it has.

        Args:
            key: of the value.
            of: the party, for messages.

        Raises:
            UserError: if a party could not begin, or does not publish it within PATIENCE.
        """
        began, announced = time.monotonic(), False
        while not self.request("check", [key]):
            if self.request("check", ["failed"]):
                raise UserError(f"Another process could not begin: {json.loads(self.request('get', 'failed'))}")
            waited = time.monotonic() - began
            if waited > PATIENCE:
                raise UserError(
                    f"{self.called} {of} has not come within {PATIENCE / 60:.0f} minutes. Is it running there?"
                )
            if waited > REACH / 20 and not announced:
                self.say(f"waiting for {self.called} {of}{self.how.format(of)}")
                announced = True
            time.sleep(POLL)
        return json.loads(self.request("get", key))

    def enter(self, patience: float, where: str) -> None:
        """Take part.

        Args:
            patience: seconds in which party 0 has to open the rendezvous.
            where: address and port, for messages.

        Raises:
            SettingErrors: if the store is another run's, or the numbers of parties differ.
        """
        if self.rank == 0:
            self.publish("count", self.count)
        began = time.monotonic()
        while not self.request("check", ["count"]):
            if time.monotonic() - began > patience:
                words = (
                    f"is used by another training at {where}, not by node 0 of this one before it begins. If that is node 0, "
                    "which trains already, stop all nodes and start them again; else take another number, on all nodes"
                )
                raise SettingErrors(SettingError("MASTER_PORT", words))
            time.sleep(POLL)
        count = json.loads(self.request("get", "count"))
        if self.rank >= count:
            name = "NNODES" if self.called == "node" else "GPU_COUNT"
            words = f"makes {self.count} {self.called}s here, and {count} on {self.called} 0, which waits for no further one"
            raise SettingErrors(SettingError(name, f"{words}; all need the same"))
        if self.request("add", f"here/{self.rank}", 1) > 1:
            words = f"is {self.rank} on two nodes; it counts them, from 0"
            raise SettingErrors(
                SettingError("NODE_RANK", f"{words}. (If this one has started again, start node 0 again, too.)")
            )

    def compare(self, mine: Mapping[str, Any]) -> None:
        """Compare facts with those of party 0. To be called by all.

        Args:
            mine: of this party, by the setting to look at, or another name.

        Raises:
            SettingErrors: with all facts in which a party differs from party 0.
        """
        self.publish(f"facts/{self.rank}", mine)
        if self.rank == 0:
            differing = []
            for other in range(1, self.count):
                theirs = self.wait_for(f"facts/{other}", other)
                for name in (name for name in mine if _differs(name, theirs.get(name), mine[name])):
                    values = (
                        f"{_shorten(theirs.get(name))} on {self.called} {other}, "
                        f"and {_shorten(mine[name])} on {self.called} 0"
                    )
                    differing.append([name, f"is {values}; all need the same"])
            self.publish("differences", differing)
        if differences := self.wait_for("differences"):
            raise SettingErrors(*(SettingError(name, message) for name, message in differences))

    def leave(self) -> None:
        """Leave the rendezvous. Party 0 waits for all others, since it hosts the store."""
        self.request("add", "gone", 1)
        deadline = time.monotonic() + REACH
        while self.rank == 0 and self.request("add", "gone", 0) < self.count and time.monotonic() < deadline:
            time.sleep(POLL / 10)
        del self.store


@contextlib.contextmanager
def open_rendezvous(
    place: ProcessInfo, processes: int, address: str, port: int, say: Callable[[str], None]
) -> Iterator[Rendezvous]:
    """Meet the other parties of a run: all its processes if torchrun or srun started them, else one process of each node.

    Args:
        place: of this process.
        processes: of the whole run.
        address: of party 0.
        port: of the store.
        say: logs what is waited for.

    Raises:
        SettingErrors: if the address or the port is wrong.
        UserError: if the parties cannot be reached.
    """
    rank, count = (place.rank, processes) if place.launcher else (place.node, place.nodes)
    called = "process" if place.launcher else "node"
    hosts = rank == 0 and place.launcher != "torchrun"  # torchrun hosts a store itself
    where = f"{address}, port {port}"
    if hosts:
        store = open_store(address, port, REACH)
    else:
        store = connect_store(address, port, REACH, lambda: say(f"waiting for {called} 0 at {where}"))
    how = f" at {where}: NODE_RANK={{}} ./training.sh there" if called == "node" else ""
    met = Rendezvous(PrefixStore("rwkv-peft", store), rank, count, called, say, how)
    # torchrun's store exists before party 0 does
    met.enter(PATIENCE if place.launcher == "torchrun" else REACH / 4, where)
    try:
        yield met
    except (SettingErrors, UserError, OSError, MemoryError, ImportError, KeyboardInterrupt) as error:
        with contextlib.suppress(UserError):
            if not met.lost:
                met.publish(
                    "failed", "it was stopped by Ctrl-C" if isinstance(error, KeyboardInterrupt) else str(error)
                )
                time.sleep(5 * POLL)  # so that they read it before the store is gone
        raise
    met.leave()


def _differs(name: str, theirs: Any, mine: Any) -> bool:
    # (a run without a name gets the one that rank 0 chooses)
    return theirs != mine and not (name == "RUN_NAME" and "" in (theirs, mine))


def _shorten(value: Any) -> str:
    text = str(value)
    return (text if len(text) < 60 else f"{text[:20]}...{hashlib.sha256(text.encode()).hexdigest()[:8]}") or '""'


def facts_of(settings: Mapping[str, Any], base: str, data: Any, state: Any) -> dict[str, Any]:
    """Return what must be the same in all processes, by the setting to look at, or another name.

    Args:
        settings: all, by name.
        base: the sha256 of the base model's file.
        data: identifies the data; JSON can hold it.
        state: identifies the train state that the run resumes from; JSON can hold it.
    """
    # here: this module is imported before a run is known to need torch's and Lightning's seconds
    import pytorch_lightning
    import torch

    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(file.relative_to(PACKAGE).as_posix().encode() + file.read_bytes())
    versions = f"torch {torch.__version__.partition('+')[0]}, lightning {pytorch_lightning.__version__}"
    return {
        "the kit's code": digest.hexdigest()[:12],
        "versions": f"{versions}, Python {'.'.join(platform.python_version_tuple()[:2])}",
        **{name: value for name, value in settings.items() if name not in PER_NODE},
        "MODEL_PATH": f"a file of sha256 {base[:12]}",
        "DATA_PATH": hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12],
        "the state": hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:12],
    }
