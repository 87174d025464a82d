"""What today's formats ask beside their words: bounds that no content may hold, cues, tools one by one, texts that are ready,
rows for infilling, and first lines that are indented."""

import json

import pytest
from helpers.rows import encode_block_of
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.common.errors import UserError
from rwkv_peft.preprocess.schemas import Reader, columns
from rwkv_peft.preprocess.truncate import Limits
from rwkv_peft.text import template_file, tokenizer
from rwkv_peft.text.presets import PRESETS
from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import Dialogue, Message, clean_answer, split_thought, tidy_answer, to_spans
from rwkv_peft.text.turns import spans_of_text

S, U, A, T = Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TOOL
BOT = [name for name in PRESETS if "-bot" in name]


def text_of(name: str, *messages: Message, tools: str = "") -> str:
    return "".join(PRESETS[name].render(Dialogue(messages, tools))[0])


def made_of(row: dict, name: str, **changes) -> str:
    made = encode_block_of(row, template=PRESETS[name], **changes)
    return tokenizer.decode(made.ids[:-1]) if len(made.ids) else ", ".join(reject.message for reject in made.rejects)


# ---- bounds ----


@pytest.mark.parametrize("name", [*BOT, "rwkv-g1-fim"])
@pytest.mark.parametrize("repair", [True, False])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a✿b"}]},
        {"messages": [{"role": "user", "content": "✿"}, {"role": "assistant", "content": "a"}]},
        {"prompt": "q", "completion": "a ✿"},
        {"prefix": "a", "suffix": "b✿", "middle": "c"},
    ],
)
def test_a_bound_inside_a_content_is_rejected_with_the_sign(name, repair, row):
    assert "holds ✿" in made_of(row, name, repair=repair)


@pytest.mark.parametrize("name", [n for n in PRESETS if not PRESETS[n].reserved])
def test_the_sign_is_a_letter_like_others_elsewhere(name):
    assert "✿" in made_of({"prompt": "q✿", "completion": "a"}, name)


# ---- the Bot format ----


@pytest.mark.parametrize("name", BOT)
def test_a_ready_text_of_the_bot_format_has_the_turns_of_a_rendered_one(name):
    form = PRESETS[name]
    texts, roles = PRESETS["rwkv-g1-bot"].render(
        Dialogue((Message(S, "s"), Message(U, "User: a"), Message(A, "b。\n\nc"), Message(U, "d"), Message(A, "e")))
    )
    assert spans_of_text("".join(texts).encode(), form.headings) == to_spans(texts, roles)


def test_the_turns_of_ready_texts_under_hashes_are_detected():
    data = b"### System\nx\n### `read`\n### User\na\n### Assistant\nb ### User\n### Users\n### User\nc"
    result = spans_of_text(data, PRESETS["rwkv-g1-function-calling"].headings)
    assert [(data[s.start : s.end].decode(), s.role) for s in result] == [
        ("### System", Role.HEADING), ("\nx\n### `read`\n", S), ("### User", Role.HEADING), ("\na\n", U),
        ("### Assistant", Role.HEADING), ("\nb ### User\n### Users\n", A), ("### User", Role.HEADING), ("\nc", U),
    ]  # fmt: skip


def test_each_answer_of_a_ready_text_ends_with_its_bound_where_rows_are_expanded():
    row = {"text": "User✿a✿\nBot✿b✿\nUser✿c✿\nBot✿d✿"}
    made = encode_block_of(row, template=PRESETS["rwkv-g1-bot"], expand=True)
    ends = made.sizes.cumsum().tolist()
    assert [tokenizer.decode(made.ids[e - n : e].tolist()) for e, n in zip(ends, made.sizes.tolist(), strict=True)] == [
        "User✿a✿\nBot✿b✿", "User✿a✿\nBot✿b✿\nUser✿c✿\nBot✿d✿",
    ]  # fmt: skip


@pytest.mark.parametrize("name", BOT)
def test_a_client_stops_at_the_bound(name):
    assert PRESETS[name].stops()[0] == "✿"


# ---- cues ----


@pytest.mark.parametrize(("name", "cue"), [("cue", " (think)"), ("bit", " (think a bit)"), ("lot", " (think a lot)")])
def test_a_cue_is_behind_a_question_that_a_thought_answers(name, cue):
    name = f"rwkv-g1-think-{name}"
    turns = (Message(U, "a\n"), Message(A, "b", think="t"), Message(U, "c"), Message(A, "d"), Message(U, "e (think)"))
    assert text_of(name, *turns, Message(A, "f", think="t")) == (
        f"User: a{cue}\n\nAssistant: <think>\nt\n</think>\nb\n\nUser: c\n\nAssistant: <think></think>\nd\n\n"
        "User: e (think)\n\nAssistant: <think>\nt\n</think>\nf"  # a question that has a cue keeps its own
    )
    assert PRESETS[name].prompt([Message(U, "q")]) == f"User: q{cue}\n\nAssistant: <think"
    assert PRESETS[name].add_cue("q") == f"q{cue}" and PRESETS[name].add_cue(f"q{cue}") == f"q{cue}"


