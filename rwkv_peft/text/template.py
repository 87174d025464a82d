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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .roles import Role, Span
from .turns import WORLD, is_mark

BLANK_LINES = re.compile(r"\n\s*\n")
LINE_ENDS = re.compile("[\n\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")  # of str.splitlines
TOOL_PLACES = re.compile(r"\{\{(name|description|parameters)\}\}")
THINK, END_OF_THINK = "<think>", "</think>"
CUES = ("(think)", "(think a bit)", "(think a lot)")  # RWKV7-G1x-templates.txt in BlinkDL/RWKV-LM, 2026-07-18
SPEAKERS = (Role.SYSTEM, Role.USER, Role.ASSISTANT)


class Message(NamedTuple):
    """One turn. think: what the assistant thought before it spoke. material: a second text of a user's turn (the input
    of an instruction). learn: whether an answer is to be learnt. call: the content of a tool call, as JSON.
    """

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
    ends with token 0.
    """

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


def lines(content: str) -> str:
    """Line ends are \\n."""
    return content.replace("\r\n", "\n").replace("\r", "\n") if "\r" in content else content


def tidy(content: str) -> str:
    """Line ends are \\n, and no blanks at the ends."""
    return lines(content).strip()


def clean(content: str) -> str:
    """tidy, and no blank line inside: in most templates a blank line is what ends a turn."""
    return without_blank_lines(tidy(content))


def tidy_answer(content: str) -> str:
    """Tidy for what is learnt: the indentation of the first line stays, as in code or a Chinese paragraph. Blank lines before it
    go, and so does a single space (prompt/completion data of OpenAI begin with one).
    """
    content = lines(content).rstrip()
    if not content[:1].isspace():
        return content
    words = content.lstrip()
    before = content[: len(content) - len(words)]
    indentation = before[before.rindex(found[-1]) + 1 :] if (found := LINE_ENDS.findall(before)) else before
    return words if indentation == " " else indentation + words


def clean_answer(content: str) -> str:
    """tidy_answer, and no blank line inside."""
    return without_blank_lines(tidy_answer(content))


def without_blank_lines(content: str) -> str:
    return BLANK_LINES.sub("\n", content) if "\n" in content else content


def split_thought(content: str) -> tuple[str, str]:
    """<think>...</think> at the start of an answer, apart from the rest."""
    if not content.lstrip().startswith(THINK) or END_OF_THINK not in content:
        return "", content
    think, _, words = content.partition(THINK)[2].partition(END_OF_THINK)
    return think.strip(), tidy_answer(words)


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
    format_thought, format_no_thought: how a thought and an empty one are written.
    opening: how an answer begins when it is asked for; that much is given, not learnt.
    user_cue: stands at the end of a user's turn whose answer has a thought, and of the one that is to be answered.
    json_style: how calls and lists of tools are written: line (as they are), compact (no blanks; a tool a line), indent (two
    blanks; results of tools too, as text of JSON where they are none). Of the last two, every call has its own format_function.
    format_tool: each tool by itself, with {{name}}, {{description}} (its line is left out where there is none), {{parameters}};
    "" is the list.
    reserved: texts that mean a border here; a dialogue that holds one cannot be written.
    infill: whether this is for rows of prefix, suffix and middle. The prefix is {{content}}, the suffix {{input}}.
    bos: whether BOS=auto puts token 0 before the first turn: true where the clients of the format do (docs/data.md).
    temperature, top_p, top_k: sampling that chat.sh takes for `auto`. top_k 0: no limit.
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
    format_thought: str = f"{THINK}\n{{{{content}}}}\n{END_OF_THINK}\n"
    format_no_thought: str = f"{THINK}\n{END_OF_THINK}\n"
    user_cue: str = ""
    json_style: str = "line"
    format_tool: str = ""
    reserved: tuple[str, ...] = ()
    infill: bool = False
    bos: bool = False
    temperature: float = 0.7
    top_p: float = 0.5
    top_k: int = 0

    def begins_with_zero(self, bos: str) -> bool:
        """Whether texts begin with token 0. bos: the setting BOS, of which auto leaves it to the template."""
        return self.bos if bos == "auto" else bos == "1"

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON can hold it: what a run keeps, so that it is served in the form that it was trained in, whatever
        the name means in a later version.
        """
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
                if "" in value:
                    raise ValueError(f"{name} holds an empty text")
                value = tuple(value)
                if isinstance(default, frozenset):
                    unknown = [one for one in value if one.upper() not in Role.__members__]
                    if unknown:
                        raise ValueError(f"{name} holds {unknown[0]!r}, which is no role")
                    value = frozenset(Role[one.upper()] for one in value)
            else:
                kind = type(default) if isinstance(default, (bool, int, float)) else str
                if isinstance(value, bool) is not (kind is bool) or not isinstance(
                    value, (int, float) if kind is float else kind
                ):
                    raise ValueError(f"{name} cannot be {value!r}")
                if name == "name" and not value:
                    raise ValueError("has no name")
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
    def cleaners(self) -> dict[Role, Callable[[str], str]]:
        if not self.strip:
            return {role: clean if role in self.clean else lines for role in Role}
        found = {role: clean if role in self.clean else tidy for role in Role}
        return found | {Role.ASSISTANT: clean_answer if Role.ASSISTANT in self.clean else tidy_answer}

    @functools.cached_property
    def headings(self) -> dict[str, Role]:
        """What begins a turn in texts that are ready (spans_of_text): words before a colon behind a blank line, and headings like
        Bot✿ and ### User at the start of a line.
        """
        own = {self.patterns[r].heading.split("\n")[0].strip(): r for r in (Role.TOOL, *SPEAKERS)}
        blank = self.format_separator == "\n\n"
        words = {h[:-1]: role for h, role in own.items() if blank and re.fullmatch(r"\w[\w ]*:", h)}
        return WORLD | words | {h: role for h, role in own.items() if is_mark(h)}

    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer when the model goes on with the next turn by itself."""
        headings = {self.patterns[role].heading for role in SPEAKERS}
        tool = self.patterns[Role.TOOL].heading
        if not tool.startswith(self.patterns[Role.USER].heading):
            headings.add(tool.split("\n")[0])
        border = "" if self.answer_in_user else self.format_separator
        found = (*self.stop_words, ENDINGS["x17"].answer, *sorted(border + h for h in headings if h.strip()))
        return tuple(dict.fromkeys(found))

    def holds_reserved(self, dialogue: Dialogue) -> str:
        """A reserved text that a dialogue holds, or ""."""
        if not self.reserved:
            return ""
        says = "\n".join(part for m in dialogue.messages for part in (m.content, m.think, m.material, m.call))
        return next((word for word in self.reserved if word in says or word in dialogue.tools), "")

    def asked(self, question: str) -> str:
        """A question with the cue behind it, unless it ends with one already."""
        if not self.user_cue or question.rstrip().endswith(CUES):
            return question
        return question.rstrip() + self.user_cue

    def render(
        self, dialogue: Dialogue, ending: Ending = ENDINGS["doc"], open_answer: bool = False
    ) -> tuple[list[str], list[Role]]:
        """The text in pieces, and who says each; they make the whole without gaps. Empty pieces do not occur.

        open_answer: end with the heading of an answer that is still to come; the text never ends with a blank then.
        """
        texts: list[str] = []
        roles: list[Role] = []

        messages = self.with_system(dialogue)
        if self.user_cue:
            messages = self.with_cues(messages, open_answer)
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
                body = lead + (self.result(content) if role is Role.TOOL else cleaners[role](content))
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
        if self.json_style == "line" and any(message.role is Role.TOOL for message in messages):
            messages = joined_results(messages)
        if not (dialogue.tools or self.default_system):
            return messages
        has = bool(messages) and messages[0].role is Role.SYSTEM
        words = messages[0].content if has else self.default_system
        if not has and self.default_system_input and messages and messages[0].material:
            words = self.default_system_input
        if dialogue.tools:
            tools = self.format_tools.replace("{{content}}", self.tools_text(dialogue.tools))
            words = f"{words}\n{tools}" if words else tools
        return (Message(Role.SYSTEM, words), *messages[has:])

    def with_cues(self, messages: Sequence[Message], open_answer: bool) -> Sequence[Message]:
        """The messages, with the cue behind every user's turn that a thought answers, or that is still to be answered."""
        found = list(messages)
        content_last = self.format_user_input.rfind("{{content}}") > self.format_user_input.rfind("{{input}}")
        for i, message in enumerate(found):
            answered = found[i + 1].role is Role.ASSISTANT and found[i + 1].think if i + 1 < len(found) else open_answer
            if message.role is Role.USER and answered:
                part = "material" if message.material and not content_last else "content"
                found[i] = message._replace(**{part: self.asked(getattr(message, part))})
        return found

    def tools_text(self, tools: str) -> str:
        """The list of tools (JSON text) as this template writes it; a description in words as it is."""
        if self.json_style == "line" and not self.format_tool:
            return tools
        try:
            found = json.loads(tools)
        except (ValueError, RecursionError):
            return tools
        found = found if isinstance(found, list) else [found]
        if not self.format_tool or not all(isinstance(one, dict) for one in found):
            if self.json_style == "compact":
                return "[\n" + ",\n".join(map(self.json_text, found)) + "\n]"
            return self.json_text(found)
        return "\n".join(map(self.tool_text, found))

    def tool_text(self, tool: Mapping[str, Any]) -> str:
        """One tool by format_tool."""
        says = {name: tool.get(name) for name in ("name", "description")}
        says = {name: tidy(value) if isinstance(value, str) else "" for name, value in says.items()}
        says["parameters"] = self.json_text(tool.get("parameters") or {})
        text = self.format_tool
        if not says["description"]:
            text = "\n".join(line for line in text.split("\n") if "{{description}}" not in line)
        return "".join(says[p] if i % 2 else p for i, p in enumerate(TOOL_PLACES.split(text)))

    def json_text(self, value: Any) -> str:
        if self.json_style == "indent":
            return json.dumps(value, ensure_ascii=False, indent=2)
        return json.dumps(value, ensure_ascii=False, separators=(",", ":") if self.json_style == "compact" else None)

    def result(self, content: str) -> str:
        """What a tool gave back, cleaned, and written as JSON where the template wants that."""
        content = self.cleaners[Role.TOOL](content)
        if self.json_style != "indent":
            return content
        try:
            found = json.loads(content, object_pairs_hook=without_doubles)
            return json.dumps(found, ensure_ascii=False, indent=2, allow_nan=False)
        except (ValueError, RecursionError):  # no JSON, or JSON that this would change
            return self.json_text(content)

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
        thought = tidy(thought) if self.strip else thought
        return (self.format_thought.replace("{{content}}", thought) if thought else self.format_no_thought) + words

    def call_text(self, call: str) -> str:
        """Tool calls (JSON text) as this template writes them."""
        if "{{name}}" not in self.format_function and self.json_style == "line":
            return self.format_function.replace("{{content}}", call)
        found = json.loads(call)
        written = []
        for one in found if isinstance(found, list) else [found]:
            if "{{name}}" not in self.format_function:
                written.append(self.format_function.replace("{{content}}", self.json_text(one)))
                continue
            arguments = one["arguments"]
            arguments = arguments if isinstance(arguments, str) else self.json_text(arguments)
            says = {"name": one["name"], "arguments": arguments}
            parts = re.split(r"\{\{(name|arguments)\}\}", self.format_function)
            written.append("".join(says[p] if i % 2 else p for i, p in enumerate(parts)))
        return "\n".join(written)

    def prompt(self, messages: Sequence[Message], tools: str = "", ending: Ending = ENDINGS["doc"]) -> str:
        """What a client sends for an answer to these messages."""
        return "".join(self.render(Dialogue(tuple(messages), tools), ending, open_answer=True)[0])


def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. ValueError if it says a key twice, of which one would be lost."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def joined_results(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages, with results of tools that follow one another in one turn."""
    found: list[Message] = []
    for message in messages:
        if message.role is Role.TOOL and found and found[-1].role is Role.TOOL:
            found[-1] = Message(Role.TOOL, f"{found[-1].content}\n{message.content}")
        else:
            found.append(message)
    return tuple(found)


def spans_of(texts: Sequence[str], roles: Sequence[Role]) -> list[Span]:
    """Consecutive byte spans of rendered pieces."""
    spans, at = [], 0
    for text, role in zip(texts, roles, strict=True):
        size = len(text.encode("utf-8"))
        spans.append(Span(at, at + size, role))
        at += size
    return spans
