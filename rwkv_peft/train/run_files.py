"""The files of a run, watched by its processes: where one has changed, all of them stop, and nothing more is saved."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rwkv_peft.common.errors import EXIT_USER
from rwkv_peft.common.file_watch import FileChanged, FileWatch


class RunFiles:
    """node: whose files this process watches, None for one beside another of the same machine. ends: is told that the training
    ends.
    """

    def __init__(self, watch: FileWatch, node: int | None, ends: Callable[[], None]):
        self.watch, self.node, self.ends = watch, node, ends

    @property
    def changed(self) -> bool:
        return self.watch.changed is not None

    def look(self) -> None:
        if self.node is not None:
            self.watch.look()

    def end(self, trainer) -> None:
        """FileChanged with what has changed, on whichever node. To be called by all."""
        self.ends()
        mine = [self.node, str(self.watch.changed)] if self.node is not None and self.changed else None
        found: list[list | None] = [mine]
        if trainer.world_size > 1:
            found = [None] * trainer.world_size
            torch.distributed.all_gather_object(found, mine)
        if not (trainer.is_global_zero or mine):
            raise SystemExit(EXIT_USER)  # another process says why
        node, words = mine or next(one for one in found if one)
        raise FileChanged(words if mine else f"On node {node}, {words}")
