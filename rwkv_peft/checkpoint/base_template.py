"""PROMPT_TYPE=auto: the template that a base knows, by what its sidecar says it was trained with, else by its name."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import NamedTuple

from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.text.preset_names import recorded, recorded_name
from rwkv_peft.text.presets import PRESETS
from rwkv_peft.text.template import Template

from . import sidecars

AUTO = "auto"
# rwkv7-g1k-1.5b-20260930-ctx25600, rwkv7-g1a4-2.9b, RWKV7-G1-0.1B: a part of the name
G1 = re.compile(r"(?<![a-z0-9])g1[a-z]?\d*(?![a-z0-9])", re.IGNORECASE)
# names that say nothing: the folder's does
PLAIN = frozenset({"model", "pytorch_model", "rwkv", "consolidated"})
FOR_WORLD = frozenset({"rwkv-world", "rwkv-qa", "rwkv-instruct"})


class Known(NamedTuple):
    """name: for PROMPT_TYPE. template: its content. trained: whether the base's sidecar tells it; else its name does."""

    name: str
    template: Template
    trained: bool


def known_by(base: Path) -> Known:
    """What a base knows. base: its file, which need not exist."""
    told = sidecar_of(base)
    try:
        found = recorded(told, str(base))
    except (SettingErrors, UserError):  # (what reads the sidecar for its own sake says so)
        found = None
    if found:
        same = next((name for name, preset in PRESETS.items() if preset == found), None)
        return Known(same or recorded_name(told) or found.name, found, True)
    name = "rwkv-g1" if says_g1(base, str(told.get("base") or "")) else "rwkv-world"
    return Known(name, PRESETS[name], False)


def sidecar_of(base: Path) -> dict:
    if not sidecars.path_of(base).is_file():
        return {}
    try:
        found = sidecars.read(base, ())
        sidecars.check_unedited(base, found, False)
        return found
    except UserError:
        return {}


def says_g1(base: Path, *others: str) -> bool:
    """Whether the name of a base is that of a G1 model; of what a link leads to as well, and of the folder of model.pth."""
    names = [*others, base.name]
    with contextlib.suppress(OSError, RuntimeError):  # a link to itself
        names.append(base.resolve().name)
    if base.stem.lower() in PLAIN:
        names.append(base.parent.name)
    return any(G1.search(name) for name in names)


def misfit(base: Path, form: Template) -> str:
    """What to say of a template that is not the one which a base knows, or "". Templates of other models and of the user's own
    are a decision, and fit every base that has not been trained with one."""
    known = known_by(base)
    if known.trained:
        return f"{base.name} was trained with PROMPT_TYPE={known.name}" if known.template != form else ""
    if known.name == "rwkv-g1" and form.name in FOR_WORLD and form == PRESETS[form.name]:
        return f"{base.name} is a G1 model by its name, whose formats are rwkv-g1*"
    if known.name == "rwkv-world" and form.name.startswith("rwkv-g1"):
        return f"{base.name} does not say G1 in its name, and rwkv-g1* are formats of G1 models"
    return ""
