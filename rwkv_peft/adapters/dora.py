"""DoRA: W' = m (W + scale B A) / |W + scale B A|, with one norm and one magnitude m per output (https://arxiv.org/abs/2402.09353).

The norm follows the training but counts as a constant in the backward pass (§4.3 of the paper): it costs a forward pass
one product of the size of B A and no memory that the backward pass would keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_peft.common.errors import UserError

from .base import Adapter, AnyLinear, compute_dtype
from .lora import Lora, fresh_factors, scale, scale_of
from .lowrank import lora_linear


class Dora(Adapter):
    """lora_A [r, in] and lora_B [out, r] as in LoRA, lora_magnitude [out], float32.

    The magnitude starts as the very norm that forward divides by: a fresh adapter changes nothing, to the last bit. A row of
    zeros has no length to keep: its magnitude is 0, never learns, and says that the row learns as LoRA's do.
    """

    tensors = ("lora_A", "lora_B", "lora_magnitude")
    row_axes = {"lora_B": 0, "lora_magnitude": 0}

    def __init__(self, linear: AnyLinear, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__(linear)
        self.scale, self.dropout = scale(rank, alpha, rslora), dropout
        self.lora_A, self.lora_B = fresh_factors(linear, rank)
        moved = added(linear.dense(torch.float32), self.lora_A, self.lora_B, self.scale)
        self.lora_magnitude = nn.Parameter(torch.linalg.vector_norm(moved, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """Dropout acts on the input of all that is added to the frozen layer's output, as in HF peft."""
        kind = compute_dtype(x.dtype)
        gain = gains(self.lora_magnitude.to(kind), added(self.linear.dense(kind), self.lora_A, self.lora_B, self.scale))
        more = (gain - 1).to(x.dtype)  # gain is near 1: bfloat16 has room for gain - 1, not for gain
        if not (self.training and self.dropout > 0):
            moved = lora_linear(self.linear, x, self.lora_A, self.lora_B, self.scale)
            return torch.addcmul(moved, more, moved)
        dropped = F.dropout(x, self.dropout)
        low = F.linear(F.linear(dropped, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return self.linear(x) + more * self.linear(dropped) + (self.scale * gain).to(x.dtype) * low

    @staticmethod
    def shapes(outputs: int, inputs: int, rank: int, **_: Any) -> dict[str, tuple[int, ...]]:
        """Return the trained tensors' shapes by name."""
        return {"lora_A": (rank, inputs), "lora_B": (outputs, rank), "lora_magnitude": (outputs,)}

    @staticmethod
    def merge(weight: Tensor, tensors: dict[str, Tensor], sidecar: Mapping[str, Any]) -> Tensor:
        """Return the merged weight, [out, in]."""
        moved = Lora.merge(weight, tensors, sidecar)
        return gains(tensors["lora_magnitude"].to(moved.dtype), moved)[:, None] * moved

    @staticmethod
    def to_peft(tensors: dict[str, Tensor], sidecar: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """As LoRA's, with a magnitude for every row: peft has no row of zeros that learns as LoRA's do."""
        settings, named = Lora.to_peft(tensors, sidecar)
        magnitude, change = tensors["lora_magnitude"], scale_of(sidecar) * tensors["lora_B"] @ tensors["lora_A"]
        lengths = torch.linalg.vector_norm(change, dim=1)
        if ((magnitude == 0) & (lengths == 0)).any():
            raise UserError(
                "This dora run cannot be written as a peft adapter: its base has rows of zeros that have learnt nothing, and "
                "peft divides by their length. Merge it with ./merge.sh instead."
            )
        named["lora_magnitude_vector"] = torch.where(magnitude == 0, lengths, magnitude)
        return settings | {"use_dora": True}, named


@torch.no_grad()
def added(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + scale B A, [out, in], in the dtype of the weight."""
    return torch.addmm(weight, B.to(weight.dtype), A.to(weight.dtype), alpha=scale)


def gains(magnitude: Tensor, moved: Tensor) -> Tensor:
    """What every row of W + scale B A is multiplied by, [out]: 1 where its magnitude is 0."""
    length = torch.linalg.vector_norm(moved, dim=1)
    sound = (magnitude != 0) & (length != 0)
    return torch.where(sound, magnitude / length.masked_fill(~sound, 1.0), 1.0)
