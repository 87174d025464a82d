"""Convert a template to a Jinja chat template, which renders exactly the text of `Template.prompt`.

Clients of a .gguf file make prompts with it. The text between two turns depends only on their roles, so it is taken from prompts
that the template itself renders for short dialogues (`_probe_layout`).

The Jinja of llama.cpp (common/jinja) has no regular expressions, and strips ASCII white space only: U+3000 at the ends of a turn
stays, which Python strips. Jinja cannot parse JSON: results of tools and arguments that are JSON text keep their white
space where the template would reformat them (json_style). The second text of a question ({{input}}) cannot be expressed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

from . import template
from .roles import Role
from .template import CUES, ENDINGS, Cleaner, Dialogue, Ending, Message, Template

_MARK = "\ue000"  # stands for the words of a turn: no template contains it, and no cleaner changes it
_THOUGHT_MARK = "\ue001"
_LETTERS = {"s": Role.SYSTEM, "u": Role.USER, "a": Role.ASSISTANT, "t": Role.TOOL}
_TOOL_ROLES = "['tool', 'function', 'observation']"
_TOOL_PLACEHOLDER = re.compile(r"\{\{(name|description|parameters)\}\}")
_ESCAPES = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}

# older clients of llama.cpp have no Jinja: they search for this word, and use a built-in layout
_WORLD_MARK = "{# rwkv-world #}"
WORLD_LAYOUT = "System: Be brief.\n\nUser: Hi\n\nAssistant: Ho\n\nUser: ?\n\nAssistant:"
_WORLD_TURNS = ((Role.SYSTEM, "Be brief."), (Role.USER, "Hi"), (Role.ASSISTANT, "Ho"), (Role.USER, "?"))


def literal(text: str) -> str:
    """Return a string literal of Jinja. Other control characters are not escaped: llama.cpp has no escape for them."""
    return "'" + "".join(_ESCAPES.get(c, c) for c in text) + "'"


def _dict_literal(strings: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{literal(key)}: {literal(value)}" for key, value in strings.items()) + "}"


# cleaner -> Jinja that strips the ends, whether the indentation of the first line is kept, whether blank lines are removed
_CLEANERS: dict[Cleaner, tuple[str, bool, bool]] = {
    template.normalize_line_ends: ("{}", False, False),
    template.tidy: ("{} | trim", False, False),
    template.clean: ("{} | trim", False, True),
    template.tidy_answer: ("({}).rstrip()", True, False),
    template.clean_answer: ("({}).rstrip()", True, True),
}


def cleaning_macro(name: str, cleaner: Cleaner) -> str:
    """Return a Jinja macro that cleans a text as one of the cleaners of template.py does.

    Args:
        name: of the macro.
        cleaner: the function.

    Raises:
        ValueError: there is no Jinja for it.
    """
    if cleaner not in _CLEANERS:
        raise ValueError(f"{cleaner!r} has no Jinja yet")
    strip, keeps_indent, no_blank_lines = _CLEANERS[cleaner]
    expression = strip.format("text | replace('\\r\\n', '\\n') | replace('\\r', '\\n')")
    body = f"{{{{- {expression} -}}}}"
    if no_blank_lines or keeps_indent:  # at least the blank lines before the first line with words are removed
        line = "(line[1:] if not seen.words and line.startswith(' ') and line[1:2] | trim else line)"
        line = line if keeps_indent else "line"
        body = (
            f"{{%- set lines = {expression} -%}}"
            "{%- set seen = namespace(words=false) -%}"
            "{%- for line in lines.split('\\n') -%}"
            "{%- if line | trim -%}"
            f"{{{{- ('\\n' if seen.words else '') ~ {line} -}}}}{{%- set seen.words = true -%}}"
            + ("" if no_blank_lines else "{%- elif seen.words -%}{{- '\\n' ~ line -}}")
            + "{%- endif -%}"
            "{%- endfor -%}"
        )
    return f"{{%- macro {name}(text) -%}}{body}{{%- endmacro -%}}"


@dataclass(frozen=True)
class _Layout:
    """The text around the words of turns.

    Attributes:
        first: role -> text before the words of the first turn.
        between: two roles -> text between the words of their turns: "ua" is from a user's words to the answer's.
        asked: role of the last turn -> text after it, up to where the answer begins.
        closed: the same, if no answer is asked for.
        empty: the prompt without any turn.
    """

    first: dict[str, str]
    between: dict[str, str]
    asked: dict[str, str]
    closed: dict[str, str]
    empty: str


def _probe_layout(form: Template, ending: Ending) -> _Layout:
    """Take the layout of a template from its own prompts."""
    # without what depends on more than the roles: that is written where the turns are collected
    style = "line" if form.json_style == "line" else "compact"  # "indent" would change the marks
    plain = dataclasses.replace(form, default_system="", default_system_input="", user_cue="", json_style=style)
    head, tail = _around_answer(plain, "")  # counted as the words of an answer here

    def parts(letters: str, asked: bool = True) -> list[str]:
        turns = tuple(Message(_LETTERS[letter], _MARK) for letter in letters)
        return "".join(plain.render(Dialogue(turns), ending, open_answer=asked)[0]).split(_MARK)

    def before(text: str, letter: str) -> str:
        return text.removesuffix(head) if letter == "a" else text

    def after(text: str, letter: str) -> str:
        return text.removeprefix(tail) if letter == "a" else text

    return _Layout(
        first={letter: before(parts(letter)[0], letter) for letter in _LETTERS},
        between={a + b: before(after(parts(a + b)[1], a), b) for a in _LETTERS for b in _LETTERS},
        asked={letter: after(parts(letter)[1], letter) for letter in _LETTERS},
        closed={letter: after(parts(letter, False)[1], letter) for letter in _LETTERS},
        empty="".join(plain.render(Dialogue(()), ending, open_answer=True)[0]),
    )


def _around_answer(form: Template, think: str) -> list[str]:
    """Return what `Template.answer` writes before and after the words of an answer with this thought."""
    return form.answer(Message(Role.ASSISTANT, _MARK, think=think)).split(_MARK)


def _answer_expressions(form: Template) -> tuple[str, str]:
    """Return Jinja expressions of the text before and after the words of an answer, with `thought` in it."""
    without, with_thought = _around_answer(form, ""), _around_answer(form, _THOUGHT_MARK)

    def expression(i: int) -> str:
        if without[i] == with_thought[i]:
            return literal(without[i])
        before, _, after = with_thought[i].partition(_THOUGHT_MARK)
        return f"({literal(before)} ~ thought ~ {literal(after)} if thought else {literal(without[i])})"

    return expression(0), expression(1)


def _concatenate(pattern: str, placeholder: re.Pattern[str], values: Mapping[str, str]) -> str:
    """Return a Jinja expression for a pattern; values: name of a placeholder -> its expression."""
    parts = placeholder.split(pattern)
    return " ~ ".join(values[part] if i % 2 else literal(part) for i, part in enumerate(parts) if i % 2 or part)


def _set_call(form: Template) -> str:
    """Return Jinja that sets `ns.call` from message['tool_calls']; arguments may be an object, or JSON text."""
    arguments = f"(fn['arguments'] if fn['arguments'] is string else (fn['arguments'] or {{}}) | {_tojson(form)})"
    if "{{name}}" in form.format_function:
        values = {"name": "fn['name']", "arguments": arguments}
        one = _concatenate(form.format_function, re.compile(r"\{\{(name|arguments)\}\}"), values)
        between, before, after = "'\\n'", "''", "''"
    elif form.json_style != "line":  # every call has the pattern to itself
        head, _, tail = form.format_function.partition("{{content}}")
        whole = f"{{'name': fn['name'], 'arguments': fn['arguments'] or {{}}}} | {_tojson(form)}"
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


def _tojson(form: Template) -> str:
    """Return the filter that formats a value by the template's json_style."""
    return {"line": "tojson", "compact": "tojson(separators=[',', ':'])", "indent": "tojson(indent=2)"}[form.json_style]


