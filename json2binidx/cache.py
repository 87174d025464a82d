"""The same call twice does not encode twice: NAME.report.json says what its files were made from, and what they hold."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv_peft import json_reader, project, tokenizer
from rwkv_peft.hashing import sha256

# what decides what is written
CODE = ("json2binidx", "rwkv_peft/rows", "rwkv_peft/templates", "rwkv_peft/tokenizer.py", "rwkv_peft/data/binidx.py",
        "rwkv_peft/data/masking.py", "rwkv_peft/roles.py")  # fmt: skip
LIBRARIES = ("pyrwkv-tokenizer", "orjson", "pyarrow", "numpy", "chardet", "python-calamine")


def key(contents: Mapping[Path, str], settings: dict[str, Any], template: str) -> str:
    """A hash of all that decides the result: content of the data (file -> SHA-256), settings, template, vocabulary, code and
    libraries."""
    digest = hashlib.sha256()

    def add(*words: str) -> None:
        for word in words:
            digest.update(f"{len(word)}:{word}".encode())

    add(json.dumps(settings, sort_keys=True), template, sha256(tokenizer.vocabulary_file()))
    for name in LIBRARIES:
        add(name, version(name))
    root = Path(__file__).resolve().parent.parent
    for place in CODE:
        for path in sorted((root / place).rglob("*.py")) if (root / place).is_dir() else [root / place]:
            add(path.name, sha256(path))
    for path, content in contents.items():
        add(project.shown(path), content)
    return digest.hexdigest()


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def describe(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """name -> size and time of the last change (ns) of each file that was written."""
    return {path.name: facts(path) for path in files}


def facts(path: Path) -> dict[str, int]:
    found = path.stat()
    return {"bytes": found.st_size, "changed": found.st_mtime_ns}


def fresh(report: Path, wanted: str) -> dict[str, Any] | None:
    """The report, if it belongs to this key and every file that it names is there and unchanged; else None."""
    try:
        found = json_reader.load(report)
        if found["key"] != wanted:
            return None
        if any(facts(report.parent / name) != known for name, known in found["files"].items()):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # no report, or not ours: encode
    return found
