"""The files of a run, watched on every node. Where one has changed, all ranks stop and nothing more is saved."""

from __future__ import annotations

from collections.abc import Callable

import pytorch_lightning as pl
import torch

from rwkv_peft.common.errors import EXIT_USER
from rwkv_peft.common.file_watch import FileChanged, FileWatch


class RunFiles:
    """The files of a run on this node.

    Args:
        watch: watches them.
        node: the node whose files this process watches; None where another process of the node does.
        on_stop: is called where the run ends because a file has changed.
    """

    def __init__(self, watch: FileWatch, node: int | None, on_stop: Callable[[], None]):
        self.watch, self.node, self.on_stop = watch, node, on_stop

    @property
    def changed(self) -> bool:
        """Whether a change was seen."""
        return self.watch.changed is not None

    def check(self) -> None:
        """Compare the files with what they were."""
        if self.node is not None:
            self.watch.look()

    def stop_all(self, trainer: pl.Trainer) -> None:
        """Stop the run on all ranks. All ranks must call it.

        Raises:
            FileChanged: with the change, on whichever node; on rank 0 and where the change was seen.
            SystemExit: on other ranks.
        """
        self.on_stop()
        own = (self.node, str(self.watch.changed)) if self.node is not None and self.changed else None
        changes: list[tuple[int, str] | None] = [own]
        if trainer.world_size > 1:
            changes = [None] * trainer.world_size
            torch.distributed.all_gather_object(changes, own)
        if own:
            raise FileChanged(own[1])
        if not trainer.is_global_zero:
            raise SystemExit(EXIT_USER)  # another process prints the reason
        node, words = next(change for change in changes if change)
        raise FileChanged(f"On node {node}, {words}")
