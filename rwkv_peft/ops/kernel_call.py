"""What compiled recurrences have in common: they check shapes, flatten them, and fall back to the torch backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .reference import must_fit, sequences


def unlearnt(*given: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the inputs without gradients where none is asked for.

    Else autograd would register every trained parameter, and keep tensors for a backward pass that never comes.
    """
    return given if torch.is_grad_enabled() else tuple(None if x is None else x.detach() for x in given)


def recurrence(
    kernel: Callable,
    fits: Callable[[Tensor], bool],
    otherwise: Callable,
    inputs: Sequence[Tensor],
    s0: Tensor | None,
    cu_seqlens: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """A recurrence of ops/reference.py. inputs: [B, T, H, N], the first is r; or [H, N] for what is the same for every token.

    kernel: from inputs [B * T, H, N] or [H, N], the first states and the spans of the sequences to y and the last states.
    fits: whether there is a kernel for such an r; otherwise: what computes where there is none.
    """
    r = inputs[0]
    if not fits(r):
        return otherwise(*inputs, s0, cu_seqlens)
    batch, tokens, heads, size = r.shape
    spans = tuple(sequences(batch, tokens, cu_seqlens))
    must_fit([x for x in inputs if x.dim() != 2], [x for x in inputs if x.dim() == 2], s0, spans)
    start = r.new_zeros(len(spans), heads, size, size, dtype=torch.float32) if s0 is None else s0
    flat = (x if x.dim() == 2 else x.reshape(batch * tokens, heads, size) for x in inputs)
    y, end = kernel(*unlearnt(*flat, start), spans)
    return y.view(r.shape), end
