"""Small tokenized files of known content, and the objects that loading makes of them."""

from __future__ import annotations

import functools
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np

from rwkv_peft.data import buckets
from rwkv_peft.data.binidx import Reader, Writer
from rwkv_peft.data.dataset import TokenDataset
from rwkv_peft.data.token_source import TokenSource
from rwkv_peft.text.roles import Role

MODES = ("pack", "concat", "pad", "only", "bucket", "get", "magic")
MASKS = ("none", "pad", "qa", "last")


def documents(sizes, seed: int = 0, ended: float = 0.7) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Tokens and roles of documents of these sizes; every token that is not the end of its document occurs once."""
    random, ids, roles, token = np.random.default_rng(seed), [], [], 1
    for size in sizes:
        tokens = np.arange(token, token + size)
        token += size
        if size and random.random() < ended:
            tokens[-1] = 0
        ids.append(tokens)
        turns = random.choice(
            [Role.TEXT, Role.USER, Role.ASSISTANT, Role.ASSISTANT, Role.UNTRAINED], size=size // 3 + 1
        )
        roles.append(np.repeat(turns, 3)[:size])
    return ids, roles


def write(prefix: Path, ids, roles=None) -> Path:
    streams = {"": np.uint16} | ({".roles": np.uint8} if roles is not None else {})
    with Writer(prefix, streams) as writer:
        for i, tokens in enumerate(ids):
            writer.add({"": tokens} | ({".roles": roles[i]} if roles is not None else {}))
        writer.commit()
    return prefix


def source(ids, roles=None, weight=1, find=None) -> TokenSource:
    """A file that is gone from its folder when this returns, but not from its readers."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = write(Path(folder) / "file", ids, roles)
        known = Reader(f"{prefix}.roles") if roles is not None else find
        return TokenSource(Reader(prefix), known, 65536, Fraction(weight))


def data(
    sources, mode="pack", mask="pad", ctx_len=16, overlong="truncate", shuffle=True, accumulate=1, world=1, **other
):
    choose = None
    if mode == "bucket":
        edges, sizes, budget = (
            other.get(name, default) for name, default in (("edges", ()), ("sizes", ()), ("budget", None))
        )
        choose = functools.partial(
            buckets.make_buckets, edges=edges, sizes=sizes, budget=budget, accumulate=accumulate, world=world
        )
    return TokenDataset(sources, mode, mask, ctx_len, overlong, other.get("seed", 1), shuffle, choose)
