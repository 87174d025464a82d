"""PiSSA: train the largest singular directions of W, freeze the rest (https://arxiv.org/abs/2404.02948).

W = U S V^T. B0 = U_r sqrt(S_r) and A0 = sqrt(S_r) V_r^T begin in the adapter, the frozen layer keeps W - B0 A0, and
W' = W - B0 A0 + B A. There is no alpha: the scale is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_peft.common.errors import UserError
from rwkv_peft.model.layers import Linear

from .base import Adapter, compute_dtype
from .lora import Lora
from .lowrank import lora_linear


class Pissa(Adapter):
    """lora_A [r, in], lora_B [out, r], float32. What they began as must be kept: merging needs the original W and both."""

    tensors = ("lora_A", "lora_B")
    start = ("init_lora_A", "init_lora_B")
    row_axes = {"lora_B": 0, "init_lora_B": 0}
    row_block = "rank"  # a weight with fewer rows is refused
    changes_base = True

    def __init__(self, linear: Linear, rank: int, niter: int, start: dict[str, Tensor] | None = None):
        """start: the factors of an earlier run, to go on from; without it, principal(W, rank, niter)."""
        super().__init__(linear)
        weight = linear.weight.detach()
        outputs, inputs = weight.shape
        if refused := self.refusal(outputs, inputs, rank):
            raise UserError(f"The rank of PiSSA, {rank}, {refused}.")
        if start is None:
            A, B = principal(weight, rank, niter)
        else:
            A, B = (start[leaf].to(weight.device, torch.float32).clone() for leaf in self.start)
        if {"lora_A": A.shape, "lora_B": B.shape} != self.shapes(outputs, inputs, rank):
            raise UserError(
                f"What this PiSSA run began with ({list(A.shape)} and {list(B.shape)}) does not fit a layer of "
                f"{linear.out_features} x {linear.in_features} and rank {rank}: it is of another base or rank."
            )
        kind = compute_dtype(weight.dtype)
        residual = torch.addmm(weight.to(kind), B.to(kind), A.to(kind), alpha=-1)  # one copy of W's size, not three
        # a new tensor: the old one may be mapped from the base's file, or be shared with a caller. It is not rounded here:
        # whoever keeps or compresses it does that, once
        linear.weight = nn.Parameter(residual, requires_grad=linear.weight.requires_grad)
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted layer's output, [..., out]."""
        return lora_linear(self.linear, x, self.lora_A, self.lora_B, 1.0)

    @staticmethod
    def shapes(outputs: int, inputs: int, rank: int, **_: Any) -> dict[str, tuple[int, ...]]:
        """Return the trained tensors' shapes by name."""
        return {"lora_A": (rank, inputs), "lora_B": (outputs, rank)}

    @staticmethod
    def refusal(outputs: int, inputs: int, rank: int, **_: Any) -> str:
        """Return why these options do not fit a layer of this size, or ""."""
        most = min(outputs, inputs)
        return f"must be {most} or less: a layer has no more singular values" if rank > most else ""

    @staticmethod
    def merge(weight: Tensor, tensors: dict[str, Tensor], sidecar: Mapping[str, Any]) -> Tensor:
        """From the original weight, not the residual. What was not trained cancels to the last bit."""
        kind = compute_dtype(weight.dtype)
        A, B, A0, B0 = (tensors[leaf].to(kind) for leaf in (*Pissa.tensors, *Pissa.start))
        return weight.to(kind) + (B @ A - B0 @ A0)

    @staticmethod
    def to_peft(tensors: dict[str, Tensor], sidecar: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """As the LoRA of twice the rank that does the same: B A - B0 A0 = [B, -B0] [A; A0] with scale 1.

        peft would compute the singular values again instead.
        """
        rank = 2 * sidecar["rank"]
        factors = {
            "lora_A": torch.cat([tensors["lora_A"], tensors["init_lora_A"]]),
            "lora_B": torch.cat([tensors["lora_B"], -tensors["init_lora_B"]], dim=1),
        }
        return Lora.to_peft(factors, {"rank": rank, "alpha": rank})

    def begun(self) -> dict[str, Tensor]:
        """Return copies of the start tensors."""
        return {"init_lora_A": self.lora_A.detach().clone(), "init_lora_B": self.lora_B.detach().clone()}


def principal(weight: Tensor, rank: int, niter: int) -> tuple[Tensor, Tensor]:
    """Return A0 [r, in] and B0 [out, r] of a weight [out, in], float32, on its device.

    It uses no outside generator: every process gets the same.

    Args:
        weight: [out, in].
        rank: r.
        niter: Rounds of subspace iteration (https://arxiv.org/abs/0909.4061); 0 is the exact SVD. In the iteration the
            space is half as wide again as the rank, which costs less than more rounds would. On one core, for 8192 x
            2048 and rank 64 where the singular values fall like 1/sqrt(i): exact 6.4 s; 4 rounds 0.5 s, 3e-4 of the
            energy missed; 8 rounds 1.0 s, 3e-6 missed. Where they hardly fall, as in random matrices, which directions
            are taken matters as little.
    """
    most = min(weight.shape)
    weight = weight.float()
    try:
        if niter == 0:
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        else:
            with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
                torch.manual_seed(0)
                U, S, V = torch.svd_lowrank(weight, min(rank + max(8, rank // 2), most), niter)
            Vh = V.T
    except torch.linalg.LinAlgError as error:
        raise UserError(
            "The singular values of a layer cannot be computed: its weight holds NaN or infinity, or is otherwise damaged. "
            "Check the base model."
        ) from error
    root = S[:rank].sqrt()
    # laid out as a loaded file's are: sums in another order would round differently in a resumed run
    return (root[:, None] * Vh[:rank]).contiguous(), (U[:, :rank] * root).contiguous()
