"""The loader: tokens per second that one worker prepares, in every way to batch, interleaved in one run.

usage: python bench/loader.py [--documents 200000] [--batches 300] [--rounds 5] [--mask qa] [--ctx-len 1024] [--json FILE]

Writes a synthetic file (lengths log-normal around 300 tokens, half of them answers) and takes micro-batches of about 16,384
tokens from each mode in turn. Prints for each mode the median of tokens/s over the rounds, its spread, and the ratio to one
million; then the time of the start (everything that is known of the data before the first batch) and of making a pass, and
the memory per document (the index file itself is 20 bytes).
"""

from __future__ import annotations

import sys

sys.path[0] = __file__.rpartition("bench")[
    0
]  # the kit, instead of this folder: tokenize.py here hides a module of Python's own

# ruff: noqa: E402
import argparse
import functools
import json
import platform
import statistics
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import torch

from rwkv_peft.data import buckets
from rwkv_peft.data.binidx import Reader, index_chunks
from rwkv_peft.data.dataset import Batches, TokenDataset
from rwkv_peft.data.token_source import TokenSource
from rwkv_peft.text.roles import Role

MODES = ("pack", "concat", "pad", "only", "bucket", "get", "magic")
TOKENS = 16_384  # of a micro-batch
GOAL = 1e6  # tokens per second


def write(prefix: Path, documents: int) -> None:
    """Turns of random length; written in blocks, so that the file may be larger than the memory."""
    random = np.random.default_rng(0)
    sizes = random.lognormal(np.log(300), 0.8, documents).astype(int).clip(4, 8192)
    for ending, dtype in (("", np.uint16), (".roles", np.uint8)):
        Path(f"{prefix}{ending}.idx").write_bytes(b"".join(index_chunks(sizes, dtype)))
    with open(f"{prefix}.bin", "wb") as tokens, open(f"{prefix}.roles.bin", "wb") as roles:
        for size in sizes:
            ids = random.integers(1, 65530, size, dtype=np.uint16)
            ids[-1] = 0
            said = np.full(size, Role.USER, dtype=np.uint8)
            said[size // 2 :] = Role.ASSISTANT
            tokens.write(ids.tobytes())
            roles.write(said.tobytes())


def make(prefix: Path, mode: str, given) -> tuple[TokenDataset, Batches]:
    needed = given.mask in ("qa", "last")
    source = TokenSource(Reader(prefix), Reader(f"{prefix}.roles") if needed else None, 65536)
    choose = functools.partial(buckets.make_buckets, edges=(), sizes=(), budget=TOKENS, accumulate=1, world=1)
    data = TokenDataset(
        [source], mode, given.mask, given.ctx_len, "truncate", 42, True, choose if mode == "bucket" else None
    )
    rows = max(1, TOKENS // (given.ctx_len if mode not in ("pad", "only") else 300))
    return data, Batches(data, data.make_plan(None, rows, 1, 1), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mask", choices=("none", "pad", "qa", "last"), default="qa")
    parser.add_argument("--ctx-len", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = {mode: {"tokens_per_s": []} for mode in MODES}
    with tempfile.TemporaryDirectory(prefix="batches-loader-") as folder:
        prefix = Path(folder) / "synthetic"
        write(prefix, given.documents)
        made = {}
        for mode in MODES:
            begin = time.perf_counter()
            data, batches = make(prefix, mode, given)
            started = time.perf_counter()
            data.streams[0].make_pass(0) if mode != "magic" else None
            ended = time.perf_counter()
            made[mode] = batches
            results[mode] |= {"start_s": started - begin, "pass_s": ended - started, "rows": data.rows}
            # once more with every allocation counted (mapped files are none)
            tracemalloc.start()
            kept = make(prefix, mode, given)
            kept[1][0]
            live, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            del kept
            results[mode] |= {"held": live / given.documents, "peak": peak / given.documents}
        for turn in range(given.rounds + 1):  # the first warms up the pages of the file
            for mode, batches in made.items():
                tokens, begin = 0, time.perf_counter()
                for i in range(given.batches):
                    tokens += batches[(turn * given.batches + i) % len(batches)].tokens
                if turn:
                    results[mode]["tokens_per_s"].append(tokens / (time.perf_counter() - begin))
    print(
        f"{given.documents:,} documents, LOSS_MASK={given.mask}, CTX_LEN={given.ctx_len}, micro-batches of about {TOKENS:,} "
        f"tokens; {platform.machine()}, one process, {given.rounds} interleaved rounds of {given.batches} batches"
    )
    for mode, row in results.items():
        speeds = row["tokens_per_s"]
        middle = statistics.median(speeds)
        print(
            f"  {mode:<7} {middle / 1e6:7.1f} M tokens/s ({min(speeds) / 1e6:.1f} to {max(speeds) / 1e6:.1f})   "
            f"{middle / GOAL:5.1f} times 1 M   start {row['start_s']:.2f} s, a pass {row['pass_s']:.2f} s of "
            f"{row['rows']:,} rows; {row['held']:.0f} bytes a document live, {row['peak']:.0f} at most"
        )
    if given.json:
        given.json.write_text(json.dumps({**vars(given), "results": results}, default=str))


if __name__ == "__main__":
    main()
