"""Before a training on several machines: do all its processes have the same? What the first one has decided, the others hear.

They meet in a store of torch's at MASTER_ADDR, which is closed again before the training itself meets there (reach.py).
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

from .connect import find_store, in_time, open_store
from .launch import ProcessInfo

REACH, PATIENCE = 120.0, 900.0  # seconds to find the first node; to wait for what another does before it begins
LOOK = 0.2  # seconds between two looks
PER_NODE = names_where(TrainConfig, per_node=True)


class Rendezvous:
    """The store in which processes compare what they have before the training begins.

    Attributes:
        me: The number of this party of `count`; 0 has the store.
        called: What to call another party, for messages.
        how: How to start one, for messages.
        lost: The store does not answer any more.
    """

    def __init__(self, store: Store, me: int, count: int, called: str, say: Callable[[str], None], how: str = ""):
        self.store, self.me, self.count, self.called, self.say, self.how = store, me, count, called, say, how
        self.lost = False  # the first one does not answer any more

    def ask(self, does: str, *what: Any) -> Any:
        """What the store of the first one answers. UserError if it does not."""
        try:
            return in_time(lambda: getattr(self.store, does)(*what), REACH)
        except TimeoutError:
            words = (
                f"The first process has not answered for {REACH:.0f} seconds: it, or the network to it, stands still."
            )
        except RuntimeError as error:
            words = f"The first process has ended before all could begin ({str(error).partition(chr(10))[0]})."
        self.lost = True
        raise UserError(words)

    def publish(self, key: str, value: Any) -> None:
        """Set a value for the others."""
        self.ask("set", key, json.dumps(value))

    def wait_for(self, key: str, of: int = 0) -> Any:
        """Return a value that another party has published, or will. Raises UserError if it cannot any more."""
        began, reported = time.monotonic(), False
        while not self.ask("check", [key]):
            if self.ask("check", ["failed"]):
                raise UserError(f"Another process could not begin: {json.loads(self.ask('get', 'failed'))}")
            waited = time.monotonic() - began
            if waited > PATIENCE:
                raise UserError(
                    f"{self.called} {of} has not come within {PATIENCE / 60:.0f} minutes. Is it running there?"
                )
            if waited > REACH / 20 and not reported:
                self.say(f"waiting for {self.called} {of}{self.how.format(of)}")
                reported = True
            time.sleep(LOOK)
        return json.loads(self.ask("get", key))

    def enter(self, patience: float, where: str) -> None:
        """Take part. Problems if this is not the meeting of this one's training. patience: seconds for the first to say so."""
        if self.me == 0:
            self.publish("count", self.count)
        began = time.monotonic()
        while not self.ask("check", ["count"]):
            if time.monotonic() - began > patience:
                words = (
                    f"is used by another training at {where}, not by node 0 of this one before it begins. If that is node 0, "
                    "which trains already, stop all nodes and start them again; else take another number, on all nodes"
                )
                raise SettingErrors(SettingError("MASTER_PORT", words))
            time.sleep(LOOK)
        count = json.loads(self.ask("get", "count"))
        if self.me >= count:
            name = "NNODES" if self.called == "node" else "GPU_COUNT"
            words = f"makes {self.count} {self.called}s here, and {count} on {self.called} 0, which waits for no further one"
            raise SettingErrors(SettingError(name, f"{words}; all need the same"))
        if self.ask("add", f"here/{self.me}", 1) > 1:
            words = f"is {self.me} on two nodes; it counts them, from 0"
            raise SettingErrors(
                SettingError("NODE_RANK", f"{words}. (If this one has started again, start node 0 again, too.)")
            )

    def compare(self, mine: Mapping[str, Any]) -> None:
        """Raise SettingErrors with all that differs from rank 0. Called by all parties."""
        self.publish(f"facts/{self.me}", mine)
        if self.me == 0:
            differences = []
            for other in range(1, self.count):
                theirs = self.wait_for(f"facts/{other}", other)
                for name in (name for name in mine if differ(name, theirs.get(name), mine[name])):
                    values = f"{shown(theirs.get(name))} on {self.called} {other}, and {shown(mine[name])} on {self.called} 0"
                    differences.append([name, f"is {values}; all need the same"])
            self.publish("differences", differences)
        if differences := self.wait_for("differences"):
            raise SettingErrors(*(SettingError(name, message) for name, message in differences))

    def leave(self) -> None:
        """Leave; the first one when all others have, since the store is its."""
        self.ask("add", "gone", 1)
        deadline = time.monotonic() + REACH
        while self.me == 0 and self.ask("add", "gone", 0) < self.count and time.monotonic() < deadline:
            time.sleep(LOOK / 10)
        del self.store


@contextlib.contextmanager
def open_rendezvous(
    place: ProcessInfo, processes: int, address: str, port: int, say: Callable[[str], None]
) -> Iterator[Rendezvous]:
    """Connect to the other parties of a training: all of its processes if a launcher has started them, else one of each node.

    Args:
        place: This process.
        processes: Of the whole training.
        address: Of the store.
        port: Of the store.
        say: Prints a message.

    Raises:
        UserError: they cannot be reached.
    """
    me, count = (place.rank, processes) if place.launcher else (place.node, place.nodes)
    called = "process" if place.launcher else "node"
    hosts = me == 0 and place.launcher != "torchrun"  # which has a store of its own
    where = f"{address}, port {port}"
    if hosts:
        store = open_store(address, port, REACH)
    else:
        store = find_store(address, port, REACH, lambda: say(f"waiting for {called} 0 at {where}"))
    how = f" at {where}: NODE_RANK={{}} ./training.sh there" if called == "node" else ""
    met = Rendezvous(PrefixStore("rwkv-peft", store), me, count, called, say, how)
    # (torchrun's store is there before rank 0 is)
    met.enter(PATIENCE if place.launcher == "torchrun" else REACH / 4, where)
    try:
        yield met
    except (SettingErrors, UserError, OSError, MemoryError, ImportError, KeyboardInterrupt) as error:
        with contextlib.suppress(UserError):
            if not met.lost:
                met.publish(
                    "failed", "it was stopped by Ctrl-C" if isinstance(error, KeyboardInterrupt) else str(error)
                )
                time.sleep(5 * LOOK)  # so that they hear it before the store is gone
        raise
    met.leave()


def differ(name: str, theirs: Any, mine: Any) -> bool:
    """Return whether two processes cannot train together. A run without a name gets the name that rank 0 gives it."""
    return theirs != mine and not (name == "RUN_NAME" and "" in (theirs, mine))


def shown(value: Any) -> str:
    """Return a value for a message."""
    text = str(value)
    return (text if len(text) < 60 else f"{text[:20]}...{hashlib.sha256(text.encode()).hexdigest()[:8]}") or '""'


def facts_of(settings: Mapping[str, Any], base: str, data: Any, state: Any) -> dict[str, Any]:
    """Return what all processes must have alike, by the variable to look at, or another name.

    Args:
        settings: By name.
        base: The SHA-256 of its file.
        data: What identifies the data.
        state: What identifies the saved state that the run resumes from.
    """
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