def _set_tools(form: Template) -> str:
    """Return Jinja that sets `ns.tools`, the list of tools for the system's turn."""
    before, _, after = form.format_tools.partition("{{content}}")
    if form.format_tool:
        one, between, around = _tool_expression(form), "'\\n'", ("", "")
    elif form.json_style == "indent":  # the whole list at once
        one, between, around = "", "", ("", "")
    else:
        compact = form.json_style == "compact"
        one, between = f"fn | {_tojson(form)}", "',\\n'" if compact else "', '"
        around = ("[\n", "\n]") if compact else ("[", "]")
    if one:
        append = f"{{%- set ns.tools = ns.tools ~ ('' if loop.first else {between}) ~ {one} -%}}"
        end = f"{{%- set ns.tools = {literal(before + around[0])} ~ ns.tools ~ {literal(around[1] + after)} -%}}"
    else:
        append = "{%- set ns.bare = ns.bare + [fn] -%}"
        end = f"{{%- set ns.tools = {literal(before)} ~ ns.bare | {_tojson(form)} ~ {literal(after)} -%}}"
    return (
        "{%- if tools is defined and tools -%}"
        "{%- for one in tools -%}"
        "{%- set fn = one['function'] if one['function'] else one -%}"
        f"{append}"
        "{%- endfor -%}"
        f"{end}"
        "{%- endif -%}"
    )


