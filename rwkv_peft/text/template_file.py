r"""Read a user's own template: a JSON file of text patterns with the field names of LLaMA-Factory.

    {"format_user": "Q: {{content}}", "format_assistant": "A: {{content}}", "format_separator": "\n\n"}

or several of them by name: {"mine": {...}, "other": {...}}, chosen with PROMPT_TYPE="file.json:mine"; or a list of objects
that each have a "name". A pattern may be a list of strings, which are joined (LLaMA-Factory's slots).
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from rwkv_peft.common import json_reader
from rwkv_peft.common.errors import UserError
from rwkv_peft.common.formatting import did_you_mean, join_names
from rwkv_peft.common.paths import display_path, is_utf8

from .roles import Role
from .template import Template

_PLACEHOLDERS: dict[str, tuple[str, ...]] = {  # of each pattern
    "format_user": ("content",),
    "format_assistant": ("content",),
    "format_system": ("content",),
    "format_observation": ("content",),
    "format_tools": ("content",),
    "format_user_input": ("content", "input"),
    "format_function": ("content", "name", "arguments"),
    "format_thought": ("content",),
    "format_tool": ("name", "description", "parameters"),
}
RETIRED = {
    "efficient_eos": "the end of an answer is EOT in make_tokenize.sh",
    "replace_eos": "the end of an answer is EOT in make_tokenize.sh",
    "replace_jinja_template": "there is no Jinja template to replace",
    "force_system": "default_system is used wherever a row has no system text",
}
_ROLES = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT, "observation": Role.TOOL}
_CHOICES = {"think": ("keep", "always", "fake"), "json_style": ("line", "compact", "indent")}
_SAMPLING: dict[str, tuple[type[int] | type[float], int, int]] = {
    "temperature": (float, 0, 100),
    "top_p": (float, 0, 1),
    "top_k": (int, 0, 65536),
}
FIELDS = [f.name for f in dataclasses.fields(Template) if f.name != "name"]


def load(path: Path, name: str = "") -> Template:
    """Return the template of a file.

    Args:
        path: the file.
        name: of the template, if the file holds several.

    Raises:
        UserError: it cannot be used; the message has every problem.
    """
    where = display_path(path)
    content = json_reader.read_json(path)
    if isinstance(content, list) and all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in content):
        content = {one["name"]: one for one in content}
    if not isinstance(content, dict):
        raise UserError(
            f'{where}: must be a JSON object of patterns, like {{"format_user": "Q: {{{{content}}}}", ...}}.'
        )
    if content and all(isinstance(one, dict) for one in content.values()):
        if not name and len(content) == 1:
            name = next(iter(content))
        if name not in content:
            problem = f"has no template {name!r}{did_you_mean(name, content)}" if name else "holds several templates"
            raise UserError(
                f'{where}: {problem}. Write PROMPT_TYPE="{path.name}:NAME" with NAME one of {join_names(content)}.'
            )
        content = content[name]
    elif name:
        raise UserError(f"{where}: holds a single template without a name; leave :{name} away.")
    values, problems = {}, []
    for key, value in content.items():
        try:
            if key != "name":
                values[key] = _parse_field(key, value)
            elif value is not None and not (isinstance(value, str) and is_utf8(value)):
                raise ValueError("must be text")  # (a run records it, and could not be read later)
        except ValueError as error:
            problems.append(f"  {key}: {error}")
    problems += [f"  {key}: is missing" for key in ("format_user", "format_assistant") if key not in content]
    if problems:
        raise UserError("\n".join([f"{where} is not a template that can be used:", *problems]))
    return Template(content.get("name") or name or path.stem, **values)


def _parse_field(key: str, value: Any) -> Any:
    """Return the value of a field of Template, or raise ValueError."""
    if key in RETIRED:
        raise ValueError(f"is not used here: {RETIRED[key]}; leave it out")
    if key not in FIELDS:
        raise ValueError(f"is not a field of a template{did_you_mean(key, FIELDS)}")
    if key in ("stop_words", "reserved"):
        if not isinstance(value, list) or not all(isinstance(word, str) and word for word in value):
            raise ValueError("must be a list of texts")
        return tuple(value)
    if key == "clean":
        if not isinstance(value, list) or not all(isinstance(word, str) and word in _ROLES for word in value):
            raise ValueError(f"must be a list of roles out of {', '.join(_ROLES)}")
        return frozenset(_ROLES[word] for word in value)
    if key in ("strip", "infill", "bos"):
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value
    if key in _SAMPLING:
        kind, least, most = _SAMPLING[key]
        is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if not is_number or not least <= value <= most or (key == "top_p" and not value):
            raise ValueError(f"must be a {'whole ' * (kind is int)}number from {least} to {most:,}")
        return kind(value)
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "".join(value)
    if not isinstance(value, str):
        raise ValueError("must be text (or a list of texts, which are joined)")
    if not is_utf8(value):
        raise ValueError("holds half of a surrogate pair, which no file can store")
    if key in _CHOICES and value not in _CHOICES[key]:
        raise ValueError(f"must be one of {', '.join(_CHOICES[key])}")
    if key not in _PLACEHOLDERS:
        return value
    names, required = re.findall(r"\{\{(.*?)\}\}", value), _PLACEHOLDERS[key]
    if unknown := [name for name in names if name not in required]:
        raise ValueError(f"has {{{{{unknown[0]}}}}}; known there: {', '.join(required)}")
    if key == "format_function":
        required = ("name", "arguments") if "name" in names else ("content",)
    elif key == "format_tool":
        required = ("name",)
    for name in required:
        if names.count(name) != 1:
            raise ValueError(f"must hold {{{{{name}}}}} once")
    return value
