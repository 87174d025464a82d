"""A dialogue -> the text that a model is trained on, in pieces that say who said what.

A template is a handful of text patterns with the field names of LLaMA-Factory, all plain text. The whole dialogue is
rendered first and encoded once, because the World tokenizer joins "。" with a newline that follows: encoding turn by turn
would give other ids.

    System: ...\\n\\nUser: ...\\n\\nAssistant: ...\\n\\nUser: ...\\n\\nAssistant: ...

A prompt ends exactly at the heading of the answer ("Assistant:", no space: a space would be the wrong first token). What
the model says begins right behind it, at the blank, and includes the separator that ends the turn.
Source: the model card of BlinkDL/rwkv-7-world and RWKV7-G1x-templates.txt in BlinkDL/RWKV-LM.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..roles import Role, Span
from .headings import WORLD

BLANK_LINES = re.compile(r"\n\s*\n")
THINK, END_OF_THINK = "<think>", "</think>"


class Message(NamedTuple):
    """One turn. think: what the assistant thought before it spoke. material: a second text of a user's turn (the input
    of an instruction). learn: whether an answer is to be learnt. call: the content of a tool call, as JSON."""

    role: Role
    content: str
    think: str = ""
    material: str = ""
    learn: bool = True
    call: str = ""


@dataclass(frozen=True)
class Dialogue:
    """Turns in order, and the tools that the assistant may call, as JSON text."""

    messages: tuple[Message, ...]
    tools: str = ""


@dataclass(frozen=True)
class Ending:
    """How turns end. answer: behind every answer, inside the turn. last: behind the last turn. token: whether the row
    ends with token 0."""

    answer: str = ""
    last: str = ""
    token: bool = True


# EOT of make_tokenize.sh
ENDINGS = {
    "doc": Ending(),
    "blank": Ending(last="\n\n", token=False),
    "both": Ending(last="\n\n"),
    "x17": Ending(answer="\x17", token=False),
}


def tidy(content: str) -> str:
    """Line ends are \\n, and no blanks at the ends."""
    if "\r" in content:
        content = content.replace("\r\n", "\n").replace("\r", "\n")
    return content.strip()


def clean(content: str) -> str:
    """tidy, and no blank line inside: in most templates a blank line is what ends a turn."""
    content = tidy(content)
    return BLANK_LINES.sub("\n", content) if "\n" in content else content


def split_thought(content: str) -> tuple[str, str]:
    """<think>...</think> at the start of an answer, apart from the rest."""
    if not content.lstrip().startswith(THINK) or END_OF_THINK not in content:
        return "", content
    think, _, words = content.partition(THINK)[2].partition(END_OF_THINK)
    return think.strip(), words.strip()


class Pattern(NamedTuple):
    """A pattern taken apart. heading: before the content, without its last blanks (those belong to who speaks)."""

    heading: str
    lead: str
    tail: str


def pattern(text: str) -> Pattern:
    before, _, after = text.partition("{{content}}")
    heading = before.rstrip()
    return Pattern(heading, before[len(heading) :], after)


@dataclass(frozen=True)
class Template:
    """Patterns of text; {{content}} is what is said. Field names as in LLaMA-Factory, and a few of our own.

    format_user_input: a user's turn that has a second text, {{input}} (""): content and input with a newline between.
    format_observation: what a tool gave back. format_function: how an answer writes a tool call ({{content}}: its JSON;
    or {{name}} and {{arguments}}). format_tools: the list of tools, which stands in the system's turn.
    default_system(_input): the system's text where a row has none (and its first turn has a second text).
    clean: roles whose turns lose their blank lines. strip: whether turns lose blanks at their ends.
    think: keep | always (an empty thought where there is none) | fake (an empty thought instead of any).
    opening: how an answer begins when it is asked for; that much is given, not learnt.
    """

    name: str
    format_user: str
    format_assistant: str
    format_system: str = "{{content}}"
    format_separator: str = "\n\n"
    format_prefix: str = ""
    format_user_input: str = ""
    format_observation: str = ""
    format_function: str = "{{content}}"
    format_tools: str = "{{content}}"
    default_system: str = ""
    default_system_input: str = ""
    stop_words: tuple[str, ...] = ()
    clean: frozenset[Role] = field(default=frozenset())
    strip: bool = True
    think: str = "keep"
    opening: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON can hold it: what a run keeps, so that it is served in the form that it was trained in, whatever
        the name means in a later version."""
        found = {}
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if isinstance(value, frozenset):
                value = sorted(role.name.lower() for role in value)
            found[one.name] = list(value) if isinstance(value, tuple) else value
        return found

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Template:
        """The template that `to_dict` has described. ValueError if it is none, or one of a newer version of this kit."""
        fields = {one.name: one for one in dataclasses.fields(cls)}
        missing = [n for n, one in fields.items() if one.default is dataclasses.MISSING and n not in content]
        if missing:
            raise ValueError(f"lacks {missing[0]}")
        values = {}
        for name, value in content.items():
            if name not in fields:
                raise ValueError(f"has the field {name!r}, which this version of the kit does not know")
            default = fields[name].default
            if isinstance(default, (tuple, frozenset)):
                if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
                    raise ValueError(f"{name} must be a list of texts, not {value!r}")
                value = tuple(value)
                if isinstance(default, frozenset):
                    unknown = [one for one in value if one.upper() not in Role.__members__]
                    if unknown:
                        raise ValueError(f"{name} holds {unknown[0]!r}, which is no role")
                    value = frozenset(Role[one.upper()] for one in value)
            elif not isinstance(value, bool if isinstance(default, bool) else str):
                raise ValueError(f"{name} cannot be {value!r}")
            values[name] = value
        return cls(**values)

    @functools.cached_property
    def patterns(self) -> dict[Role, Pattern]:
        found = {
            Role.SYSTEM: pattern(self.format_system),
            Role.USER: pattern(self.format_user),
            Role.ASSISTANT: pattern(self.format_assistant),
            Role.TOOL: pattern(self.format_observation or self.format_user),
        }
        if self.answer_in_user:  # LLaMA-Factory's way: what opens the answer stands at the end of the user's pattern
            for role in (Role.USER, Role.TOOL):
                found[role] = found[role]._replace(tail="")
            opener = pattern(self.format_user).tail
            heading = opener.rstrip()
            found[Role.ASSISTANT] = Pattern(heading, opener[len(heading) :], pattern(self.format_assistant).tail)
        return found | {Role.UNTRAINED: found[Role.ASSISTANT]}

    @functools.cached_property
    def answer_in_user(self) -> bool:
        return not pattern(self.format_assistant).heading and bool(pattern(self.format_user).tail.strip())

    @functools.cached_property
    def cleaners(self) -> dict[Role, object]:
        plain = tidy if self.strip else str
        return {role: clean if role in self.clean else plain for role in Role}

    @functools.cached_property
    def headings(self) -> dict[str, Role]:
        """Words before a colon that begin a turn behind a blank line, for texts that are ready."""
        own = {self.patterns[role].heading.strip(): role for role in (Role.USER, Role.ASSISTANT)}
        blank = self.format_separator == "\n\n"
        return WORLD | {h[:-1]: role for h, role in own.items() if blank and re.fullmatch(r"\w[\w ]*:", h)}

    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer when the model goes on with the next turn by itself."""
        headings = {self.patterns[r].heading for r in (Role.USER, Role.SYSTEM, Role.ASSISTANT)}
        border = "" if self.answer_in_user else self.format_separator
        return (*self.stop_words, ENDINGS["x17"].answer, *sorted(border + h for h in headings if h.strip()))

    def render(
        self, dialogue: Dialogue, ending: Ending = ENDINGS["doc"], open_answer: bool = False
    ) -> tuple[list[str], list[Role]]:
        """The text in pieces, and who says each; they make the whole without gaps. Empty pieces do not occur.

        open_answer: end with the heading of an answer that is still to come; the text never ends with a blank then.
        """
        texts: list[str] = []
        roles: list[Role] = []

        messages = self.with_system(dialogue)
        if self.format_prefix:
            texts.append(self.format_prefix)
            roles.append(Role.HEADING)
        patterns, cleaners, opening = self.patterns, self.cleaners, self.opening
        separator = None if self.answer_in_user else self.format_separator
        last = len(messages) - 1
        for i, message in enumerate(messages):
            role, content, think, material, learn, call = message
            heading, lead, tail = patterns[role]
            if role is Role.ASSISTANT:
                plain = not think and not call and self.think == "keep"
                body = lead + (cleaners[role](content) if plain else self.answer(message))
                if opening and body.startswith(lead + opening):
                    heading, body = heading + lead + opening, body[len(lead + opening) :]
                if not texts:
                    heading = heading.lstrip()
                tail += ending.answer
                if not learn:
                    role = Role.UNTRAINED
            elif not material:
                body = lead + cleaners[role](content)
            elif role is Role.USER and self.format_user_input:
                heading, parts = self.with_input
                says = {"content": content, "input": material}
                body, tail = "".join(cleaners[role](says[p]) if i % 2 else p for i, p in enumerate(parts)), ""
            else:
                body = lead + cleaners[role](f"{content}\n{material}")
            if i == last and not open_answer:
                behind = ending.last
            elif separator is not None:
                behind = separator
            else:
                behind = self.border(message.role, Role.ASSISTANT if i == last else messages[i + 1].role)
            if heading:
                texts.append(heading)
                roles.append(Role.HEADING)
            if body := body + tail + behind:
                texts.append(body)
                roles.append(role)
        heading, lead, _ = patterns[Role.ASSISTANT]
        if open_answer and (heading or opening):
            texts.append(heading + lead + opening if opening else heading)
            roles.append(Role.HEADING)
        return texts, roles

    @functools.cached_property
    def with_input(self) -> tuple[str, list[str]]:
        """format_user_input: its heading, and the rest with the names of what is put in at odd places."""
        heading = self.format_user_input.partition("{{")[0].rstrip()
        return heading, re.split(r"\{\{(content|input)\}\}", self.format_user_input[len(heading) :])

    def border(self, role: Role, next_role: Role) -> str:
        """What stands between two turns where the user's pattern opens the answer."""
        asked = next_role in (Role.USER, Role.TOOL)
        return self.format_separator if asked and role is not Role.SYSTEM else ""

    def with_system(self, dialogue: Dialogue) -> Sequence[Message]:
        """The messages, with the template's own system text where there is none, and with the tools in it."""
        messages = dialogue.messages
        if not (dialogue.tools or self.default_system):
            return messages
        has = bool(messages) and messages[0].role is Role.SYSTEM
        words = messages[0].content if has else self.default_system
        if not has and self.default_system_input and messages and messages[0].material:
            words = self.default_system_input
        if dialogue.tools:
            tools = self.format_tools.replace("{{content}}", dialogue.tools)
            words = f"{words}\n{tools}" if words else tools
        return (Message(Role.SYSTEM, words), *messages[has:])

    def answer(self, message: Message) -> str:
        """What the assistant says in a turn: thought, words and tool call, cleaned."""
        cleaner = self.cleaners[Role.ASSISTANT]
        words = cleaner(message.content)
        if message.call:
            call = self.call_text(message.call)
            words = f"{words}\n{call}" if words else call
        if self.think == "keep" and not message.think:
            return words
        thought = "" if self.think == "fake" else cleaner(message.think)
        return f"{THINK}\n{thought}\n{END_OF_THINK}\n{words}" if thought else f"{THINK}\n{END_OF_THINK}\n{words}"

    def call_text(self, call: str) -> str:
        if "{{name}}" not in self.format_function:
            return self.format_function.replace("{{content}}", call)
        found = json.loads(call)
        written = []
        for one in found if isinstance(found, list) else [found]:
            arguments = one["arguments"]
            arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            says = {"name": one["name"], "arguments": arguments}
            parts = re.split(r"\{\{(name|arguments)\}\}", self.format_function)
            written.append("".join(says[p] if i % 2 else p for i, p in enumerate(parts)))
        return "\n".join(written)

    def prompt(self, messages: Sequence[Message], tools: str = "", ending: Ending = ENDINGS["doc"]) -> str:
        """What a client sends for an answer to these messages."""
        return "".join(self.render(Dialogue(tuple(messages), tools), ending, open_answer=True)[0])


def spans_of(texts: Sequence[str], roles: Sequence[Role]) -> list[Span]:
    """Consecutive byte spans of rendered pieces."""
    spans, at = [], 0
    for text, role in zip(texts, roles, strict=True):
        size = len(text.encode("utf-8"))
        spans.append(Span(at, at + size, role))
        at += size
    return spans
