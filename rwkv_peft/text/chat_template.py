"""A template -> Jinja, which the clients of a .gguf file make prompts with: the very text of `Template.prompt`.

What stands between two turns depends on who speaks in them and on nothing else, so the patterns are read off prompts that the
template itself makes of short dialogues (`probe`). The cleaning of turns is read off the cleaners in the same way.

Jinja of llama.cpp (common/jinja) has no regular expressions, and strips blanks of ASCII only: U+3000 at the ends of a turn
stays there, which Python takes away. Jinja cannot parse JSON: results of tools and arguments that come as JSON text keep their
blanks where the template would write them anew (json_style). The second text of a question ({{input}}) cannot be expressed there.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .roles import Role
from .template import CUES, ENDINGS, TOOL_PLACES, Dialogue, Ending, Message, Template, tidy_answer

MARK = "\ue000"  # stands for the words of a turn: no template holds it, and no cleaner touches it
OTHER = "\ue001"
LETTERS = {"s": Role.SYSTEM, "u": Role.USER, "a": Role.ASSISTANT, "t": Role.TOOL}
TOOL_ROLES = "['tool', 'function', 'observation']"
ESCAPES = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}

# older clients of llama.cpp have no Jinja: they look for this word, and write a layout of their own
WORLD_MARK = "{# rwkv-world #}"
WORLD_LAYOUT = "System: Be brief.\n\nUser: Hi\n\nAssistant: Ho\n\nUser: ?\n\nAssistant:"
WORLD_TURNS = ((Role.SYSTEM, "Be brief."), (Role.USER, "Hi"), (Role.ASSISTANT, "Ho"), (Role.USER, "?"))


def literal(text: str) -> str:
    """A string in Jinja. Other control characters stand as they are: llama.cpp has no escape for them."""
    return "'" + "".join(ESCAPES.get(c, c) for c in text) + "'"


def table(strings: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{literal(key)}: {literal(value)}" for key, value in strings.items()) + "}"


@dataclass(frozen=True)
class Cleaning:
    """What a cleaner does. ends: line ends become \\n. left: "all" blanks before the words go; "indent": blank lines and a
    single space, but no other indentation; or "none". right: blanks behind them go. inside: blank lines between lines of words
    go.
    """

    ends: bool
    left: str
    right: bool
    inside: bool

    def apply(self, text: str) -> str:
        """The same in Python: what the Jinja of `macro` does."""
        if self.ends:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if self.right:
            text = text.rstrip()
        if self.left == "indent" and text.strip():
            lines = text.split("\n")
            while not lines[0].strip():
                del lines[0]
            if lines[0].startswith(" ") and lines[0][1:2].strip():
                lines[0] = lines[0][1:]
            text = "\n".join(lines)
        if self.left == "all":
            text = text.lstrip()
        if self.inside and "\n" in text:
            text = "\n".join(line for line in text.split("\n") if line.strip())
        return text

    def macro(self, name: str) -> str:
        expression = "text"
        if self.ends:
            expression += " | replace('\\r\\n', '\\n') | replace('\\r', '\\n')"
        if self.left == "all" and self.right:
            expression += " | trim"
        elif self.left == "all":
            expression = f"({expression}).lstrip()"
        elif self.right:
            expression = f"({expression}).rstrip()"
        body = f"{{{{- {expression} -}}}}"
        if self.inside or self.left == "indent":
            # with `inside` all blank lines go; without it those before the first line of words
            line = "(line[1:] if not seen.words and line.startswith(' ') and line[1:2] | trim else line)"
            line = line if self.left == "indent" else "line"
            body = (
                f"{{%- set lines = {expression} -%}}"
                "{%- set seen = namespace(words=false) -%}"
                "{%- for line in lines.split('\\n') -%}"
                "{%- if line | trim -%}"
                f"{{{{- ('\\n' if seen.words else '') ~ {line} -}}}}{{%- set seen.words = true -%}}"
                + ("" if self.inside else "{%- elif seen.words -%}{{- '\\n' ~ line -}}")
                + "{%- endif -%}"
                "{%- endfor -%}"
            )
        return f"{{%- macro {name}(text) -%}}{body}{{%- endmacro -%}}"


PROBES = (
    "", "a", " a ", "\n a", " \n  a\n b ", "a\n\nb", "a\n \n\n b\n", "a\r\nb\rc", "\r\n  a\r\n\r\n  b\r\n", "a\n", "\n\na\n\n",
    "\ta\t\n\tb", "a  \n\n\n  b  \n c", " ", "\n", "a\n\t\nb", "  a", "\n a", " \ta", "\n\n   a\n\n  b",
)  # fmt: skip


def cleaning_of(cleaner: Callable[[str], str]) -> Cleaning:
    """What a cleaner of a template does. ValueError for one that does something else."""
    found = Cleaning(
        ends=cleaner("a\r\nb") == "a\nb",
        left="all" if cleaner("  a") == "a" else "indent" if cleaner("\n\n  a") == "  a" else "none",
        right=cleaner("a \n") == "a",
        inside=cleaner("a\n\nb") == "a\nb",
    )
    for text in PROBES:
        if found.apply(text) != cleaner(text):
            raise ValueError(f"{cleaner!r} makes {cleaner(text)!r} of {text!r}, which has no Jinja yet")
    return found


@dataclass(frozen=True)
class Layout:
    """The text around the words of turns. first: before those of the first turn. between: "ua" -> between a user's words and
    the assistant's answer to them. asked: behind the last turn, up to where an answer begins; closed: where none is asked for.
    empty: the prompt without any turn.
    """

    first: dict[str, str]
    between: dict[str, str]
    asked: dict[str, str]
    closed: dict[str, str]
    empty: str


def probe(form: Template, ending: Ending) -> Layout:
    """Read the layout of a template off its own prompts."""
    plain = bare(form)

    def parts(letters: str, asked: bool = True) -> list[str]:
        turns = tuple(Message(LETTERS[letter], MARK) for letter in letters)
        text = "".join(plain.render(Dialogue(turns), ending, open_answer=asked)[0])
        return text.split(MARK)

    alone = {letter: parts(letter) for letter in LETTERS}
    around = assistant(plain, "")  # is part of the words of an answer here
    trimmed = lambda text, letter, where: cut(text, around, letter, where)  # noqa: E731
    return Layout(
        first={letter: trimmed(alone[letter][0], letter, 0) for letter in LETTERS},
        between={a + b: trimmed(trimmed(parts(a + b)[1], a, 1), b, 0) for a in LETTERS for b in LETTERS},
        asked={letter: trimmed(alone[letter][1], letter, 1) for letter in LETTERS},
        closed={letter: trimmed(parts(letter, False)[1], letter, 1) for letter in LETTERS},
        empty="".join(plain.render(Dialogue(()), ending, open_answer=True)[0]),
    )


def bare(form: Template) -> Template:
    """The template without what depends on more than who speaks: that is written where the turns are gathered."""
    style = "line" if form.json_style == "line" else "compact"  # "indent" would change the marks
    return dataclasses.replace(form, default_system="", default_system_input="", user_cue="", json_style=style)


def assistant(form: Template, think: str) -> list[str]:
    """What `Template.answer` puts around the words of an answer, with the thought marked OTHER."""
    return form.answer(Message(Role.ASSISTANT, MARK, think=think)).split(MARK)


def cut(text: str, around: list[str], letter: str, where: int) -> str:
    """Take what belongs to an answer's words from the text before (where=0) or behind (1) them."""
    if letter != "a":
        return text
    return text.removesuffix(around[0]) if where == 0 else text.removeprefix(around[1])


