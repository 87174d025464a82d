"""A user's own template: a JSON file of text patterns with the field names of LLaMA-Factory.

    {"format_user": "Q: {{content}}", "format_assistant": "A: {{content}}", "format_separator": "\\n\\n"}

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

PLACES = {  # what may stand in a pattern; the first must
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
ROLES = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT, "observation": Role.TOOL}
WORDS = {"think": ("keep", "always", "fake"), "json_style": ("line", "compact", "indent")}
SAMPLING = {"temperature": (float, 0, 100), "top_p": (float, 0, 1), "top_k": (int, 0, 65536)}
FIELDS = [f.name for f in dataclasses.fields(Template) if f.name != "name"]


def load(path: Path, name: str = "") -> Template:
    """The template of a file. name: which, where it holds several. UserError with every problem at once."""
    where = display_path(path)
    found = json_reader.read(path)
    if isinstance(found, list) and all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in found):
        found = {one["name"]: one for one in found}
    if not isinstance(found, dict):
        raise UserError(
            f'{where}: must be a JSON object of patterns, like {{"format_user": "Q: {{{{content}}}}", ...}}.'
        )
    if found and all(isinstance(one, dict) for one in found.values()):
        if not name and len(found) == 1:
            name = next(iter(found))
        if name not in found:
            asked = f"has no template {name!r}{did_you_mean(name, found)}" if name else "holds several templates"
            raise UserError(
                f'{where}: {asked}. Write PROMPT_TYPE="{path.name}:NAME" with NAME one of {join_names(found)}.'
            )
        found = found[name]
    elif name:
        raise UserError(f"{where}: holds a single template without a name; leave :{name} away.")
    values, problems = {}, []
    for key, value in found.items():
        try:
            if key != "name":
                values[key] = check(key, value)
            elif value is not None and not (isinstance(value, str) and is_utf8(value)):
                raise ValueError("must be text")  # (a run keeps it, and could not be read again)
        except ValueError as error:
            problems.append(f"  {key}: {error}")
    problems += [f"  {key}: is missing" for key in ("format_user", "format_assistant") if key not in found]
    if problems:
        raise UserError("\n".join([f"{where} is not a template that can be used:", *problems]))
    return Template(found.get("name") or name or path.stem, **values)


def check(key: str, value: Any) -> Any:
    """The value of a field as Template wants it, or ValueError."""
    if key in RETIRED:
        raise ValueError(f"is not used here: {RETIRED[key]}; leave it out")
    if key not in FIELDS:
        raise ValueError(f"is not a field of a template{did_you_mean(key, FIELDS)}")
    if key in ("stop_words", "reserved"):
        if not isinstance(value, list) or not all(isinstance(word, str) and word for word in value):
            raise ValueError("must be a list of texts")
        return tuple(value)
    if key == "clean":
        if not isinstance(value, list) or not all(isinstance(word, str) and word in ROLES for word in value):
            raise ValueError(f"must be a list of roles out of {', '.join(ROLES)}")
        return frozenset(ROLES[word] for word in value)
    if key in ("strip", "infill", "bos"):
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value
    if key in SAMPLING:
        kind, least, most = SAMPLING[key]
        number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if not number or not least <= value <= most or (key == "top_p" and not value):
            raise ValueError(f"must be a {'whole ' * (kind is int)}number from {least} to {most:,}")
        return kind(value)
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "".join(value)
    if not isinstance(value, str):
        raise ValueError("must be text (or a list of texts, which are joined)")
    if not is_utf8(value):
        raise ValueError("holds half of a surrogate pair, which no file can store")
    if key in WORDS and value not in WORDS[key]:
        raise ValueError(f"must be one of {', '.join(WORDS[key])}")
    if key not in PLACES:
        return value
    places = re.findall(r"\{\{(.*?)\}\}", value)
    unknown = [p for p in places if p not in PLACES[key]]
    if unknown:
        raise ValueError(f"has {{{{{unknown[0]}}}}}; known there: {', '.join(PLACES[key])}")
    wanted = (
        ["name", "arguments"]
        if key == "format_function" and "name" in places
        else PLACES[key][: 1 if key in ("format_function", "format_tool") else None]
    )
    for place in wanted:
        if places.count(place) != 1:
            raise ValueError(f"must hold {{{{{place}}}}} once")
    return value
