"""The official initialisation of a new model: every tensor by its name.

Source of every number: RWKV_Tmix_x070, RWKV_CMix_x070 and generate_init_weight in RWKV-LM/RWKV-v7/train_temp/src/model.py;
RWKV_Tmix_x060, RWKV_Tmix_x052, their channel mixes and generate_init_weight in RWKV-LM/RWKV-v5/src/model.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rwkv_peft.common.errors import UserError

from .arch import ARCHS, Geometry, shapes

LARGE = 4096  # width from which RWKV-6 has low-rank parts of twice the rank


def rank(factor: float, width: int) -> int:
    """The official suggestion for the inner width of a low-rank part of RWKV-7: factor * sqrt(width), in steps of 32."""
    return max(32, round(factor * width**0.5 / 32) * 32)


def new_geometry(version: str, layers: int, width: int, vocab: int, head_size: int = 64) -> Geometry:
    """The sizes that the official trainer gives a new model. UserError where width and head size do not go together."""
    if head_size < 2:
        raise UserError(f"--head-size {head_size}: must be 2 or more (64 for every released model).")
    if width % head_size:
        raise UserError(f"--width {width}: must be a multiple of --head-size {head_size}.")
    gated = int(width * 3.5) // 32 * 32  # of RWKV-5 and -6
    if not gated:
        raise UserError(f"--width {width}: is too small; the channel mix would have no width.")
    factor = 2 if width >= LARGE else 1
    sizes = {
        "x070": {
            "dim_ffn": 4 * width, "rank_w": rank(2.5, width), "rank_a": rank(2.5, width),
            "rank_v": rank(1.7, width) if layers > 1 else 0, "rank_g": rank(5, width),
        },
        "x060": {"dim_ffn": gated, "rank_w": 64 * factor, "rank_mix": 32 * factor},
        "x052": {"dim_ffn": gated},
    }[version]  # fmt: skip
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
        return torch.empty(shape).uniform_(-bound, bound, generator=self.generator)

    def orthogonal(self, shape, gain: float) -> Tensor:
        gain *= math.sqrt(shape[0] / shape[1]) if shape[0] > shape[1] else 1.0
        return torch.nn.init.orthogonal_(torch.empty(shape), gain=gain, generator=self.generator)

    def decay(self) -> Tensor:
        """time_decay of RWKV-5 and -6."""
        return -6 + 5 * self.along ** (0.7 + 1.3 * self.depth)

    def bonus(self) -> Tensor:
        """time_faaaa of RWKV-5 and -6."""
        return self.depth * (1 - self.along) + ((self.n + 1) % 3 - 1) * 0.1


def special_of_v7(recipe: Recipe, leaf: str, name: str, shape) -> Tensor | None:
    N, n = recipe.geometry.head_size, recipe.n
    linear = recipe.along - 0.5
    inside = (n % N - (N - 1) / 2) / ((N - 1) / 2)  # -1 to 1 within each head
    zigzag = inside * inside.abs()
    mixes = {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}
    vectors = {
        "w0": -6 + 6 * recipe.along ** (1 + recipe.depth**0.3) + 0.5 + zigzag * 2.5,
        "a0": -0.19 + zigzag * 0.3 + linear * 0.4,
        "v0": 0.73 - linear * 0.4,
        "k_k": 0.71 - linear * 0.1,
        "k_a": torch.full_like(n, 1.02),
    }
    if name.endswith("ffn.x_k"):
        return 1.0 - recipe.part**recipe.rest**4
    if leaf in mixes:
        return 1.0 - recipe.part ** (mixes[leaf] * recipe.rest)
    if leaf in vectors:
        return vectors[leaf]
    if leaf == "r_k":
        return torch.full(shape, -0.04)
    if leaf in ("w1", "a1", "v1", "g1") or name.endswith(("output.weight", "ffn.value.weight")):
        return torch.zeros(shape)
    if leaf in ("w2", "a2", "v2", "g2"):
        return recipe.orthogonal(shape, 0.1)
    if leaf == "weight":
        small = 0.1 if name.endswith("att.key.weight") else 1.0
        return recipe.uniform(shape, small * 0.5 / math.sqrt(recipe.geometry.n_embd))
    return None


def gated(recipe: Recipe, leaf: str, name: str, shape) -> Tensor | None:
    """What RWKV-5 and -6 have in common."""
    if leaf == "time_decay":
        return recipe.decay()
    if leaf == "time_faaaa":
        return recipe.bonus()
    if name.endswith(("output.weight", "ffn.value.weight", "ffn.receptance.weight")):
        return torch.zeros(shape)
    if leaf == "weight":
        return recipe.orthogonal(shape, 0.1 if name.endswith(("att.key.weight", "att.gate.weight")) else 1.0)
    return None


def shift_mix(recipe: Recipe, letter: str) -> Tensor:
    """How much of the current token each channel takes, in RWKV-5's sense (time_mix; RWKV-6's time_maa is 1 less it)."""
    power = {"r": 0.5, "g": 0.5}.get(letter, 1.0)
    return recipe.part ** (power * recipe.rest) + (0.3 * recipe.depth if letter == "v" else 0.0)


def special_of_v6(recipe: Recipe, leaf: str, name: str, shape) -> Tensor | None:
    if leaf in ("time_maa_w1", "time_decay_w1"):
        return torch.zeros(shape)
    if leaf in ("time_maa_w2", "time_decay_w2"):
        return recipe.uniform(shape, 0.01)
    if leaf.startswith("time_maa_"):
        return 1.0 - (recipe.part**recipe.rest if ".ffn." in name else shift_mix(recipe, leaf[-1]))
    return gated(recipe, leaf, name, shape)


def special_of_v5(recipe: Recipe, leaf: str, name: str, shape) -> Tensor | None:
    if leaf.startswith("time_mix_"):
        return recipe.part**recipe.rest if ".ffn." in name else shift_mix(recipe, leaf[-1])
    return gated(recipe, leaf, name, shape)


SPECIAL: dict[str, Callable] = {"x070": special_of_v7, "x060": special_of_v6, "x052": special_of_v5}


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
        made = SPECIAL[geometry.version](recipe, name.rpartition(".")[2], name, shape)
        if made is None:
            raise ValueError(f"{name}: no rule says how it begins in {ARCHS[geometry.version].name}")
        return made.reshape(shape)

    return {name: make(name, shape).float() for name, shape in shapes(geometry).items()}
