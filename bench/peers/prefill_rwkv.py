"""The rwkv package reads the tokens and says the logits of all of them. It trains nothing: no backward pass, no optimizer."""

from __future__ import annotations

import os

os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}  # read when the package is imported

# ruff: noqa: E402
from importlib.metadata import version

import protocol
import torch
from rwkv.model import RWKV


def make():
    model = RWKV(model=given.child.removesuffix(".pth"), strategy=f"cpu {given.precision}")

    def forward() -> list[torch.Tensor]:
        return [model.forward(row, None, full_output=True)[0] for row in rows]

    about = {"implementation": "rwkv prefill", "version": version("rwkv"), "trains": False}
    return about, forward


def loss_of(logits: list[torch.Tensor]) -> float:
    return float(torch.nn.functional.cross_entropy(torch.cat(logits).float(), targets.flatten()))


given = protocol.given()
inputs, targets = protocol.tokens(given.batch, given.ctx, given.vocab)
rows = inputs.tolist()
protocol.serve(given.threads, make, 3, loss_of)  # the JIT compiles in the second pass
