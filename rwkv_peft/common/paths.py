"""The project's folders, and how settings name the files in them."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

from .errors import UserError
from .names import escape_invisible

PACKAGE = Path(__file__).resolve().parents[1]  # the kit's code
ROOT = PACKAGE.parent
OUTPUT = ROOT / "output"
_MODEL_SUFFIXES = (".pth", ".safetensors")


def resolve_path(name: str, folder: str) -> Path:
    """Return the file that a setting names, which may not exist.

    Args:
        name: a name in ROOT/folder, or a path relative to the working directory or to the project.
        folder: the folder of ROOT for such files.

    Raises:
        UserError: the name is not UTF-8.
    """
    if not is_utf8(name):
        raise UserError(f"{name.encode(errors='replace').decode()}: this name is not UTF-8; rename the file.")
    path = Path(name)
    with contextlib.suppress(RuntimeError):  # a user that does not exist
        path = path.expanduser()
    places = [ROOT / folder / path, Path.cwd() / path, ROOT / path]
    existing = [p for p in places if p.exists()] or [p for p in places if p.is_symlink()]  # (a dangling link)
    return existing[0] if existing else places[0] if path.name == name else places[1]


def describe_missing(path: Path) -> str:
    """Return what is wrong with a path that is no file: "there is no such file"."""
    if path.exists():
        return f"is {'a folder' if path.is_dir() else 'a FIFO, a socket or a device'}, and no file"
    if not path.is_symlink():
        return "there is no such file"
    try:
        path.stat()
    except FileNotFoundError:
        return f"is a link to {escape_invisible(os.readlink(path))}, which is not there"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "is a link that leads to itself"
    return f"is a link to {escape_invisible(os.readlink(path))}, which is no file"


_DRIVE = re.compile(r"^/?([A-Za-z]):(?!\d)(.*)$", re.S)  # (a number after the colon is a weight of DATA_PATH)
_WSL_SHARE = re.compile(r"^[\\/]{1,2}wsl(?:\$|\.localhost)[\\/]?([^\\/]*)[\\/](.*)$", re.I | re.S)
_MAX_VISITED = 20_000  # names in folders that are compared to find a path without separators


def explain_foreign_path(name: str) -> str:
    r"""Return what to do about a path of another system, or a web address, in a setting or a command; "" for others.

    Under WSL, drive C: of Windows is /mnt/c. In bash a backslash escapes the next letter, so that C:\Users\me without quotes
    arrives as C:Usersme.
    """
    text = name.strip().strip("'\"").strip()
    if re.match(r"^(https?|ftp|s3|gs|hf|git)://", text, re.I):
        return f"{text} is a web address, not a file: download the file, and name its place on this machine."
    if text.lower().startswith("file:"):
        text = unquote(re.sub(r"^file:/*(?=/)", "", text, flags=re.I))
        return f"{name} is an address of a file: {_describe(_drive_path(text) or Path(text))}."
    if shared := _WSL_SHARE.match(text):
        inside = Path("/" + shared[2].replace("\\", "/"))
        return f"{name} is how Windows names a file of WSL; here it is {_describe(inside)}."
    if re.match(r"^\\{1,2}wsl", text, re.I):
        return (
            f"{name} looks like a path of Windows from which bash has taken the backslashes: put it in single quotes. A file of "
            "WSL itself is named like /home/me/my.jsonl here."
        )
    if re.match(r"^\\\\[^\\]", text):
        return f"{name} is a network path of Windows: copy the file to this machine, or to a drive such as C: (/mnt/c)."
    drive = _DRIVE.match(text)
    if drive and drive[2] and "\\" not in drive[2] and "/" not in drive[2]:
        root = Path(f"/mnt/{drive[1].lower()}")
        file = _find_without_separators(root, drive[2])
        place = _describe(file) if file else f"written like {root}/Users/me/NAME{Path(drive[2]).suffix}"
        return (
            f"{name} looks like a path of Windows from which bash has taken the backslashes. Under WSL that file is {place}. "
            "(A path with backslashes needs single quotes.)"
        )
    if drive and drive[2] and (path := _drive_path(text)):
        return f"{name} is a path of Windows; under WSL it is {_describe(path)}."
    if git_bash := re.match(r"^/([A-Za-z])/(Users/.*)$", text, re.S):
        return f"{name} is a path of Git Bash; under WSL it is {_describe(Path(f'/mnt/{git_bash[1].lower()}') / git_bash[2])}."
    if "\\" in text and not Path(text).exists():
        path = Path(text.replace("\\", "/"))
        return f"{name} has backslashes, as paths of Windows have; here it is {_describe(path)}."
    return ""


def _drive_path(text: str) -> Path | None:
    r"""Return the path under WSL of C:\Users\me or /C:/Users/me; None if it names no drive."""
    drive = _DRIVE.match(text)
    return Path(f"/mnt/{drive[1].lower()}") / drive[2].replace("\\", "/").lstrip("/") if drive else None


def _describe(path: Path) -> str:
    """Return a path as it is typed in bash, and whether it exists."""
    suffixes = ("", ".idx", ".jsonl", ".pth")  # that settings may leave out
    try:
        exists = any(Path(f"{place / path}{suffix}").exists() for place in (Path.cwd(), ROOT) for suffix in suffixes)
    except (OSError, ValueError):
        exists = False
    return f"{shlex.quote(str(path))} ({'it is there: use that' if exists else 'nothing is there either'})"


def _find_without_separators(folder: Path, name: str) -> Path | None:
    """Return the file whose path below `folder`, written without separators, is `name`; None if there is none."""
    waiting, visited = [(folder, name)], 0
    while waiting and visited < _MAX_VISITED:
        place, rest = waiting.pop()
        try:
            names = os.listdir(place)
        except OSError:
            continue
        visited += len(names)
        if rest in names:
            return place / rest
        waiting += [(place / one, rest[len(one) :]) for one in names if rest.startswith(one) and len(one) < len(rest)]
    return None


def is_utf8(text: str) -> bool:
    """Return whether text can be stored and shown: file names in other encodings arrive as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def resolve_model(name: str) -> Path:
    """Return the file of MODEL_PATH, where the suffix .pth or .safetensors may be left out."""
    path = resolve_path(name, "model")
    if path.exists():
        return path
    with_suffix = [resolve_path(name + suffix, "model") for suffix in _MODEL_SUFFIXES if not name.endswith(suffix)]
    return next((place for place in with_suffix if place.exists()), path)


def list_models(folder: Path) -> list[str]:
    """Return the names of the files in a folder that may be models or adapters."""
    return [p.name for p in folder.iterdir() if p.suffix in _MODEL_SUFFIXES] if folder.is_dir() else []


def resolve_data(name: str) -> Path:
    """Return the path of DATA_PATH without suffix: sample, sample.bin, sample.jsonl and data/sample are all data/sample."""
    name = name.rstrip("/")
    if not any(resolve_path(name + suffix, "data").exists() for suffix in (".idx", ".bin")):
        name = re.sub(r"\.(bin|idx|jsonl)$", "", name)  # (a stem may end in .bin itself)
    index, tokens = (resolve_path(name + suffix, "data") for suffix in (".idx", ".bin"))
    path = tokens if tokens.exists() and not index.exists() else index
    return Path(str(path)[: -len(".idx")])


def list_data() -> list[str]:
    """Return the names for DATA_PATH of the tokenized files in data/."""
    return [p.stem for p in (ROOT / "data").glob("*.idx") if not p.stem.endswith(".roles")]


def display_path(path: str | os.PathLike) -> str:
    """Return a path as the user would write it: relative to the project if it is inside."""
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(ROOT)) if absolute.is_relative_to(ROOT) else str(path)
