"""LISA: all of a few blocks at a time (https://arxiv.org/abs/2403.17919).

Every so many optimizer steps other blocks are drawn. The optimizer follows: it forgets the moments of blocks that go, and
begins anew with those that come, so memory holds the float32 weights, gradients and moments of the drawn blocks only. A
block that goes is rounded back to the dtype that frozen weights are kept in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from rwkv_peft.model.arch import linear_layers
from rwkv_peft.model.rwkv import RWKV


class Lisa:
    """Which blocks of a model are trained. parts: att, ffn or both. layers: blocks at a time. keep: dtype of the others."""

    def __init__(self, model: RWKV, parts: tuple[str, ...], layers: int, every: int, seed: int, keep: torch.dtype):
        self.model, self.every, self.seed, self.keep = model, every, seed, keep
        self.names: dict[int, list[str]] = {}
        for layer in linear_layers(model.geometry, parts):
            self.names.setdefault(int(layer.split(".")[1]), []).append(f"{layer}.weight")
        self.layers = min(layers, len(self.names))
        self.active: list[int] = []
        self.touched: set[str] = set()  # names of all that was ever trained

    def drawn(self, step: int) -> list[int]:
        """The blocks of an optimizer step (from 0): the same for the same seed, whatever came before."""
        dice = np.random.default_rng((self.seed, step // self.every))
        return sorted(int(i) for i in dice.choice(len(self.names), self.layers, replace=False))

    def follow(self, step: int) -> bool:
        """Train the blocks of this step; whether others than before."""
        return self.train(self.drawn(step))

    def train(self, wanted: list[int]) -> bool:
        """Train these blocks and no others; whether others than before."""
        if wanted == self.active:
            return False
        for block in set(self.active) ^ set(wanted):
            comes = block in wanted
            for name in self.names[block]:
                owner, _, leaf = name.rpartition(".")
                weight = self.model.get_parameter(name).detach()
                fresh = nn.Parameter(weight.to(torch.float32 if comes else self.keep), requires_grad=comes)
                setattr(self.model.get_submodule(owner), leaf, fresh)
        self.active = wanted
        self.touched |= {name for block in wanted for name in self.names[block]}
        return True

    def go_on(self, active: list[int], names: Iterable[str]) -> None:
        """Be where an earlier run was: it trained these blocks, and had saved these tensors."""
        self.train(active)
        self.touched |= {name for blocks in self.names.values() for name in blocks} & set(names)

    def saved(self) -> dict[str, nn.Parameter]:
        """What may differ from the base, by name."""
        return {n: p for n, p in self.model.named_parameters() if n in self.touched or p.requires_grad}


class LisaResample(pl.Callback):
    """Draws the blocks before each optimizer step that is due, and hands the optimizer their parameters.

    groups: () -> the optimizer's parameter groups for what is trained now.
    """

    def __init__(self, lisa: Lisa, groups: Callable[[], list[dict]]):
        self.lisa, self.groups = lisa, groups

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx % trainer.accumulate_grad_batches or not self.lisa.follow(trainer.global_step):
            return
        optimizer = trainer.optimizers[0]
        for group, fresh in zip(optimizer.param_groups, self.groups(), strict=True):
            group["params"] = fresh["params"]
        current = {p for group in optimizer.param_groups for p in group["params"]}
        for gone in [p for p in optimizer.state if p not in current]:
            del optimizer.state[gone]
