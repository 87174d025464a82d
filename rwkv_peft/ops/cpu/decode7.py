"""Generating with RWKV-7: one token through all blocks in one call (cpu/decode7.cpp), where every weight is a plain one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .build import function
from .wkv import LANES, NAMES, SIZES, pointer

LARGE = ("receptance", "key", "value", "output")
RANKS = ("w1", "a1", "v1", "g1")
LOW = (*RANKS, "w2", "a2", "v2", "g2")


class DecodeStep7:
    """The blocks of a model that is no longer trained, for one token at a time.

    It keeps a second copy of the low-rank matrices, as [outputs, inputs] in the format of the large ones: a few hundredths of
    the model.
    """

    def __init__(self, blocks: Sequence[Any], heads: int, size: int, dtype: torch.dtype):
        self.table = [tensors_of(block, dtype) for block in blocks]
        self.pointers = torch.tensor([[pointer(t) for t in row] for row in self.table])
        att = blocks[-1].att  # the first block has no v1
        ranks = [getattr(att, name).shape[1] if hasattr(att, name) else 0 for name in RANKS]
        self.sizes = torch.tensor([len(blocks), heads, size, *ranks, len(blocks[0].ffn.key.weight)])
        self.run = function(f"decode7_{NAMES[dtype]}", 4, 0)

    def __call__(self, x: Tensor, state: list[tuple[Tensor, ...]]) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """x: float32 [1, C], in front of the first block; state: of one sequence, the tensors of a BlockState per block.

        Returns x behind the last block, and the new state.
        """
        x = x.clone(memory_format=torch.contiguous_format)
        before = [[t.float().contiguous() for t in tensors] for tensors in state]
        after = [[torch.empty_like(t) for t in tensors] for tensors in before]
        places = torch.tensor(
            [[*map(pointer, old), *map(pointer, new)] for old, new in zip(before, after, strict=True)]
        )
        self.run(*map(pointer, (self.pointers, places, x, self.sizes)), torch.get_num_threads())
        return x, [tuple(tensors) for tensors in after]


def decode_step(model) -> DecodeStep7 | None:
    """Return what replaces the model's blocks for a single float32 token.

    None where some block is not plain RWKV-7 in a number format that the kernel has.
    """
    geometry, blocks = model.geometry, model.blocks
    if geometry.version != "x070" or model.dtype != torch.float32 or geometry.head_size not in SIZES:
        return None
    large = [layer for b in blocks for layer in (*(getattr(b.att, n) for n in LARGE), b.ffn.key, b.ffn.value)]
    if not all(isinstance(layer, nn.Linear) and layer.product == model.ops.linear for layer in large):
        return None  # with an adapter, or compressed
    small = [p for b in blocks for name, p in b.att.named_parameters(recurse=False) if name in LOW]
    numbers = [n for p in (*small, large[0].weight, blocks[0].ffn.key.weight) for n in p.shape]
    [dtype, *others] = {layer.weight.dtype for layer in large}
    if others or dtype not in NAMES or large[0].weight.device.type != "cpu" or any(n % LANES for n in numbers):
        return None
    if any(not torch.equal(p.to(dtype).to(p.dtype), p) for p in small):
        return None  # trained, and finer than the large ones
    return DecodeStep7(blocks, geometry.n_head, geometry.head_size, dtype)


def tensors_of(block, dtype: torch.dtype) -> list[Tensor | None]:
    """In the order of Block in cpu/decode7.cpp."""
    att, ffn = block.att, block.ffn

    def there(module, names):
        return [None if p is None else p.detach() for p in (getattr(module, name, None) for name in names)]

    def vectors(module, *names):
        return [p if p is None else p.float().reshape(-1).contiguous() for p in there(module, names)]

    def turned(*names):
        return [p if p is None else p.t().to(dtype).contiguous() for p in there(att, names)]

    def large(*layers):
        return [layer.weight.detach().contiguous() for layer in layers]

    return [
        *vectors(block.ln1, "weight", "bias"),
        *vectors(att, "x_r", "x_w", "x_k", "x_v", "x_a", "x_g"),
        *large(att.receptance, att.key, att.value),
        *turned(*LOW),
        *vectors(att, "w0", "a0", "v0", "k_k", "k_a", "r_k"),
        *vectors(att.ln_x, "weight", "bias"),
        *large(att.output),
        *vectors(block.ln2, "weight", "bias"),
        *vectors(ffn, "x_k"),
        *large(ffn.key, ffn.value),
    ]  # fmt: skip
