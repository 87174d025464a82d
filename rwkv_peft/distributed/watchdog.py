"""Watchdog: stops the run and reports the rank when a process dies or stalls, instead of hanging in a collective.

Each process increments a counter of its own in the store of the process group, from a thread, and reads those of the others.
Time is measured by the number of reads, not by a clock: where all processes were suspended together (Ctrl-Z), all resume.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable

import pytorch_lightning as pl
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from rwkv_peft.common.errors import EXIT_PROCESS, EXIT_USER

from .lightning_private import child_process_observer

BEAT = 1.0  # seconds between two beats
STALLED = 90  # reads without a new beat, after which a process counts as stalled
GONE = 10  # ... where an error has shown already that one is gone
# errors of torch where another process is gone
BROKEN = re.compile(r"gloo|NCCL|[Cc]onnection|[Ss]ocket|ProcessGroup|peer", re.S)
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REASONS = {  # of an exit code, for messages
    -signal.SIGKILL: "was killed (by the system, if memory ran out: dmesg tells)",
    -signal.SIGTERM: "was told to end",
}


class Watchdog(pl.Callback):
    """Ends this process, and those that it has started, when another process of the run is gone.

    Args:
        rank: of this process.
        world: number of processes.
        per_node: processes of a machine.
        parent: the process of the kit that has started this one, None if another launcher has.
        tidy: cleans up before this process ends at once.
        log: reports why the run ends.
        changed: describes a change of the run's files, if there was one.
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
        self.tidy, self.report, self.changed = tidy, log, changed  # (Lightning sets `log` of its callbacks)
        self.children: list[subprocess.Popen] = []  # started by this process, local rank 1 first
        self.reads, self.done = 0, False
        self.over = threading.Event()
        self.reporting = threading.Lock()  # the thread that has it reports

    def replacing_lightnings_observer(self) -> contextlib.AbstractContextManager[object]:
        """Replace Lightning's observer of started processes, which ends this process even in the middle of a write."""
        return child_process_observer(self.observe)

    def observe(self, child_processes: list[subprocess.Popen]) -> None:
        """Watch started processes from their start on."""
        self.children = child_processes
        self.start(self.check_children)

    def start(self, work: Callable[[], None]) -> None:
        """Run `work` in a thread that ends with this process."""
        threading.Thread(target=work, name="watch", daemon=True).start()

    def check_children(self) -> None:
        """End this process when one that it has started has ended too early."""
        while not self.over.wait(BEAT):
            self.end_with_child()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin to watch the other processes."""
        if self.world == 1:
            return
        self.missed = dict.fromkeys(range(self.world), 0)
        self.beats = dict.fromkeys(range(self.world), 0)
        # a connection of its own, because the run waits on the other one
        connection = _get_default_store().clone()  # type: ignore[attr-defined]  # torch's stub lacks it
        self.store: Store = PrefixStore("watch", connection)
        self.start(self.beat)
        self.start(self.check)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stop watching."""
        self.done = True
        self.over.set()

    def beat(self) -> None:
        """Exchange beats until the run ends."""
        while not self.over.wait(BEAT):
            self.exchange_beats()
            self.reads += 1

    def check(self) -> None:
        """End this process when another one has stalled."""
        before = -1
        while not self.over.wait(BEAT):
            if self.reads == before:  # rank 0 hosts the store, and does not answer
                self.missed[0] += 1
            before = self.reads
            words = self.describe_stalled(STALLED)
            if words and not self.over.is_set():
                self.end(words)

    def exchange_beats(self) -> None:
        """Increment this process's counter, and read those of the others."""
        try:
            self.store.add(f"{self.rank}", 1)
            beats = {rank: self.store.add(f"{rank}", 0) for rank in self.beats}
        except RuntimeError:  # rank 0 hosts the store
            beats = {**self.beats, self.rank: self.beats[self.rank] + 1}
            self.missed[0] += GONE
        for rank, beat in beats.items():
            self.missed[rank] = 0 if beat != self.beats[rank] else self.missed[rank] + 1
        self.beats = beats

    def end_with_child(self) -> None:
        """End this process if one that it has started has ended too early."""
        for number, child in enumerate(self.children, 1):
            code = child.poll()
            if code and not self.over.is_set():
                if code - 128 in STOPS:  # it got a signal, and ended before the processes agreed on it
                    self.end("", code)
                # a changed file ends a process that reads what is not there
                if code == EXIT_USER and (words := self.changed()):
                    self.end("", code, f"\n{words}")
                self.end(f"{self.name(self.rank + number)} {REASONS.get(code, f'has ended with code {code}')}")

    def describe_stalled(self, reads: int) -> str:
        """Describe a process without a new beat in so many reads, "" if there is none."""
        late = [rank for rank, missed in self.missed.items() if missed >= reads and rank != self.rank]
        return f"{self.name(late[0])} has not answered for {int(reads * BEAT)} seconds" if late else ""

    def name(self, rank: int) -> str:
        """Return the name of a process for messages."""
        node = f"node {rank // self.per_node}, " if self.world > self.per_node else ""
        return f"process {rank} ({node}GPU {rank % self.per_node})"

    def caused(self, error: Exception) -> bool:
        """End this process with the name of the one that is gone, if an error of torch is because of that.

        Returns:
            False if the error has another cause, or the process cannot be identified.
        """
        if not hasattr(self, "store") or not BROKEN.search(str(error)):
            return False
        for _ in range(GONE + 2):
            self.exchange_beats()
            self.end_with_child()
            if words := self.describe_stalled(GONE):
                self.end(words)
            time.sleep(BEAT)
        return False

    def end(self, words: str, code: int = EXIT_PROCESS, why: str = "") -> None:
        """End this process and those that it has started at once: they wait in a collective.

        Args:
            words: what has become of another process, beginning with its name; "" if the cause is something else.
            code: the exit code.
            why: what to report of another cause.
        """
        if not self.reporting.acquire(blocking=False):
            time.sleep(60)
        self.leave()
        self.tidy()
        if words and (self.rank == 0 or words.startswith(self.name(0))):
            self.report(
                f"\nTraining ends: {words}. ./training.sh again goes on from the last saved state, if there is one."
            )
        if why:
            self.report(why)
        if words.startswith(self.name(0)) and self.rank < self.per_node and self.parent == os.getppid():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.parent, signal.SIGKILL)  # it has stalled
        os._exit(code)

    def leave(self) -> None:
        """End the processes that this one has started.

        Where the run is done, they end by themselves within GONE seconds; else they may wait for this one in a collective.
        """
        self.over.set()
        for child in self.children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GONE if self.done else 0)
            child.kill()
