"""Bat: every block of W is multiplied and moved by a small matrix (https://arxiv.org/abs/2409.15371; the first "Bone").

W is cut into r x r blocks W_ab (a: outputs, b: inputs). W'_ab = W_ab (I + D_b) + D_b, with one D per block of inputs, as
RWKV-PEFT has it. (HF peft's init_weights="bat" has one D per block of outputs: other tensors, another adapter.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_peft.common.errors import UserError

from .base import Adapter, AnyLinear, compute_dtype, device_of


class Bat(Adapter):
    """disha [in/r, r, r], float32, zero at the start: a fresh adapter changes nothing.

    W' is never formed. With u_b = D_b x_b, output block a is  sum_b W_ab (x_b + u_b) + sum_b u_b : the frozen layer sees
    x + u, and one sum goes to all output blocks. So nothing of the size of W is computed or kept, and the frozen layer
    may be kept in any form.
    """

    tensors = ("disha",)
    row_axes = {}
    row_block = "rank"  # it works on square blocks
    no_peft = "peft's bat shares its blocks along the outputs, ours along the inputs"

    def __init__(self, linear: AnyLinear, rank: int):
        super().__init__(linear)
        if refused := self.refusal(linear.out_features, linear.in_features, rank):
            raise UserError(f"The rank of Bat, {rank}, {refused}.")
        shape = self.shapes(linear.out_features, linear.in_features, rank)["disha"]
        self.disha = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device_of(linear)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted layer's output, [..., out]."""
        D = self.disha.to(x.dtype)
        u = torch.einsum("...bk,bjk->...bj", x.unflatten(-1, (len(D), -1)), D)  # [..., in/r, r]
        y = self.linear(x + u.flatten(-2))
        return (y.unflatten(-1, (-1, D.shape[-1])) + u.sum(-2, keepdim=True)).flatten(-2)

    @staticmethod
    def shapes(outputs: int, inputs: int, rank: int, **_: Any) -> dict[str, tuple[int, ...]]:
        """Return the trained tensors' shapes by name."""
        return {"disha": (inputs // rank, rank, rank)}

    @staticmethod
    def refusal(outputs: int, inputs: int, rank: int, **_: Any) -> str:
        """Return why these options do not fit a layer of this size, or ""."""
        common = math.gcd(outputs, inputs)
        return (
            f"must divide {common}, to cut a layer into square blocks; or use MiSS, which takes any"
            if common % rank
            else ""
        )

    @staticmethod
    def merge(weight: Tensor, tensors: dict[str, Tensor], sidecar: Mapping[str, Any]) -> Tensor:
        """Return the merged weight, [out, in]."""
        D = tensors["disha"].to(compute_dtype(weight.dtype))
        blocks, rank, _ = D.shape
        W = weight.to(D.dtype).reshape(-1, rank, blocks, rank)  # [out/r, r, in/r, r]
        return (W + torch.einsum("aibj,bjk->aibk", W, D) + D.transpose(0, 1)).reshape(weight.shape)
