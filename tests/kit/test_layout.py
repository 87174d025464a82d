"""Where tests are: no test imports another one, and every test file that a text names exists."""

import ast
import re

from helpers.kit import ROOT

TESTS = ROOT / "tests"


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_test_imports_another_one():
    for path in TESTS.rglob("*.py"):
        for name in imported_modules(path):
            assert not any(part == "conftest" or part.startswith("test_") for part in name.split(".")), (path, name)


def test_test_files_that_are_named_exist():
    texts = [*ROOT.glob("*.md"), *ROOT.glob("c*/README.md"), ROOT / "pyproject.toml", ROOT / "bench/gpu.sh"]
    for folder in ("docs", "rwkv_peft", "tests", "bench"):
        texts += [*(ROOT / folder).rglob("*.md"), *(ROOT / folder).rglob("*.py")]
    for path in texts:
        if path.name == "CHANGELOG.md":
            continue
        for name in re.findall(r"(?<![\w/])tests/[\w/]*\.py", path.read_text(encoding="utf-8")):
            # another project's, cited in docs/data.md and in what checks it
            assert (ROOT / name).is_file() or name.startswith(("tests/models/rwkv/", "tests/tokenizers_/")), (
                path,
                name,
            )
