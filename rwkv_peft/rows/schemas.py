"""A row of any data set of the field -> a dialogue, or a text that is ready.

What a row is shows in its columns; roles are read from their names, never from their places. A row that cannot be used
raises RowError with a reason (counted) and a sentence (shown); the caller knows the file and the line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from ..errors import Problem, Problems
from ..roles import Role
from ..templates.template import THINK, Dialogue, Message, split_thought
from ..words import did_you_mean
from .literals import parse_list
from .mojibake import doctor

Row = Mapping[str, Any]


class RowError(Exception):
    """Why a row cannot be used. reason: a few words that are counted; the message: a sentence about this row."""

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)  # both, so that it survives the way between processes
        self.reason, self.message = reason, message

    def __str__(self) -> str:
        return self.message


# the names that data sets give to those who speak
ROLE_NAMES = {
    "system": Role.SYSTEM, "developer": Role.SYSTEM,
    "user": Role.USER, "human": Role.USER, "prompter": Role.USER,
    "assistant": Role.ASSISTANT, "gpt": Role.ASSISTANT, "bot": Role.ASSISTANT, "model": Role.ASSISTANT,
    "chatgpt": Role.ASSISTANT, "ai": Role.ASSISTANT,
    "tool": Role.TOOL, "observation": Role.TOOL, "function": Role.TOOL, "function_response": Role.TOOL,
    "ipython": Role.TOOL, "tool_response": Role.TOOL,
}  # fmt: skip
PLAIN_ROLES = {name: role for name, role in ROLE_NAMES.items() if role in (Role.USER, Role.ASSISTANT)}
CALLS = ("function_call", "tool_call")  # roles of a message that is a tool call of the assistant

# columns that hold a conversation, and the three that hold a question, its input and its answer
MESSAGES = ("messages", "conversations", "conversation")
PAIRS = (
    ("instruction", "input", "output"),
    ("prompt", "", "completion"),
    ("prompt", "", "response"),
    ("question", "", "answer"),
    ("query", "", "response"),
)

MAPPABLE = ("prompt", "query", "response", "system", "history", "messages", "text", "tools", "think")

# HANDLER: short names, and those of the field; what each reads
HANDLERS = {
    "auto": "auto",
    "text": "text", "GeneralPretrainHandler": "text",
    "alpaca": "pair", "AlpacaStyleInstructionHandler": "pair",
    "prompt-completion": "pair", "PromptCompletionHandler": "pair",
    "sharegpt": "messages", "ShareGPTStyleHandler": "messages",
    "openai": "messages", "OpenAIMessagesHandler": "messages",
}  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """Which column of the data plays which part; MAP_KEYS changes the names."""

    messages: tuple[str, ...] = MESSAGES
    pairs: tuple[tuple[str, str, str], ...] = PAIRS
    text: str = "text"
    system: str = "system"
    history: str = "history"
    tools: str = "tools"
    think: str = "think"
    named: tuple[str, ...] = ()  # the columns that MAP_KEYS names: each must be somewhere in the data


def columns(map_keys: str) -> Columns:
    """MAP_KEYS, like {"prompt": "question", "response": "reply"}; "" leaves a part out. Problems if it is wrong."""
    if not map_keys.strip():
        return Columns()
    try:
        given = json.loads(map_keys)
    except json.JSONDecodeError as error:
        raise Problems(
            Problem("MAP_KEYS", f'is not valid JSON ({error}); write it like {{"text": "content"}}')
        ) from None
    if not isinstance(given, dict) or not all(isinstance(v, str) for v in given.values()):
        raise Problems(Problem("MAP_KEYS", 'must be an object of texts, like {"text": "content"}'))
    unknown = [key for key in given if key not in MAPPABLE]
    if unknown:
        meant = did_you_mean(unknown[0], MAPPABLE)
        raise Problems(Problem("MAP_KEYS", f"has the key {unknown[0]!r}{meant}; known are {', '.join(MAPPABLE)}"))
    found = {key: given[key] for key in ("text", "system", "history", "tools", "think") if key in given}
    if "messages" in given:
        found["messages"] = (given["messages"],)
    if {"prompt", "query", "response"} & set(given):
        usual = dict(zip(("prompt", "query", "response"), PAIRS[0], strict=True))
        # a column that plays a part of its own plays no other one besides
        free = {part: "" if name in given.values() else name for part, name in usual.items()}
        found["pairs"] = (tuple(given.get(part, free[part]) for part in usual),)
    return Columns(**found, named=tuple(name for name in given.values() if name))


@dataclass
class Reader:
    """Reads rows. verdicts: what the mojibake doctor said of the strings of the last row. seen: named columns met."""

    columns: Columns = Columns()
    handler: str = "auto"
    repair: bool = True
    verdicts: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)

    def read(self, row: Row) -> tuple[str, Dialogue | str]:
        """The schema's name, and a dialogue or a ready text. RowError if the row is none that can be used."""
        if self.verdicts:
            self.verdicts.clear()
        if self.columns.named:
            self.seen.update(name for name in self.columns.named if name in row)
        kind, name = self.recognise(row)
        if kind == "text":
            return "text", self.text(row[name], name)
        if kind == "pair":
            pair = next(p for p in self.columns.pairs if p[0] == name and p[2] in row)
            schema = "alpaca" if pair == PAIRS[0] else "/".join((pair[0], pair[2]))
            return schema, self.pair(row, *pair)
        rows = parsed(row[name]) if isinstance(row[name], str) else row[name]
        messages = self.messages(rows, row)
        return ("sharegpt" if "from" in rows[0] else name), messages

    def recognise(self, row: Row) -> tuple[str, str]:
        """messages, pair or text, and the column that tells it."""
        wanted = HANDLERS[self.handler]
        if wanted != "pair" and wanted != "text":
            for name in self.columns.messages:  # what most rows are
                if row.get(name) is not None:
                    return "messages", name
        kinds = {
            "messages": self.columns.messages,
            "pair": [p[0] for p in self.columns.pairs if p[0] in row and p[2] in row],
            "text": (self.columns.text,),
        }
        kinds = kinds if wanted == "auto" else {wanted: kinds[wanted]}
        empty = None
        for kind, names in kinds.items():
            for name in names:
                if row.get(name) is not None:
                    return kind, name
                if name in row and name:  # exports of several kinds have all the columns, and null in those not used
                    empty = empty or (kind, name)
        if empty:
            return empty
        has = ", ".join(map(repr, list(row)[:6])) or "nothing"
        pairs = [" with ".join(filter(None, pair[::2])) for pair in self.columns.pairs[:2]]
        known = [*self.columns.messages[:2], *pairs, self.columns.text]
        if wanted != "auto":
            known = {"messages": self.columns.messages[:2], "pair": pairs, "text": known[-1:]}[wanted]
        raise RowError("unknown columns", f"has none of the keys {', '.join(known)}; it has {has}")

    def string(self, value: str) -> str:
        if self.repair and not value.isascii():
            value, verdict = doctor(value)
            if verdict != "clean":
                self.verdicts.add(verdict)
        return value

    def text(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            raise RowError("wrong type", f'its "{name}" must be a string, not {kind(value)}')
        if not value or value.isspace():
            raise RowError("empty", f'its "{name}" is empty')
        return self.string(value)

    def optional(self, row: Row, name: str) -> str:
        """A column that may be absent, null or empty."""
        value = row.get(name) if name else None
        if value is None or value == "":
            return ""
        if not isinstance(value, str):
            raise RowError("wrong type", f'its "{name}" must be a string, not {kind(value)}')
        return "" if value.isspace() else self.string(value)

    def pair(self, row: Row, prompt: str, query: str, response: str) -> Dialogue:
        """A question with its input, what came before (history), and the answer."""
        if isinstance(row[prompt], list) and isinstance(row[response], list):  # lists of messages on both sides
            return self.messages([*row[prompt], *row[response]], row)
        system = self.optional(row, self.columns.system)
        found = [Message(Role.SYSTEM, system)] if system else []
        history = row.get(self.columns.history) or []
        if isinstance(history, str):
            history = parsed(history)
        if not isinstance(history, list):
            raise RowError("wrong type", f'its "{self.columns.history}" must be a list of [question, answer] pairs')
        for i, turn in enumerate(history, 1):
            if not isinstance(turn, list) or len(turn) != 2:
                raise RowError(
                    "wrong type", f'turn {i} of its "{self.columns.history}" must be a [question, answer] pair'
                )
            found.append(Message(Role.USER, self.text(turn[0], f"{self.columns.history}, question {i}")))
            found.append(Message(Role.ASSISTANT, self.text(turn[1], f"{self.columns.history}, answer {i}")))
        question, material = self.optional(row, prompt), self.optional(row, query)
        if not question and not material:
            raise RowError("empty", f'its "{prompt}" is empty')
        if not question:
            question, material = material, ""
        found.append(Message(Role.USER, question, material=material))
        if row[response] is None:
            raise RowError("empty", f'its "{response}" is empty')
        think, words = split_thought(self.text(row[response], response))
        found.append(Message(Role.ASSISTANT, words, think=self.optional(row, self.columns.think) or think))
        return Dialogue(tuple(found), tools_text(row.get(self.columns.tools)))

    def messages(self, rows: Any, row: Row) -> Dialogue:
        """A conversation from [{"role": ..., "content": ...}, ...], or "from" and "value"."""
        if not isinstance(rows, list) or not rows:
            raise RowError("wrong type", "its conversation must be a list of messages with at least one in it")
        found: list[Message] = []
        answers = 0
        tools = row.get(self.columns.tools)
        system = self.optional(row, self.columns.system)
        if system:
            found.append(Message(Role.SYSTEM, system))
        for i, one in enumerate(rows, 1):
            message = self.plain_message(one) or self.message(i, one)
            if message is None:
                continue
            role = message.role
            if role is Role.ASSISTANT:
                answers += 1
            elif role is Role.SYSTEM:
                tools = tools or one.get("tools")
                if system and len(found) == 1:  # said in a column of its own and in the conversation
                    found[0] = message
                    continue
            elif role is Role.TOOL and found and found[-1].role is Role.TOOL:
                found[-1] = Message(Role.TOOL, f"{found[-1].content}\n{message.content}")
                continue
            found.append(message)
        if not answers:
            raise RowError("no answer", "the conversation has no assistant message")
        return Dialogue(tuple(found), tools_text(tools))

    def plain_message(self, one: Any) -> Message | None:
        """A message of nothing but a role and its words, which most are: what `message` would give, sooner. Or None."""
        if type(one) is not dict or len(one) != 2:
            return None
        try:
            role, content = one["role"], one["content"]
        except KeyError:
            role, content = one.get("from"), one.get("value")
        role = PLAIN_ROLES.get(role) if type(role) is str else None
        if role is None or type(content) is not str or not content or content.isspace() or THINK in content[:40]:
            return None
        return Message(role, content if content.isascii() else self.string(content))

    def message(self, i: int, one: Any) -> Message | None:
        """Message i (from 1) of a conversation; None for a system message that says nothing."""
        if not isinstance(one, dict):
            raise RowError("wrong type", f"message {i} must be an object with role and content")
        name = one.get("role") or one.get("from")
        role = ROLE_NAMES.get(name) if isinstance(name, str) else None
        if role is None:
            name, role = self.unusual_role(i, one, name)
        content = one.get("content", one.get("value"))
        if isinstance(content, list):
            content = joined_parts(i, content)
        call = ""
        if role is Role.ASSISTANT:
            if name in CALLS:
                call, content = call_text(i, content), ""
            elif calls := one.get("tool_calls") or one.get("function_call"):  # the latter is OpenAI's older form
                call, content = call_text(i, calls), content or ""
        if not isinstance(content, str):
            raise RowError("wrong type", f"message {i} ({name}) has no text in content")
        empty = not content or content.isspace()
        if role is Role.SYSTEM and empty:
            return None
        content = self.string(content)
        if role is not Role.ASSISTANT:
            if empty:
                raise RowError("empty", f"message {i} ({name}) is empty")
            return Message(role, content)
        think, content = split_thought(content)
        for key in (self.columns.think, "reasoning_content"):
            think = think or self.optional(one, key)
        if empty and not call:
            raise RowError("empty", f"message {i} ({name}) is empty")
        weight = one.get("weight", 1)
        if weight is not None and weight not in (0, 1):
            raise RowError("wrong type", f"message {i} ({name}) has the weight {weight!r}; it must be 0 or 1")
        return Message(role, content, think, learn=weight != 0, call=call)

    def unusual_role(self, i: int, one: dict[str, Any], name: Any) -> tuple[str, Role]:
        """A role that is not written as the table has it."""
        word = name.strip().lower() if isinstance(name, str) else ""
        if word in CALLS:
            return word, Role.ASSISTANT
        if word not in ROLE_NAMES:
            raise RowError("unknown role", f"message {i} has the role {name!r}; known are {', '.join(ROLE_NAMES)}")
        return word, ROLE_NAMES[word]


def parsed(text: str) -> Any:
    """A list that stands in a text, as the columns of tables hold it."""
    try:
        return parse_list(text)
    except ValueError as error:
        words = f"its conversation must be a list of messages, or text of one, but the text {error}"
        raise RowError("wrong type", words) from None


def joined_parts(i: int, parts: Iterable[Any]) -> str:
    """OpenAI's list of parts; only text can be trained."""
    found = []
    for part in parts:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            what = part.get("type") if isinstance(part, dict) else kind(part)
            raise RowError("not text", f"message {i} has a part of type {what}; only text can be trained")
        found.append(text)
    return "\n".join(found)


def call_text(i: int, calls: Any) -> str:
    """Tool calls as JSON text: {"name": ..., "arguments": {...}}, or a list of such where there are several."""
    if isinstance(calls, str):
        try:
            calls = orjson.loads(calls)
        except orjson.JSONDecodeError:
            raise RowError("tool call", f"message {i} must hold its tool call as JSON") from None
    written = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise RowError("tool call", f"message {i} has a tool call without a name")
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = orjson.loads(arguments)
            except orjson.JSONDecodeError:
                raise RowError(
                    "tool call", f"message {i}: the arguments of {call['name']} are not valid JSON"
                ) from None
        written.append({"name": call["name"], "arguments": arguments})
    return json.dumps(written[0] if len(written) == 1 else written, ensure_ascii=False)


def tools_text(tools: Any) -> str:
    """The list of tools as one line of JSON; functions without the wrapper that OpenAI puts around them."""
    if not tools:
        return ""
    if isinstance(tools, str):
        try:
            tools = orjson.loads(tools)
        except orjson.JSONDecodeError:
            return tools.strip()  # a description in words
    if not isinstance(tools, list):
        tools = [tools]
    if not tools:
        return ""
    bare = [t.get("function", t) if isinstance(t, dict) else t for t in tools]
    return json.dumps(bare, ensure_ascii=False)


def kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null",
             bytes: "bytes that are no UTF-8 text"}  # fmt: skip
    return names.get(type(value), "a number")
