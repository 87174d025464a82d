"""What every test shares: one thread, a fixed seed, and a copy of the project in a folder with a space in its name."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

# before torch is imported: libgomp's spinning makes small operations far slower when processes share the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
# a run heeds no signal that whoever started it ignores; started from a script's background, we would be such a starter
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
# the same examples every time: a run that fails can be run again, and one that was green stays so
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")
# EVERYTHING=1 in the shell: more trials and combinations than CI has time for (docs/reliability.md, docs/parallel.md)
EVERYTHING = bool(os.environ.get("EVERYTHING"))


def few(values, kept=()):
    """The values of a parameter: ./test.sh takes those in `kept`, .ci/run all of them."""
    slow = pytest.mark.slow
    return [v if v in kept else pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=slow) for v in values]


SCRIPTS = ("make_tokenize.sh", "training.sh", "merge.sh", "chat.sh")


# files of minutes, longest first: what begins last would be waited for by idle workers
LONG = (
    "test_quickstart", "test_strategies", "test_resume", "test_end_to_end", "test_nodes", "test_ops_cpu", "test_matrix",
    "test_processes", "test_fuzz", "test_bench", "test_ops_fla", "test_diagnose", "test_training", "test_saves", "test_names",
)  # fmt: skip


def pytest_collection_modifyitems(items) -> None:
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def project_folder(tmp_path, monkeypatch):
    """The kit's folders, empty, for code that runs in this process."""
    from rwkv_peft.common import paths

    root = tmp_path / "a project"
    for folder in ("data", "model", "output", "merge"):
        (root / folder).mkdir(parents=True)
    monkeypatch.setattr(paths, "ROOT", root)
    monkeypatch.setattr(paths, "OUTPUT", root / "output")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return root


class Kit:
    """A copy of the kit in a folder of its own, used through its scripts like a user does."""

    def __init__(self, root: Path):
        self.root = root
        for folder in ("rwkv_peft", "json2binidx"):
            shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
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


@pytest.fixture
def kit(tmp_path) -> Kit:
    return Kit(tmp_path / "my kit")


@pytest.fixture(scope="session")
def shared_kit(tmp_path_factory) -> Kit:
    """One copy for tests that leave it as they found it: a tiny base, tokenized data."""
    kit = Kit(tmp_path_factory.mktemp("shared") / "my kit")
    tiny.save_model(kit.root / "model" / "tiny.pth")
    kit.data("chat.jsonl", *tiny.CHATS)
    kit.run("make_tokenize.sh", "chat.jsonl")
    kit.set(MODEL_PATH="tiny.pth", DATA_PATH="chat", PRECISION="fp32", EPOCH_COUNT="1")
    return kit


@pytest.fixture
def ready(project_folder):
    """A tiny base and tokenized data in a project of its own."""
    from inprocess import tokenize

    tiny.save_model(project_folder / "model" / "tiny.pth")
    tokenize(tiny.write_jsonl(project_folder / "data" / "chat.jsonl", tiny.CHATS))
    return project_folder


def pytest_make_parametrize_id(config, val, argname):
    """Bytes are named by their place: packed ones hold the time, which differs between processes that collect the same tests."""
    return argname if isinstance(val, bytes) else None
