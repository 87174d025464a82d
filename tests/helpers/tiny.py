"""Tiny RWKV files and data. Vocabularies are prefixes of the World vocabulary: text becomes ids below 65536, so the
models that see text have all of it; the others are smaller."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from rwkv_peft.checkpoint import pth
from rwkv_peft.model.arch import ARCHS, Geometry
from rwkv_peft.model.init_weights import initial_tensors, new_geometry
from rwkv_peft.model.rwkv import RWKV, build
from rwkv_peft.ops import dispatch

CHATS = [
    {"text": "User: What is red?\n\nAssistant: A colour, like a ripe tomato."},
    {"text": "User: 你好！\n\nAssistant: 你好。\n\nUser: 一加一？\n\nAssistant: 二。"},
    {"messages": [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two, three."}]},
    {
        "conversations": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Sky?"},
            {"role": "assistant", "content": "Blue."},
            {"role": "user", "content": "草？"},
            {"role": "assistant", "content": "绿色的，\n\n一直都是。"},
        ]
    },
    {"text": "User: Repeat it.\n\nAssistant: " + "It is so. " * 12},
    {"text": "User: Night?\n\nAssistant: Dark and quiet."},
    {"text": "User: Sea?\n\nAssistant: Salt, wind, gulls."},
    {"text": "User: 海？\n\nAssistant: 盐、风和海鸥。"},
]


VERSIONS = list(ARCHS)


def geometry(
    layers: int = 2, width: int = 32, vocab: int = 65536, head_size: int = 16, version: str = "x070"
) -> Geometry:
    return new_geometry(version, layers, width, vocab, head_size)


def tensors(seed: int = 0, shape: Geometry | None = None) -> dict[str, torch.Tensor]:
    """Random weights in which nothing is zero or one: every part of the model shows in its output."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, tensor in initial_tensors(shape or geometry(), seed).items():
        noise = torch.randn(tensor.shape, generator=generator)
        scale = 0.5 if name == "emb.weight" else 1.0 / tensor.shape[-1] ** 0.5 if tensor.dim() == 2 else 0.2
        out[name] = tensor + scale * noise
    return out


def model(seed: int = 0, shape: Geometry | None = None, **options) -> RWKV:
    shape = shape or geometry()
    return build(shape, tensors(seed, shape), ops(shape), keep=options.get("dtype"), **options)


def ops(shape: Geometry, op: str = "torch"):
    return dispatch.choose(op, shape.version)


def save_model(path: Path, seed: int = 0, shape: Geometry | None = None, dtype=torch.float32) -> Path:
    pth.save(path, {n: t.to(dtype) for n, t in tensors(seed, shape).items()})
    return path


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def wkv_inputs(batch: int, tokens: int, heads: int, size: int, kind: str = "random", dtype=torch.float32):
    """r, w, k, v, a, b as a model makes them. kind: random, repeated (the same key again and again, replaced almost
    wholly: the case in which a careless inverse blows up), fast or slow (decay at its ends)."""
    shape = (batch, tokens, heads, size)
    r, k, v = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    w = -0.6065306597126334 * torch.sigmoid(3 * torch.randn(shape, dtype=torch.float64))
    kk = torch.nn.functional.normalize(torch.randn(shape, dtype=torch.float64), dim=-1)
    a = torch.sigmoid(torch.randn(shape, dtype=torch.float64))
    if kind == "repeated":
        kk, k = kk[:, :1].expand(shape), k[:, :1].expand(shape)
        a, w = torch.full_like(a, 0.999), torch.full_like(w, -1e-3)
    if kind == "fast":
        w = torch.full_like(w, -0.6065306597126334)
    if kind == "slow":
        w = torch.zeros_like(w)
    return [x.to(dtype).clone().requires_grad_() for x in (r, w, k, v, -kk, kk * a)]


def wkv6_inputs(
    batch: int, tokens: int, heads: int, size: int, kind: str = "random", dtype=torch.float32, constant: bool = False
):
    """r, w, k, v, u for WKV-6; constant: one decay for all tokens, for WKV-5. kind: random, repeated (the same key again
    and again), fast (decays from exp(-20) to none at all), slow (no decay), mixed (one token, or channel, that forgets
    everything among slow ones: a running sum of logarithms would have no digits left behind it)."""
    shape = (batch, tokens, heads, size)
    r, k, v = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    u = torch.randn(heads, size, dtype=torch.float64)
    w = -torch.exp(2 * torch.randn(shape[2:] if constant else shape, dtype=torch.float64) - 2)
    if kind == "repeated":
        k, w = k[:, :1].expand(shape), torch.full_like(w, -1e-3)
    if kind == "fast":
        w = -20 * 5000 ** torch.rand_like(w)
        w[..., 0] = -torch.inf
    if kind == "slow":
        w = torch.zeros_like(w)
    if kind == "mixed":
        w = -0.01 * torch.rand_like(w)
        (w[..., size // 2] if constant else w[:, tokens // 2]).fill_(-1e4)
    return [x.to(dtype).clone().requires_grad_() for x in (r, w, k, v, u)]


def state_facts(step: int) -> dict:
    """What the manifest of a state says, with little in it."""
    return {
        "step": step, "steps": 99, "finished": False, "world": 1, "settings": {}, "became": {}, "plan": {}, "tokens": 0,
        "base": {"name": "x.pth", "sha256": "0" * 64, "mark": None}, "data": {"files": []}, "options": {}, "start_sha256": None,
        "optimizer": {}, "scaler": None, "blocks": None, "wandb": None,
    }  # fmt: skip
