"""Where things lie: the project's folders, and the names that settings use for files in them."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from .errors import UserError

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "output"
MODELS = (".pth", ".safetensors")  # endings of the files that are read as models


def find(name: str, folder: str) -> Path:
    """A file that a setting names: in ROOT/folder, or a path from here, or from the project. May not exist."""
    if not is_text(name):
        raise UserError(f"{name.encode(errors='replace').decode()}: this name is not UTF-8; rename the file.")
    given = Path(name)
    with contextlib.suppress(RuntimeError):  # a user that does not exist
        given = given.expanduser()
    places = [ROOT / folder / given, Path.cwd() / given, ROOT / given]
    return next((p for p in places if p.exists()), places[0] if given.name == name else places[1])


def is_text(name: str) -> bool:
    """Whether a name can be written into files and shown: names of other encodings arrive as half characters."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def model_file(name: str) -> Path:
    """MODEL_PATH -> the file; the ending .pth or .safetensors may be left out."""
    path = find(name, "model")
    with_endings = [
        find(name + ending, "model") for ending in MODELS if not path.exists() and not name.endswith(ending)
    ]
    return next((place for place in with_endings if place.exists()), path)


def models_in(folder: Path) -> list[str]:
    """The names of the files in a folder that may be models or adapters."""
    return [p.name for p in folder.iterdir() if p.suffix in MODELS] if folder.is_dir() else []


def data_prefix(name: str) -> Path:
    """DATA_PATH -> path without ending: sample, sample.bin, sample.jsonl and data/sample all mean data/sample."""
    name = name.rstrip("/")
    if not any(find(name + ending, "data").exists() for ending in (".idx", ".bin")):  # a name may end in .bin itself
        name = re.sub(r"\.(bin|idx|jsonl)$", "", name)
    found = find(name + ".idx", "data")
    if not found.exists() and find(name + ".bin", "data").exists():
        found = find(name + ".bin", "data")
    return Path(str(found)[: -len(".idx")])


def data_names() -> list[str]:
    """What DATA_PATH may say for the tokenized files in data/."""
    return [p.stem for p in (ROOT / "data").glob("*.idx") if not p.stem.endswith(".roles")]


def shown(path: str | os.PathLike) -> str:
    """A path as the user would write it: from the project if it lies there."""
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(ROOT)) if absolute.is_relative_to(ROOT) else str(path)
