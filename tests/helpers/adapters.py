"""Options of every method, and a model whose adapter weights are moved off their start."""

from __future__ import annotations

import torch

from rwkv_peft.adapters import inject

OPTIONS = {
    "lora": {"rank": 4, "alpha": 8.0, "rslora": True}, "dora": {"rank": 4, "alpha": 8.0}, "pissa": {"rank": 4, "niter": 4},
    "miss": {"rank": 4}, "bat": {"rank": 8}, "peft": {"config": {"peft_type": "LOHA", "r": 2, "alpha": 4}},
    "state": {"shifts": True}, "none": {}, "lisa": {"layers": 1, "every": 2}, "full": {},
}  # fmt: skip


def moved(model, seed=5, step=0.1):
    """Something was learnt."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in inject.trainable_params(model).values():
            p.add_(torch.randn(p.shape) * step)
    return {name: p.detach().clone() for name, p in inject.trainable_params(model).items()}
