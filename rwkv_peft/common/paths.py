"""Where things lie: the project's folders, and the names that settings use for files in them."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

from .errors import UserError
from .names import visible

PACKAGE = Path(__file__).resolve().parents[1]  # the kit's code
ROOT = PACKAGE.parent
OUTPUT = ROOT / "output"
MODELS = (".pth", ".safetensors")  # endings of the files that are read as models


def resolve_path(name: str, folder: str) -> Path:
    """A file that a setting names: in ROOT/folder, or a path from here, or from the project. May not exist."""
    if not is_utf8(name):
        raise UserError(f"{name.encode(errors='replace').decode()}: this name is not UTF-8; rename the file.")
    given = Path(name)
    with contextlib.suppress(RuntimeError):  # a user that does not exist
        given = given.expanduser()
    places = [ROOT / folder / given, Path.cwd() / given, ROOT / given]
    there = [p for p in places if p.exists()] or [p for p in places if p.is_symlink()]  # (a link that leads nowhere)
    return there[0] if there else places[0] if given.name == name else places[1]


def missing(path: Path) -> str:
    """What to say of a file that cannot be found, or is none."""
    if path.exists():
        return f"is {'a folder' if path.is_dir() else 'a FIFO, a socket or a device'}, and no file"
    if not path.is_symlink():
        return "there is no such file"
    try:
        path.stat()
    except FileNotFoundError:
        return f"is a link to {visible(os.readlink(path))}, which is not there"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "is a link that leads to itself"
    return f"is a link to {visible(os.readlink(path))}, which is no file"


DRIVE = re.compile(r"^/?([A-Za-z]):(?!\d)(.*)$", re.S)  # (a number behind the colon is a weight of DATA_PATH)
SHARED = re.compile(r"^[\\/]{1,2}wsl(?:\$|\.localhost)[\\/]?([^\\/]*)[\\/](.*)$", re.I | re.S)
BACKSLASH = chr(92)
VISITED = 20_000  # names of folders that are compared while a path without separators is put together


def foreign_path(name: str) -> str:
    """What to say of a path of another system, or of a web address, that a setting or a command names; "" for others.

    Under WSL, drive C: of Windows is /mnt/c. In bash a backslash takes the next letter as it is, so that C:\\Users\\me without
    quotes arrives as C:Usersme.
    """
    text = name.strip().strip("'\"").strip()
    if re.match(r"^(https?|ftp|s3|gs|hf|git)://", text, re.I):
        return f"{text} is a web address, not a file: download the file, and name its place on this machine."
    if text.lower().startswith("file:"):
        text = unquote(re.sub(r"^file:/*(?=/)", "", text, flags=re.I))
        return f"{name} is an address of a file: {written(drive_path(text) or Path(text))}."
    if shared := SHARED.match(text):
        inside = Path("/" + shared[2].replace("\\", "/"))
        return f"{name} is how Windows names a file of WSL; here it is {written(inside)}."
    if re.match(r"^\\{1,2}wsl", text, re.I):
        return (
            f"{name} looks like a path of Windows from which bash has taken the backslashes: put it in single quotes. A file of "
            "WSL itself is named like /home/me/my.jsonl here."
        )
    if re.match(r"^\\\\[^\\]", text):
        return f"{name} is a network path of Windows: copy the file to this machine, or to a drive such as C: (/mnt/c)."
    drive = DRIVE.match(text)
    if drive and drive[2] and not drive[2].startswith(("\\", "/")) and "\\" not in drive[2] and "/" not in drive[2]:
        found = put_together(Path(f"/mnt/{drive[1].lower()}"), drive[2])
        place = written(found) if found else f"written like /mnt/{drive[1].lower()}/Users/me/{tail_of(drive[2])}"
        return (
            f"{name} looks like a path of Windows from which bash has taken the backslashes. Under WSL that file is {place}. "
            "(A path with backslashes needs single quotes.)"
        )
    if drive and drive[2]:
        return f"{name} is a path of Windows; under WSL it is {written(drive_path(text))}."
    if git_bash := re.match(r"^/([A-Za-z])/(Users/.*)$", text, re.S):
        return f"{name} is a path of Git Bash; under WSL it is {written(Path(f'/mnt/{git_bash[1].lower()}') / git_bash[2])}."
    if "\\" in text and not Path(text).exists():
        return f"{name} has backslashes, as paths of Windows have; here it is {written(Path(text.replace(BACKSLASH, '/')))}."
    return ""


def drive_path(text: str) -> Path | None:
    """C:\\Users\\me or /C:/Users/me as the path that WSL gives it; None if it names no drive."""
    drive = DRIVE.match(text)
    return Path(f"/mnt/{drive[1].lower()}") / drive[2].replace("\\", "/").lstrip("/") if drive else None


def tail_of(name: str) -> str:
    return f"NAME{Path(name).suffix}"


def written(path: Path) -> str:
    """A path as it is typed in bash, and whether it is there."""
    endings = ("", ".idx", ".jsonl", ".pth")  # that settings may leave out
    try:
        there = any(Path(f"{place / path}{ending}").exists() for place in (Path.cwd(), ROOT) for ending in endings)
    except (OSError, ValueError):
        there = False
    return f"{shlex.quote(str(path))} ({'it is there: use that' if there else 'nothing is there either'})"


def put_together(folder: Path, name: str) -> Path | None:
    """The file whose path, written without separators, is `name`; None if there is none."""
    waiting, seen = [(folder, name)], 0
    while waiting and seen < VISITED:
        place, rest = waiting.pop()
        try:
            inside = [entry.name for entry in os.scandir(place)]
        except OSError:
            continue
        seen += len(inside)
        if rest in inside:
            return place / rest
        waiting += [(place / one, rest[len(one) :]) for one in inside if rest.startswith(one) and len(one) < len(rest)]
    return None


def is_utf8(name: str) -> bool:
    """Whether a name can be written into files and shown: names of other encodings arrive as half characters."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def model_file(name: str) -> Path:
    """MODEL_PATH -> the file; the ending .pth or .safetensors may be left out."""
    path = resolve_path(name, "model")
    with_endings = [
        resolve_path(name + ending, "model") for ending in MODELS if not path.exists() and not name.endswith(ending)
    ]
    return next((place for place in with_endings if place.exists()), path)


def models_in(folder: Path) -> list[str]:
    """The names of the files in a folder that may be models or adapters."""
    return [p.name for p in folder.iterdir() if p.suffix in MODELS] if folder.is_dir() else []


def data_prefix(name: str) -> Path:
    """DATA_PATH -> path without ending: sample, sample.bin, sample.jsonl and data/sample all mean data/sample."""
    name = name.rstrip("/")
    if not any(
        resolve_path(name + ending, "data").exists() for ending in (".idx", ".bin")
    ):  # a name may end in .bin itself
        name = re.sub(r"\.(bin|idx|jsonl)$", "", name)
    found = resolve_path(name + ".idx", "data")
    if not found.exists() and resolve_path(name + ".bin", "data").exists():
        found = resolve_path(name + ".bin", "data")
    return Path(str(found)[: -len(".idx")])


def data_names() -> list[str]:
    """What DATA_PATH may say for the tokenized files in data/."""
    return [p.stem for p in (ROOT / "data").glob("*.idx") if not p.stem.endswith(".roles")]


def display_path(path: str | os.PathLike) -> str:
    """A path as the user would write it: from the project if it lies there."""
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(ROOT)) if absolute.is_relative_to(ROOT) else str(path)
