"""Watchdog: stop the run and report the rank when a process dies or stalls, instead of hanging in a collective operation.

Each process increments its own counter in torch's store from a thread, and reads the counters of the others. A process has
stalled after a number of checks without a new count, not after a time: where all were stopped together (Ctrl-Z), all
continue.
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
STALLED = 90  # checks without a new beat, after which a process has stalled
GONE = 10  # ... where something else already shows that one has ended
# what torch says where another process is not there any more
BROKEN = re.compile(r"gloo|NCCL|[Cc]onnection|[Ss]ocket|ProcessGroup|peer", re.S)
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REASONS = {
    -signal.SIGKILL: "was killed (by the system, if memory ran out: dmesg tells)",
    -signal.SIGTERM: "was told to end",
}


class Watchdog(pl.Callback):
    """Ends the training where a process has died or stalled.

    Args:
        rank: Of this process.
        world: Processes of the training.
        per_node: Processes of a machine.
        parent: The process of this training that has started this one; None for none.
        tidy: What to do before exiting at once.
        log: Prints why the training ends.
        changed: Returns what has become of the run's files, in words.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        per_node: int,
        parent: int | None,
        tidy: Callable[[], None],
        log: Callable[[str], None],
        changed: Callable[[], object] = lambda: None,
    ):
        self.rank, self.world, self.per_node, self.parent = rank, world, per_node, parent
        self.tidy, self.log, self.changed = tidy, log, changed
        self.children: list[subprocess.Popen] = []  # those that we have started ourselves, local rank 1 first
        self.checks, self.done = 0, False
        self.over = threading.Event()
        self.named = threading.Lock()  # who has it says it

    @contextlib.contextmanager
    def instead_of_lightnings(self) -> Iterator[None]:
        """Replace Lightning's observer while this is entered.

        Lightning's ends this process by SIGKILL some seconds after any of those that it has started has ended, whatever
        it is writing.
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
        """Run `work` in a daemon thread."""
        threading.Thread(target=work, name="watch", daemon=True).start()

    def check_children(self) -> None:
        """Check the started processes until the training is over."""
        while not self.over.wait(BEAT):
            self.end_with_child()

    def on_train_start(self, trainer, module) -> None:
        """Begin to count."""
        if self.world == 1:
            return
        self.missed = dict.fromkeys(range(self.world), 0)
        self.beats = dict.fromkeys(range(self.world), 0)
        # (a connection of its own: the training waits on the other one)
        self.store: Store = PrefixStore("watch", _get_default_store().clone())  # type: ignore[attr-defined]  # torch's stub lacks Store.clone
        self.start(self.beat)
        self.start(self.check)

    def on_train_end(self, trainer, module) -> None:
        """Stop."""
        self.done = True
        self.over.set()

    def beat(self) -> None:
        """Count, until the training is over."""
        while not self.over.wait(BEAT):
            self.look()
            self.checks += 1

    def check(self) -> None:
        """Check the other processes until the training is over."""
        before = -1
        while not self.over.wait(BEAT):
            if self.checks == before:  # rank 0 has the store, and does not answer
                self.missed[0] += 1
            before = self.checks
            words = self.still(STALLED)
            if words and not self.over.is_set():
                self.end(words)

    def look(self) -> None:
        """Beat, and see who else has."""
        try:
            self.store.add(f"{self.rank}", 1)
            beats = {rank: self.store.add(f"{rank}", 0) for rank in self.beats}
        except RuntimeError:  # rank 0 has the store
            beats = {**self.beats, self.rank: self.beats[self.rank] + 1}
            self.missed[0] += GONE
        for rank, beat in beats.items():
            self.missed[rank] = 0 if beat != self.beats[rank] else self.missed[rank] + 1
        self.beats = beats

    def end_with_child(self) -> None:
        """End if a process that we have started has ended before its time."""
        for number, child in enumerate(self.children, 1):
            code = child.poll()
            if code and not self.over.is_set():
                if code - 128 in STOPS:  # it got a signal to stop, before it could inform the others
                    self.end("", code)
                if code == EXIT_USER and (words := self.changed()):  # which ends a process that reads what is not there
                    self.end("", code, f"\n{words}")
                self.end(f"{self.name(self.rank + number)} {REASONS.get(code, f'has ended with code {code}')}")

    def still(self, checks: int) -> str:
        """Return which process has stalled, in words; "" for none."""
        late = [rank for rank, missed in self.missed.items() if missed >= checks and rank != self.rank]
        return f"{self.name(late[0])} has not answered for {int(checks * BEAT)} seconds" if late else ""

    def name(self, rank: int) -> str:
        """Return a process in words."""
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
        """Exit at once, and end the processes that this one has started: they wait in the middle of something.

        Args:
            words: About another process.
            code: Exit code.
            why: About something else.
        """
        if not self.named.acquire(blocking=False):
            time.sleep(60)
        self.leave()
        self.tidy()
        if words and (self.rank == 0 or words.startswith(self.name(0))):
            self.log(
                f"\nTraining ends: {words}. ./training.sh again goes on from the last saved state, if there is one."
            )
        if why:
            self.log(why)
        if words.startswith(self.name(0)) and self.rank < self.per_node and self.parent == os.getppid():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.parent, signal.SIGKILL)  # it has stalled
        os._exit(code)

    def leave(self) -> None:
        """Wait for the processes that this one has started, or end them.

        Where the training is done they end by themselves; else they may wait for it in the middle of something.
        """
        self.over.set()
        for child in self.children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GONE if self.done else 0)
            child.kill()
