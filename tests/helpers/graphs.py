"""A model that trains with CUDA graphs, its batches and its steps."""

from __future__ import annotations

import itertools

import torch

from helpers import tiny
from rwkv_peft.adapters import inject
from rwkv_peft.data.dataset import Batch
from rwkv_peft.model.rwkv import build
from rwkv_peft.ops import dispatch
from rwkv_peft.train.cuda_graphs import Graphs

BOUNDS = (0, 8, 16, 24)


def learner(method="lora", version="x070", recompute="nothing", dropout=0.0, said=None, op="torch", **more):
    """A model that trains, with graphs if there is somebody to report."""
    torch.manual_seed(0)
    shape = tiny.geometry(version=version)
    model = build(shape, tiny.tensors(0, shape), dispatch.made(op, version), torch.float32, recompute)
    options = {"rank": 4, "alpha": 8.0} if method == "lora" else {}
    inject.inject_adapters(model, inject.AdapterConfig(method, options, ("att", "ffn"), dropout, **more), torch.float32)
    model.train()
    if said is not None:
        model.replay = Graphs(model, said.append)
    return model


def batch(seed, bounds=BOUNDS, device="cpu"):
    ids = torch.randint(1, 200, (1, bounds[-1]), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(seed % 3, bounds[-1])  # (another number of rows that count each time)
    targets = ids[0, positions].to(device)
    return Batch(ids.to(device), bounds, positions.to(device), targets, len(positions), bounds[-1])


def loss_of(model, given):
    x, _ = model.features(given.ids, cu_seqlens=given.cu_seqlens, carry=False)
    return model.ops.cross_entropy(x[0].index_select(0, given.positions), model.head_weight(), given.targets)


def steps(model, count=5, micro=2, bounds=(BOUNDS,), batches=None):
    """What a model learns in some steps of some micro-batches each: its parameters."""
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learnt, lr=1e-2)
    given = itertools.cycle(batches or [batch(seed, bounds[seed % len(bounds)]) for seed in range(count * micro)])
    for _ in range(count):
        for _ in range(micro):
            loss_of(model, next(given)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return learnt
