"""The memory that make_tokenize.sh takes for a large file: all its processes together, beside a bare interpreter.

usage: python bench/tokenize_memory.py [--gigabytes 2] [--workers auto] [--folder /tmp]

Writes dialogues as bench/tokenize.py does, tokenizes them, and looks every quarter of a second at the proportional set size
of the process and its children (Linux: /proc/PID/smaps_rollup). Pages of files that the kernel may drop are not in it.
"""

from __future__ import annotations

import sys

sys.path[0] = __file__.rpartition("bench")[
    0
]  # the kit, instead of this folder: tokenize.py here hides a module of Python's own

# ruff: noqa: E402
import argparse
import contextlib
import importlib.util
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def family(pid: int) -> list[int]:
    """The process and all that it has started."""
    pids = [pid]
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                pids += family(int(child))
    return pids


def megabytes(pid: int) -> float:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def peak(command: list[str]) -> tuple[float, float, str]:
    """Megabytes at most, seconds, and what it printed."""
    begin, most = time.monotonic(), 0.0
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen(command, stdout=said) as process:
        while process.poll() is None:
            most = max(most, sum(map(megabytes, family(process.pid))))
            time.sleep(0.25)
        said.seek(0)
        if process.returncode:
            sys.exit(f"{command[0]} ended with {process.returncode}")
        return most, time.monotonic() - begin, said.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--workers", default="auto")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args()
    spec = importlib.util.spec_from_file_location("bench_tokenize", ROOT / "bench/tokenize.py")
    chats = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chats)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        path = Path(folder) / "chats.jsonl"
        size, rows, _ = chats.write_chats(path, int(given.gigabytes * 1e9))
        bare, _, _ = peak([sys.executable, "-c", "import time; time.sleep(1)"])
        most, seconds, said = peak([str(ROOT / "make_tokenize.sh"), str(path), "--workers", given.workers])
    print(said.splitlines()[0])
    print(
        f"{size / 1e9:.2f} GB, {rows:,} rows in {seconds:.0f} s ({size / 1e6 / seconds:.1f} MB/s), WORKERS={given.workers}"
    )
    print(f"peak: {most:.0f} MB, {most - bare:.0f} MB above a bare interpreter ({bare:.0f} MB)")


if __name__ == "__main__":
    main()
