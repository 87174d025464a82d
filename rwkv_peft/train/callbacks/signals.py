"""Ctrl-C and other signals: stop between two micro-batches, on all ranks at once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

import pytorch_lightning as pl
import torch

from rwkv_peft.train.run_files import RunFiles

STOPPING = b"\nStopping after this batch and saving. Ctrl-C again leaves at once, without saving.\n"
LEFT_WITH = b"\nLeft at once. Checkpoints that were saved before are whole.\n"
LEFT_WITHOUT = b"\nLeft at once. Nothing had been saved yet: ./training.sh begins anew.\n"


class GracefulStop(pl.Callback):
    """Ctrl-C, SIGTERM or a closed terminal: finish the micro-batch, save, exit. A second Ctrl-C exits at once.

    A signal that the parent process has set to be ignored (nohup) stays ignored.

    Args:
        clean_up: is called before an exit at once.
        is_main: this process prints what it does.
        has_saved: whether anything was saved.
        files: files of the run. Where one has changed, nothing more is saved.

    Attributes:
        received: number of the signal, 0 for none.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(
        self,
        clean_up: Callable[[], None] = lambda: None,
        is_main: bool = True,
        has_saved: Callable[[], bool] = lambda: True,
        files: RunFiles | None = None,
    ):
        self.clean_up, self.received, self.is_main, self.has_saved, self.files = clean_up, 0, is_main, has_saved, files

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals, from before the trainer's preparations until its end."""
        before = {n: signal.getsignal(n) for n in self.SIGNALS}
        self.heard = [n for n, handler in before.items() if handler is not signal.SIG_IGN]
        self._listen()
        try:
            yield
        finally:
            for number in self.heard:
                signal.signal(number, before[number])

    def _listen(self) -> None:
        for number in self.heard:
            signal.signal(number, self.receive)

    def on_train_start(self, trainer, module) -> None:
        """Handle signals again."""
        self._listen()  # Lightning has replaced the handlers by now

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.received == number == signal.SIGINT:
            self.clean_up()
            self._write(LEFT_WITH if self.has_saved() else LEFT_WITHOUT)
            os._exit(128 + number)
        already, self.received = self.received, number
        if already:  # a terminal that closes sends it twice: by the kernel and by the shell
            return
        self._write(STOPPING)

    def _write(self, message: bytes) -> None:
        # a signal handler must not wait for locks that the main program may have taken: write, do not print
        if self.is_main:
            with contextlib.suppress(OSError):  # the terminal may be closed
                os.write(2, message)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        """Stop the training where any rank has received a signal."""
        trainer.should_stop = self.agree(trainer) or trainer.should_stop

    def agree(self, trainer: pl.Trainer) -> bool:
        """Return whether any rank has received a signal; then all ranks stop. All ranks must call it.

        Raises:
            FileChanged: on all ranks, where a file of one of them has changed.
        """
        received, changed = self.received, self.files is not None and self.files.changed
        if trainer.world_size > 1:
            states = torch.tensor([received, int(changed)], device=trainer.strategy.root_device)
            received, changed = trainer.strategy.reduce(states, reduce_op="max").tolist()
            if received and not self.received:  # another rank has received it
                self.received = received
                self._write(STOPPING)
            # (a signal during this exchange is exchanged by the next one)
        if changed and self.files:
            self.files.stop_all(trainer)
        return bool(received)

    def check_files(self, trainer: pl.Trainer) -> None:
        """Check the files of the run. All ranks must call it.

        Raises:
            FileChanged: on all ranks, where a file of one of them has changed.
        """
        if self.files:
            self.files.check()
        self.agree(trainer)
