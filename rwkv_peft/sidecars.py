"""Sidecars: beside each checkpoint of a run lies a file of the same name with .json, which says what made it, so that nothing
is typed twice. Floor 0."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import UserError
from .methods import QUANTS
from .project import shown


def path_of(path: str | os.PathLike) -> Path:
    return Path(path).with_suffix(".json")


def read(path: str | os.PathLike, wanted: tuple[str, ...]) -> dict[str, Any]:
    """The sidecar of a checkpoint, with at least the wanted keys. UserError if it is missing or unreadable."""
    sidecar = path_of(path)
    if not sidecar.is_file():
        raise UserError(
            f"{shown(sidecar)}: is missing. It is written with every checkpoint and says how {shown(path)} was made."
        )
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{shown(sidecar)}: is not readable as JSON ({error}).") from None
    missing = [key for key in wanted if not isinstance(content, dict) or key not in content]
    if missing:
        raise UserError(f"{shown(sidecar)}: does not say {', '.join(missing)}; it is not a sidecar of this kit.")
    wrong = [key for key in content if key in SIDECAR and not SIDECAR[key](content[key])]
    if wrong:
        raise UserError(f"{shown(sidecar)}: {wrong[0]} cannot be {content[wrong[0]]!r}. Was the file edited?")
    return content


def whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1e9


# what a sidecar's values must be
SIDECAR: dict[str, Callable[[Any], bool]] = {
    "method": lambda value: isinstance(value, str),
    "rank": lambda value: whole(value, 1),
    "alpha": number,
    "rslora": lambda value: isinstance(value, bool),
    "niter": lambda value: whole(value, 0),
    "shifts": lambda value: isinstance(value, bool),
    "layers": lambda value: whole(value, 1),
    "every": lambda value: whole(value, 1),
    "config": lambda value: isinstance(value, dict),
    "base": lambda value: isinstance(value, str) and value == Path(value).name != "",
    "base_path": lambda value: isinstance(value, str),
    "base_sha256": lambda value: isinstance(value, str),
    "base_mark": lambda value: value is None or isinstance(value, list),
    "checkpoint_sha256": lambda value: isinstance(value, str),
    "start_sha256": lambda value: isinstance(value, str),
    "geometry": lambda value: isinstance(value, dict),
    "quant": lambda value: value in ("none", *QUANTS),
    "quant_parts": lambda value: isinstance(value, list) and all(isinstance(part, str) for part in value),
    "quant_kept": lambda value: isinstance(value, list) and all(isinstance(layer, str) for layer in value),
    "epoch": lambda value: whole(value, 0),
    "step": lambda value: whole(value, 0),
    "prompt_type": lambda value: value is None or isinstance(value, str),
    "eot": lambda value: value is None or isinstance(value, str),
}