def thoughtful(form: Template) -> tuple[str, str]:
    """Jinja expressions of the text before the words of an answer, and behind them. `thought`: what it thought."""
    without, with_thought = assistant(form, ""), assistant(form, OTHER)

    def expression(i: int) -> str:
        if without[i] == with_thought[i]:
            return literal(without[i])
        before, _, after = with_thought[i].partition(OTHER)
        return f"({literal(before)} ~ thought ~ {literal(after)} if thought else {literal(without[i])})"

    return expression(0), expression(1)


def calls(form: Template) -> str:
    """Jinja that sets `ns.call` from message['tool_calls']. Arguments may come as an object, or as JSON text."""
    arguments = f"(fn['arguments'] if fn['arguments'] is string else (fn['arguments'] or {{}}) | {tojson(form)})"
    if "{{name}}" in form.format_function:
        values = {"name": "fn['name']", "arguments": arguments}
        parts = re.split(r"\{\{(name|arguments)\}\}", form.format_function)
        one = " ~ ".join(values[p] if i % 2 else literal(p) for i, p in enumerate(parts) if i % 2 or p)
        between, before, after = "'\\n'", "''", "''"
    elif form.json_style != "line":  # every call has the pattern to itself
        head, _, tail = form.format_function.partition("{{content}}")
        whole = f"{{'name': fn['name'], 'arguments': fn['arguments'] or {{}}}} | {tojson(form)}"
        colon = '":' if form.json_style == "compact" else '": '
        comma = "," if form.json_style == "compact" else ", "
        text = f"""'{{"name{colon}' ~ fn['name'] | tojson ~ '{comma}"arguments{colon}' ~ fn['arguments'] ~ '}}'"""
        one = f"{literal(head)} ~ (({text}) if fn['arguments'] is string else {whole}) ~ {literal(tail)}"
        between, before, after = "'\\n'", "''", "''"
    else:
        one = f"""'{{"name": ' ~ fn['name'] | tojson ~ ', "arguments": ' ~ {arguments} ~ '}}'"""
        head, _, tail = form.format_function.partition("{{content}}")
        many = "message['tool_calls'] | length > 1"
        between = "', '"
        before, after = f"{literal(head)} ~ ('[' if {many} else '')", f"(']' if {many} else '') ~ {literal(tail)}"
    return (
        "{%- if message['tool_calls'] -%}"
        f"{{%- set ns.call = {before} -%}}"
        "{%- for one in message['tool_calls'] -%}"
        "{%- set fn = one['function'] if one['function'] else one -%}"
        f"{{%- set ns.call = ns.call ~ ('' if loop.first else {between}) ~ {one} -%}}"
        "{%- endfor -%}"
        f"{{%- set ns.call = ns.call ~ {after} -%}}"
        "{%- endif -%}"
    )


