"""./quickstart.sh in a copy of the project: the whole road, without touching what is the user's."""

import shutil
import subprocess
import sys

import pytest
from helpers.kit import EVERYTHING, ROOT

pytestmark = pytest.mark.timeout(1800)  # each installs or trains for minutes
SHIPPED = ["setup.sh", "quickstart.sh", "make_tokenize.sh", "training.sh", "merge.sh", "chat.sh", "requirements.txt"]


@pytest.mark.slow
def test_quickstart_teaches_the_sample_and_leaves_the_users_files_alone(tmp_path):
    root = tmp_path / "a fresh clone"
    # as a downloaded archive may be: without the folders that hold nothing but the user's files
    for folder in ("rwkv_peft", "json2binidx", "data"):
        keep = shutil.ignore_patterns("__pycache__", "*.pth", "*.bin", "*.idx")
        shutil.copytree(ROOT / folder, root / folder, ignore=keep)
    for name in SHIPPED:
        shutil.copy(ROOT / name, root)
    # the packages are there already: set-up's stamp says so, as after its first run
    (root / ".venv").mkdir()
    (root / ".venv/bin").symlink_to(f"{sys.prefix}/bin")
    (root / ".venv/lib").symlink_to(f"{sys.prefix}/lib")
    shutil.copy(f"{sys.prefix}/pyvenv.cfg", root / ".venv") if (ROOT / ".venv/pyvenv.cfg").exists() else None
    done = subprocess.run(
        ["bash", "-c", 'echo "$(cksum < requirements.txt) requirements.txt"'], cwd=root, capture_output=True
    )
    (root / ".venv/installed").write_bytes(done.stdout)
    (root / "training.sh").write_text((root / "training.sh").read_text().replace("\nSEED=42", "\nSEED=7"))
    (root / "data/sample.bin").write_text("mine")
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file() and ".venv" not in p.parts}
    first = subprocess.run([root / "quickstart.sh"], capture_output=True, text=True, cwd="/", timeout=1800)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    assert "merged     Exactly 217 steps" in first.stdout and "With a real model:" in first.stdout
    assert (root / "model/rwkv7-tiny.pth").is_file()
    base = (root / "model/rwkv7-tiny.pth").read_bytes()
    assert all(p.read_bytes() == content for p, content in before.items())
    if not EVERYTHING:  # minutes more
        return
    second = subprocess.run([root / "quickstart.sh"], capture_output=True, text=True, cwd="/", timeout=1800)
    assert second.returncode == 0 and "It is there already" in second.stdout
    assert (root / "model/rwkv7-tiny.pth").read_bytes() == base
    assert all(p.read_bytes() == content for p, content in before.items())
