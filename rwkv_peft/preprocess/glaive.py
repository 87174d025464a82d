r"""Rows of glaive-function-calling-v2 -> messages and tools.

A row is a system text with the functions in it, and a whole talk as one text:

{"system": "SYSTEM: You are ... with access to the following functions. Use them if required -\n{...}",
 "chat": "USER: ...\n\n\nASSISTANT: <functioncall> {\"name\": ..., \"arguments\": '{...}'} <|endoftext|>"
         "\n\n\nFUNCTION RESPONSE: ...\n\n\nASSISTANT: ... <|endoftext|>"}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import orjson

from .values import RowError

SPEAKERS = {"SYSTEM": "system", "USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
TURN = rf"({'|'.join(SPEAKERS)}):[ ]?"
SEPARATORS = ("\n\n\n", "\n\n", "\n")  # between turns: what the files have, and copies of them
END = re.compile(r"\s*<\|endoftext\|>\s*\Z")
CALL = re.compile(r"<functioncall>\s*(\{.*\})\s*\Z", re.S)
ARGUMENTS = re.compile(r'("arguments"\s*:\s*)\'(.*)\'(\s*\})\Z', re.S)


def is_glaive(row: Mapping[str, Any]) -> bool:
    """Return whether a row has this form."""
    chat = row.get("chat")
    return isinstance(chat, str) and chat.lstrip().startswith("USER:") and "\nASSISTANT:" in chat


def row_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with messages and tools in place of its two texts. RowError if a call cannot be read."""
    rest = {key: value for key, value in row.items() if key not in ("chat", "system")}
    system = row.get("system")
    tools: list[Any] = []
    if isinstance(system, str):
        system, tools = functions_of(system.strip().removeprefix("SYSTEM:").strip())
    chat = row["chat"].strip()
    separator = next(separator for separator in SEPARATORS if f"{separator}ASSISTANT:" in chat)
    pieces = re.split(rf"(?:\A|{separator}\n*){TURN}", chat)[1:]  # speaker, words, speaker, words, ...
    messages = [message(SPEAKERS[who], words) for who, words in zip(pieces[::2], pieces[1::2], strict=True)]
    return rest | {"system": system, "messages": messages} | ({"tools": tools} if tools else {})


def functions_of(system: str) -> tuple[str, list[Any]]:
    """The words of a system text, and the functions that stand behind them one after another."""
    begin = system.find("\n{") + 1
    if not begin:
        return system, []
    rest, decoder, tools = system[begin:].strip(), json.JSONDecoder(), []
    while rest:
        try:
            tool, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return system, []
        tools.append(tool)
        rest = rest[end:].strip()
    return system[:begin].strip(), tools


def message(role: str, words: str) -> dict[str, Any]:
    """Return a message of a turn; a function call becomes a tool call."""
    words = END.sub("", words).strip()
    call = CALL.search(words) if role == "assistant" else None
    if not call:
        return {"role": role, "content": words}
    # the arguments are JSON between single quotes, whose own single quotes have a backslash
    text = ARGUMENTS.sub(lambda m: m[1] + m[2].replace("\\'", "'") + m[3], call[1])
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise RowError("wrong type", f"has a call that is not valid JSON: {call[1][:60]}") from None
    return {"role": role, "content": words[: call.start()].strip(), "tool_calls": [value]}
