"""The same call twice does not encode twice: NAME.report.json says what its files were made from, and what they hold."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv_peft.common import json_reader, paths
from rwkv_peft.common.hashing import sha256
from rwkv_peft.text import tokenizer

# what decides what is written
CODE = ("preprocess", "text", "data/binidx.py", "data/masking.py")
LIBRARIES = ("pyrwkv-tokenizer", "orjson", "pyarrow", "numpy", "chardet", "python-calamine")


def key(contents: Mapping[Path, str], settings: dict[str, Any], template: str) -> str:
    """Return a hash of all that decides the result.

    Args:
        contents: File -> SHA-256 of its content.
        settings: By name.
        template: Of the prompt. Vocabulary, code and libraries are added here.
    """
    digest = hashlib.sha256()

    def add(*words: str) -> None:
        for word in words:
            digest.update(f"{len(word)}:{word}".encode())

    add(json.dumps(settings, sort_keys=True), template, sha256(tokenizer.vocabulary_file()))
    for name in LIBRARIES:
        add(name, version(name))
    for place in (paths.PACKAGE / name for name in CODE):
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            add(path.name, sha256(path))
    for path, content in contents.items():
        add(paths.display_path(path), content)
    return digest.hexdigest()


def version(package: str) -> str:
    """Return the version of a package, "none" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def describe(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Name -> size and time of the last change (ns) of each file that was written."""
    return {path.name: facts(path) for path in files}


def facts(path: Path) -> dict[str, int]:
    """Return size and time of change of a file."""
    status = path.stat()
    return {"bytes": status.st_size, "changed": status.st_mtime_ns}


def fresh(report: Path, wanted: str) -> dict[str, Any] | None:
    """The report, if it belongs to this key and every file that it names is there and unchanged; else None."""
    try:
        content = json_reader.load_json(report)
        if content["key"] != wanted:
            return None
        if any(facts(report.parent / name) != known for name, known in content["files"].items()):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # no report, or not ours: encode
    return content