def tojson(form: Template) -> str:
    """The filter that writes a value as the template's json_style has it."""
    return {"line": "tojson", "compact": "tojson(separators=[',', ':'])", "indent": "tojson(indent=2)"}[form.json_style]


def tools(form: Template) -> str:
    """Jinja that sets `ns.tools`, the list of tools as it stands in the system's turn."""
    before, _, after = form.format_tools.partition("{{content}}")
    if form.format_tool:
        one, between, around = tool(form), "'\\n'", ("", "")
    elif form.json_style == "indent":  # the whole list at once
        one, between, around = "", "", ("", "")
    else:
        compact = form.json_style == "compact"
        one, between = f"fn | {tojson(form)}", "',\\n'" if compact else "', '"
        around = ("[\n", "\n]") if compact else ("[", "]")
    if one:
        gather = f"{{%- set ns.tools = ns.tools ~ ('' if loop.first else {between}) ~ {one} -%}}"
        end = f"{{%- set ns.tools = {literal(before + around[0])} ~ ns.tools ~ {literal(around[1] + after)} -%}}"
    else:
        gather = "{%- set ns.bare = ns.bare + [fn] -%}"
        end = f"{{%- set ns.tools = {literal(before)} ~ ns.bare | {tojson(form)} ~ {literal(after)} -%}}"
    return (
        "{%- if tools is defined and tools -%}"
        "{%- for one in tools -%}"
        "{%- set fn = one['function'] if one['function'] else one -%}"
        f"{gather}"
        "{%- endfor -%}"
        f"{end}"
        "{%- endif -%}"
    )


