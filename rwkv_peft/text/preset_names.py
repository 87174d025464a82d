"""Resolve PROMPT_TYPE: the name of a preset template, or a JSON file of the user."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rwkv_peft.common.errors import SettingError, SettingErrors, UserError
from rwkv_peft.common.formatting import did_you_mean
from rwkv_peft.common.names import describe_fault
from rwkv_peft.common.paths import describe_missing, display_path, resolve_path

from . import template_file
from .presets import BEFORE, PRESETS
from .template import Template


def find_template(name: str) -> Template:
    """Return a template.

    Args:
        name: a preset, or file.json, or file.json:name if the file holds several.

    Raises:
        SettingErrors: there is none of this name.
        UserError: the file cannot be used.
    """
    if name in PRESETS:
        return PRESETS[name]
    if wrong := describe_fault(name):
        raise SettingErrors(SettingError("PROMPT_TYPE", f"{wrong}; take another name"))
    file, _, inner = name.rpartition(":") if ".json:" in name else (name, "", "")
    if not file.endswith(".json"):
        known = ", ".join(PRESETS)
        raise SettingErrors(
            SettingError("PROMPT_TYPE", f"must be one of {known}, auto, or a .json file{did_you_mean(name, PRESETS)}")
        )
    path = resolve_path(file, "data")
    if not path.is_file():
        raise SettingErrors(SettingError("PROMPT_TYPE", f"{display_path(path)}: {describe_missing(path)}"))
    return template_file.load(path, inner)


def recorded_name(record: Mapping[str, Any], key: str = "prompt_type") -> str:
    """Return today's name of a recorded template: in older versions some names meant another one. "" if none is recorded."""
    name = str(record.get(key) or "")
    return name if record.get("template") is not None else BEFORE.get(name, name)


def recorded_template(record: Mapping[str, Any], where: str, key: str = "prompt_type") -> Template | None:
    """Return the template that a sidecar or NAME.report.json records, or None.

    Its content ("template") counts; its name only if the record has no content, as older versions of this kit wrote it.

    Args:
        record: the content of the file.
        where: the file, for messages.
        key: the key of the name.

    Raises:
        SettingErrors: there is no template of this name.
        UserError: the template cannot be used.
    """
    content, name = record.get("template"), recorded_name(record, key)
    if content is not None:
        try:
            return Template.from_dict(content)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{where}: its template {error}. Was the file edited, or made by a newer version?"
            ) from None
    return find_template(name) if name else None