def test_a_cue_is_behind_the_input_of_a_question():
    turns = (Message(U, "q", material="m"), Message(A, "a", think="t"))
    assert text_of("rwkv-g1-think-cue", *turns).startswith("User: q\nm (think)\n\n")


def test_no_cue_is_behind_the_result_of_a_tool():
    turns = (Message(U, "q"), Message(A, "", call='{"name": "f", "arguments": {}}', think="t"), Message(T, "1"))
    said = text_of("rwkv-g1-think-cue", *turns, Message(A, "a", think="t"))
    assert "q (think)\n\n" in said and "Function output:\n1\n\n" in said


# ---- tools ----


TOOLS = '[{"name": "add", "description": "Add\\n", "parameters": {"a": 1}}, {"name": "no"}]'
TWO = '[{"name": "add", "arguments": {"a": "啊"}}, {"name": "no", "arguments": {}}]'
TURNS = (Message(U, "q"), Message(A, "", call=TWO), Message(T, '{"b": [1]}'), Message(T, "none"), Message(A, "a"))


def test_calls_and_results_stand_in_tags_one_by_one():
    assert text_of("rwkv-g1-toolcall", Message(S, "s"), *TURNS, tools=TOOLS) == (
        'System: s\n<tools>[\n{"name":"add","description":"Add\\n","parameters":{"a":1}},\n{"name":"no"}\n]</tools>\n\n'
        'User: q\n\nAssistant: <tool_call>{"name":"add","arguments":{"a":"啊"}}</tool_call>\n'
        '<tool_call>{"name":"no","arguments":{}}</tool_call>\n\nUser: <tool_response>{"b": [1]}</tool_response>\n\n'
        "User: <tool_response>none</tool_response>\n\nAssistant: a"
    )


def test_results_under_hashes_are_json_one_by_one():
    said = text_of("rwkv-g1-function-calling", *TURNS, tools=TOOLS)
    assert '### Tool Output\n```json\n{\n  "b": [\n    1\n  ]\n}\n```\n### Tool Output\n```json\n"none"\n```\n' in said
    assert said.count("**Description:**") == 1 and "### `no`\n**Parameters:**\n```json\n{}\n```\n" in said
    assert said.count("**Tool Call:**") == 3  # how to call one, and two calls


@pytest.mark.parametrize("result", ["1e400", '{"a": 1, "a": 2}', "NaN", "[" * 100_000, "{", "天气"])
def test_a_result_that_json_would_change_stays_as_it_is(result):
    said = text_of("rwkv-g1-function-calling", Message(U, "q"), Message(T, result), Message(A, "a"))
    assert f"```json\n{json.dumps(result, ensure_ascii=False)}\n```" in said


def test_a_description_of_tools_in_words_is_taken_as_it_is():
    for name in ("rwkv-g1-toolcall", "rwkv-g1-function-calling", "rwkv-g1-tools"):
        assert "add(a: int)" in text_of(name, *TURNS, tools="add(a: int)")
        assert '"add(a: int)"' not in text_of(name, *TURNS, tools="add(a: int)")


def test_results_that_follow_one_another_share_a_turn_where_the_template_has_no_place_for_each():
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": "1"},
                        {"role": "tool", "content": "2"}, {"role": "assistant", "content": "a"}]}  # fmt: skip
    assert made_of(row, "rwkv-g1-tools") == "User: q\n\nUser: Function output:\n1\n2\n\nAssistant: a"
    assert "1</tool_response>\n\nUser: <tool_response>2" in made_of(row, "rwkv-g1-toolcall")


# ---- infilling ----


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prefix": "a\n", "suffix": "\nb", "middle": "  c"}, "✿prefix✿✿suffix✿\nb✿middle✿a\n  c"),
        ({"prefix": "", "suffix": "b", "middle": "c"}, "✿prefix✿✿suffix✿b✿middle✿c"),
        ({"prefix": "a", "suffix": "", "middle": "c"}, "✿prefix✿✿suffix✿✿middle✿ac"),
        ({"prefix": "a", "suffix": "\r\n", "middle": "c\r\n"}, "✿prefix✿✿suffix✿\n✿middle✿ac\n"),
        ({"prompt": "a", "completion": " c"}, "✿prefix✿✿suffix✿✿middle✿a c"),
    ],
)
def test_a_row_for_infilling_keeps_its_blanks(row, text):
    assert made_of(row, "rwkv-g1-fim") == text


def test_columns_of_other_names_are_filled_in_as_well():
    named = columns('{"prompt": "before", "query": "after", "response": "hole"}')
    row = {"before": "", "after": "b", "hole": "c"}
    assert made_of(row, "rwkv-g1-fim", columns=named) == "✿prefix✿✿suffix✿b✿middle✿c"


def test_only_the_middle_is_learnt():
    made = encode_block_of({"prefix": "f(x):", "suffix": "b", "middle": " return"}, template=PRESETS["rwkv-g1-fim"])
    learnt = [i for i, role in zip(made.ids.tolist(), made.roles.tolist(), strict=True) if role == A]
    assert tokenizer.decode(learnt[:-1]) == " return" and learnt[-1] == 0


