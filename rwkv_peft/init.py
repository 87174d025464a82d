"""A new RWKV-7 base with the official initialisation, in the official format.

usage: python -m rwkv_peft.init --out model/my.pth [--layers 12] [--width 768] [--vocab 65536] [--head-size 64]
                                [--dtype bf16|fp32] [--seed 42]

Source of every number: RWKV_Tmix_x070, RWKV_CMix_x070 and generate_init_weight in RWKV-LM/RWKV-v7/train_temp/src/model.py.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from .errors import UserError, door


def rank(factor: float, width: int) -> int:
    """The official suggestion for the inner width of a low-rank part: factor * sqrt(width), in steps of 32."""
    return max(32, round(factor * width**0.5 / 32) * 32)


def new_geometry(layers: int, width: int, vocab: int, head_size: int = 64):
    from .model.arch import Geometry

    if head_size < 2:
        raise UserError(f"--head-size {head_size}: must be 2 or more (64 for every released model).")
    if width % head_size:
        raise UserError(f"--width {width}: must be a multiple of --head-size {head_size}.")
    return Geometry(
        n_layer=layers, n_embd=width, head_size=head_size, vocab_size=vocab, dim_ffn=4 * width,
        rank_w=rank(2.5, width), rank_a=rank(2.5, width), rank_v=rank(1.7, width) if layers > 1 else 0,
        rank_g=rank(5, width),
    )  # fmt: skip


def initial_tensors(geometry, seed: int) -> dict:
    """Every tensor of a fresh model, float32, by its official name."""
    import torch

    from .model.arch import shapes

    generator = torch.Generator().manual_seed(seed)
    C, N = geometry.n_embd, geometry.head_size
    n = torch.arange(C, dtype=torch.float64)
    linear = n / (C - 1) - 0.5
    inside = (n % N - (N - 1) / 2) / ((N - 1) / 2)  # -1 to 1 within each head
    zigzag = inside * inside.abs()

    def uniform(shape, bound: float):
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    def orthogonal(shape, gain: float):
        gain *= math.sqrt(shape[0] / shape[1]) if shape[0] > shape[1] else 1.0
        return torch.nn.init.orthogonal_(torch.empty(shape), gain=gain, generator=generator)

    def make(name: str, shape):
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        depth = layer / max(geometry.n_layer - 1, 1)  # 0 to 1
        rest = 1.0 - layer / geometry.n_layer  # 1 to almost 0
        www = -6 + 6 * (n / (C - 1)) ** (1 + depth**0.3)
        mixes = {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}
        vectors = {
            "w0": www + 0.5 + zigzag * 2.5,
            "a0": -0.19 + zigzag * 0.3 + linear * 0.4,
            "v0": 0.73 - linear * 0.4,
            "k_k": 0.71 - linear * 0.1,
            "k_a": torch.full((C,), 1.02, dtype=torch.float64),
        }
        part, leaf = name.split(".")[-2:]
        if name == "emb.weight":
            return uniform(shape, 1e-4)
        if name == "head.weight":
            gain = 0.5 * math.sqrt(shape[0] / shape[1]) if shape[0] > shape[1] else 0.5
            return torch.nn.init.orthogonal_(torch.empty(shape), gain=gain, generator=generator)
        if name.endswith("ln_x.weight"):
            return torch.full(shape, ((1 + layer) / geometry.n_layer) ** 0.7)
        if name.endswith("bias"):
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        if part == "ffn" and leaf == "x_k":
            return (1.0 - (n / C) ** rest**4).reshape(shape)
        if leaf in mixes:
            return (1.0 - (n / C) ** (mixes[leaf] * rest)).reshape(shape)
        if leaf in vectors:
            return vectors[leaf].reshape(shape)
        if leaf == "r_k":
            return torch.full(shape, -0.04)
        if leaf in ("w1", "a1", "v1", "g1") or name.endswith(("output.weight", "ffn.value.weight")):
            return torch.zeros(shape)
        if leaf in ("w2", "a2", "v2", "g2"):
            return orthogonal(shape, 0.1)
        small = 0.1 if name.endswith("att.key.weight") else 1.0
        return uniform(shape, small * 0.5 / math.sqrt(C))

    return {name: make(name, shape).float() for name, shape in shapes(geometry).items()}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m rwkv_peft.init", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", required=True, type=Path, help="the .pth to write; an existing file is not overwritten"
    )
    parser.add_argument("--layers", type=positive, default=12)
    parser.add_argument("--width", type=positive, default=768)
    parser.add_argument(
        "--vocab", type=positive, default=65536, help="rows of emb and head (65536: the World vocabulary)"
    )
    parser.add_argument("--head-size", type=positive, default=64)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--seed", type=positive, default=42)
    given = parser.parse_args(arguments)
    with door():
        import torch

        from . import checkpoint, project

        if given.out.exists():
            raise UserError(f"{given.out}: exists already and is not overwritten; choose another name or remove it.")
        geometry = new_geometry(given.layers, given.width, given.vocab, given.head_size)
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[given.dtype]
        tensors = {name: t.to(dtype) for name, t in initial_tensors(geometry, given.seed).items()}
        checkpoint.save(given.out, tensors)
        total = sum(t.numel() for t in tensors.values())
        print(f"wrote {project.shown(given.out.resolve())}: RWKV-7, {given.layers} layers, width {given.width}, "
              f"vocabulary {given.vocab}, {total / 1e6:,.1f} M parameters, {given.dtype}, untrained")  # fmt: skip


def positive(text: str) -> int:
    number = int(text)
    if not 1 <= number < 2**31:
        raise argparse.ArgumentTypeError("must be 1 or more, and less than 2147483648")
    return number


if __name__ == "__main__":
    main(sys.argv[1:])
