"""Benchmarks still run: what they measure is for people to read, that they do is for us."""

import subprocess
import sys

import pytest
from helpers.kit import ROOT

TRIED = {
    "step.py": "--geometry tiny --ctx 32 --rounds 1 --precision fp32",
    "memory.py": "--geometry tiny --methods lora --grad-cp 0 --ctx 64 --precision fp32 --steps 2",
    "watching.py": "--geometry tiny --ctx 32 --precision fp32 --steps 2 --rounds 1",
    "resume.py": "--kills 1 --steps 12",
    "file_watch.py": "--geometry tiny --ctx 32 --steps 4 --save-steps 2",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIED)
def test_a_benchmark_runs(name, tmp_path):
    result = tmp_path / "found.json"
    words = [sys.executable, str(ROOT / "bench" / name), *TRIED[name].split(), "--json", str(result)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "ratio" in done.stdout
        or "tokens/s" in done.stdout
        or "largest difference" in done.stdout
        or "share" in done.stdout
    )
    assert result.stat().st_size
