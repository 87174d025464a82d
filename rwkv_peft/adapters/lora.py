"""LoRA: W + alpha/r * B A (https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Adapter


class Lora(Adapter):
    """lora_A [r, in], lora_B [out, r], float32. B starts at zero: a fresh adapter changes nothing."""

    tensors = ("lora_A", "lora_B")

    def __init__(self, linear: nn.Module, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__(linear)
        outputs, inputs = linear.weight.shape
        device = linear.weight.device
        self.scale, self.dropout = alpha / rank, dropout
        self.lora_A = nn.Parameter(torch.empty(rank, inputs, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))
        return self.linear(x) + self.scale * F.linear(inner, self.lora_B.to(x.dtype))

    @staticmethod
    def merge(weight: Tensor, tensors: dict[str, Tensor], sidecar: dict) -> Tensor:
        delta = tensors["lora_B"].float() @ tensors["lora_A"].float()
        return weight.to(delta.dtype).add(delta, alpha=sidecar["alpha"] / sidecar["rank"])
