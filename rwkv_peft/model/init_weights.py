"""The official initialisation of a new model: every tensor by its name. What a version has of its own is in its module.

Source of every number: RWKV_Tmix_x070, RWKV_CMix_x070 and generate_init_weight in RWKV-LM/RWKV-v7/train_temp/src/model.py;
RWKV_Tmix_x060, RWKV_Tmix_x052, their channel mixes and generate_init_weight in RWKV-LM/RWKV-v5/src/model.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rwkv_peft.common.errors import UserError

from .arch import ARCHS, Geometry, shapes
from .rwkv import VERSIONS


def new_geometry(version: str, layers: int, width: int, vocab: int, head_size: int = 64) -> Geometry:
    """The sizes that the official trainer gives a new model. UserError where width and head size do not go together."""
    if head_size < 2:
        raise UserError(f"--head-size {head_size}: must be 2 or more (64 for every released model).")
    if width % head_size:
        raise UserError(f"--width {width}: must be a multiple of --head-size {head_size}.")
    sizes = VERSIONS[version].new_sizes(layers, width)
    if not sizes["dim_ffn"]:
        raise UserError(f"--width {width}: is too small; the channel mix would have no width.")
    return Geometry(version, layers, width, head_size, vocab, **sizes)


class Recipe:
    """Random numbers and the position of a tensor, from which the values of every version are made.

    depth: 0 in the first layer to 1 in the last; rest: 1 in the first to almost 0 in the last. n: channels, float64.
    """

    def __init__(self, geometry: Geometry, layer: int, generator: torch.Generator):
        self.geometry, self.layer, self.generator = geometry, layer, generator
        self.depth = layer / max(geometry.n_layer - 1, 1)
        self.rest = 1.0 - layer / geometry.n_layer
        self.n = torch.arange(geometry.n_embd, dtype=torch.float64)
        self.part = self.n / geometry.n_embd  # 0 to almost 1 over the channels
        self.along = self.n / max(geometry.n_embd - 1, 1)  # 0 to 1

    def uniform(self, shape, bound: float) -> Tensor:
        """Draw from [-bound, bound]."""
        return torch.empty(shape).uniform_(-bound, bound, generator=self.generator)

    def orthogonal(self, shape, gain: float) -> Tensor:
        """Draw an orthogonal matrix; a tall one is scaled by the root of its sides' ratio."""
        gain *= math.sqrt(shape[0] / shape[1]) if shape[0] > shape[1] else 1.0
        return torch.nn.init.orthogonal_(torch.empty(shape), gain=gain, generator=self.generator)


def initial_tensors(geometry: Geometry, seed: int) -> dict[str, Tensor]:
    """Every tensor of a fresh model, float32, by its official name."""
    generator = torch.Generator().manual_seed(seed)

    def make(name: str, shape) -> Tensor:
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        recipe = Recipe(geometry, layer, generator)
        if name == "emb.weight":
            return recipe.uniform(shape, 1e-4)
        if name == "head.weight":
            return recipe.orthogonal(shape, 0.5)
        if name.endswith("ln_x.weight"):
            return torch.full(shape, ((1 + layer) / geometry.n_layer) ** 0.7)
        if name.endswith("bias"):
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        made = VERSIONS[geometry.version].initial_value(recipe, name.rpartition(".")[2], name, shape)
        if made is None:
            raise ValueError(f"{name}: no rule says how it begins in {ARCHS[geometry.version].name}")
        return made.reshape(shape)

    return {name: make(name, shape).float() for name, shape in shapes(geometry).items()}
