"""Where things lie: the project's folders, the names that settings use for files in them, and the runs in output/."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from .errors import UserError
from .words import did_you_mean, listed

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "output"


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
    """MODEL_PATH -> the file; the ending .pth may be left out."""
    path = find(name, "model")
    if not path.exists() and not name.endswith(".pth") and find(name + ".pth", "model").exists():
        return find(name + ".pth", "model")
    return path


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


def is_taken(folder: Path) -> bool:
    """Whether a run has left results there. A folder with settings only (stopped before its first step) may be used."""
    log = folder / "loss.jsonl"
    return any(folder.glob("rwkv-*.pth")) or (log.exists() and log.stat().st_size > 0)


def point_latest(folder: Path) -> None:
    """output/latest -> the newest run. A hint for people and for merge.sh; file systems without links go without."""
    link, fresh = folder.parent / "latest", folder.parent / f".latest-{os.getpid()}"
    with contextlib.suppress(OSError):
        fresh.symlink_to(folder.name)
        os.replace(fresh, link)


def run_folder(name: str) -> Path:
    """The folder of the run `name`; for "" that of the newest run that has saved something. UserError if there is none."""
    if name:
        folder = OUTPUT / name if (OUTPUT / name).is_dir() else Path(name)
        if not folder.is_dir():
            there = [p.name for p in OUTPUT.glob("*") if p.is_dir() and not p.is_symlink()]
            raise UserError(
                f"RUN={name}: there is no such run{did_you_mean(name, there) or '.'} "
                f"In {shown(OUTPUT)}/ there is: {listed(there)}."
            )
        return folder
    if saved_epochs(OUTPUT / "latest"):
        return (OUTPUT / "latest").resolve()
    # the link is missing, or its run was ended before it had anything to save
    runs = [p.parent for p in OUTPUT.glob("*/run.json") if saved_epochs(p.parent)]
    if not runs:
        raise UserError(f"No run in {shown(OUTPUT)}/ has saved a checkpoint yet. Train first: ./training.sh")
    return max(runs, key=lambda p: (p / "run.json").stat().st_mtime)


def saved_epochs(folder: Path) -> list[int]:
    return sorted(int(m[1]) for p in folder.glob("rwkv-*.pth") if (m := re.fullmatch(r"rwkv-(\d+)\.pth", p.name)))


def epoch_file(folder: Path, epoch: int | None) -> Path:
    """The checkpoint of an epoch of a run, None for the newest. UserError naming what there is."""
    epochs = saved_epochs(folder)
    if not epochs:
        raise UserError(f"{shown(folder)}: this run has saved no checkpoint yet.")
    if epoch is None:
        epoch = epochs[-1]
    if epoch not in epochs:
        raise UserError(f"{shown(folder)}: has no rwkv-{epoch}.pth; it has the epochs {listed(map(str, epochs))}.")
    return folder / f"rwkv-{epoch}.pth"
