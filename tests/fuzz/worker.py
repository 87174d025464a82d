"""One harness in one process: coverage-guided with atheris where it is installed, else changed inputs alone.

The parent reads a file of shared memory: how many inputs were judged, and the one that is being judged now, in case
that this process ends or does not answer."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import mmap
import os
import random
import struct
import sys
import time
from pathlib import Path

from fuzz.harness import Finding, Harness, Judge, key_of, limit_addresses

HEAD = struct.Struct("<QQQ")  # inputs judged, inputs that were large ones, bytes of the present one
ROOM = 8 << 20  # bytes of the largest input
GROW_EVERY, GROW_SHARE = 2.0, 0.2  # seconds between two large inputs, and their share of the time
GROWN = 1 << 16  # bytes of a large input
LIMIT_EVERY = 10_000  # inputs: what the fuzzer itself keeps grows, and is none of the input's memory


def instrument():
    """A context in which imported modules of the kit are made to report which of their lines ran; None without
    atheris."""
    if os.environ.get("FUZZ_WITHOUT_ATHERIS") or importlib.util.find_spec("atheris") is None:
        return None
    import atheris

    return atheris.instrument_imports(include=["rwkv_peft"])


def load(name: str) -> Harness:
    harness = importlib.import_module(f"fuzz.harnesses.{name}").It()
    harness.name = name
    return harness


class Worker:
    """results: the folder for findings and the corpus; shared: the file that the parent reads."""

    def __init__(self, harness: Harness, results: Path, shared: Path, folder: Path):
        self.harness, self.results = harness, results
        with open(shared, "r+b") as file:
            self.memory = mmap.mmap(file.fileno(), HEAD.size + ROOM)
        self.judged = self.grew = 0
        self.reported: set[str] = set()
        self.judge = Judge(harness, folder)
        self.inputs = [path.read_bytes() for path in harness.seeds()] or [b""]
        self.spent, self.begun = 0.0, time.monotonic()
        self.next_growth = self.begun + GROW_EVERY
        self.random = random.Random()

    def note(self, data: bytes) -> None:
        self.memory[: HEAD.size] = HEAD.pack(self.judged, self.grew, len(data))
        self.memory[HEAD.size : HEAD.size + len(data)] = data

    def one(self, data: bytes) -> str:
        """Judge an input; a finding is written down, and the work continues."""
        if len(data) > ROOM:
            return "too large"
        self.note(data)
        if self.judged % LIMIT_EVERY == 0:
            limit_addresses()
        try:
            return self.judge.judge(data)
        except Finding as finding:
            return self.write(finding, data)
        finally:
            self.judged += 1

    def write(self, finding: Finding, data: bytes) -> str:
        key = key_of(finding)
        path = self.results / "findings" / self.harness.name / key
        if key not in self.reported or len(data) < path.stat().st_size:
            self.reported.add(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            path.with_name(f"{key}.txt").write_text(str(finding), encoding="utf-8", errors="backslashreplace")
        return key

    def grow_now_and_then(self) -> None:
        """Whether time grows with the size, for some part of some input."""
        now = time.monotonic()
        if now < self.next_growth or self.spent > GROW_SHARE * (now - self.begun):
            return
        data, seed = self.random.choice(self.inputs), self.random.getrandbits(32)
        try:
            self.note(self.harness.grown(data, random.Random(seed), GROWN)[:ROOM])
            self.judge.grow(data, seed, GROWN)
        except Finding as finding:
            self.write(finding, getattr(finding, "data", None) or self.harness.grown(data, random.Random(seed), GROWN))
        self.grew += 1
        self.spent += time.monotonic() - now
        self.next_growth = time.monotonic() + GROW_EVERY

    def with_coverage(self, seconds: float, runs: int, seed: int) -> None:
        """Does not return: atheris ends the process."""
        import atheris

        corpus = self.results / "corpus" / self.harness.name
        corpus.mkdir(parents=True, exist_ok=True)
        first = Path(self.judge.folder).with_name("seeds")
        first.mkdir()
        for number, path in enumerate(self.harness.seeds()):
            (first / f"{number:04}").write_bytes(path.read_bytes())

        def one(data: bytes) -> None:
            self.grow_now_and_then()
            self.one(data)

        def change(data: bytes, most: int, seed: int) -> bytes:
            source = random.Random(seed)
            if source.random() < 0.3:
                return atheris.Mutate(data, most)
            return self.harness.mutate(data, source, source.choice(self.inputs))[:most]

        arguments = ["fuzz", f"-max_total_time={max(1, int(seconds))}", f"-max_len={self.harness.longest}", "-timeout=1000000",
                     "-rss_limit_mb=0", f"-seed={seed}", str(corpus), str(first)]  # fmt: skip
        if runs:
            arguments.insert(1, f"-runs={runs}")
        atheris.Setup(arguments, one, custom_mutator=change)
        atheris.Fuzz()

    def without(self, seconds: float, runs: int, seed: int) -> None:
        """Inputs that had an outcome of their own are kept, and changed in turn."""
        end, source, seen = time.monotonic() + seconds, random.Random(seed), set()
        for data in self.inputs:
            seen.add(self.one(data))
        kept = list(self.inputs)
        while time.monotonic() < end and not (runs and self.judged >= runs):
            self.grow_now_and_then()
            data = self.harness.mutate(source.choice(kept), source, source.choice(kept))[: self.harness.longest]
            outcome = self.one(data)
            if outcome not in seen:
                seen.add(outcome)
                kept.append(data)
        print(f"#{self.judged} DONE cov: 0 ft: {len(seen)} corp: {len(kept)}/", file=sys.stderr, flush=True)
        self.note(b"")


def main(arguments: list[str]) -> None:
    facts = json.loads(arguments[0])
    with instrument() or contextlib.nullcontext():
        harness = load(facts["harness"])
    results, shared, folder = (Path(facts[name]) for name in ("results", "shared", "folder"))
    worker = Worker(harness, results, shared, folder)
    print("READY", file=sys.stderr, flush=True)
    way = worker.without if instrument() is None else worker.with_coverage
    way(max(facts["least"], facts["until"] - time.time()), facts["runs"], facts["seed"])


if __name__ == "__main__":
    main(sys.argv[1:])
