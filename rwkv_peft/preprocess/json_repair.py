"""JSON that is not quite JSON.

What has only one possible reading is read, with the kind of fault; everything else is refused with a sentence that names the
fault.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from typing import Any

import orjson

from rwkv_peft.common.paths import is_utf8

PYTHON_LIMIT = 4 << 20  # characters that Python's own parser may read: its tree takes about 50 times as much memory
DEPTH_LIMIT = 64  # brackets inside one another
SHOWN = 30  # characters of a row that a sentence quotes

# kind of fault -> what the report says of rows with it
FAULTS = {
    "python": "written as Python prints them (single quotes, None, True), not as JSON; read all the same",
    "nan": "with NaN, Infinity or a number that is too large, which JSON does not have; each is taken as null (empty)",
    "comma": "with a comma that nothing follows; read all the same",
    "comment": "with a comment inside; read without it",
    "control": "with a line break or tab inside a text, which JSON writes as \\n or \\t; read all the same",
    "twice": "that are a text which holds the row, as JSON written twice has it; read all the same",
    "bytes": "with a byte order mark in front; read without it",
}

# one that never closes is taken to its end: otherwise each of its marks would be tried as the beginning of another
STRING = r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)'
SINGLE = r"'[^'\\]*(?:\\.[^'\\]*)*(?:'|\\?\Z)"
COMMENT = r"//[^\n]*|/\*.*?\*/|(/\*.*\Z)|#[^\n]*"
COMMENTS = re.compile(rf"({STRING})|{COMMENT}", re.S)
COMMENTS_BESIDE_BOTH = re.compile(rf"({STRING}|{SINGLE})|{COMMENT}", re.S)
TRAILING = re.compile(rf"({STRING})|,(?=\s*(?:[}}\]]|\Z))", re.S)
OUTSIDE = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|(\\?\Z))', re.S)
CONTROL = re.compile(rf"{STRING}", re.S)
# what numpy leaves out between the elements of an array that it prints, and what it puts around one
PRINTED = re.compile(rf"({STRING}|{SINGLE}|[}}\])])(?=\s+[\"'{{\[(])|{STRING}|{SINGLE}|\barray\(|,\s*dtype=\w+\)", re.S)
NAMES = {"nan": None, "NaN": None, "NAN": None, "inf": None, "Infinity": None, "null": None, "NA": None, "NaT": None,
         "true": True, "false": False}  # fmt: skip
TYPOGRAPHIC = re.compile("(?:^|[{\\[,:，：])\\s*([“”„‟＂‘’«»「」『』])")
FULL_WIDTH = re.compile("[\"'”’]\\s*([：，；])")


HALF = "it holds half of a surrogate pair, such as \\ud83d alone, which no file can store"


def repair_json(text: str) -> tuple[Any, str]:
    """The value of a text that strict JSON refuses, and the kind of its fault (a key of FAULTS).

    ValueError with a sentence if it cannot be read in one way only.
    """
    value, kind = read(text)
    if "\\" in text and not is_utf8(json.dumps(value, ensure_ascii=False)):
        raise ValueError(HALF)
    return value, kind


def read(text: str) -> tuple[Any, str]:
    """The same; its texts may be such as no file can store."""
    kind = ""
    if text.startswith("\ufeff"):
        text, kind = text.lstrip("\ufeff"), "bytes"
    text = text.strip()
    if too_deep(text):
        raise ValueError(f"is nested too deeply: more than {DEPTH_LIMIT} brackets are open at once")
    try:
        return lenient(text, kind)
    except (ValueError, RecursionError) as error:
        first = error
    if "'" in text or re.search(r"\b(?:None|True|False)\b", text):
        try:
            return python_value(text), "python"
        except ValueError:
            pass
    raise ValueError(f"is not valid JSON: {fault(text, first)}")


def lenient(text: str, kind: str) -> tuple[Any, str]:
    """JSON with comments, commas that nothing follows, control characters, NaN. ValueError if it is not that."""
    bare = COMMENTS.sub(lambda m: m[1] or m[2] or " ", text)
    kind = "comment" if bare != text else kind
    whole = TRAILING.sub(lambda m: m[1] or "", bare)
    kind = "comma" if whole != bare else kind
    faults: set[str] = set()

    def number(text: str) -> float | None:
        value = float(text)
        if math.isfinite(value):
            return value
        faults.add(text)
        return None  # NaN becomes null

    value = json.loads(whole, strict=False, parse_constant=faults.add, parse_float=number)
    if faults:
        return value, "nan"
    if any(ord(c) < 32 for string in CONTROL.findall(whole) for c in string):
        return value, "control"
    if not kind:  # it is well formed, so strict JSON refused what it holds
        raise ValueError(HALF)
    return value, kind


def python_value(text: str) -> Any:
    """What Python (or numpy, or pandas) printed. ValueError if it is not a literal of texts, numbers, lists and dicts."""
    if len(text) > PYTHON_LIMIT or too_deep(text):
        raise ValueError("too large")

    def separated(part: re.Match) -> str:
        if part[0].startswith("array("):
            return ""
        if part[0].startswith(","):
            return ""
        return f"{part[0]}," if part[1] else part[0]

    text = PRINTED.sub(separated, COMMENTS_BESIDE_BOTH.sub(lambda m: m[1] or m[2] or " ", text))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes that Python keeps as they are
            tree = KnownNames().visit(ast.parse(text.strip(), mode="eval"))
            return plain(ast.literal_eval(tree))
    except (SyntaxError, TypeError, MemoryError, RecursionError, ValueError):
        raise ValueError("not a Python literal") from None


class KnownNames(ast.NodeTransformer):
    """nan, null, true and the like become their values."""

    def visit_Name(self, node: ast.Name) -> ast.AST:  # noqa: N802 - the name that ast calls
        """Replace a known name (true, null, NaN ...) by its value."""
        return ast.Constant(NAMES[node.id]) if node.id in NAMES else node


def plain(value: Any) -> Any:
    """Tuples become lists, and keys become text. ValueError for what JSON cannot hold (bytes, sets)."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(key): plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if value is not None and not isinstance(value, str | bool | int | float):
        raise ValueError("not JSON")
    return value