def tool(form: Template) -> str:
    """A Jinja expression: one tool by format_tool. The line of a description goes where there is none."""
    values = {
        "name": "(fn['name'] or '') | trim",
        "description": "(fn['description'] or '') | trim",
        "parameters": f"(fn['parameters'] or {{}}) | {tojson(form)}",
    }
    rows = form.format_tool.split("\n")
    found = []
    for number, row in enumerate(rows):
        text = row + "\n" * (number < len(rows) - 1)
        one = " ~ ".join(
            f"({values[p]})" if i % 2 else literal(p) for i, p in enumerate(TOOL_PLACES.split(text)) if i % 2 or p
        )
        found.append(f"(({one}) if fn['description'] else '')" if "{{description}}" in row else one or "''")
    return " ~ ".join(found)


def cue(form: Template) -> str:
    """Jinja that puts the cue behind a question which a thought answers, or which is still to be answered."""
    if not form.user_cue:
        return ""
    written = " or ".join(f"text.endswith({literal(word)})" for word in CUES)
    return (
        "{%- if (loop.last and add_generation_prompt) or (not loop.last and loop.nextitem['role'] == 'assistant' "
        "and thought_of(loop.nextitem) | trim) -%}"
        f"{{%- set bare = text.rstrip() -%}}{{%- if not ({written.replace('text', 'bare')}) -%}}"
        f"{{%- set text = bare ~ {literal(form.user_cue)} -%}}{{%- endif -%}}"
        "{%- endif -%}"
    )


def jinja(form: Template, ending: Ending = ENDINGS["doc"], bos: bool = False) -> str:
    """The chat template. ending: how turns of the training data end. bos: the prompt begins with the token bos_token."""
    layout = probe(form, ending)
    cleaners = {letter: cleaning_of(form.cleaners[role]) for letter, role in LETTERS.items()}
    cleaners["words"] = cleaning_of(tidy_answer)  # of split_thought
    names: dict[Cleaning, str] = {}
    for cleaning in cleaners.values():
        names.setdefault(cleaning, f"clean{len(names)}")
    before, behind = thoughtful(form)
    clean = {letter: names[cleaning] for letter, cleaning in cleaners.items()}
    default, joined = form.default_system, "true" if form.json_style == "line" else "false"
    result = f"{{{{- {clean['t']}(ns.results ~ text) -}}}}"
    if form.json_style == "indent":  # JSON text as it is; other text as a text of JSON
        result = (
            f"{{%- set given = {clean['t']}(text) -%}}"
            "{%- if message['content'] is mapping -%}{{- message['content'] | tojson(indent=2) -}}"
            "{%- elif given[:1] in ['{', '['] -%}{{- given -}}"
            "{%- else -%}{{- given | tojson -}}{%- endif -%}"
        )
    parts = [
        WORLD_MARK if is_world(form, ending) else "",
        "{{- bos_token -}}" if bos else "",
        *(cleaning.macro(name) for cleaning, name in names.items()),
        TEXT_OF,
        f"{{%- set first = {table(layout.first)} -%}}",
        f"{{%- set between = {table(layout.between)} -%}}",
        f"{{%- set asked = {table(layout.asked)} -%}}",
        f"{{%- set closed = {table(layout.closed)} -%}}",
        THOUGHT_OF,
        "{%- set ns = namespace(last='', call='', words='', tools='', bare=[], own='', results='', begun=false) -%}",
        tools(form),
        # the system's text that no message brings: the template's own, and the tools
        f"{{%- set ns.own = {literal(default)} -%}}"
        "{%- for message in messages -%}"
        "{%- if not ns.begun and (message['role'] not in ['system', 'developer'] or text_of(message['content']) | trim) -%}"
        "{%- set ns.begun = true -%}"
        "{%- if message['role'] in ['system', 'developer'] -%}{%- set ns.own = text_of(message['content']) -%}"
        "{%- set ns.words = 'given' -%}{%- endif -%}"
        "{%- endif -%}"
        "{%- endfor -%}"
        f"{{%- if ns.tools -%}}{{%- set ns.own = ns.own ~ ('\\n' if ns.own else '') ~ ns.tools -%}}{{%- endif -%}}"
        "{%- if ns.own -%}"
        f"{{{{- first['s'] ~ {clean['s']}(ns.own) -}}}}{{%- set ns.last = 's' -%}}"
        "{%- endif -%}"
        "{%- set ns.begun = ns.words != 'given' -%}",
        "{%- for message in messages -%}"
        "{%- set role = message['role'] -%}"
        "{%- set text = text_of(message['content']) -%}"
        "{%- if role in ['system', 'developer'] -%}{%- set who = 's' -%}"
        "{%- elif role == 'user' -%}{%- set who = 'u' -%}"
        "{%- elif role == 'assistant' -%}{%- set who = 'a' -%}"
        f"{{%- elif role in {TOOL_ROLES} -%}}{{%- set who = 't' -%}}"
        "{%- else -%}{{- raise_exception('this chat template has no role ' ~ role) -}}"
        "{%- endif -%}"
        # a system message that says nothing is none; that of the beginning stands there already
        "{%- if who == 's' and not text | trim -%}"
        "{%- elif who == 's' and not ns.begun -%}{%- set ns.begun = true -%}"
        # what several tools gave back is one turn
        f"{{%- elif who == 't' and {joined} and not loop.last and loop.nextitem['role'] in {TOOL_ROLES} -%}}"
        "{%- set ns.results = ns.results ~ text ~ '\\n' -%}"
        "{%- else -%}"
        "{{- between[ns.last ~ who] if ns.last else first[who] -}}"
        "{%- set ns.last = who -%}"
        f"{{%- if who == 's' -%}}{{{{- {clean['s']}(text) -}}}}"
        f"{{%- elif who == 'u' -%}}{cue(form)}{{{{- {clean['u']}(text) -}}}}"
        f"{{%- elif who == 't' -%}}{result}{{%- set ns.results = '' -%}}"
        "{%- else -%}"
        "{%- set ns.call = '' -%}{%- set ns.words = text -%}"
        "{%- if (text | trim).startswith('<think>') and '</think>' in text -%}"
        f"{{%- set ns.words = {clean['words']}(text.split('<think>', 1)[1].split('</think>', 1)[1]) -%}}"
        "{%- endif -%}",
        calls(form),
        f"{{%- set ns.words = {clean['a']}(ns.words) -%}}"
        "{%- if ns.call -%}{%- set ns.words = ns.words ~ ('\\n' if ns.words else '') ~ ns.call -%}{%- endif -%}"
        f"{{%- set thought = {clean['a']}(thought_of(message)){' | trim' if form.strip else ''} -%}}"
        f"{{{{- {before} ~ ns.words ~ {behind} -}}}}"
        "{%- endif -%}"
        "{%- endif -%}"
        "{%- endfor -%}",
        "{%- if add_generation_prompt -%}"
        f"{{{{- asked[ns.last] if ns.last else {literal(layout.empty)} -}}}}"
        "{%- elif ns.last -%}"
        "{{- closed[ns.last] -}}"
        "{%- endif -%}",
    ]
    return "".join(parts)


