r"""Calls, results and tools in texts -> keys and messages of their own, so that a template writes them once, in its own form.

They are between tags (Hermes, Qwen), or among the parts of a content (Anthropic, Gemini):

{"role": "assistant", "content": "I look.\n<tool_call>\n{...}\n</tool_call>"}  a call
{"role": "tool" or "user", "content": "<tool_response>\n42\n</tool_response>"}  a result
{"role": "system", "content": "... <tools>\n{...}\n</tools> ..."}               tools
{"role": "user", "content": [{"type": "tool_result", "content": "42"}]}          a result; {"type": "tool_use", ...}: a call
{"role": "model", "parts": [{"functionCall": {"name": "f", "args": {}}}]}        a call; {"functionResponse": ...}: a result
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rwkv_peft.text.roles import Role

from . import glaive
from .json_repair import parse_list
from .keys import TOOL_CALLS, TOOLS, parts_of
from .values import as_text, code_of, in_code, is_nothing

CALL = re.compile(r"\s*<tool_call>\s*(.*?)\s*</tool_call>\s*", re.DOTALL)
RESULT = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)
CALL_TAG = re.compile("<tool_call>|<functioncall>")
LIST = re.compile(r"<tools>\s*([\[{].*?)\s*</tools>", re.DOTALL)
# how the system texts of Qwen and Hermes begin to speak of tools, and where they end
BEGINS = re.compile(r"(?:\A|\n)# Tools\s*\n|You are provided with function signatures within ")
ENDS = "</tool_call>"


def may_hold_tools(one: Any) -> bool:
    """Whether a message may have calls, results or tools in its words; quick."""
    if not isinstance(one, dict):
        return False
    for value in one.values():
        if isinstance(value, str):
            if "<tool" in value or "<functioncall>" in value:
                return True
        elif isinstance(value, list) and any(isinstance(part, dict) and is_of_tools(part) for part in value):
            return True
    return False


def apart(one: Mapping[str, Any], role: Role | None) -> list[Mapping[str, Any]]:
    """A message as several, with calls, results and tools in keys and messages of their own."""
    if not isinstance(one, dict):
        return [one]
    key = next((key for key in parts_of(tuple(one)).said if one[key] is not None), "")
    value = one.get(key)
    if isinstance(value, list):
        return apart_in_parts(one, key, value, role)
    if not isinstance(value, str):
        return [one]
    if role is Role.ASSISTANT:
        words, calls = calls_of_text(value)
        return [{**one, key: words, free(one, TOOL_CALLS): calls}] if calls else [one]
    if role is Role.SYSTEM:
        words, tools = tools_of_text(value)
        return [{**one, key: words, free(one, TOOLS): tools}] if tools else [one]
    if role in (Role.TOOL, Role.USER) and (results := results_of_text(value)):
        speaker = next((k for k in parts_of(tuple(one)).speaker if isinstance(one[k], str)), "role")
        return [{**one, speaker: "tool", key: result} for result in results]
    return [one]


def calls_of_text(text: str) -> tuple[str, list[Any]]:
    """The words of an answer, and the calls behind them; none where they are quoted, or cannot be read."""
    if "<functioncall>" in text:
        message = glaive.message("assistant", text)
        return message["content"], message.get("tool_calls", [])
    begin = text.find("<tool_call>", max(text.rfind("</think>"), 0))  # (a thought may speak of one)
    if begin < 0 or in_code(code_of(text), begin):
        return text, []
    at, calls = begin, []
    while block := CALL.match(text, at):
        try:
            call = parse_list(block[1])
        except ValueError:
            return text, []
        calls += call if isinstance(call, list) else [call]
        at = block.end()
    if at != len(text) or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return text, []
    return text[:begin].rstrip(), calls


def results_of_text(text: str) -> list[str]:
    """The results that a text consists of; none if there is more in it."""
    texts, at = [], 0
    while block := RESULT.match(text, at):
        texts.append(block[1])
        at = block.end()
    return texts if at == len(text) else []


def stay_text(words: str, role: Role) -> bool:
    """Return whether calls, results or tools between tags stay in the text of a message.

    They do where they could not be read, or where text follows them.
    """
    if role is Role.ASSISTANT:
        tag = CALL_TAG.search(words)
        return tag is not None and not in_code(code_of(words), tag.start())
    return (LIST.search(words) if role is Role.SYSTEM else RESULT.match(words)) is not None


def tools_of_text(text: str) -> tuple[str, list[Any]]:
    """A system text without its list of tools and what it says of the form of calls, and the list; [] where there is none."""
    block = LIST.search(text)
    tools = objects(block[1]) if block else []
    if not block or not tools:
        return text, []
    before, behind = text[: block.start()], text[block.end() :]
    if begins := BEGINS.search(before):
        before = before[: begins.start()]
    if ENDS in behind:
        behind = behind[behind.rindex(ENDS) + len(ENDS) :]
    return "\n".join(part for part in (before.strip(), behind.strip()) if part), tools


def objects(text: str) -> list[Any]:
    """Return the objects of a list, or one after another; [] where there is something else."""
    values, decoder = [], json.JSONDecoder()
    while text:
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            return []
        values += value if isinstance(value, list) else [value]
        text = text[end:].lstrip(" \t\r\n,")
    return values if all(isinstance(one, dict) for one in values) else []


def free(one: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of these keys that a message does not have."""
    return next(name for name in names if is_nothing(one.get(name)))


def is_of_tools(part: Mapping[str, Any]) -> bool:
    """Return whether a part of a content is a call or a result."""
    return part.get("type") in ("tool_use", "tool_result") or any(name in part for name in (*OF_CALL, *OF_RESULT))


OF_CALL, OF_RESULT = ("functionCall", "function_call"), ("functionResponse", "function_response")


def apart_in_parts(
    one: Mapping[str, Any], key: str, parts: Sequence[Any], role: Role | None
) -> list[Mapping[str, Any]]:
    """Return a message's text, calls and results as messages of their own."""
    rest: list[Any] = []
    calls: list[Any] = []
    results: list[Any] = []
    for part in parts:
        if not isinstance(part, dict) or not is_of_tools(part):
            rest.append(part)
        elif part.get("type") == "tool_use":
            calls.append({"name": part.get("name"), "arguments": part.get("input")})
        elif part.get("type") == "tool_result":
            results.append(result_text(part.get("content")))
        elif name := next((name for name in OF_CALL if name in part), ""):
            call = part[name] if isinstance(part[name], dict) else {}
            calls.append({"name": call.get("name"), "arguments": call.get("args", call.get("arguments"))})
        else:
            result = part[next(name for name in OF_RESULT if name in part)]
            results.append(result_text(result.get("response", result) if isinstance(result, dict) else result))
    if calls and role is not Role.ASSISTANT:  # (what is not as it should be is refused as a part)
        return [one]
    speaker = next((k for k in parts_of(tuple(one)).speaker if isinstance(one[k], str)), "role")
    messages: list[Mapping[str, Any]] = [{speaker: "tool", key: result} for result in results]
    if calls:
        messages.append({**one, key: rest or "", free(one, TOOL_CALLS): calls})
    elif rest or not results:
        messages.append({**one, key: rest})
    return messages


def result_text(value: Any) -> Any:
    """What a tool gave back, of texts in parts as one text."""
    if (
        isinstance(value, list)
        and value
        and all(isinstance(one, dict) and isinstance(one.get("text"), str) for one in value)
    ):
        return "\n".join(one["text"] for one in value)
    return "" if value is None else value if isinstance(value, str | list) else as_text(value)
