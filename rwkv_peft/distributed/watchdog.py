"""A process of a training that has died or stands still is named, and ends the training: the others would wait for it for ever.

Each process counts up a number of its own in the store in which they met, from a thread, and looks at the numbers of the others.
What stands still is told by the looks of who looks, not by a clock: where all were stopped together (Ctrl-Z), all go on.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytorch_lightning as pl
from pytorch_lightning.strategies.launchers import subprocess_script
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from rwkv_peft.common.errors import EXIT_PROCESS, EXIT_USER

BEAT = 1.0  # seconds between two beats
STILL = 90  # looks without a new beat, after which a process stands still
GONE = 10  # ... where something else says already that one has gone
# what torch says where another process is not there any more
BROKEN = re.compile(r"gloo|NCCL|[Cc]onnection|[Ss]ocket|ProcessGroup|peer", re.S)
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REASONS = {
    -signal.SIGKILL: "was killed (by the system, if memory ran out: dmesg tells)",
    -signal.SIGTERM: "was told to end",
}


class Watchdog(pl.Callback):
    """rank: of this process, of `world`; per_node: processes of a machine. parent: the process of ours that has started this one,
    None for none. tidy: what to do before leaving at once. tell: says why the training ends. changed: what has become of the
    run's files, in words.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        per_node: int,
        parent: int | None,
        tidy: Callable[[], None],
        tell: Callable[[str], None],
        changed: Callable[[], object] = lambda: None,
    ):
        self.rank, self.world, self.per_node, self.parent = rank, world, per_node, parent
        self.tidy, self.tell, self.changed = tidy, tell, changed
        self.children: list[subprocess.Popen] = []  # those that we have started ourselves, local rank 1 first
        self.looks, self.done = 0, False
        self.over = threading.Event()
        self.named = threading.Lock()  # who has it says it

    @contextlib.contextmanager
    def instead_of_lightnings(self) -> Iterator[None]:
        """Take the place of Lightning's observer, which ends this process by SIGKILL some seconds after any of those that it has
        started has ended, whatever it is just writing.
        """
        theirs, subprocess_script._launch_process_observer = subprocess_script._launch_process_observer, self.observe
        try:
            yield
        finally:
            subprocess_script._launch_process_observer = theirs

    def observe(self, child_processes: list[subprocess.Popen]) -> None:
        """Look after processes from their start on."""
        self.children = child_processes
        self.start(self.check_children)

    def start(self, work: Callable[[], None]) -> None:
        threading.Thread(target=work, name="watch", daemon=True).start()

    def check_children(self) -> None:
        while not self.over.wait(BEAT):
            self.end_with_child()

    def on_train_start(self, trainer, module) -> None:
        if self.world == 1:
            return
        self.missed = dict.fromkeys(range(self.world), 0)
        self.beats = dict.fromkeys(range(self.world), 0)
        # (a connection of its own: the training waits on the other one)
        self.store: Store = PrefixStore("watch", _get_default_store().clone())
        self.start(self.beat)
        self.start(self.check)

    def on_train_end(self, trainer, module) -> None:
        self.done = True
        self.over.set()

    def beat(self) -> None:
        while not self.over.wait(BEAT):
            self.look()
            self.looks += 1

    def check(self) -> None:
        before = -1
        while not self.over.wait(BEAT):
            if self.looks == before:  # the first process has the store, and does not answer
                self.missed[0] += 1
            before = self.looks
            words = self.still(STILL)
            if words and not self.over.is_set():
                self.end(words)

    def look(self) -> None:
        """Beat, and see who else has."""
        try:
            self.store.add(f"{self.rank}", 1)
            found = {rank: self.store.add(f"{rank}", 0) for rank in self.beats}
        except RuntimeError:  # the first process has the store
            found = {**self.beats, self.rank: self.beats[self.rank] + 1}
            self.missed[0] += GONE
        for rank, beat in found.items():
            self.missed[rank] = 0 if beat != self.beats[rank] else self.missed[rank] + 1
        self.beats = found

    def end_with_child(self) -> None:
        """End if a process that we have started has ended before its time."""
        for number, child in enumerate(self.children, 1):
            code = child.poll()
            if code and not self.over.is_set():
                if code - 128 in STOPS:  # it was told to stop, before it could tell the others
                    self.end("", code)
                if code == EXIT_USER and (words := self.changed()):  # which ends a process that reads what is not there
                    self.end("", code, f"\n{words}")
                self.end(f"{self.name(self.rank + number)} {REASONS.get(code, f'has ended with code {code}')}")

    def still(self, looks: int) -> str:
        late = [rank for rank, missed in self.missed.items() if missed >= looks and rank != self.rank]
        return f"{self.name(late[0])} has not answered for {int(looks * BEAT)} seconds" if late else ""

    def name(self, rank: int) -> str:
        node = f"node {rank // self.per_node}, " if self.world > self.per_node else ""
        return f"process {rank} ({node}GPU {rank % self.per_node})"

    def caused(self, error: Exception) -> bool:
        """Whether an error is because another process is not there; then ends the training with its name, if it can be found."""
        if not hasattr(self, "store") or not BROKEN.search(str(error)):
            return False
        for _ in range(GONE + 2):
            self.look()
            self.end_with_child()
            if words := self.still(GONE):
                self.end(words)
            time.sleep(BEAT)
        return False

    def end(self, words: str, code: int = EXIT_PROCESS, why: str = "") -> None:
        """Leave at once, and let nobody of ours stay: they wait in the middle of something. words: about another process; why:
        about something else.
        """
        if not self.named.acquire(blocking=False):
            time.sleep(60)
        self.leave()
        self.tidy()
        if words and (self.rank == 0 or words.startswith(self.name(0))):
            self.tell(
                f"\nTraining ends: {words}. ./training.sh again goes on from the last saved state, if there is one."
            )
        if why:
            self.tell(why)
        if words.startswith(self.name(0)) and self.rank < self.per_node and self.parent == os.getppid():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.parent, signal.SIGKILL)  # it stands still
        os._exit(code)

    def leave(self) -> None:
        """Where this process ends, those that it has started have ended: by themselves where the training is done, else they may
        wait for it in the middle of something.
        """
        self.over.set()
        for child in self.children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GONE if self.done else 0)
            child.kill()
