"""Conversations become the text that RWKV models know, and every byte has a speaker."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.errors import UserError
from rwkv_peft.roles import Role
from rwkv_peft.templates import Message, clean, messages_of, overlooked_heading, render, spans_of_text

TURNS = st.lists(
    st.tuples(
        st.sampled_from([Role.USER, Role.ASSISTANT]), st.text(min_size=1, max_size=60).filter(lambda t: clean(t))
    ),
    min_size=1,
    max_size=6,
)


def test_a_conversation_is_rendered_as_the_base_models_were_trained():
    text, _ = render([
        Message(Role.SYSTEM, "Be kind."),
        Message(Role.USER, "在吗？\r\n\r\n\r\n在？"),
        Message(Role.ASSISTANT, " 在的。\n"),
        Message(Role.USER, "再见"),
        Message(Role.ASSISTANT, "再见。"),
    ])  # fmt: skip
    assert text == "System: Be kind.\n\nUser: 在吗？\n在？\n\nAssistant: 在的。\n\nUser: 再见\n\nAssistant: 再见。"


def test_a_prompt_ends_exactly_at_the_colon():
    assert render([Message(Role.USER, "Hi")], open_answer=True)[0] == "User: Hi\n\nAssistant:"


def test_an_answer_begins_at_the_space_and_includes_the_blank_line_that_ends_it():
    text, spans = render([Message(Role.USER, "a"), Message(Role.ASSISTANT, "b"), Message(Role.USER, "c")])
    said = [text.encode()[s.start : s.end].decode() for s in spans if s.role is Role.ASSISTANT]
    assert said == [" b\n\n"]


@settings(max_examples=200, deadline=None)
@given(TURNS)
def test_spans_cover_the_text_and_reading_it_back_finds_the_same_ones(turns):
    text, spans = render([Message(role, content) for role, content in turns])
    data = text.encode("utf-8", "surrogatepass")
    assert spans[0].start == 0 and spans[-1].end == len(data)
    assert all(a.end == b.start for a, b in zip(spans, spans[1:], strict=False))
    assert spans_of_text(data) == spans


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_cleaning_leaves_no_blank_line_and_is_done_once(text):
    assert "\n\n" not in clean(text)
    assert clean(clean(text)) == clean(text)


@pytest.mark.parametrize(
    ("text", "roles"),
    [
        ("just text", [Role.TEXT]),
        ("Title\n\nUser: a\n\nAssistant: b", [Role.TEXT, Role.HEADING, Role.USER, Role.HEADING, Role.ASSISTANT]),
        ("User：a\n\nAssistant：b", [Role.HEADING, Role.USER, Role.HEADING, Role.ASSISTANT]),
        ("Assistant: the word User: inside\nUser: is no heading", [Role.HEADING, Role.ASSISTANT]),
        (' User: not at the start\n\nAssistant:"quoted"', [Role.TEXT, Role.HEADING, Role.ASSISTANT]),
    ],
)
def test_headings_stand_at_the_start_or_after_a_blank_line(text, roles):
    assert [span.role for span in spans_of_text(text.encode())] == roles


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "at least one"),
        ("hello", "must be a list"),
        ([{"role": "wizard", "content": "x"}], "the role 'wizard'"),
        ([{"role": "user", "content": None}], "no text in content"),
        ([{"role": "user", "content": " \n "}], "is empty"),
        (["user"], "must be an object"),
        ([{"role": "user", "content": "x"}], "no assistant message"),
    ],
)
def test_conversations_that_cannot_be_used_say_why(rows, words):
    with pytest.raises(UserError, match=words):
        messages_of(rows)


@pytest.mark.parametrize(
    ("text", "found"),
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
def test_what_only_looks_like_a_turn_is_noticed(text, found):
    assert overlooked_heading(text.encode(), spans_of_text(text.encode())) == found


def test_the_names_of_other_data_sets_are_understood():
    rows = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert messages_of(rows) == [Message(Role.USER, "a"), Message(Role.ASSISTANT, "b")]
