"""LISA: full training of a few blocks at a time (https://arxiv.org/abs/2403.17919).

Every so many optimizer steps other blocks are drawn. The optimizer drops the moments of the blocks that are frozen again and
starts without moments for the new ones, so memory holds the float32 weights, gradients and moments of the drawn blocks only.
A block that is frozen again is rounded back to the dtype of frozen weights.
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
    """The blocks of a model that are trained.

    Args:
        model: is changed in place.
        parts: att, ffn or both.
        layers: blocks at a time.
        every: optimizer steps between two draws.
        seed: of the draws.
        keep: dtype of frozen weights.

    Attributes:
        active: the blocks that are trained now.
        touched: names of all tensors that were ever trained.
    """

    def __init__(self, model: RWKV, parts: tuple[str, ...], layers: int, every: int, seed: int, keep: torch.dtype):
        self.model, self.every, self.seed, self.keep = model, every, seed, keep
        self.names: dict[int, list[str]] = {}
        for layer in linear_layers(model.geometry, parts):
            self.names.setdefault(int(layer.split(".")[1]), []).append(f"{layer}.weight")
        self.layers = min(layers, len(self.names))
        self.active: list[int] = []
        self.touched: set[str] = set()

    def drawn(self, step: int) -> list[int]:
        """Return the blocks of an optimizer step (from 0). They depend on seed and step only."""
        generator = np.random.default_rng((self.seed, step // self.every))
        return sorted(int(i) for i in generator.choice(len(self.names), self.layers, replace=False))

    def follow(self, step: int) -> bool:
        """Train the blocks of this step. Returns whether they are others than before."""
        return self.train(self.drawn(step))

    def train(self, wanted: list[int]) -> bool:
        """Train these blocks and no others. Returns whether they are others than before."""
        if wanted == self.active:
            return False
        for block in set(self.active) ^ set(wanted):
            is_trained = block in wanted
            for name in self.names[block]:
                owner, _, leaf = name.rpartition(".")
                weight = self.model.get_parameter(name).detach()
                fresh = nn.Parameter(weight.to(torch.float32 if is_trained else self.keep), requires_grad=is_trained)
                setattr(self.model.get_submodule(owner), leaf, fresh)
        self.active = wanted
        self.touched |= {name for block in wanted for name in self.names[block]}
        return True

    def resume(self, active: list[int], names: Iterable[str]) -> None:
        """Restore the blocks of a training state.

        Args:
            active: the blocks that were trained.
            names: of the tensors in the state.
        """
        self.train(active)
        self.touched |= {name for blocks in self.names.values() for name in blocks} & set(names)

    def saved(self) -> dict[str, nn.Parameter]:
        """Return the parameters that may differ from the base, by name."""
        return {n: p for n, p in self.model.named_parameters() if n in self.touched or p.requires_grad}


class LisaResample(pl.Callback):
    """Draw blocks before each optimizer step that is due, and pass their parameters to the optimizer.

    Args:
        lisa: the blocks.
        groups: returns the optimizer's parameter groups for what is trained now.
    """

    def __init__(self, lisa: Lisa, groups: Callable[[], list[dict]]):
        self.lisa, self.groups = lisa, groups

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        """Draw the blocks of the next optimizer step."""
        if batch_idx % trainer.accumulate_grad_batches or not self.lisa.follow(trainer.global_step):
            return
        optimizer = trainer.optimizers[0]
        for group, fresh in zip(optimizer.param_groups, self.groups(), strict=True):
            group["params"] = fresh["params"]
        current = {p for group in optimizer.param_groups for p in group["params"]}
        for gone in [p for p in optimizer.state if p not in current]:
            del optimizer.state[gone]