def too_deep(text: str) -> bool:
    """Return whether more brackets are open at once than parsers should follow.

    Brackets inside texts count where strings do not parse, which refuses no sound row: those never come here.
    """
    if text.count("[") + text.count("{") <= DEPTH_LIMIT:
        return False
    depth = deepest = 0
    for part in re.finditer(rf"{STRING}|{SINGLE}|[{{}}\[\]]", text, re.S):
        if part[0] in "{[":
            depth += 1
            deepest = max(deepest, depth)
        elif part[0] in "}]":
            depth -= 1
    return deepest > DEPTH_LIMIT


def fault(text: str, error: Exception) -> str:
    """What is wrong with a text that is no JSON, in words."""
    if text[:1] not in ("{", "["):
        return f"it begins with {text[:SHOWN]!r}, where a row begins with {{"
    outside = OUTSIDE.sub(lambda m: '""' if m[1] is None else m[0], text)
    odd = [mark for pattern in (TYPOGRAPHIC, FULL_WIDTH) if (mark := pattern.search(outside))]
    if odd:
        marks = " ".join(m[1] for m in odd)
        return f'it has {marks} (typographic or full-width) where JSON needs a plain " or : or , ; replace them around the texts'
    message = str(error)
    if message.startswith("it holds half"):
        return message
    column = error.pos + 1 if isinstance(error, json.JSONDecodeError) else 0
    try:
        _, end = json.JSONDecoder(strict=False).raw_decode(text)
        rest = text[end:].strip()
        if rest[:1] in ("{", "["):
            return "several objects stand behind one another; each needs a line of its own"
        return f"there is {rest[:SHOWN]!r} behind its end"
    except (ValueError, RecursionError):
        pass
    if re.search(r"[{\[,:]\s*'", outside):
        return "it has single quotes, and JSON needs double ones"
    if bare := re.search(r"[{,]\s*([A-Za-z_]\w*)\s*:", outside):
        return f'its key {bare[1]} has no quotes: write "{bare[1]}"'
    if escape := re.search(r'\\([^"\\/bfnrtu]|u(?![0-9a-fA-F]{4}))', text) if "escape" in message else None:
        return f"a text has the escape \\{escape[1]}, which JSON does not know: write \\\\ for a backslash"
    if '"' in outside.replace('""', ""):
        return 'a quote is opened that never closes; inside a text, write \\n for a line break and \\" for a quote'
    if outside.count("{") != outside.count("}") or outside.count("[") != outside.count("]"):
        return 'a bracket is missing: it was cut off, or a text holds a quote that is not written as \\"'
    if "',' delimiter" in message:
        return f'a comma is missing at column {column} (or a text holds a quote that is not written as \\")'
    if "':' delimiter" in message:
        return f"a colon is missing at column {column}"
    return f"{message.partition(':')[0][:1].lower()}{message.partition(':')[0][1:]}, column {column}"


def parse_list(text: str) -> Any:
    """The list that a cell of a table holds, as JSON or as Python prints it. ValueError with a sentence if it is neither."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return repair_json(text)[0]
