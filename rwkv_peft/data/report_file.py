"""NAME.report.json beside tokenized data: what make_tokenize.sh recorded about them, as training reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rwkv_peft.common import json_reader
from rwkv_peft.common.json_reader import Schema, is_none_or, is_object, is_text, is_whole

# checks of the values
SCHEMA: Schema = {
    "settings": is_object,
    "template": is_none_or(is_object),
    "places": is_object,
    "files": lambda value: is_object(value) and all(map(is_object, value.values())),
    "vocabulary": is_text,
    "source": is_text,
}
# checks of the settings in it
SETTINGS: Schema = {"PROMPT_TYPE": is_text, "EOT": is_text, "BOS": lambda value: is_whole(value, 0, 1)}


def path_of(prefix: Path) -> Path:
    """Return the path of the report."""
    return Path(f"{prefix}.report.json")


def read(prefix: Path) -> dict[str, Any]:
    """Read the report of tokenized data; {} if there is none.

    Raises:
        UserError: it was damaged or edited.
    """
    path = path_of(prefix)
    if not path.exists():
        return {}
    report = json_reader.read_json(path, "report of tokenized data", SCHEMA)
    json_reader.check_schema(path, report.get("settings", {}), "report of tokenized data", SETTINGS)
    return report
