"""Chat data in JSONL -> .bin/.idx with roles: our pipeline beside one on the `rwkv` package's Python tokenizer, on one core,
interleaved in one run.

usage: python bench/tokenize.py [--megabytes 256] [--peer-megabytes 3] [--rounds 5] [--workers N] [--json FILE]

The data are dialogues in English and Chinese, made of the sentences of data/sample.jsonl and data/pretrain.jsonl in a seeded
order: one to three questions of one sentence or paragraph, with answers of 2 to 8 of them.
Both sides read, render, encode, find the answers, check by decoding, and write ids and who said each.
The peer is what the field's converters do: json.loads, the turns' text, TRIE_TOKENIZER.encode, decode and compare, write; it
works on a part of the same rows, because it takes long. Megabytes are of JSONL; times are of warm runs.
"""

from __future__ import annotations

import sys

sys.path[0] = __file__.rpartition("bench")[
    0
]  # the kit, instead of this folder: our name hides a module of Python's own

# ruff: noqa: E402
import argparse
import contextlib
import io
import json
import os
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from rwkv_peft.config.shell import Script, parse_assignments
from rwkv_peft.data.binidx import Writer
from rwkv_peft.preprocess.config import TokenizeConfig
from rwkv_peft.preprocess.tokenize import tokenize
from rwkv_peft.text.roles import Role

ROOT = Path(__file__).resolve().parent.parent
SENTENCES = (2, 4, 8)  # of an answer


def sentences() -> list[str]:
    sentences = []
    for name in ("sample.jsonl", "pretrain.jsonl"):
        for line in (ROOT / "data" / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            turns = (
                row.get("messages") or row.get("conversations") or [{"content": t} for t in row["text"].split("\n\n")]
            )
            sentences += [
                (turn.get("content") or turn.get("value")).removeprefix("User: ").removeprefix("Assistant: ")
                for turn in turns
            ]
    return [s.strip() for s in sentences if s.strip()]


def write_chats(path: Path, size: int) -> tuple[int, int, int]:
    """About `size` bytes of dialogues; returns how many exactly, of how many rows and messages."""
    order, known, written, rows, turns = random.Random(0), sentences(), 0, 0, 0
    with open(path, "wb") as file:
        while written < size:
            messages = []
            for _ in range(order.choice((1, 1, 2, 3))):
                messages.append({"role": "user", "content": order.choice(known)})
                answer = "\n".join(order.choices(known, k=order.choice(SENTENCES)))
                messages.append({"role": "assistant", "content": answer})
            written += file.write(json.dumps({"messages": messages}, ensure_ascii=False).encode() + b"\n")
            rows, turns = rows + 1, turns + len(messages)
    return written, rows, turns


def peer(path: Path, prefix: Path, tokenizer) -> None:
    """The field's way, with the roles that ours finds as well (turn by turn, which for the peer is the quickest)."""
    names = {"user": "User", "assistant": "Assistant"}
    with (
        Writer(prefix, {"": np.dtype(np.uint16), ".roles": np.dtype(np.uint8)}) as writer,
        open(path, encoding="utf-8") as file,
    ):
        for line in file:
            ids, roles = [], []
            for message in json.loads(line)["messages"]:
                text = f"{names[message['role']]}: {message['content']}\n\n"
                some = tokenizer.encode(text)
                if tokenizer.decode(some) != text:
                    raise ValueError(line)
                ids += some
                roles += [Role.ASSISTANT if message["role"] == "assistant" else Role.USER] * len(some)
            writer.add({"": np.array([*ids, 0], np.uint16), ".roles": np.array([*roles, roles[-1]], np.uint8)})
        writer.commit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--peer-megabytes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    import rwkv
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    trie = TRIE_TOKENIZER(str(Path(rwkv.__file__).parent / "rwkv_vocab_v20230424.txt"))
    script = ROOT / "make_tokenize.sh"
    values = parse_assignments(script) | {"OVERWRITE_CACHE": "1", "WORKERS": str(given.workers)}
    config = Script(script, values).read(TokenizeConfig)
    speeds: dict[str, list[float]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "chats.jsonl", Path(folder) / "peer.jsonl"
        written, rows, turns = write_chats(ours, given.megabytes * 10**6)
        sizes = {"ours": written, "peer": write_chats(theirs, given.peer_megabytes * 10**6)[0]}
        for round_ in range(given.rounds + 1):
            for name, run in (
                ("ours", lambda: tokenize(ours, config, 1, True)),
                ("peer", lambda: peer(theirs, theirs.with_suffix(""), trie)),
            ):
                begin = time.perf_counter()
                with contextlib.redirect_stdout(io.StringIO()):
                    run()
                if round_:  # the first is the warm-up
                    speeds[name].append(sizes[name] / 1e6 / (time.perf_counter() - begin))
        on_peers_rows = tokenize_quietly(theirs, config)
    medians = {name: statistics.median(rates) for name, rates in speeds.items()}
    cores = given.workers
    print(f"JSONL chats -> .bin/.idx with roles, report and picture; {platform.machine()}, {os.cpu_count()} cores, "
          f"Python {platform.python_version()}, {given.rounds} interleaved rounds")  # fmt: skip
    print(f"  {rows:,} rows, {written / rows:,.0f} bytes and {turns / rows:.1f} messages each")
    for name, words in (("ours", f"make_tokenize.sh, WORKERS={cores}"), ("peer", "Python tokenizer, 1 process")):
        rates = speeds[name]
        print(
            f"  {words:<30} {medians[name]:7.1f} MB/s  ({min(rates):.1f} to {max(rates):.1f}) of {sizes[name] / 1e6:.0f} MB"
        )
    per_core = medians["ours"] / cores
    print(f"a core: {per_core:.1f} MB/s of JSONL, end to end")
    print(f"ratio: ours is {per_core / medians['peer']:.1f} times as fast as the peer, core for core")
    if given.json:
        given.json.write_text(
            json.dumps({"mb_per_s": speeds, "medians": medians, "workers": cores, "check": on_peers_rows})
        )


def tokenize_quietly(path: Path, config: TokenizeConfig) -> int:
    """Tokens that ours makes of the peer's rows: a sign that both did the same work."""
    with contextlib.redirect_stdout(io.StringIO()):
        return tokenize(path, config, 1, True)["tokens"]["once"]


if __name__ == "__main__":
    main()
