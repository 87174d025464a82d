"""The operations of a block other than the recurrence, as the formulas define them, for any device.

Backends fuse them. Shapes: T tokens of all sequences one after another, S sequences, C channels, H heads, N head size
(C = H * N).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .lowrank_merge import fold as fold

READS = ()  # formats of weights that `linear` need not convert
LOG_DECAY_SCALE = -0.6065306597126334  # -exp(-1/2): no token's decay is below exp of this
EPS = 64e-5  # of the norm behind the recurrence: 1e-5 * 8**2, as the base models were trained


def decode_step(model) -> None:
    """What takes the place of a model's blocks where a single token goes through them; None: there is nothing better."""


class Where(Protocol):
    """The bounds of sequences among T tokens.

    Attributes:
        cu_seqlens: The bounds [S + 1], as integers on the host.
        host: The same as an int64 tensor on the host.
        first: The first token of each sequence, [S], on the device of the tokens.
    """

    cu_seqlens: tuple[int, ...]
    host: Tensor
    first: Tensor


def token_shift(x: Tensor, before: Tensor, where: Where) -> Tensor:
    """What stood one token earlier: x [T, C] moved by one, and at each sequence's first token what was carried in, [S, C]."""
    return F.pad(x[:-1], (0, 0, 1, 0)).index_copy(0, where.first, before.to(x.dtype))


def token_shift_mix(x: Tensor, before: Tensor, shares: Sequence[Tensor], where: Where) -> list[Tensor]:
    """X + (token_shift(x) - x) * share for each share [C]: what the layers of a block read."""
    change = token_shift(x, before, where) - x
    return [torch.addcmul(x, change, share) for share in shares]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the layer norm of x [T, C], eps 1e-5."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-5)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """X [..., in] times weight [out, in] of any dtype, in the dtype of x."""
    return F.linear(x, weight.to(x.dtype))


def square_relu(x: Tensor) -> Tensor:
    """Return relu(x) squared."""
    return torch.relu(x) ** 2


class Wkv7Inputs(NamedTuple):
    """The outputs of RWKV-7's layers that the recurrence takes, [T, C] each; w, a and mix before their sigmoid.

    mix and v_first are None in the first layer.
    """

    r: Tensor
    w: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    g: Tensor
    mix: Tensor | None
    v_first: Tensor | None


class Wkv7Params(NamedTuple):
    """The parameters of RWKV-7 around the recurrence: [C] each, in the dtype of the gates."""

    k_k: Tensor
    k_a: Tensor
    r_k: Tensor
    weight: Tensor  # of ln_x
    bias: Tensor


def wkv7_block(
    wkv: Callable, x: Wkv7Inputs, own: Wkv7Params, s0: Tensor, where: Where, heads: int
) -> tuple[Tensor, Tensor]:
    """From what the layers give to what the output layer reads, [T, C], and the state behind each sequence.

    wkv: of a backend. s0: [S, H, N, N].
    """
    T, C = x.r.shape
    in_heads = lambda z: z.view(T, heads, C // heads)  # noqa: E731
    # the logarithm of the decay, in the state's precision: near 1 a bfloat16 decay has only a few values
    w = LOG_DECAY_SCALE * torch.sigmoid(x.w.to(s0.dtype))
    v = x.v
    if x.mix is not None and x.v_first is not None:
        v = v + (x.v_first - v) * torch.sigmoid(x.mix)
    a = torch.sigmoid(x.a)  # how much of the old value is replaced
    kk = F.normalize(in_heads(x.k * own.k_k), dim=-1, eps=1e-12)
    k = x.k * (1 + (a - 1) * own.k_a)
    inputs = (in_heads(z)[None] for z in (x.r, w, k, v, -kk, kk * in_heads(a)))
    y, s = wkv(*inputs, s0, where.cu_seqlens)
    y = F.group_norm(y.reshape(T, C), heads, own.weight, own.bias, EPS)
    bonus = in_heads(x.r * k * own.r_k).sum(-1, keepdim=True)
    y = y + (bonus * in_heads(v)).view(T, C)
    return y * x.g, s


def cross_entropy_grad(logits: Tensor, targets: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Return the summed cross entropy and its gradient.

    Args:
        logits: [R, V].
        targets: int64 [R].
        wanted: Whether the gradient is asked for.

    Returns:
        The sum over rows of -log softmax(logits)[target], at least float32, and its gradient in the dtype of logits,
        which may overwrite them; None if it is not asked for.
    """
    dtype, target = logits.dtype, targets[:, None]
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    log_sum = logits.logsumexp(-1, keepdim=True)
    loss = (log_sum - logits.gather(-1, target)).sum()
    if not wanted:
        return loss, None
    probabilities = logits.sub_(log_sum).exp_()
    return loss, probabilities.scatter_add_(-1, target, torch.full_like(log_sum, -1.0)).to(dtype)
