"""Imports go down only: a package knows those on lower floors, and none beside it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.kit import ROOT

PACKAGE = ROOT / "rwkv_peft"
FLOORS = {
    "cli": 9,
    "chat": 8,
    "merge": 7, "train": 7,
    "preprocess": 6, "distributed": 6, "export": 6,
    "checkpoint": 5, "config": 5,
    "adapters": 4,
    "data": 3, "model": 3,
    "ops": 2, "quantize": 2, "text": 2,
    "common": 1,
}  # fmt: skip
# what reads variables of the shell: commands, and what starts processes
READS_ENVIRONMENT = {"cli/train.py", "config/shell.py", "train/resume.py"}


def imports(path: Path) -> Iterator[str]:
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def files(package: str) -> list[Path]:
    return sorted((PACKAGE / package).rglob("*.py"))


def test_every_module_is_in_a_package_with_a_floor():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(FLOORS)
    assert {path.name for path in PACKAGE.iterdir() if path.is_file()} == {"__init__.py", "run.sh"}


@pytest.mark.parametrize("package", FLOORS)
def test_a_package_imports_only_from_lower_floors(package):
    assert files(package)
    upward = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files(package)
        for name in imports(path)
        if (match := re.match(r"rwkv_peft\.([a-z]\w*)", name))
        and match[1] != package
        and FLOORS[match[1]] >= FLOORS[package]
    ]
    assert not upward


def test_preprocessing_never_imports_torch():
    for path in (*files("preprocess"), *files("text")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.split(".")[0] == "torch" for name in names), path
    modules = "rwkv_peft.cli.tokenize, rwkv_peft.preprocess.tokenize, rwkv_peft.cli.preview"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_only_commands_read_the_environment():
    readers = {
        path.relative_to(PACKAGE).as_posix()
        for package in FLOORS
        for path in files(package)
        if re.search(r"os\.environ|getenv", path.read_text(encoding="utf-8"))
    }
    assert readers <= READS_ENVIRONMENT


def test_the_standalone_command_is_thin():
    lines = [line for path in (ROOT / "json2binidx").glob("*.py") for line in path.read_text().splitlines()]
    assert 0 < len(lines) < 40
