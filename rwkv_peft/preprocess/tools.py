"""The tools that an assistant may call, and its calls: from every form that data sets have to one line of JSON.

padded: the row is Arrow's, which puts null where an object lacks a field that others have; such nulls are removed. unused gets
(level, key) of every key that is not used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from .json_repair import parse_list
from .keys import left_over
from .values import RowError, is_nothing, short, without_padding

NO_TOOLS = ("none", "no", "n/a", "na", "nan", "null", "no tools", "no functions", "empty", "无", "没有", "无工具")
Unused = dict[tuple[str, str], int]


def agreed_tools(candidates: Sequence[tuple[str, Any]], padded: bool, unused: Unused) -> str:
    """Return the list of tools as one line of JSON; functions without the wrapper that OpenAI puts around them.

    Raises:
        RowError: two lists disagree.
    """
    texts = [(name, text) for name, value in candidates if (text := tools_text(value, padded, unused))]
    for name, text in texts[1:]:
        if not same(text, texts[0][1]):
            says = f"{short(texts[0][1])} and {short(text)}"
            raise RowError("two values", f'has two lists of tools, "{texts[0][0]}" and "{name}", that disagree: {says}')
    return texts[0][1] if texts else ""


def same(one: str, other: str) -> bool:
    """Whether two texts are of the same JSON, or the same."""
    try:
        return one == other or orjson.loads(one) == orjson.loads(other)
    except orjson.JSONDecodeError:
        return False


def tools_text(tools: Any, padded: bool, unused: Unused) -> str:
    """Return one list of tools as a line of JSON, "" for none."""
    if isinstance(tools, str):
        try:
            tools = orjson.loads(tools)
        except orjson.JSONDecodeError:
            return "" if tools.strip().lower() in NO_TOOLS else tools.strip()  # a description in words
    elif padded:
        tools = without_padding(tools)
    if is_nothing(tools):
        return ""
    bare = []
    if isinstance(tools, list):  # Gemini's lists inside a list
        tools = [one for tool in tools for one in declared(tool)]
    for tool in tools if isinstance(tools, list) else [tools]:
        if isinstance(tool, str):  # Arrow's columns of mixed kinds hold JSON text
            try:
                tool = orjson.loads(tool)
            except orjson.JSONDecodeError:
                if tool.strip().lower() not in NO_TOOLS:
                    bare.append(tool)
                continue
        function = tool.get("function") if isinstance(tool, dict) else None
        if isinstance(function, dict):
            count_keys(tool, ("function", "type", "strict"), "key beside a tool's function", unused)
            bare.append(function)
        else:
            bare.append(tool)
    return json.dumps(bare, ensure_ascii=False, default=str) if bare else ""


def declared(tool: Any) -> list[Any]:
    """Return the functions of a tool in Gemini's form, or the tool itself."""
    for name in ("functionDeclarations", "function_declarations"):
        if isinstance(tool, dict) and isinstance(tool.get(name), list):
            return tool[name]
    return [tool]


def count_keys(one: Mapping[str, Any], used: tuple[str, ...], level: str, unused: Unused) -> None:
    """Count the keys that are not used."""
    for key in left_over(tuple(one), used):
        if not is_nothing(one[key]):
            unused[level, key] = 1


def agreed_call(where: str, calls: Sequence[tuple[str, Any]], padded: bool, unused: Unused) -> str:
    """The call of a message that may have it under several names. RowError where two of them disagree."""
    texts = [(name, call_text(where, value, padded, unused)) for name, value in calls]
    for name, text in texts[1:]:
        if not same(text, texts[0][1]):
            raise RowError(
                "two values",
                f'{where}: "{texts[0][0]}" and "{name}" disagree: {short(texts[0][1])} and {short(text)}',
            )
    return texts[0][1]


def call_text(where: str, calls: Any, padded: bool, unused: Unused) -> str:
    """Return tool calls as JSON text: {"name": ..., "arguments": {...}}, or a list of such where there are several.

    No arguments at all (null, "", {}) are {}.
    """
    if isinstance(calls, str):
        try:
            calls = orjson.loads(calls)
        except orjson.JSONDecodeError:
            raise RowError("tool call", f"{where} must hold its tool call as JSON") from None
    written = []
    for entry in calls if isinstance(calls, list) else [calls]:
        call = entry
        if isinstance(entry, dict) and isinstance(entry.get("function"), dict):
            call = entry["function"]
            count_keys(entry, ("function", "type", "id", "index"), "key beside a call's function", unused)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise RowError("tool call", f"{where} has a tool call without a name")
        names = [key for key in ("arguments", "parameters", "args") if key in call]
        values = [arguments(where, call["name"], call[key], padded) for key in names]
        if any(value != values[0] for value in values[1:]):
            raise RowError("two values", f'{where}: "{names[0]}" and "{names[1]}" of {call["name"]} disagree')
        count_keys(call, ("name", *names, *(("id", "type") if call is entry else ())), "key of a call", unused)
        written.append({"name": call["name"], "arguments": values[0] if values else {}})
    return json.dumps(written[0] if len(written) == 1 else written, ensure_ascii=False, default=str)


def arguments(where: str, name: str, value: Any, padded: bool) -> Any:
    """Return the arguments of a call. Raises RowError if they are no JSON."""
    if is_nothing(value):
        return {}
    if isinstance(value, str):
        try:
            return parse_list(value)
        except ValueError:
            raise RowError("tool call", f"{where}: the arguments of {name} are not valid JSON") from None
    return without_padding(value) if padded else value
