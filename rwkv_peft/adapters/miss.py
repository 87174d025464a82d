"""MiSS: one small matrix, added to every block of the input dimension (https://arxiv.org/abs/2409.15371).

W' = W + [D^T D^T ... D^T], cut to the width of W. RWKV-PEFT called it Bone from November 2024, then DiSHA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_peft.common.errors import UserError

from .base import Adapter, AnyLinear, compute_dtype, device_of


class Miss(Adapter):
    """disha [r, out], float32, zero at the start: a fresh adapter changes nothing.

    Since all blocks share D, the blocks of x are added up first: r values per token instead of in.
    """

    tensors = ("disha",)
    row_axes = {"disha": 1}

    def __init__(self, linear: AnyLinear, rank: int):
        super().__init__(linear)
        if refused := self.refusal(linear.out_features, linear.in_features, rank):
            raise UserError(f"The rank of MiSS, {rank}, {refused}.")
        self.disha = nn.Parameter(torch.zeros(rank, linear.out_features, dtype=torch.float32, device=device_of(linear)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted layer's output, [..., out]."""
        rank = len(self.disha)
        blocks = F.pad(x, (0, -x.shape[-1] % rank)).unflatten(-1, (-1, rank))  # [..., ceil(in/r), r]
        return self.linear(x) + blocks.sum(-2) @ self.disha.to(x.dtype)

    @staticmethod
    def shapes(outputs: int, inputs: int, rank: int, **_: Any) -> dict[str, tuple[int, ...]]:
        """Return the trained tensors' shapes by name."""
        return {"disha": (rank, outputs)}

    @staticmethod
    def refusal(outputs: int, inputs: int, rank: int, **_: Any) -> str:
        """Return why these options do not fit a layer of this size, or ""."""
        return f"must be {inputs} or less: a layer has no more inputs" if rank > inputs else ""

    @staticmethod
    def merge(weight: Tensor, tensors: dict[str, Tensor], sidecar: Mapping[str, Any]) -> Tensor:
        """Return the merged weight, [out, in]."""
        row = tensors["disha"].to(compute_dtype(weight.dtype)).T  # [out, r]
        blocks = -(-weight.shape[1] // row.shape[1])
        return weight.to(row.dtype) + row.repeat(1, blocks)[:, : weight.shape[1]]

    @staticmethod
    def to_peft(tensors: dict[str, Tensor], sidecar: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the settings and tensors that peft would have."""
        settings = {"peft_type": "MISS", "r": sidecar["rank"], "init_weights": True, "miss_dropout": 0.0}
        return settings, {"miss_block": tensors["disha"]}