@pytest.mark.parametrize("policy", ["drop", "truncate", "truncate-left", "split"])
@pytest.mark.parametrize("most", [{"max_tokens": 30}, {"source": 20}, {"target": 20}])
def test_a_row_for_infilling_is_never_cut(policy, most):
    row = {"prefix": "a " * 30, "suffix": "b " * 30, "middle": " c" * 30}
    made = encode_block_of(row, template=PRESETS["rwkv-g1-fim"], limits=Limits(policy=policy, **most))
    assert not len(made.ids) and sum(n for what, n in made.counts.items() if what.startswith("dropped: longer")) == 1


def test_rows_for_infilling_and_talks_are_not_mixed_up():
    row = {"prefix": "a", "suffix": "b", "middle": "c"}
    assert "take rwkv-g1-fim" in made_of(row, "rwkv-world")
    talk = {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant", "user", "assistant")]}
    assert "is a conversation" in made_of(talk, "rwkv-g1-fim")


# ---- the first line of an answer ----


@pytest.mark.parametrize(
    ("said", "stays"),
    [
        ("    return x", "    return x"),
        ("\treturn x\n", "\treturn x"),
        ("　　春眠不觉晓", "　　春眠不觉晓"),
        ("\r\n\r\n    x\r\n    y \r\n", "    x\n    y"),
        ("\n \n  x", "  x"),
        (" one", "one"),  # prompt/completion data begin with a blank that belongs to no line
        ("\n one", "one"),
        ("plain", "plain"),
        ("\x0b\u2028  x", "  x"),
        ("   ", ""),
    ],
)
def test_an_answer_keeps_its_indentation_and_nothing_else_before_it(said, stays):
    assert tidy_answer(said) == stays == tidy_answer(stays)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "    x"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "\n    x"}]},
        {"instruction": "q", "output": "    x"},
        {"prompt": "q", "completion": "    x\n"},
        {"question": "q", "answer": "\r\n    x"},
        {"instruction": "q", "output": "    x", "history": [["h", "    x"]]},
    ],
)
@pytest.mark.parametrize("repair", [True, False])
@pytest.mark.parametrize("name", ["rwkv-world", "rwkv-g1", "rwkv-g1-bot", "chatml", "alpaca"])
def test_every_way_in_keeps_the_indentation(row, repair, name):
    form = PRESETS[name]
    lead = form.patterns[A].heading + form.patterns[A].lead
    said = made_of(row, name, repair=repair)
    assert said.count(f"{lead}    x") == said.count("x") - said.count("context")


def test_a_thought_before_it_takes_nothing_from_it():
    assert split_thought("<think>\nt\n</think>\n\n    x") == ("t", "    x")
    assert split_thought("<think>t</think> x") == ("t", "x")
    row = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>t</think>\n\n    x"}]
    }
    assert made_of(row, "rwkv-g1").endswith("</think>\n    x")


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_an_answer_that_begins_with_a_letter_is_what_it_always_was(text):
    for cleaner in (tidy_answer, clean_answer):
        assert cleaner(cleaner(text)) == cleaner(text)
        assert cleaner(text).strip() == cleaner(text.strip())
    if text[:1].strip():
        assert tidy_answer(text) == text.replace("\r\n", "\n").replace("\r", "\n").strip()


def test_a_question_loses_its_blanks_as_before():
    assert made_of({"prompt": "  q  ", "completion": "a"}, "rwkv-world") == "User: q\n\nAssistant: a"


# ---- a template of one's own ----


def test_a_template_of_ones_own_may_have_all_of_this(tmp_path):
    content = {
        "format_user": "U✿{{content}}✿", "format_assistant": "A✿{{content}}✿", "format_separator": "\n",
        "format_thought": "[{{content}}]", "format_no_thought": "[]", "think": "always", "user_cue": " (think)",
        "json_style": "compact", "reserved": ["✿"], "format_tool": "- {{name}}", "infill": False,
    }  # fmt: skip
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    form = template_file.load(path)
    assert "".join(form.render(Dialogue((Message(U, "q"), Message(A, "a", think="t"))))[0]) == "U✿q (think)✿\nA✿[t]a✿"
    assert form.find_reserved(Dialogue((Message(U, "✿"),))) == "✿"
    for wrong, words in (
        ({"json_style": "x"}, "json_style: must be one of line, compact, indent"),
        ({"reserved": "✿"}, "reserved: must be a list of texts"),
        ({"format_thought": "x"}, "format_thought: must hold {{content}} once"),
        ({"format_tool": "x"}, "format_tool: must hold {{name}} once"),
        ({"infill": 1}, "infill: must be true or false"),
    ):
        path.write_text(json.dumps(content | wrong), encoding="utf-8")
        with pytest.raises(UserError) as error:
            template_file.load(path)
        assert words in str(error.value)


def test_a_prefix_alone_is_no_row():
    with pytest.raises(Exception, match="has none of the keys"):
        Reader().read({"prefix": "a", "suffix": "b"})
