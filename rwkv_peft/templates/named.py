"""PROMPT_TYPE -> a template: the name of one of ours, or a JSON file of the user's."""

from __future__ import annotations

from ..errors import Problem, Problems
from ..project import find, shown
from ..words import did_you_mean
from . import custom
from .presets import PRESETS
from .template import Template


def template(name: str) -> Template:
    """name: a preset, or file.json, or file.json:name where a file holds several. Problems if there is none."""
    if name in PRESETS:
        return PRESETS[name]
    file, _, inner = name.rpartition(":") if ".json:" in name else (name, "", "")
    if not file.endswith(".json"):
        known = ", ".join(PRESETS)
        raise Problems(Problem("PROMPT_TYPE", f"must be one of {known}, or a .json file{did_you_mean(name, PRESETS)}"))
    path = find(file, "data")
    if not path.is_file():
        raise Problems(Problem("PROMPT_TYPE", f"{shown(path)}: there is no such file"))
    return custom.load(path, inner)