def _tool_expression(form: Template) -> str:
    """Return a Jinja expression of one tool by format_tool, without the description's line if it has none."""
    values = {
        "name": "((fn['name'] or '') | trim)",
        "description": "((fn['description'] or '') | trim)",
        "parameters": f"((fn['parameters'] or {{}}) | {_tojson(form)})",
    }
    expressions = []
    for line in re.findall(r"[^\n]*\n|[^\n]+", form.format_tool):
        one = _concatenate(line, _TOOL_PLACEHOLDER, values)
        expressions.append(f"(({one}) if fn['description'] else '')" if "{{description}}" in line else one)
    return " ~ ".join(expressions)


def _add_cue(form: Template) -> str:
    """Return Jinja that adds the cue to a question whose answer has a thought or is still to come."""
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


def to_jinja(form: Template, ending: Ending = ENDINGS["doc"], bos: bool = False) -> str:
    """Return the chat template.

    Args:
        form: the template.
        ending: how turns of the training data end.
        bos: the prompt begins with the token bos_token.
    """
    layout = _probe_layout(form, ending)
    cleaners = {letter: form.cleaners[role] for letter, role in _LETTERS.items()}
    cleaners["words"] = template.tidy_answer  # of split_thought
    names: dict[Cleaner, str] = {}
    for cleaner in cleaners.values():
        names.setdefault(cleaner, f"clean{len(names)}")
    before, after = _answer_expressions(form)
    macros = {letter: names[cleaner] for letter, cleaner in cleaners.items()}
    default, joined = form.default_system, "true" if form.json_style == "line" else "false"
    result = f"{{{{- {macros['t']}(ns.results ~ text) -}}}}"
    if form.json_style == "indent":  # JSON text is unchanged; other text becomes a JSON string
        result = (
            f"{{%- set given = {macros['t']}(text) -%}}"
            "{%- if message['content'] is mapping -%}{{- message['content'] | tojson(indent=2) -}}"
            "{%- elif given[:1] in ['{', '['] -%}{{- given -}}"
            "{%- else -%}{{- given | tojson -}}{%- endif -%}"
        )
    parts = [
        _WORLD_MARK if _is_world(form, ending) else "",
        "{{- bos_token -}}" if bos else "",
        *(cleaning_macro(name, cleaner) for cleaner, name in names.items()),
        _TEXT_OF,
        f"{{%- set first = {_dict_literal(layout.first)} -%}}",
        f"{{%- set between = {_dict_literal(layout.between)} -%}}",
        f"{{%- set asked = {_dict_literal(layout.asked)} -%}}",
        f"{{%- set closed = {_dict_literal(layout.closed)} -%}}",
        _THOUGHT_OF,
        "{%- set ns = namespace(last='', call='', words='', tools='', bare=[], own='', results='', begun=false) -%}",
        _set_tools(form),
        # the system's text that no message has: the template's own, and the tools
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
        f"{{{{- first['s'] ~ {macros['s']}(ns.own) -}}}}{{%- set ns.last = 's' -%}}"
        "{%- endif -%}"
        "{%- set ns.begun = ns.words != 'given' -%}",
        "{%- for message in messages -%}"
        "{%- set role = message['role'] -%}"
        "{%- set text = text_of(message['content']) -%}"
        "{%- if role in ['system', 'developer'] -%}{%- set who = 's' -%}"
        "{%- elif role == 'user' -%}{%- set who = 'u' -%}"
        "{%- elif role == 'assistant' -%}{%- set who = 'a' -%}"
        f"{{%- elif role in {_TOOL_ROLES} -%}}{{%- set who = 't' -%}}"
        "{%- else -%}{{- raise_exception('this chat template has no role ' ~ role) -}}"
        "{%- endif -%}"
        # an empty system message is ignored; the first one is written already
        "{%- if who == 's' and not text | trim -%}"
        "{%- elif who == 's' and not ns.begun -%}{%- set ns.begun = true -%}"
        # the results of several tools are one turn
        f"{{%- elif who == 't' and {joined} and not loop.last and loop.nextitem['role'] in {_TOOL_ROLES} -%}}"
        "{%- set ns.results = ns.results ~ text ~ '\\n' -%}"
        "{%- else -%}"
        "{{- between[ns.last ~ who] if ns.last else first[who] -}}"
        "{%- set ns.last = who -%}"
        f"{{%- if who == 's' -%}}{{{{- {macros['s']}(text) -}}}}"
        f"{{%- elif who == 'u' -%}}{_add_cue(form)}{{{{- {macros['u']}(text) -}}}}"
        f"{{%- elif who == 't' -%}}{result}{{%- set ns.results = '' -%}}"
        "{%- else -%}"
        "{%- set ns.call = '' -%}{%- set ns.words = text -%}"
        "{%- if (text | trim).startswith('<think>') and '</think>' in text -%}"
        f"{{%- set ns.words = {macros['words']}(text.split('<think>', 1)[1].split('</think>', 1)[1]) -%}}"
        "{%- endif -%}",
        _set_call(form),
        f"{{%- set ns.words = {macros['a']}(ns.words) -%}}"
        "{%- if ns.call -%}{%- set ns.words = ns.words ~ ('\\n' if ns.words else '') ~ ns.call -%}{%- endif -%}"
        f"{{%- set thought = {macros['a']}(thought_of(message)){' | trim' if form.strip else ''} -%}}"
        f"{{{{- {before} ~ ns.words ~ {after} -}}}}"
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


# the text of a content, which may be a list of parts, or empty
_TEXT_OF = (
    "{%- macro text_of(content) -%}"
    "{%- if content is string -%}{{- content -}}"
    "{%- elif content is iterable -%}"
    "{%- for part in content -%}"
    "{{- '' if loop.first else '\\n' -}}{{- part if part is string else part['text'] -}}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
)


# the thought of an assistant's message, in its content or in a key of its own
_THOUGHT_OF = (
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


def _is_world(form: Template, ending: Ending) -> bool:
    """Return whether llama.cpp's built-in layout of the World models is that of this template."""
    return form.prompt([Message(role, words) for role, words in _WORLD_TURNS], ending=ending) == WORLD_LAYOUT
