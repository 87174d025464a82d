"""Before a training on several machines: do all its processes have the same? What the first one has decided, the others hear.

They meet in a store of torch's at MASTER_ADDR, which is closed again before the training itself meets there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore

from ..errors import Problem, Problems, UserError
from ..words import first_line
from .place import Place

REACH, PATIENCE = 120.0, 900.0  # seconds to find the first node; to wait for what another does before it begins
LOOK = 0.2  # seconds between two looks
CODE = Path(__file__).resolve().parent.parent  # what computes
# settings that may differ: where things lie on a machine, and how it is reached; files are compared by what is in them
OWN = {
    "NODE_RANK", "RUN_NAME", "MASTER_ADDR", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "MODEL_PATH", "DATA_PATH", "VAL_DATA",
    "NUM_WORKERS", "EMB_ON_CPU",
}  # fmt: skip


class Meeting:
    """me: the number of this party of `count`; 0 is the first. called: what to call another; how: to start one."""

    def __init__(self, store: Store, me: int, count: int, called: str, say: Callable[[str], None], how: str = ""):
        self.store, self.me, self.count, self.called, self.say, self.how = store, me, count, called, say, how

    def tell(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def hear(self, key: str, of: int = 0) -> Any:
        """What another has told, or will. UserError if it cannot any more."""
        began, told = time.monotonic(), False
        try:
            while not self.store.check([key]):
                if self.store.check(["failed"]):
                    raise UserError(f"Another process could not begin: {json.loads(self.store.get('failed'))}")
                waited = time.monotonic() - began
                if waited > PATIENCE:
                    raise UserError(
                        f"{self.called} {of} has not come within {PATIENCE / 60:.0f} minutes. Is it running there?"
                    )
                if waited > REACH / 20 and not told:
                    self.say(f"waiting for {self.called} {of}{self.how.format(of)}")
                    told = True
                time.sleep(LOOK)
            return json.loads(self.store.get(key))
        except RuntimeError as error:
            why = first_line(error)
            raise UserError(f"The first process has ended before all could begin ({why}).") from None

    def compare(self, mine: Mapping[str, Any]) -> None:
        """Problems with all that differs from what the first process has. To be called by all."""
        self.tell(f"facts/{self.me}", mine)
        if self.me == 0:
            found = []
            for other in range(1, self.count):
                theirs = self.hear(f"facts/{other}", other)
                for name in (name for name in mine if theirs.get(name) != mine[name]):
                    values = f"{shown(theirs.get(name))} on {self.called} {other}, and {shown(mine[name])} on {self.called} 0"
                    found.append([name, f"is {values}; all need the same"])
            self.tell("differences", found)
        if differences := self.hear("differences"):
            raise Problems(*(Problem(name, message) for name, message in differences))

    def part(self) -> None:
        """Leave; the first one when all others have, since the store is its."""
        self.store.add("gone", 1)
        deadline = time.monotonic() + REACH
        while self.me == 0 and self.store.add("gone", 0) < self.count and time.monotonic() < deadline:
            time.sleep(LOOK / 10)
        del self.store


@contextlib.contextmanager
def meeting(place: Place, processes: int, address: str, port: int, say: Callable[[str], None]) -> Iterator[Meeting]:
    """With the other parties of a training: all of its processes if somebody else has started them, else one of each node.
    processes: of the whole training. UserError if they cannot be reached."""
    me, count = (place.rank, processes) if place.starter else (place.node, place.nodes)
    called = "process" if place.starter else "node"
    hosts = me == 0 and place.starter != "torchrun"  # which has a store of its own
    try:
        store = TCPStore(address, port, None, hosts, timedelta(seconds=REACH), wait_for_workers=False)
    except RuntimeError as error:
        reason = first_line(error)
        if hosts:
            words = f"cannot be used here ({reason}); is another training running? Take another number, on all nodes"
            raise Problems(Problem("MASTER_PORT", words)) from None
        words = (
            f"nobody answers at {address}, port {port}. Is ./training.sh running on node 0, is this that machine's address "
            "(hostname -I tells it there), and does a firewall let the port through?"
        )
        raise Problems(Problem("MASTER_ADDR", words)) from None
    how = f" at {address}, port {port}: NODE_RANK={{}} ./training.sh there" if called == "node" else ""
    met = Meeting(PrefixStore("rwkv-peft", store), me, count, called, say, how)
    if met.store.add(f"here/{me}", 1) > 1:
        raise Problems(Problem("NODE_RANK", f"is {me} on two nodes; it counts them, from 0"))
    try:
        yield met
    except (Problems, UserError, OSError) as error:
        with contextlib.suppress(RuntimeError):
            met.tell("failed", str(error))
            time.sleep(5 * LOOK)  # so that they hear it before the store is gone
        raise
    met.part()


def shown(value: Any) -> str:
    text = str(value)
    return (text if len(text) < 60 else f"{text[:20]}...{hashlib.sha256(text.encode()).hexdigest()[:8]}") or '""'


def facts_of(settings: Mapping[str, Any], base: str, data: Any, state: Any) -> dict[str, Any]:
    """What all processes must have alike, by the variable to look at, or another name. base: the sha256 of its file. data: what
    identifies the data. state: the same of the saved state that the run goes on from."""
    import pytorch_lightning
    import torch

    digest = hashlib.sha256()
    for file in sorted(CODE.rglob("*.py")):
        digest.update(file.relative_to(CODE).as_posix().encode() + file.read_bytes())
    versions = f"torch {torch.__version__.partition('+')[0]}, lightning {pytorch_lightning.__version__}"
    return {
        "the kit's code": digest.hexdigest()[:12],
        "versions": f"{versions}, Python {'.'.join(platform.python_version_tuple()[:2])}",
        **{name: value for name, value in settings.items() if name not in OWN},
        "MODEL_PATH": f"a file of sha256 {base[:12]}",
        "DATA_PATH": hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12],
        "the state": hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:12],
    }
