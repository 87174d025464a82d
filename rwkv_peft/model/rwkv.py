"""RWKV: embedding -> blocks -> head. Takes its wkv function as an argument and knows nothing of backends or adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .arch import Geometry
from .layers import LayerNorm, Linear
from .rwkv7 import Block
from .state import BlockState, Borders


class Embedding(nn.Module):
    def __init__(self, vocabulary: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, channels))

    def forward(self, ids: Tensor, dtype) -> Tensor:
        return F.embedding(ids, self.weight).to(dtype)


class RWKV(nn.Module):
    """grad_cp: keep only each block's input for the backward pass and compute the rest again (less memory, 1/3 more work).

    dtype: what activations are computed in; weights keep theirs.
    """

    def __init__(self, geometry: Geometry, wkv: Callable, dtype: torch.dtype = torch.float32, grad_cp: bool = False):
        super().__init__()
        self.geometry, self.dtype, self.grad_cp = geometry, dtype, grad_cp
        self.emb = Embedding(geometry.vocab_size, geometry.n_embd)
        self.blocks = nn.ModuleList(Block(geometry, i, wkv) for i in range(geometry.n_layer))
        self.ln_out = LayerNorm(geometry.n_embd)
        self.head = Linear(geometry.n_embd, geometry.vocab_size)

    def zero_state(self, sequences: int) -> list[BlockState]:
        like = torch.empty(0, dtype=self.dtype, device=self.emb.weight.device)
        return [BlockState.zeros(sequences, self.geometry.n_head, self.geometry.head_size, like) for _ in self.blocks]

    def features(
        self, ids: Tensor, state: Sequence[BlockState] | None = None, cu_seqlens: Sequence[int] | None = None
    ) -> tuple[Tensor, list[BlockState]]:
        """ids -> what the head reads, and the state after each sequence.

        ids: int64 [B, T]. state: one BlockState per block, for S sequences; None is zero. cu_seqlens: [S + 1] integers,
        with B = 1: several sequences in one row. Without it every row is a sequence (S = B).
        Returns [B, T, C] after ln_out, and the new state.
        """
        batch, tokens = ids.shape
        if cu_seqlens is None:
            cu_seqlens = range(0, batch * tokens + 1, tokens)
        borders = Borders(tuple(cu_seqlens), ids.device)
        state = self.zero_state(len(borders)) if state is None else state
        x, v_first, after = self.emb(ids.reshape(-1), self.dtype), None, []
        for block, before in zip(self.blocks, state, strict=True):
            if self.grad_cp and torch.is_grad_enabled():
                x, v_first, *new = checkpoint(block, x, v_first, borders, *before.tensors(), use_reentrant=False)
            else:
                x, v_first, *new = block(x, v_first, borders, *before.tensors())
            after.append(BlockState(*new))
        return self.ln_out(x).view(batch, tokens, -1), after

    def forward(self, ids, state=None, cu_seqlens=None) -> tuple[Tensor, list[BlockState]]:
        """Logits [B, T, V] and the state after each sequence; arguments as in `features`."""
        x, state = self.features(ids, state, cu_seqlens)
        return self.head(x), state


def build(
    geometry: Geometry,
    tensors: Mapping[str, Tensor],
    wkv: Callable,
    dtype: torch.dtype = torch.float32,
    grad_cp: bool = False,
    keep: torch.dtype | None = None,
) -> RWKV:
    """A model with the weights of a file, made without random numbers first: mapped tensors go straight in.

    tensors: name -> tensor (may be mapped from the disk; never written to). keep: dtype that the weights are kept in;
    None leaves each as it is in the file.
    """
    with torch.device("meta"):
        model = RWKV(geometry, wkv, dtype, grad_cp)
    names = set(model.state_dict())
    weights = {n: t if keep is None else t.to(keep) for n, t in tensors.items() if n in names}
    model.load_state_dict(weights, strict=True, assign=True)
    return model
