"""PROMPT_TYPE=auto: the chat template that a base model was trained with, from its sidecar or from its name."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import NamedTuple

from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.text.preset_names import recorded_name, recorded_template
from rwkv_peft.text.presets import PRESETS
from rwkv_peft.text.template import Template

from . import sidecars

AUTO = "auto"
# rwkv7-g1k-1.5b-20260930-ctx25600, rwkv7-g1a4-2.9b, RWKV7-G1-0.1B: a part of the name
G1 = re.compile(r"(?<![a-z0-9])g1[a-z]?\d*(?![a-z0-9])", re.IGNORECASE)
# names without information: the name of the folder is used
PLAIN = frozenset({"model", "pytorch_model", "rwkv", "consolidated"})
FOR_WORLD = frozenset({"rwkv-world", "rwkv-qa", "rwkv-instruct"})


class BaseTemplate(NamedTuple):
    """The template of a base model.

    Attributes:
        name: value for PROMPT_TYPE.
        template: the template itself.
        trained: True if the base's sidecar records it, False if it follows from the name.
    """

    name: str
    template: Template
    trained: bool


def find_base_template(base: Path) -> BaseTemplate:
    """Return the template of a base model. The file `base` need not exist."""
    sidecar = read_base_sidecar(base)
    try:
        template = recorded_template(sidecar, str(base))
    except (SettingErrors, UserError):  # reported where the sidecar itself is read
        template = None
    if template:
        same = next((name for name, preset in PRESETS.items() if preset == template), None)
        return BaseTemplate(same or recorded_name(sidecar) or template.name, template, True)
    name = "rwkv-g1" if is_g1_name(base, str(sidecar.get("base") or "")) else "rwkv-world"
    return BaseTemplate(name, PRESETS[name], False)


def read_base_sidecar(base: Path) -> dict:
    """Return the sidecar of a base model; {} if it is missing, unreadable or edited."""
    if not sidecars.sidecar_path(base).is_file():
        return {}
    try:
        sidecar = sidecars.read_sidecar(base, ())
        sidecars.check_unedited(base, sidecar, False)
        return sidecar
    except UserError:
        return {}


def is_g1_name(base: Path, *others: str) -> bool:
    """Return whether a base is a G1 model by its name.

    The name of its link target counts as well, and for a model.pth the name of its folder.
    """
    names = [*others, base.name]
    with contextlib.suppress(OSError, RuntimeError):  # a link to itself
        names.append(base.resolve().name)
    if base.stem.lower() in PLAIN:
        names.append(base.parent.name)
    return any(G1.search(name) for name in names)


def describe_mismatch(base: Path, form: Template) -> str:
    """Return why a template differs from the one that the base was trained with; "" if there is nothing to say.

    Templates of other models and of the user's own are a decision, and fit every base that was not trained with one.
    """
    known = find_base_template(base)
    if known.trained:
        return f"{base.name} was trained with PROMPT_TYPE={known.name}" if known.template != form else ""
    if known.name == "rwkv-g1" and form.name in FOR_WORLD and form == PRESETS[form.name]:
        return f"{base.name} is a G1 model by its name, whose formats are rwkv-g1*"
    if known.name == "rwkv-world" and form.name.startswith("rwkv-g1"):
        return f"{base.name} does not say G1 in its name, and rwkv-g1* are formats of G1 models"
    return ""
