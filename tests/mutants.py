"""Mutants: small faults planted in a copy of the kit, one at a time; the default tests of the package must fail for each.

    python tests/mutants.py                 plant each in this commit, and print which were killed
    python tests/mutants.py --commit NAME   the same for another commit
    python tests/mutants.py -k adapters     only those whose file has this in its path

Each line is a file, what is there, what is put in its place, and the tests that are run (of the commit's own suite, without
slow ones). Exit code 1 if one survives or has no place.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# the file in rwkv_peft/, the words there, the fault, the tests
MUTANTS = [
    ("adapters/lora.py", "math.sqrt(rank) if rslora else rank", "rank if rslora else rank", "adapters"),
    ("adapters/dora.py", "more = (gain - 1).to", "more = (gain - 0.9).to", "adapters"),
    ("adapters/pissa.py", 'row_axes = {"lora_B": 0, ', "row_axes = {", "merge"),
    ("quantize/int8_fp8.py", "row_scale(weight, 127)", "row_scale(weight, 126)", "quantize"),
    ("quantize/int8_fp8.py", ".clamp_(-448, 448)", "", "quantize"),
    ("export/cast.py", "if max(-low, high) > limit:", "if high > limit:", "export"),
    ("export/state.py", "tensor.transpose(1, 2) for name", "tensor for name", "export"),
    (
        "merge/fold.py",
        "(part.apply(name, first, first) - first) * share",
        "(part.apply(name, first, first)) * share",
        "merge",
    ),
    (
        "merge/fold.py",
        "if not base.is_floating_point():  # no weights, and no means",
        "if False:  # no weights, and no means",
        "merge",
    ),
    ("model/generate.py", "if token in stop_tokens:", "if False:", "model chat"),
    ("model/generate.py", "[: min(", "[: max(", "model chat"),
    ("model/generate.py", "keep[0] = True", "pass", "model chat"),
    ("ops/loss.py", "loss += more", "loss = more", "ops"),
    ("ops/loss.py", "dweight +=", "dweight =", "ops"),
    ("ops/block_ops.py", "torch.relu", "torch.nn.functional.gelu", "ops model"),
    ("data/masking.py", "~answers[:-1] | starts[1:]", "~answers[:-1]", "data"),
    ("data/masking.py", "out[-1] = roles[-1]", "pass", "data"),
    ("data/packing.py", "each = min(room // length, items)", "each = min(room // length + 1, items)", "data"),
    ("data/sampling.py", "np.random.default_rng([*self.key, number])", "np.random.default_rng([*self.key, 0])", "data"),
    (
        "text/template.py",
        r'content.replace("\r\n", "\n").replace("\r", "\n") if',
        "content if",
        "text",
    ),
    (
        "config/strategies.py",
        '"deepspeed_stage_3": Strategy("weights", 3)',
        '"deepspeed_stage_3": Strategy("memory", 3)',
        "config distributed train",
    ),
    ("config/shell.py", 'if f.type in (bool, "bool")', "if f.type in ()", "config"),
    ("checkpoint/run_dir.py", "if n <= step][:-keep]", "if n < step][:-keep]", "checkpoint train"),
    (
        "checkpoint/train_state.py",
        "(name) > step:",
        "(name) > step + 1000:",
        "checkpoint train",
    ),
    (
        "common/formatting.py",
        'rest // 60:02}:{rest % 60:02}" if hours',
        'rest // 60}:{rest % 60:02}" if hours',
        "common",
    ),
    ("common/atomic_io.py", "os.fsync(file.fileno())", "pass", "common"),
    ("common/errors.py", "EXIT_DISK = 3", "EXIT_DISK = 2", "common kit/test_errors.py"),
    ("distributed/sharding.py", "max=1.0)", "max=2.0)", "distributed train"),
    ("distributed/launch.py", "config.node_rank * config.gpu_count + local", "config.node_rank + local", "distributed"),
    ("preprocess/truncate.py", "if messages[turn].call:", "if False:", "preprocess"),
    (
        "preprocess/truncate.py",
        "raise TooLong(limits.name(messages[i].role))",
        "messages[i] = messages[i]; break",
        "preprocess",
    ),
    (
        "preprocess/keys.py",
        're.sub(r"[\\s\\-_\\ufeff\\u200b]+", "", name).lower()',
        "name.lower()",
        "preprocess/test_schemas.py",
    ),
    ("train/lr_schedule.py", "first * (step + 1) / warmup", "first * step / warmup", "train/test_lr_schedule.py"),
    ("train/callbacks/validation.py", "waited >= self.patience", "waited > self.patience", "train/test_validation.py"),
    ("train/memory_estimate.py", "trained * (master + optim.moments)", "trained * master", "train"),
    (
        "chat/diagnose.py",
        '-(-settings["EPOCH_STEPS"] // settings["MINI_BSZ"])',
        '(settings["EPOCH_STEPS"] // settings["MINI_BSZ"])',
        "kit/test_facts.py chat",
    ),
    ("cli/init_model.py", "if given.out.exists():", "if False:", "cli model"),
]


def tests_at(commit: str, names: str) -> list[str]:
    """Return test files and folders of HEAD as an earlier commit called them."""
    changes = subprocess.run(
        ["git", "diff", "--name-status", "-M40%", commit, "HEAD", "--", "tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    earlier = {
        new: old for kind, old, *more in map(str.split, changes.stdout.splitlines()) for new in more if kind[0] == "R"
    }
    listed = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", commit, "tests"], cwd=ROOT, capture_output=True, text=True
    )
    there = set(listed.stdout.split())
    result = []
    for name in names.split():
        path = ROOT / "tests" / name
        files = [path] if path.is_file() else sorted(path.rglob("test_*.py"))
        here = [file.relative_to(ROOT).as_posix() for file in files]
        result += [old for old in (earlier.get(file, file) for file in here) if old in there]
    return result


def killed(tree: Path, file: str, words: str, fault: str, tests: list[str]) -> tuple[bool | None, str]:
    """Plant one fault and run the tests. Returns whether one failed (None: there is no place for it), and which."""
    path = tree / "rwkv_peft" / file
    whole = path.read_text(encoding="utf-8") if path.is_file() else ""
    if whole.count(words) != 1:
        return None, f"{whole.count(words)} places"
    path.write_text(whole.replace(words, fault), encoding="utf-8")
    try:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-x",
                "-n",
                "0",
                "-p",
                "no:cacheprovider",
                "-m",
                "not slow and not gpu",
                *tests,
            ],
            cwd=tree,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    finally:
        path.write_text(whole, encoding="utf-8")
    failed = [line.partition(" - ")[0] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 1 or bool(failed), failed[0] if failed else f"exit code {done.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--commit", default="HEAD")
    parser.add_argument("-k", default="", help="part of the file's path")
    given = parser.parse_args()
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "kit"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(tree), given.commit], cwd=ROOT, check=True)
        try:
            (tree / ".venv").symlink_to(ROOT / ".venv")
            for file, words, fault, tests in MUTANTS:
                if given.k in file:
                    began = time.monotonic()
                    dead, why = killed(tree, file, words, fault, tests_at(given.commit, tests))
                    survived += not dead
                    word = {True: "killed", False: "SURVIVED", None: "NO PLACE"}[dead]
                    print(
                        f"{word:9} {file}: {words.strip()[:60]!r} {why} ({time.monotonic() - began:.0f} s)", flush=True
                    )
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    print(f"{survived} survived")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
