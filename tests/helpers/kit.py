"""A copy of the project that is used through its scripts, and how many values a test takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest  # noqa: E402

from helpers import tiny  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


# EVERYTHING=1 in the shell: more trials and combinations than CI has time for (docs/reliability.md, docs/parallel.md)
EVERYTHING = bool(os.environ.get("EVERYTHING"))


def few(values, kept=()):
    """The values of a parameter: ./test.sh takes those in `kept`, .ci/run all of them."""
    slow = pytest.mark.slow
    return [v if v in kept else pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=slow) for v in values]


SCRIPTS = ("make_tokenize.sh", "training.sh", "merge.sh", "chat.sh")


class Kit:
    """A copy of the kit in a folder of its own, used through its scripts like a user does."""

    def __init__(self, root: Path):
        self.root = root
        for folder in ("rwkv_peft", "json2binidx"):
            shutil.copytree(ROOT / folder, root / folder)  # compiled files too: no process compiles the kit again
        for script in SCRIPTS:
            shutil.copy(ROOT / script, root)
        for folder in ("data", "model", "output", "merge"):
            (root / folder).mkdir()
        (root / ".venv").symlink_to(sys.prefix)

    def set(self, script: str = "training.sh", to: str | None = None, **values: object) -> str:
        """Change variables of a script as a user would, in place or in a copy; returns the script's name."""
        lines = (self.root / script).read_text().splitlines()
        for name, value in values.items():
            places = [i for i, line in enumerate(lines) if line.startswith(f"{name}=")]
            assert len(places) == 1, f"{script} sets {name} {len(places)} times"
            lines[places[0]] = f'{name}="{value}"'
        target = self.root / (to or script)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n".join(lines) + "\n")
        target.chmod(0o755)
        return to or script

    def run(self, script: str, *arguments: str, ok: bool = True, timeout: float = 120, **environment: str):
        """Run a script from another folder. Returns the finished process; stdout and stderr are text."""
        env = {k: v for k, v in os.environ.items() if k != "LOCAL_RANK"} | {"OMP_NUM_THREADS": "1"} | environment
        done = subprocess.run(
            [str(self.root / script), *arguments], capture_output=True, text=True, env=env, timeout=timeout, cwd="/"
        )
        if ok:
            assert done.returncode == 0, done.stdout + done.stderr
        else:
            assert done.returncode != 0, done.stdout
            assert "Traceback" not in done.stderr, done.stderr
        return done

    def data(self, name: str, *rows: dict) -> Path:
        return tiny.write_jsonl(self.root / "data" / name, rows)