# the text of a content that may be a list of parts, or nothing
TEXT_OF = (
    "{%- macro text_of(content) -%}"
    "{%- if content is string -%}{{- content -}}"
    "{%- elif content is iterable -%}"
    "{%- for part in content -%}"
    "{{- '' if loop.first else '\\n' -}}{{- part if part is string else part['text'] -}}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
)


# what an assistant's message holds of a thought, in its words or beside them
THOUGHT_OF = (
    "{%- macro thought_of(message) -%}"
    "{%- set text = text_of(message['content']) -%}"
    "{%- set found = namespace(think='') -%}"
    "{%- if (text | trim).startswith('<think>') and '</think>' in text -%}"
    "{%- set found.think = text.split('<think>', 1)[1].split('</think>', 1)[0] | trim -%}"
    "{%- endif -%}"
    "{%- for key in ['reasoning_content', 'reasoning', 'thinking'] -%}"
    "{%- if not found.think and message[key] is string -%}{%- set found.think = message[key] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{{- found.think -}}"
    "{%- endmacro -%}"
)


def is_world(form: Template, ending: Ending) -> bool:
    """Whether llama.cpp's built-in layout of the World models is that of this template."""
    return form.prompt([Message(role, words) for role, words in WORLD_TURNS], ending=ending) == WORLD_LAYOUT
