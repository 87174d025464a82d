"""Conversations become the text that models know, and every byte has a speaker."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.common.errors import UserError
from rwkv_peft.text import template_file, tokenizer
from rwkv_peft.text.presets import PRESETS
from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import ENDINGS, Dialogue, Message, clean, to_spans
from rwkv_peft.text.turns import overlooked_heading, spans_of_text

WORLD = PRESETS["rwkv-world"]
S, U, A, T = Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TOOL

TURNS = st.lists(
    st.tuples(st.sampled_from([U, A]), st.text(min_size=1, max_size=60).filter(lambda t: clean(t))),
    min_size=1,
    max_size=6,
)


def text_of(template, *messages, tools="", ending="doc"):
    return "".join(template.render(Dialogue(messages, tools), ENDINGS[ending])[0])


# one dialogue with everything: a system text, an input, blank lines, a thought, two turns
DIALOGUE = (
    Message(S, "Be\n\nkind."),
    Message(U, "Q?\r\n\r\nSoon!", material="M"),
    Message(A, "A.\n\nB.", think="Hm."),
    Message(U, "再见"),
    Message(A, "再见。"),
)
CUES = {"cue": " (think)", "bit": " (think a bit)", "lot": " (think a lot)"}
GOLDEN = {
    "rwkv-world": "System: Be\nkind.\n\nUser: Q?\nSoon!\nM\n\nAssistant: <think>\nHm.\n</think>\nA.\nB.\n\n"
    "User: 再见\n\nAssistant: 再见。",
    "rwkv-qa": "System: Be\nkind.\n\nQuestion: Q?\nSoon!\nM\n\nAnswer: <think>\nHm.\n</think>\nA.\nB.\n\n"
    "Question: 再见\n\nAnswer: 再见。",
    "rwkv-instruct": "System: Be\nkind.\n\nInstruction: Q?\nSoon!\n\nInput: M\n\nResponse: <think>\nHm.\n</think>\nA.\nB.\n\n"
    "Instruction: 再见\n\nResponse: 再见。",
    "rwkv-g1": "System: Be\nkind.\n\nUser: Q?\nSoon!\nM\n\nAssistant: <think>\nHm.\n</think>\nA.\n\nB.\n\n"
    "User: 再见\n\nAssistant: 再见。",
    "rwkv-g1-think": "System: Be\nkind.\n\nUser: Q?\nSoon!\nM\n\nAssistant: <think>\nHm.\n</think>\nA.\n\nB.\n\n"
    "User: 再见\n\nAssistant: <think>\n</think>\n再见。",
    "rwkv-g1-fakethink": "System: Be\nkind.\n\nUser: Q?\nSoon!\nM\n\nAssistant: <think></think>\nA.\n\nB.\n\n"
    "User: 再见\n\nAssistant: <think></think>\n再见。",
    "rwkv-g1-emptythink-2025": "System: Be\nkind.\n\nUser: Q?\nSoon!\nM\n\nAssistant: <think>\n</think>\nA.\n\nB.\n\n"
    "User: 再见\n\nAssistant: <think>\n</think>\n再见。",
    "rwkv-g1-bot": "System✿Be\nkind.✿\nUser✿Q?\nSoon!\nM✿\nBot✿<think>\nHm.\n</think>\nA.\n\nB.✿\nUser✿再见✿\nBot✿再见。✿",
    "rwkv-g1-bot-think": "System✿Be\nkind.✿\nUser✿Q?\nSoon!\nM✿\nBot✿<think>\nHm.\n</think>\nA.\n\nB.✿\nUser✿再见✿\n"
    "Bot✿<think></think>\n再见。✿",
    "rwkv-g1-bot-fakethink": "System✿Be\nkind.✿\nUser✿Q?\nSoon!\nM✿\nBot✿<think></think>\nA.\n\nB.✿\nUser✿再见✿\n"
    "Bot✿<think></think>\n再见。✿",
    "rwkv-g1-toolcall": "System: Be\nkind.\n\nUser: Q?\nSoon!\nM\n\nAssistant: <think>\nHm.\n</think>\nA.\n\nB.\n\n"
    "User: 再见\n\nAssistant: 再见。",
    "rwkv-g1-function-calling": "### System\nBe\nkind.\n### User\nQ?\nSoon!\nM\n### Assistant\n<think>\nHm.\n</think>\nA.\n\nB.\n"
    "### User\n再见\n### Assistant\n再见。",
    "rwkv-g1-function-calling-think": "### System\nBe\nkind.\n### User\nQ?\nSoon!\nM\n### Assistant\n<think>\nHm.\n</think>\n"
    "A.\n\nB.\n### User\n再见\n### Assistant\n<think></think>\n再见。",
    "rwkv-g1-function-calling-fakethink": "### System\nBe\nkind.\n### User\nQ?\nSoon!\nM\n### Assistant\n<think></think>\n"
    "A.\n\nB.\n### User\n再见\n### Assistant\n<think></think>\n再见。",
    "rwkv-g1-fim": "Be\n\nkind.✿prefix✿✿suffix✿M✿middle✿Q?\n\nSoon!<think>\nHm.\n</think>\nA.\n\nB."
    "✿prefix✿✿suffix✿✿middle✿再见再见。",
    **{
        f"rwkv-g1-think-{name}": f"System: Be\nkind.\n\nUser: Q?\nSoon!\nM{cue}\n\nAssistant: <think>\nHm.\n</think>\nA."
        "\n\nB.\n\nUser: 再见\n\nAssistant: <think></think>\n再见。"
        for name, cue in CUES.items()
    },
    "rwkv-g1-tools": "System: Be\nkind.\n\nUser: Q?\nSoon!\nM\n\nAssistant: <think>\nHm.\n</think>\nA.\n\nB.\n\n"
    "User: 再见\n\nAssistant: 再见。",
    "rwkv-g1-rag": "Be\nkind.\n\nM\n\nUser: Q?\nSoon!\n\nAssistant: <think>\nHm.\n</think>\nA.\n\nB.\n\n"
    "User: 再见\n\nAssistant: 再见。",
    "alpaca": "Be\n\nkind.\n\n### Instruction:\nQ?\n\nSoon!\n\n### Input:\nM\n\n### Response:\n"
    "<think>\nHm.\n</think>\nA.\n\nB.\n\n### Instruction:\n再见\n\n### Response:\n再见。",
    "chatml": "<|im_start|>system\nBe\n\nkind.<|im_end|>\n<|im_start|>user\nQ?\n\nSoon!\nM<|im_end|>\n"
    "<|im_start|>assistant\n<think>\nHm.\n</think>\nA.\n\nB.<|im_end|>\n<|im_start|>user\n再见<|im_end|>\n"
    "<|im_start|>assistant\n再见。<|im_end|>",
    "default": "System: Be\n\nkind.\nHuman: Q?\n\nSoon!\nM\nAssistant: <think>\nHm.\n</think>\nA.\n\nB.\n"
    "Human: 再见\nAssistant: 再见。",
    "ext-cat": "Be\n\nkind.\n🐱:Q?\n\nSoon!\nM\n🤖:<think>\nHm.\n</think>\nA.\n\nB.\n🐱:再见\n🤖:再见。",
    "empty": "Be\n\nkind.Q?\n\nSoon!\nM<think>\nHm.\n</think>\nA.\n\nB.再见再见。",
}
PROMPTS = {
    "rwkv-world": "User: Hi\n\nAssistant:", "rwkv-qa": "Question: Hi\n\nAnswer:",
    "rwkv-instruct": "Instruction: Hi\n\nResponse:", "rwkv-g1": "User: Hi\n\nAssistant:",
    "rwkv-g1-think": "User: Hi\n\nAssistant: <think",
    "rwkv-g1-fakethink": "User: Hi\n\nAssistant: <think></think",
    "rwkv-g1-emptythink-2025": "User: Hi\n\nAssistant: <think>\n</think",
    "rwkv-g1-bot": "User✿Hi✿\nBot✿", "rwkv-g1-bot-think": "User✿Hi✿\nBot✿<think",
    "rwkv-g1-bot-fakethink": "User✿Hi✿\nBot✿<think></think", "rwkv-g1-toolcall": "User: Hi\n\nAssistant:",
    "rwkv-g1-function-calling": "### User\nHi\n### Assistant",
    "rwkv-g1-function-calling-think": "### User\nHi\n### Assistant\n<think",
    "rwkv-g1-function-calling-fakethink": "### User\nHi\n### Assistant\n<think></think",
    "rwkv-g1-fim": "✿prefix✿✿suffix✿✿middle✿Hi",
    **{f"rwkv-g1-think-{name}": f"User: Hi{cue}\n\nAssistant: <think" for name, cue in CUES.items()},
    "rwkv-g1-tools": "User: Hi\n\nAssistant: ```json", "rwkv-g1-rag": "User: Hi\n\nAssistant:",
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
              "### Instruction:\nHi\n\n### Response:",
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant", "default": "Human: Hi\nAssistant:",
    "ext-cat": "🐱:Hi\n🤖:", "empty": "Hi",
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_writes_its_golden_text(name):
    assert text_of(PRESETS[name], *DIALOGUE) == GOLDEN[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_prompt_ends_at_the_heading_of_the_answer_and_never_with_a_blank(name):
    prompt = PRESETS[name].prompt([Message(U, "Hi")])
    assert prompt == PROMPTS[name]
    assert prompt == prompt.rstrip()


@pytest.mark.parametrize("name", [n for n in PRESETS if n not in ("empty", "rwkv-g1-tools")])
def test_a_prompt_is_how_a_trained_row_begins_in_tokens_too(name):
    prompt = PRESETS[name].prompt([Message(U, "你好。")])
    whole = text_of(PRESETS[name], Message(U, "你好。"), Message(A, "好。", think="嗯。"))
    ids = tokenizer.encode(prompt)
    assert tokenizer.encode(whole)[: len(ids)] == ids


TOOLS = '[{"name": "add"}]'
CALL = '{"name": "add", "arguments": {"a": 1}}'


def test_tools_stand_in_the_system_turn_and_calls_and_their_results_in_turns():
    messages = (Message(U, "1+1?"), Message(A, "", call=CALL), Message(T, "2"), Message(A, "Two."))
    assert text_of(PRESETS["rwkv-g1-tools"], *messages, tools=TOOLS) == (
        'System: Tools:\n[{"name": "add"}]\nReturn only a JSON function call.\n\nUser: 1+1?\n\n'
        'Assistant: ```json\n{"name": "add", "arguments": {"a": 1}}\n```\n\nUser: Function output:\n2\n\nAssistant: Two.'
    )
    texts, roles = PRESETS["rwkv-g1-tools"].render(Dialogue(messages, TOOLS))
    assert ("Assistant: ```json", Role.HEADING) in zip(texts, roles, strict=True)  # what the client sends is not learnt
    assert text_of(PRESETS["chatml"], Message(S, "Help."), *messages, tools=TOOLS) == (
        '<|im_start|>system\nHelp.\n# Tools\n<tools>\n[{"name": "add"}]\n</tools><|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n'
        '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>"
    )


def test_alpaca_chooses_its_introduction_by_the_input():
    assert ", paired with an input" in text_of(PRESETS["alpaca"], Message(U, "Q", material="M"), Message(A, "A"))
    assert ", paired with an input" not in text_of(PRESETS["alpaca"], Message(U, "Q"), Message(A, "A"))


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        ("doc", "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant: d"),
        ("blank", "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant: d\n\n"),
        ("both", "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant: d\n\n"),
        ("x17", "User: a\n\nAssistant: b\x17\n\nUser: c\n\nAssistant: d\x17"),
    ],
)
def test_turns_and_rows_end_as_eot_says(ending, text):
    turns = (Message(U, "a"), Message(A, "b"), Message(U, "c"), Message(A, "d"))
    assert text_of(WORLD, *turns, ending=ending) == text
    assert ENDINGS[ending].token == (ending in ("doc", "both"))


def test_an_answer_begins_at_the_space_and_includes_the_blank_line_that_ends_it():
    texts, roles = WORLD.render(Dialogue((Message(U, "a"), Message(A, "b"), Message(U, "c"))))
    assert [t for t, r in zip(texts, roles, strict=True) if r is A] == [" b\n\n"]


def test_an_answer_that_is_not_to_be_learnt_has_a_role_of_its_own():
    _, roles = WORLD.render(Dialogue((Message(U, "a"), Message(A, "b", learn=False), Message(U, "c"), Message(A, "d"))))
    assert roles == [Role.HEADING, U, Role.HEADING, Role.UNTRAINED, Role.HEADING, U, Role.HEADING, A]


@settings(max_examples=100, deadline=None)
@given(TURNS, st.sampled_from(sorted(PRESETS)))
def test_pieces_make_the_text_without_gaps_and_without_empty_ones(turns, name):
    messages = tuple(Message(role, content) for role, content in turns)
    texts, roles = PRESETS[name].render(Dialogue(messages))
    assert len(texts) == len(roles) and all(texts)
    for message in messages:
        assert PRESETS[name].cleaners[message.role](message.content) in "".join(texts)


@settings(max_examples=100, deadline=None)
@given(TURNS)
def test_reading_a_world_text_back_finds_the_same_turns(turns):
    texts, roles = WORLD.render(Dialogue(tuple(Message(role, content) for role, content in turns)))
    data = "".join(texts).encode("utf-8", "ignore")
    if data == "".join(texts).encode("utf-8", "surrogatepass"):
        assert spans_of_text(data) == to_spans(texts, roles)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_cleaning_leaves_no_blank_line_and_is_done_once(text):
    assert "\n\n" not in clean(text)
    assert clean(clean(text)) == clean(text)


@pytest.mark.parametrize(
    ("text", "roles"),
    [
        ("just text", [Role.TEXT]),
        ("Title\n\nUser: a\n\nAssistant: b", [Role.TEXT, Role.HEADING, U, Role.HEADING, A]),
        ("User：a\n\nAssistant：b", [Role.HEADING, U, Role.HEADING, A]),
        ("Assistant: the word User: inside\nUser: is no heading", [Role.HEADING, A]),
        (' User: not at the start\n\nAssistant:"quoted"', [Role.TEXT, Role.HEADING, A]),
    ],
)
def test_headings_stand_at_the_start_or_after_a_blank_line(text, roles):
    assert [span.role for span in spans_of_text(text.encode())] == roles


def test_the_headings_of_a_preset_are_detected_in_ready_texts():
    words = PRESETS["rwkv-qa"].headings
    assert [s.role for s in spans_of_text(b"Question: a\n\nAnswer: b", words)] == [Role.HEADING, U, Role.HEADING, A]
    assert [s.role for s in spans_of_text(b"Question: a\n\nAnswer: b")] == [Role.TEXT]


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("User: a\nAssistant: b", "Assistant:"),
        ("User: a\n\nassistant: b", "assistant:"),
        ("User: a\n\n Assistant： b", "Assistant："),
        ("User: a\n\nAssistant: the User: said", ""),
        ("System: s\n\nUser: a\n\nAssistant: b", ""),
        ("User：a\n\nAssistant: b", "User："),
        ("plain text", ""),
    ],
)
def test_what_only_validations_like_a_turn_is_noticed(text, result):
    assert overlooked_heading(text.encode(), spans_of_text(text.encode())) == result


def load(tmp_path, content, name=""):
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return template_file.load(path, name)


LLAMA_FACTORY = {  # the answer is opened at the end of the user's pattern
    "format_user": ["Human: {{content}}", "\nAssistant:"],
    "format_assistant": ["{{content}}", "\n"],
    "format_system": "System: {{content}}\n",
    "format_separator": "",
    "format_prefix": "<s>",
    "default_system": "Be brief.",
    "stop_words": ["\nHuman:"],
}


def test_a_template_of_llama_factory_is_read_as_text(tmp_path):
    template = load(tmp_path, LLAMA_FACTORY)
    turns = (Message(U, "a"), Message(A, "b"), Message(U, "c"), Message(A, "d"))
    assert text_of(template, *turns) == "<s>System: Be brief.\nHuman: a\nAssistant:b\nHuman: c\nAssistant:d\n"
    texts, roles = template.render(Dialogue(turns))
    assert [t for t, r in zip(texts, roles, strict=True) if r is A] == ["b\n", "d\n"]
    assert template.prompt([Message(U, "a")]) == "<s>System: Be brief.\nHuman: a\nAssistant:"


def test_turns_need_not_alternate_in_any_template(tmp_path):
    odd = (Message(A, "a"), Message(A, "b"), Message(U, "c"), Message(U, "d"), Message(A, "e"))
    assert text_of(WORLD, *odd) == "Assistant: a\n\nAssistant: b\n\nUser: c\n\nUser: d\n\nAssistant: e"
    own = load(tmp_path, {**LLAMA_FACTORY, "default_system": "", "format_prefix": "", "format_separator": "~"})
    assert text_of(own, *odd) == "Assistant:a\n\nAssistant:b\n~Human: c~Human: d\nAssistant:e\n"


def test_one_of_several_templates_is_chosen_by_its_name(tmp_path):
    two = {"x": {"format_user": "X{{content}}", "format_assistant": "Y{{content}}"}, "y": LLAMA_FACTORY}
    assert load(tmp_path, two, "x").format_user == "X{{content}}"
    assert load(tmp_path, [{"name": n, **t} for n, t in two.items()], "y").format_prefix == "<s>"


def test_a_tool_call_may_be_written_with_name_and_arguments(tmp_path):
    base = {"format_user": "U {{content}}", "format_assistant": "A {{content}}", "format_separator": "\n"}
    template = load(tmp_path, base | {"format_function": "{{name}}({{arguments}})"})
    two = f"[{CALL}, {CALL}]"
    turns = (Message(U, "q"), Message(A, "", call=CALL), Message(T, "2"), Message(A, "", call=two))
    assert text_of(template, *turns) == 'U q\nA add({"a": 1})\nU 2\nA add({"a": 1})\nadd({"a": 1})'


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("{", "", "is not readable as JSON"),
        ("7", "", "must be a JSON object"),
        ({}, "", "format_user: is missing\n  format_assistant: is missing"),
        ({"format_user": "Q", "format_assistant": "{{content}}"}, "", "format_user: must hold {{content}} once"),
        ({"format_user": "{{query}}", "format_assistant": "{{content}}"}, "", "has {{query}}; known there: content"),
        ({"format_usr": "x"}, "", "format_usr: is not a field of a template; did you mean format_user?"),
        ({"replace_eos": True}, "", "replace_eos: is not used here"),
        ({"stop_words": "x"}, "", "stop_words: must be a list of texts"),
        ({"think": "always?"}, "", "think: must be one of keep, always, fake"),
        ({"clean": ["everybody"]}, "", "clean: must be a list of roles"),
        ({"format_user": 7}, "", "format_user: must be text"),
        ({"a": {}, "b": {}}, "", "holds several templates"),
        ({"alpha": {}, "b": {}}, "alpa", "has no template 'alpa'; did you mean alpha?"),
        ({"format_user": "x"}, "alpha", "holds a single template without a name"),
    ],
)
def test_a_template_that_cannot_be_used_says_why(tmp_path, content, name, words):
    with pytest.raises(UserError) as error:
        load(tmp_path, content, name)
    assert words in str(error.value) and "mine.json" in str(error.value)
