r"""Prompt templates: render a dialogue as text, in pieces with roles.

A template is a set of plain-text patterns with the field names of LLaMA-Factory. The whole dialogue is rendered first and
encoded once, because the World tokenizer joins "。" with a newline that follows: encoding turn by turn would give other ids.

    System: ...\n\nUser: ...\n\nAssistant: ...\n\nUser: ...\n\nAssistant: ...

A prompt ends exactly with the heading of the answer ("Assistant:", no space: a space would be the wrong first token). The
answer begins right after it, with the space, and includes the separator that ends the turn.
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

_BLANK_LINES = re.compile(r"\n\s*\n")
_LINE_ENDS = re.compile("[\n\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")  # of str.splitlines
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
THINK, END_OF_THINK = "<think>", "</think>"
CUES = ("(think)", "(think a bit)", "(think a lot)")  # RWKV7-G1x-templates.txt in BlinkDL/RWKV-LM, 2026-07-18
_SPEAKERS = (Role.SYSTEM, Role.USER, Role.ASSISTANT)

Cleaner = Callable[[str], str]


class Message(NamedTuple):
    """One turn.

    Attributes:
        role: who speaks.
        content: the words.
        think: the assistant's thought before its words.
        material: a second text of a user's turn (the input of an instruction).
        learn: whether an answer is trained.
        call: the content of a tool call, as JSON.
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
    """How turns end.

    Attributes:
        answer: follows every answer, inside the turn.
        last: follows the last turn.
        token: whether the row ends with token 0.
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


def normalize_line_ends(content: str) -> str:
    r"""Make all line ends \n."""
    return content.replace("\r\n", "\n").replace("\r", "\n") if "\r" in content else content


def tidy(content: str) -> str:
    r"""Make all line ends \n, and strip white space from the ends."""
    return normalize_line_ends(content).strip()


def clean(content: str) -> str:
    """Clean a turn: `tidy`, and no blank line inside, because in most templates a blank line ends a turn."""
    return _remove_blank_lines(tidy(content))


def tidy_answer(content: str) -> str:
    """Tidy an answer: like `tidy`, but the indentation of the first line stays, as in code or a Chinese paragraph.

    Blank lines before it are removed, and so is a single space (prompt/completion data of OpenAI begin with one).
    """
    content = normalize_line_ends(content).rstrip()
    if not content[:1].isspace():
        return content
    words = content.lstrip()
    before = content[: len(content) - len(words)]
    ends = _LINE_ENDS.findall(before)
    indentation = before[before.rindex(ends[-1]) + 1 :] if ends else before
    return words if indentation == " " else indentation + words


def clean_answer(content: str) -> str:
    """Clean an answer: `tidy_answer`, and no blank line inside."""
    return _remove_blank_lines(tidy_answer(content))


def _remove_blank_lines(content: str) -> str:
    return _BLANK_LINES.sub("\n", content) if "\n" in content else content


def split_thought(content: str) -> tuple[str, str]:
    """Split <think>...</think> at the start of an answer from the rest. Returns the thought and the answer."""
    if not content.lstrip().startswith(THINK) or END_OF_THINK not in content:
        return "", content
    think, _, words = content.partition(THINK)[2].partition(END_OF_THINK)
    return think.strip(), tidy_answer(words)


def _fill(pattern: str, values: Mapping[str, str]) -> str:
    """Replace the placeholders of these names: {{name}}."""
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), pattern)


class Pattern(NamedTuple):
    """A parsed pattern.

    Attributes:
        heading: the text before the content, without trailing white space.
        lead: that white space; it belongs to the turn.
        tail: the text after the content.
    """

    heading: str
    lead: str
    tail: str


def _parse_pattern(text: str) -> Pattern:
    before, _, after = text.partition("{{content}}")
    heading = before.rstrip()
    return Pattern(heading, before[len(heading) :], after)


@dataclass(frozen=True)
class Template:
    """Text patterns; {{content}} is the content of a turn. Field names as in LLaMA-Factory, and a few of this kit.

    Attributes:
        name: of the template.
        format_user: a user's turn.
        format_assistant: an answer.
        format_system: the system's turn.
        format_separator: between turns.
        format_prefix: before the first turn.
        format_user_input: a user's turn with a second text, {{input}}; "": content and input with a newline between.
        format_observation: the result of a tool.
        format_function: a tool call in an answer ({{content}}: its JSON; or {{name}} and {{arguments}}).
        format_tools: the list of tools, which is part of the system's turn.
        default_system: the system's text where a row has none.
        default_system_input: the same, where the first turn has a second text.
        stop_words: texts that end an answer.
        clean: roles whose turns lose their blank lines.
        strip: whether white space is stripped from the ends of turns.
        think: keep; always (an empty thought where there is none); fake (an empty thought in place of any).
        opening: the beginning of an answer that is part of the prompt; it is not trained.
        format_thought: a thought.
        format_no_thought: an empty thought.
        user_cue: the end of a user's turn whose answer has a thought, and of the one that a prompt ends with.
        json_style: how calls and lists of tools are written: line (unchanged), compact (no spaces; one tool per line),
            indent (by two spaces; results of tools too, as JSON text if they are not JSON). With the last two, every call
            has its own format_function.
        format_tool: one tool, with {{name}}, {{description}} (its line is left out if there is none), {{parameters}}; "":
            tools are written as a list.
        reserved: texts that mark the bounds of turns; a dialogue that contains one cannot be written.
        infill: whether this is for rows of prefix, suffix and middle. The prefix is {{content}}, the suffix {{input}}.
        bos: whether BOS=auto puts token 0 before the first turn: true if the clients of the format do (docs/data.md).
        temperature: of sampling, where chat.sh has `auto`.
        top_p: the same.
        top_k: the same; 0 is no limit.
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
        """Return whether texts begin with token 0, by the setting BOS; for auto, by the template."""
        return self.bos if bos == "auto" else bos == "1"

    def to_dict(self) -> dict[str, Any]:
        """Return every field as a JSON value.

        A run records them, so that its model is served with the template of its training, whatever the name means in a
        later version.
        """
        content = {}
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if isinstance(value, frozenset):
                value = sorted(role.name.lower() for role in value)
            content[one.name] = list(value) if isinstance(value, tuple) else value
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Template:
        """Return the template that `to_dict` has described.

        Raises:
            ValueError: it describes none, or one of a newer version of this kit.
        """
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
        """The parsed pattern of each role's turns."""
        patterns = {
            Role.SYSTEM: _parse_pattern(self.format_system),
            Role.USER: _parse_pattern(self.format_user),
            Role.ASSISTANT: _parse_pattern(self.format_assistant),
            Role.TOOL: _parse_pattern(self.format_observation or self.format_user),
        }
        if self.answer_in_user:
            opener, tail = patterns[Role.USER].tail, patterns[Role.ASSISTANT].tail
            for role in (Role.USER, Role.TOOL):
                patterns[role] = patterns[role]._replace(tail="")
            heading = opener.rstrip()
            patterns[Role.ASSISTANT] = Pattern(heading, opener[len(heading) :], tail)
        return patterns | {Role.UNTRAINED: patterns[Role.ASSISTANT]}

    @functools.cached_property
    def answer_in_user(self) -> bool:
        """Whether the user's pattern ends with the heading of the answer, as LLaMA-Factory's do."""
        return not _parse_pattern(self.format_assistant).heading and bool(_parse_pattern(self.format_user).tail.strip())

    @functools.cached_property
    def cleaners(self) -> dict[Role, Cleaner]:
        """The function that cleans each role's turns."""
        default = tidy if self.strip else normalize_line_ends
        cleaners: dict[Role, Cleaner] = {role: clean if role in self.clean else default for role in Role}
        if self.strip:
            cleaners[Role.ASSISTANT] = clean_answer if Role.ASSISTANT in self.clean else tidy_answer
        return cleaners

    @functools.cached_property
    def headings(self) -> dict[str, Role]:
        """What begins a turn in formatted texts, for `spans_of_text`.

        These are words before a colon after a blank line, and headings like Bot✿ and ### User at the start of a line.
        """
        own = {self.patterns[r].heading.split("\n")[0].strip(): r for r in (Role.TOOL, *_SPEAKERS)}
        blank = self.format_separator == "\n\n"
        words = {h[:-1]: role for h, role in own.items() if blank and re.fullmatch(r"\w[\w ]*:", h)}
        return WORLD | words | {h: role for h, role in own.items() if is_mark(h)}

    def stops(self) -> tuple[str, ...]:
        """Return the texts that end an answer if the model continues with the next turn by itself."""
        headings = {self.patterns[role].heading for role in _SPEAKERS}
        tool = self.patterns[Role.TOOL].heading
        if not tool.startswith(self.patterns[Role.USER].heading):
            headings.add(tool.split("\n")[0])
        before = "" if self.answer_in_user else self.format_separator
        texts = (*self.stop_words, ENDINGS["x17"].answer, *sorted(before + h for h in headings if h.strip()))
        return tuple(dict.fromkeys(texts))

    def find_reserved(self, dialogue: Dialogue) -> str:
        """Return a reserved text that a dialogue contains, or ""."""
        if not self.reserved:
            return ""
        text = "\n".join(part for m in dialogue.messages for part in (m.content, m.think, m.material, m.call))
        return next((word for word in self.reserved if word in text or word in dialogue.tools), "")

    def add_cue(self, question: str) -> str:
        """Return a question with the cue at its end, unless it ends with one already."""
        if not self.user_cue or question.rstrip().endswith(CUES):
            return question
        return question.rstrip() + self.user_cue

    def render(
        self, dialogue: Dialogue, ending: Ending = ENDINGS["doc"], open_answer: bool = False
    ) -> tuple[list[str], list[Role]]:
        """Render a dialogue.

        Args:
            dialogue: the turns.
            ending: how turns end.
            open_answer: end with the heading of the answer to come; the text does not end with white space then.

        Returns:
            The text in consecutive pieces, none of them empty, and the role of each piece.
        """
        texts: list[str] = []
        roles: list[Role] = []

        messages = self.add_system(dialogue)
        if self.user_cue:
            messages = self._add_cues(messages, open_answer)
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
                body = lead + (self._result(content) if role is Role.TOOL else cleaners[role](content))
            elif role is Role.USER and self.format_user_input:
                heading = self.format_user_input.partition("{{")[0].rstrip()
                values = {"content": cleaners[role](content), "input": cleaners[role](material)}
                body, tail = _fill(self.format_user_input[len(heading) :], values), ""
            else:
                body = lead + cleaners[role](f"{content}\n{material}")
            if i == last and not open_answer:
                after = ending.last
            elif separator is not None:
                after = separator
            elif i < last and message.role is not Role.SYSTEM and messages[i + 1].role in (Role.USER, Role.TOOL):
                after = self.format_separator
            else:  # the user's pattern opens the answer
                after = ""
            if heading:
                texts.append(heading)
                roles.append(Role.HEADING)
            if body := body + tail + after:
                texts.append(body)
                roles.append(role)
        heading, lead, _ = patterns[Role.ASSISTANT]
        if open_answer and (heading or opening):
            texts.append(heading + lead + opening if opening else heading)
            roles.append(Role.HEADING)
        return texts, roles

    def add_system(self, dialogue: Dialogue) -> Sequence[Message]:
        """Return the messages with the template's own system text where there is none, and with the tools in it."""
        messages = dialogue.messages
        if self.json_style == "line" and any(message.role is Role.TOOL for message in messages):
            messages = _join_results(messages)
        if not (dialogue.tools or self.default_system):
            return messages
        has = bool(messages) and messages[0].role is Role.SYSTEM
        words = messages[0].content if has else self.default_system
        if not has and self.default_system_input and messages and messages[0].material:
            words = self.default_system_input
        if dialogue.tools:
            tools = self.format_tools.replace("{{content}}", self._format_tools(dialogue.tools))
            words = f"{words}\n{tools}" if words else tools
        return (Message(Role.SYSTEM, words), *messages[has:])

    def _add_cues(self, messages: Sequence[Message], open_answer: bool) -> Sequence[Message]:
        """Add the cue to every user's turn whose answer has a thought or is still to come."""
        result = list(messages)
        content_last = self.format_user_input.rfind("{{content}}") > self.format_user_input.rfind("{{input}}")
        for i, message in enumerate(messages):
            following = messages[i + 1] if i + 1 < len(messages) else None
            has_cue = following.role is Role.ASSISTANT and following.think if following else open_answer
            if message.role is not Role.USER or not has_cue:
                continue
            if message.material and not content_last:
                result[i] = message._replace(material=self.add_cue(message.material))
            else:
                result[i] = message._replace(content=self.add_cue(message.content))
        return result

    def _format_tools(self, tools: str) -> str:
        """Format the list of tools (JSON text); a description that is not JSON stays as it is."""
        if self.json_style == "line" and not self.format_tool:
            return tools
        try:
            content = json.loads(tools)
        except (ValueError, RecursionError):
            return tools
        content = content if isinstance(content, list) else [content]
        if not self.format_tool or not all(isinstance(one, dict) for one in content):
            if self.json_style == "compact":
                return "[\n" + ",\n".join(map(self._to_json, content)) + "\n]"
            return self._to_json(content)
        return "\n".join(map(self._format_one_tool, content))

    def _format_one_tool(self, tool: Mapping[str, Any]) -> str:
        words = [tool.get(key) for key in ("name", "description")]
        name, description = (tidy(value) if isinstance(value, str) else "" for value in words)
        text = self.format_tool
        if not description:
            text = "\n".join(line for line in text.split("\n") if "{{description}}" not in line)
        parameters = self._to_json(tool.get("parameters") or {})
        return _fill(text, {"name": name, "description": description, "parameters": parameters})

    def _to_json(self, value: Any) -> str:
        if self.json_style == "indent":
            return json.dumps(value, ensure_ascii=False, indent=2)
        return json.dumps(value, ensure_ascii=False, separators=(",", ":") if self.json_style == "compact" else None)

    def _result(self, content: str) -> str:
        """Return the result of a tool, cleaned, and written as JSON if the template requires that."""
        content = self.cleaners[Role.TOOL](content)
        if self.json_style != "indent":
            return content
        try:
            value = json.loads(content, object_pairs_hook=_dict_of_unique)
            return json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False)
        except (ValueError, RecursionError):  # no JSON, or JSON that this would change
            return self._to_json(content)

    def answer(self, message: Message) -> str:
        """Return the content of an assistant's turn, cleaned: thought, words and tool call."""
        cleaner = self.cleaners[Role.ASSISTANT]
        words = cleaner(message.content)
        if message.call:
            call = self._format_call(message.call)
            words = f"{words}\n{call}" if words else call
        if self.think == "keep" and not message.think:
            return words
        thought = "" if self.think == "fake" else cleaner(message.think)
        thought = tidy(thought) if self.strip else thought
        return (self.format_thought.replace("{{content}}", thought) if thought else self.format_no_thought) + words

    def _format_call(self, call: str) -> str:
        """Format tool calls (JSON text)."""
        if "{{name}}" not in self.format_function and self.json_style == "line":
            return self.format_function.replace("{{content}}", call)
        content = json.loads(call)
        calls = []
        for one in content if isinstance(content, list) else [content]:
            if "{{name}}" not in self.format_function:
                calls.append(self.format_function.replace("{{content}}", self._to_json(one)))
                continue
            arguments = one["arguments"]
            arguments = arguments if isinstance(arguments, str) else self._to_json(arguments)
            calls.append(_fill(self.format_function, {"name": one["name"], "arguments": arguments}))
        return "\n".join(calls)

    def prompt(self, messages: Sequence[Message], tools: str = "", ending: Ending = ENDINGS["doc"]) -> str:
        """Return the prompt that a client sends for an answer to these messages."""
        return "".join(self.render(Dialogue(tuple(messages), tools), ending, open_answer=True)[0])


def _dict_of_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. ValueError if it has a key twice: one of the values would be lost."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key twice")
    return content


def _join_results(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Join consecutive results of tools in one turn."""
    joined: list[Message] = []
    for message in messages:
        if message.role is Role.TOOL and joined and joined[-1].role is Role.TOOL:
            joined[-1] = Message(Role.TOOL, f"{joined[-1].content}\n{message.content}")
        else:
            joined.append(message)
    return tuple(joined)


def to_spans(texts: Sequence[str], roles: Sequence[Role]) -> list[Span]:
    """Return consecutive byte spans of rendered pieces."""
    spans, at = [], 0
    for text, role in zip(texts, roles, strict=True):
        size = len(text.encode("utf-8"))
        spans.append(Span(at, at + size, role))
        at += size
    return spans
