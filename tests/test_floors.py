"""Imports go down only, and nothing on a floor imports another room of it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOORS = ["rwkv_peft.train", "rwkv_peft.chat", "rwkv_peft.init", "rwkv_peft.run", "json2binidx", "merge"]
MAKERS = [
    "rwkv_peft." + r
    for r in ("config", "rows", "adapters", "training", "generate", "bases", "tokenized", "vocabulary", "prompting")
]
MATERIALS = [
    "rwkv_peft." + r
    for r in (
        "shell_vars",
        "tokenizer",
        "templates",
        "checkpoint",
        "safetensors_file",
        "data",
        "model",
        "ops",
        "machine",
        "pictures",
        "quantize",
    )
]
GROUND = [
    "rwkv_peft." + r
    for r in (
        "errors",
        "names",
        "words",
        "roles",
        "atomic",
        "bus_error",
        "file_watch",
        "filetype",
        "hashing",
        "json_reader",
        "native",
        "pieces",
        "straight",
        "project",
        "runs",
        "methods",
        "strategies",
        "sidecars",
        "step_log",
        "terminal",
        "zip_records",
    )
]
FLOORS = [GROUND, MATERIALS, MAKERS, DOORS]


def room_and_floor(module: str):
    for number, rooms in enumerate(FLOORS):
        for room in rooms:
            if module == room or module.startswith(room + "."):
                return room, number
    return None


def imports(path: Path):
    package = list(path.relative_to(ROOT).with_suffix("").parts)[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield stem
            yield from (f"{stem}.{alias.name}" for alias in node.names)


FILES = [p for folder in ("rwkv_peft", "json2binidx", "merge") for p in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_from_floors_below_its_own(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    here = room_and_floor(module)
    if here is None:
        assert module == "rwkv_peft", f"{module} has no place on a floor"
        return
    for name in imports(path):
        there = room_and_floor(name)
        if there and there[0] != here[0]:
            ground = here[1] == there[1] == 0
            assert there[1] < here[1] or ground, f"{module} imports {name}"


def test_the_tokenizing_door_never_imports_torch():
    for path in FILES:
        if "json2binidx" in path.parts:
            assert not any(name.split(".")[0] == "torch" for name in imports(path)), path
    import subprocess
    import sys

    code = (
        "import sys, json2binidx.__main__, json2binidx.tokenize, json2binidx.preview; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_environment_is_read_at_the_door_only(path):
    if path.name != "shell_vars.py" and path.parent.name != "train":
        assert "os.environ" not in path.read_text() and "getenv" not in path.read_text()
