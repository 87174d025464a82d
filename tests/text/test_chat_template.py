"""The chat template that an export carries writes the very prompt that the kit trains and chats with."""

import functools
import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rwkv_peft.preprocess.schemas import Reader
from rwkv_peft.text import template_file
from rwkv_peft.text.chat_template import cleaning_macro, literal, to_jinja
from rwkv_peft.text.presets import PRESETS
from rwkv_peft.text.template import ENDINGS, Template, clean, clean_answer, normalize_line_ends, tidy, tidy_answer

jinja2 = pytest.importorskip("jinja2")

OWN = {
    "own": Template("own", "Q: {{content}} (think)", "A: {{content}};", default_system="Be 'kind'\\."),
    "prefix": Template(
        "prefix", "<u>{{content}}</u>", "<a>{{content}}</a>", format_prefix="<go>\n", format_separator="", think="always",
        opening="<think", default_system="A\n\nB",
    ),
    # LLaMA-Factory's way: what opens the answer is at the end of the user's pattern
    "llama": Template("llama", "[INST] {{content}} [/INST] ", "{{content}}</s>", format_separator="\n"),
    "calls": Template("calls", "{{content}}\r", "{{content}}", format_function="{{name}}({{arguments}})", strip=False),
}  # fmt: skip
FORMS = PRESETS | OWN


def environment():
    """As transformers and llama.cpp write JSON: Jinja itself escapes what HTML would take for its own."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    made.filters["tojson"] = lambda value, indent=None, separators=None: json.dumps(
        value, ensure_ascii=False, indent=indent, separators=separators
    )
    return made


@functools.cache
def compiled(form, eot, bos):
    return environment().from_string(to_jinja(form, ENDINGS[eot], bos))


def rendered(form, eot, messages, tools=None, bos=False, ask=True):
    return compiled(form, eot, bos).render(messages=messages, tools=tools, add_generation_prompt=ask, bos_token="<s>")


def prompt(form, eot, messages, tools=None):
    """What the kit itself makes of the same conversation, read as a row of training data is."""
    ends = messages[-1]["role"] != "assistant"  # a row has an answer; one that ends with a question is asked for it
    row = {"messages": [*messages, {"role": "assistant", "content": "x"}] if ends else messages, "tools": tools}
    result = Reader(repair=False).read(row)[1]
    return form.prompt(result.messages[:-1] if ends else result.messages, result.tools, ENDINGS[eot])


WORDS = st.text(st.sampled_from("ab \n\r\t。你✿<>'\"\\{}%#User: "), max_size=14).filter(str.strip)
WITH_THOUGHT = WORDS.filter(lambda text: "<think>" not in text)
TURN = st.one_of(
    st.builds(lambda text, role: {"role": role, "content": text}, WORDS, st.sampled_from(["user", "system", "tool", "user"])),
    st.builds(lambda text: {"role": "assistant", "content": text}, WORDS),
    st.builds(lambda text, think: {"role": "assistant", "content": f"<think>{think}</think>{text}"}, WORDS, WITH_THOUGHT),
    st.builds(lambda text, think: {"role": "assistant", "content": text, "reasoning_content": think}, WORDS, WORDS),
    st.builds(
        lambda text, names: {"role": "assistant", "content": text,
                             "tool_calls": [{"function": {"name": n, "arguments": {"x": n, "y": [1, None]}}} for n in names]},
        st.one_of(WORDS, st.just("")), st.lists(st.sampled_from(["add", "你"]), min_size=1, max_size=2),
    ),
)  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": "<b>"}}}, {"name": "你"}]


@pytest.mark.smoke(4)
@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=40, deadline=None)
@given(st.lists(TURN, min_size=1, max_size=5), st.sampled_from(sorted(ENDINGS)), st.sampled_from([None, TOOLS]))
def test_the_chat_template_writes_the_prompt_of_the_kit(name, messages, eot, tools):
    json_text = any(one["role"] == "tool" and one["content"].strip()[:1] in ("{", '"') for one in messages)
    assume(FORMS[name].json_style != "indent" or not json_text)  # Jinja cannot report whether that is JSON
    assert rendered(FORMS[name], eot, messages, tools) == prompt(FORMS[name], eot, messages, tools)


@pytest.mark.parametrize("name", FORMS)
def test_a_prompt_without_a_system_message_has_that_of_the_template(name):
    for messages in (
        [{"role": "user", "content": "Hi"}],
        [{"role": "system", "content": " "}, {"role": "user", "content": "Hi"}],
        [{"role": "system", "content": None}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    ):
        asked = [{"role": "user", "content": "Hi"}]
        assert rendered(FORMS[name], "doc", messages) == prompt(FORMS[name], "doc", asked)


@pytest.mark.smoke(8)
@pytest.mark.parametrize("name", FORMS)
def test_without_a_question_the_conversation_ends_as_a_row_does_and_token_zero_comes_first(name):
    form = FORMS[name]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    result = Reader(repair=False).read({"messages": messages})[1]
    for eot in ENDINGS:
        whole = "".join(form.render(result, ENDINGS[eot])[0])
        assert rendered(form, eot, messages, ask=False) == whole
        assert rendered(form, eot, messages, ask=False, bos=True) == f"<s>{whole}"


PROBES = (
    "", "a", " a ", "\n a", " \n  a\n b ", "a\n\nb", "a\n \n\n b\n", "a\r\nb\rc", "\r\n  a\r\n\r\n  b\r\n", "a\n", "\n\na\n\n",
    "\ta\t\n\tb", "a  \n\n\n  b  \n c", " ", "\n", "a\n\t\nb", "  a", "\n a", " \ta", "\n\n   a\n\n  b",
)  # fmt: skip


@pytest.mark.parametrize("cleaner", [tidy, clean, tidy_answer, clean_answer, normalize_line_ends])
def test_a_cleaning_macro_cleans_as_the_cleaner_does(cleaner):
    made = environment().from_string(cleaning_macro("f", cleaner) + "{{- f(text) -}}")
    for text in PROBES:
        assert made.render(text=text) == cleaner(text)


def test_a_cleaner_that_has_no_jinja_is_refused():
    with pytest.raises(ValueError, match="has no Jinja yet"):
        cleaning_macro("f", str.upper)


def test_a_role_that_the_template_does_not_know_is_an_error():
    with pytest.raises(jinja2.exceptions.UndefinedError, match="raise_exception"):
        rendered(PRESETS["rwkv-world"], "doc", [{"role": "narrator", "content": "x"}])


@pytest.mark.parametrize("text", ["a'b\\n\n\t\r\"{{x}} {% y %} #}", "\x17", "你✿"])
def test_a_literal_is_the_text(text):
    assert environment().from_string("{{- " + literal(text) + " -}}").render() == text


def test_a_users_own_file_has_a_chat_template(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"format_user": "Q: {{content}}", "format_assistant": "A: {{content}}"}))
    form = template_file.load(path)
    messages = [{"role": "user", "content": "Hi"}]
    assert rendered(form, "x17", messages) == prompt(form, "x17", messages) == "Q: Hi\n\nA:"
