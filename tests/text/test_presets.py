"""Golden token ids of every preset: one dialogue as it is trained, and one question as it is asked.

Brackets stand around what is learnt. The ids are those of the World vocabulary (rwkv_vocab_v20230424). ✿ is 10060, "></" is 5439.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.preprocess.encode import Pieces, encode_row
from rwkv_peft.text import tokenizer
from rwkv_peft.text.presets import ABOUT, PRESETS
from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import Dialogue, Message

S, U, A, T = Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TOOL
FLOWER, BOUND = 10060, "✿"

CHAT = Dialogue(
    (
        Message(S, "Be kind."),
        Message(U, "1+1?"),
        Message(A, "2。", think="Sum."),
        Message(U, "再见。"),
        Message(A, "    x\n\ny"),
    )
)
FILL = Dialogue((Message(U, "def f(x):\n", material="\nprint(f(1))"), Message(A, "    return x")))
TOOLS = Dialogue(
    (
        Message(U, "1+1?"),
        Message(A, "", call='{"name": "add", "arguments": {"a": 1}}'),
        Message(T, '{"sum": 2}'),
        Message(A, "2."),
    ),
    '[{"name": "add", "description": "Add", "parameters": {"a": "int"}}]',
)
ASKED = (Message(U, "Hi。"),)
# fmt: off
ROWS_WRITTEN = {
    "rwkv-world":
        "40812 59 3673 31214 47 261 24281 59 284 44 50 64 261 5585 41693 59 [295 35762 63 11 6654 47 11 754 35762 63 11 51 "
        "28329 11] 24281 59 33 10703 16519 28329 11 5585 41693 59 [28360 121 11 122 0]",
    "rwkv-qa":
        "40812 59 3673 31214 47 261 53648 59 284 44 50 64 261 40301 59 [295 35762 63 11 6654 47 11 754 35762 63 11 51 28329 "
        "11] 53648 59 33 10703 16519 28329 11 40301 59 [28360 121 11 122 0]",
    "rwkv-instruct":
        "40812 59 3673 31214 47 261 62994 59 284 44 50 64 261 53671 59 [295 35762 63 11 6654 47 11 754 35762 63 11 51 28329 "
        "11] 62994 59 33 10703 16519 28329 11 53671 59 [28360 121 11 122 0]",
    "rwkv-g1":
        "40812 59 3673 31214 47 261 24281 59 284 44 50 64 261 5585 41693 59 [295 35762 63 11 6654 47 11 754 35762 63 11 51 "
        "28329 11] 24281 59 33 10703 16519 28329 11 5585 41693 59 [28360 121 261 122 0]",
    "rwkv-g1-think":
        "40812 59 3673 31214 47 261 24281 59 284 44 50 64 261 5585 41693 59 295 35762 [63 11 6654 47 11 754 35762 63 11 51 "
        "28329 11] 24281 59 33 10703 16519 28329 11 5585 41693 59 295 35762 [63 11 754 35762 63 28352 121 261 122 0]",
    "rwkv-g1-think-cue":
        "40812 59 3673 31214 47 261 24281 59 284 44 50 64 275 35762 42 261 5585 41693 59 295 35762 [63 11 6654 47 11 754 "
        "35762 63 11 51 28329 11] 24281 59 33 10703 16519 28329 11 5585 41693 59 295 35762 [5439 35762 63 28352 121 261 122 "
        "0]",
    "rwkv-g1-think-bit":
        "40812 59 3673 31214 47 261 24281 59 284 44 50 64 275 35762 332 21365 42 261 5585 41693 59 295 35762 [63 11 6654 47 "
        "11 754 35762 63 11 51 28329 11] 24281 59 33 10703 16519 28329 11 5585 41693 59 295 35762 [5439 35762 63 28352 121 "
        "261 122 0]",
    "rwkv-g1-think-lot":
        "40812 59 3673 31214 47 261 24281 59 284 44 50 64 275 35762 332 22031 42 261 5585 41693 59 295 35762 [63 11 6654 47 "
        "11 754 35762 63 11 51 28329 11] 24281 59 33 10703 16519 28329 11 5585 41693 59 295 35762 [5439 35762 63 28352 121 "
        "261 122 0]",
    "rwkv-g1-fakethink":
        "40812 59 3673 31214 47 261 24281 59 284 44 50 64 261 5585 41693 59 295 35762 5439 35762 [63 11 51 28329 11] 24281 "
        "59 33 10703 16519 28329 11 5585 41693 59 295 35762 5439 35762 [63 28352 121 261 122 0]",
    "rwkv-g1-emptythink-2025":
        "40812 59 3673 31214 47 261 24281 59 284 44 50 64 261 5585 41693 59 295 35762 63 11 754 35762 [63 11 51 28329 11] "
        "24281 59 33 10703 16519 28329 11 5585 41693 59 295 35762 63 11 754 35762 [63 28352 121 261 122 0]",
    "rwkv-g1-bot":
        "40812 10060 886 31214 47 10060 11 24281 10060 50 44 50 64 10060 11 5645 10060 [61 35762 63 11 6654 47 11 754 35762 "
        "63 11 51 10080 10060 11] 24281 10060 10703 16519 10080 10060 11 5645 10060 [19250 121 261 122 10060 0]",
    "rwkv-g1-bot-think":
        "40812 10060 886 31214 47 10060 11 24281 10060 50 44 50 64 10060 11 5645 10060 61 35762 [63 11 6654 47 11 754 35762 "
        "63 11 51 10080 10060 11] 24281 10060 10703 16519 10080 10060 11 5645 10060 61 35762 [5439 35762 63 28352 121 261 "
        "122 10060 0]",
    "rwkv-g1-bot-fakethink":
        "40812 10060 886 31214 47 10060 11 24281 10060 50 44 50 64 10060 11 5645 10060 61 35762 5439 35762 [63 11 51 10080 "
        "10060 11] 24281 10060 10703 16519 10080 10060 11 5645 10060 61 35762 5439 35762 [63 28352 121 261 122 10060 0]",
    "rwkv-g1-tools":
        "40812 59 37473 59 11 1659 35 26290 388 269 6913 384 269 63053 388 269 5547 384 269 61059 388 4893 98 388 269 7865 "
        "5200 94 11 40721 31581 332 29141 56292 30380 47 261 24281 59 284 44 50 64 261 5585 41693 59 21214 26060 [11 2364 "
        "26290 388 269 6913 384 269 58155 388 4893 98 388 284 2408 11 6884 261] 24281 59 55049 46731 59 11 2364 8762 388 285 "
        "126 261 5585 41693 59 [285 47 0]",
    "rwkv-g1-toolcall":
        "40812 59 295 35783 793 11 2364 26290 5181 6913 5178 63053 5181 5547 5178 61059 23259 98 5181 7865 5200 11 1691 48 "
        "35783 63 261 24281 59 284 44 50 64 261 5585 41693 59 [295 27176 96 24947 797 35 26290 5181 6913 5178 58155 23259 98 "
        "388 50 27575 27176 96 24947 63 261] 24281 59 295 27176 96 54316 797 35 8762 388 285 9201 27176 96 54316 63 261 5585 "
        "41693 59 [285 47 0]",
    "rwkv-g1-function-calling":
        "5201 44948 11 5201 331 6913 97 11 520 62981 5383 19384 11 520 60882 5383 11 6884 26060 11 124 3331 35 98 388 269 "
        "7865 35 11 126 11 6884 11 1500 30380 22226 4706 39936 39979 45 40228 51665 32234 46028 59 11 520 24251 28593 5383 "
        "11 6884 26060 11 2364 26290 388 269 27176 96 26290 384 269 58155 388 4893 8020 388 269 35957 5200 11 6884 11 961 "
        "22187 46327 32273 30380 20084 4715 40228 32273 52389 57583 47 11 5201 29956 11 50 44 50 64 11 5201 58683 [11 520 "
        "24251 28593 5383 11 6884 26060 11 124 3331 35 26290 388 269 6913 384 3331 35 58155 388 358 28352 35 98 388 284 3331 "
        "126 11 126 11 6884 11] 5201 29915 44673 11 6884 26060 11 124 3331 35 8762 388 285 11 126 11 6884 11 5201 58683 [11 "
        "51 47 0]",
    "rwkv-g1-function-calling-think":
        "5201 44948 11 5201 331 6913 97 11 520 62981 5383 19384 11 520 60882 5383 11 6884 26060 11 124 3331 35 98 388 269 "
        "7865 35 11 126 11 6884 11 1500 30380 22226 4706 39936 39979 45 40228 51665 32234 46028 59 11 520 24251 28593 5383 "
        "11 6884 26060 11 2364 26290 388 269 27176 96 26290 384 269 58155 388 4893 8020 388 269 35957 5200 11 6884 11 961 "
        "22187 46327 32273 30380 20084 4715 40228 32273 52389 57583 47 11 5201 29956 11 50 44 50 64 11 5201 58683 11 61 "
        "35762 [5439 35762 63 11 520 24251 28593 5383 11 6884 26060 11 124 3331 35 26290 388 269 6913 384 3331 35 58155 388 "
        "358 28352 35 98 388 284 3331 126 11 126 11 6884 11] 5201 29915 44673 11 6884 26060 11 124 3331 35 8762 388 285 11 "
        "126 11 6884 11 5201 58683 11 61 35762 [5439 35762 63 11 51 47 0]",
    "rwkv-g1-function-calling-fakethink":
        "5201 44948 11 5201 331 6913 97 11 520 62981 5383 19384 11 520 60882 5383 11 6884 26060 11 124 3331 35 98 388 269 "
        "7865 35 11 126 11 6884 11 1500 30380 22226 4706 39936 39979 45 40228 51665 32234 46028 59 11 520 24251 28593 5383 "
        "11 6884 26060 11 2364 26290 388 269 27176 96 26290 384 269 58155 388 4893 8020 388 269 35957 5200 11 6884 11 961 "
        "22187 46327 32273 30380 20084 4715 40228 32273 52389 57583 47 11 5201 29956 11 50 44 50 64 11 5201 58683 11 61 "
        "35762 5439 35762 [63 11 520 24251 28593 5383 11 6884 26060 11 124 3331 35 26290 388 269 6913 384 3331 35 58155 388 "
        "358 28352 35 98 388 284 3331 126 11 126 11 6884 11] 5201 29915 44673 11 6884 26060 11 124 3331 35 8762 388 285 11 "
        "126 11 6884 11 5201 58683 11 61 35762 5439 35762 [63 11 51 47 0]",
    "rwkv-g1-rag":
        "886 31214 47 261 24281 59 284 44 50 64 261 5585 41693 59 [295 35762 63 11 6654 47 11 754 35762 63 11 51 28329 11] "
        "24281 59 33 10703 16519 28329 11 5585 41693 59 [28360 121 261 122 0]",
    "rwkv-g1-fim":
        "10060 42093 10060 10060 42337 10060 11 35433 41 103 41 50 494 10060 41851 10060 7334 337 41 121 501 [28352 42178 "
        "355 0]",
    "alpaca":
        "886 31214 47 261 5201 63185 59 11 50 44 50 64 261 5201 55292 59 [11 61 35762 63 11 6654 47 11 754 35762 63 11 51 "
        "28329 11] 5201 63185 59 11 10703 16519 28329 11 5201 55292 59 [28352 121 261 122 0]",
    "chatml":
        "61 125 1949 96 35691 125 63 42343 11 886 31214 589 125 1949 96 7463 125 63 11 61 125 1949 96 35691 125 63 27370 11 "
        "50 44 50 64 61 125 1949 96 7463 125 63 11 61 125 1949 96 35691 125 63 33914 8778 117 [11 61 35762 63 11 6654 47 11 "
        "754 35762 63 11 51 10080 61 125 1949 96 7463 125 63 11] 61 125 1949 96 35691 125 63 27370 11 10703 16519 10080 61 "
        "125 1949 96 7463 125 63 11 61 125 1949 96 35691 125 63 33914 8778 117 [28352 121 261 122 61 125 1949 96 7463 125 63 "
        "0]",
    "default":
        "40812 59 3673 31214 47 11 33161 59 284 44 50 64 11 5585 41693 59 [295 35762 63 11 6654 47 11 754 35762 63 11 51 "
        "28329] 33161 59 33 10703 16519 28329 5585 41693 59 [28360 121 261 122 0]",
    "ext-cat":
        "886 31214 47 11 3319 145 178 59 50 44 50 64 11 3319 165 151 59 [61 35762 63 11 6654 47 11 754 35762 63 11 51 28329] "
        "3319 145 178 59 10703 16519 28329 3319 165 151 59 [19250 121 261 122 0]",
    "empty":
        "886 31214 47 50 44 50 64 [61 35762 63 11 6654 47 11 754 35762 63 11 51 10080] 10703 16519 10080 [19250 121 261 122 "
        "0]",
}
PROMPTS = {
    "rwkv-world": "24281 59 3880 28329 11 5585 41693 59",
    "rwkv-qa": "53648 59 3880 28329 11 40301 59",
    "rwkv-instruct": "62994 59 3880 28329 11 53671 59",
    "rwkv-g1": "24281 59 3880 28329 11 5585 41693 59",
    "rwkv-g1-think": "24281 59 3880 28329 11 5585 41693 59 295 35762",
    "rwkv-g1-think-cue": "24281 59 3880 10080 275 35762 42 261 5585 41693 59 295 35762",
    "rwkv-g1-think-bit": "24281 59 3880 10080 275 35762 332 21365 42 261 5585 41693 59 295 35762",
    "rwkv-g1-think-lot": "24281 59 3880 10080 275 35762 332 22031 42 261 5585 41693 59 295 35762",
    "rwkv-g1-fakethink": "24281 59 3880 28329 11 5585 41693 59 295 35762 5439 35762",
    "rwkv-g1-emptythink-2025": "24281 59 3880 28329 11 5585 41693 59 295 35762 63 11 754 35762",
    "rwkv-g1-bot": "24281 10060 1097 10080 10060 11 5645 10060",
    "rwkv-g1-bot-think": "24281 10060 1097 10080 10060 11 5645 10060 61 35762",
    "rwkv-g1-bot-fakethink": "24281 10060 1097 10080 10060 11 5645 10060 61 35762 5439 35762",
    "rwkv-g1-tools": "24281 59 3880 28329 11 5585 41693 59 21214 26060",
    "rwkv-g1-toolcall": "24281 59 3880 28329 11 5585 41693 59",
    "rwkv-g1-function-calling": "5201 29956 11 1097 28329 5201 58683",
    "rwkv-g1-function-calling-think": "5201 29956 11 1097 28329 5201 58683 11 61 35762",
    "rwkv-g1-function-calling-fakethink": "5201 29956 11 1097 28329 5201 58683 11 61 35762 5439 35762",
    "rwkv-g1-rag": "24281 59 3880 28329 11 5585 41693 59",
    "rwkv-g1-fim": "10060 42093 10060 10060 42337 10060 10060 41851 10060 1097 10080",
    "alpaca": "32937 4600 4419 63654 32227 59489 332 32202 47 37580 332 57119 32227 64829 59336 22590 52723 47 261 "
    "5201 63185 59 11 1097 28329 11 5201 55292 59",
    "chatml": "61 125 1949 96 35691 125 63 27370 11 1097 10080 61 125 1949 96 7463 125 63 11 61 125 1949 96 35691 "
    "125 63 33914 8778 117",
    "default": "33161 59 3880 28329 5585 41693 59",
    "ext-cat": "3319 145 178 59 1097 28329 3319 165 151 59",
    "empty": "1097 10080",
}
# fmt: on


def dialogue_of(name: str) -> Dialogue:
    """The tools' presets write a call, the one for infilling a function's body, the others a talk."""
    if PRESETS[name].infill:
        return FILL
    tools = name in ("rwkv-g1-tools", "rwkv-g1-toolcall") or "function-calling" in name
    return TOOLS if tools else CHAT


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.replace("[", " ").replace("]", " ").split()]


def learnt(text: str) -> list[bool]:
    """Which of the ids stand in brackets."""
    result, inside = [], False
    for word in text.split():
        inside |= word.startswith("[")
        result.append(inside)
        inside &= not word.endswith("]")
    return result


@pytest.mark.parametrize("name", PRESETS)
def test_a_dialogue_has_these_ids_and_these_are_learnt(name):
    made = encode_row(Pieces(*PRESETS[name].render(dialogue_of(name))), True)
    assert made.ids.tolist() == numbers(ROWS_WRITTEN[name])
    assert (made.roles == Role.ASSISTANT).tolist() == learnt(ROWS_WRITTEN[name])


@pytest.mark.parametrize("name", PRESETS)
def test_a_question_has_these_ids(name):
    assert tokenizer.encode(PRESETS[name].prompt(ASKED)) == numbers(PROMPTS[name])


@pytest.mark.parametrize("name", PRESETS)
def test_the_golden_ids_are_the_text(name):
    text = "".join(PRESETS[name].render(dialogue_of(name))[0])
    assert tokenizer.decode(numbers(ROWS_WRITTEN[name])[:-1]) == text and numbers(ROWS_WRITTEN[name])[-1] == 0
    assert tokenizer.decode(numbers(PROMPTS[name])) == PRESETS[name].prompt(ASKED)


def test_every_preset_says_what_it_is():
    assert list(ABOUT) == list(PRESETS) and all(ABOUT.values())


def test_the_empty_thought_is_four_tokens_then_a_bracket_and_one_line_break():
    prompt = tokenizer.encode(PRESETS["rwkv-g1-fakethink"].prompt(ASKED))
    assert prompt[-4:] == [295, 35762, 5439, 35762]  # " <" "think" "></" "think"
    row = tokenizer.encode("".join(PRESETS["rwkv-g1-fakethink"].render(Dialogue((*ASKED, Message(A, "x"))))[0]))
    assert row[: len(prompt)] == prompt and tokenizer.decode(row[len(prompt) :]) == ">\nx"


BOT = [name for name in PRESETS if "-bot" in name]


@pytest.mark.parametrize("name", BOT)
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text(min_size=1, max_size=12).filter(lambda t: BOUND not in t and "\0" not in t and t.strip()),
        min_size=2,
        max_size=4,
    )
)
def test_every_turn_of_the_bot_format_ends_with_its_token_whatever_is_before_it(name, contents):
    messages = tuple(Message(role, c) for role, c in zip(itertools.cycle((U, A)), contents, strict=False))
    texts, roles = PRESETS[name].render(Dialogue(messages))
    made = encode_row(Pieces(texts, roles), True)
    assert np.count_nonzero(made.ids == FLOWER) == 2 * len(contents)  # one in the heading, one at the end
    if len(contents) % 2 == 0:
        assert made.ids[-2:].tolist() == [FLOWER, 0]
        assert made.roles[-2:].tolist() == [Role.ASSISTANT, Role.ASSISTANT]  # the model learns to end its turn


def test_no_token_holds_the_bound_beside_other_bytes_or_ends_inside_it():
    """What the test above rests on: greedy matching can take the bound as one token only."""
    flower = BOUND.encode()
    tokens = tokenizer.token_bytes()
    assert [i for i, token in enumerate(tokens) if flower in token] == [FLOWER]
    parts = (flower[:1], flower[:2])
    assert all(token in parts for token in tokens if token.endswith(parts) and len(token) <= 2 or token in parts)
    assert not [token for token in tokens if len(token) > 2 and token.endswith(parts)]


def test_the_function_calling_format_is_that_of_the_organisations_renderer():
    """The golden text of vllm-rwkv's own test (tests/tokenizers_/test_rwkv.py, 2026-08)."""
    tools = (
        '[{"name": "read", "description": "Read a file", "parameters": {"type": "object", "properties": {"path": {"type": '
        '"string"}}}}]'
    )
    messages = (
        Message(S, "You are helpful"),
        Message(U, "Read it"),
        Message(A, "I'll read it", call='{"name": "read", "arguments": {"path": "a.txt"}}'),
        Message(T, '{"content":"hello"}'),
    )
    lines = [
        "### System", "You are helpful", "### `read`", "**Description:** Read a file", "**Parameters:**", "```json", "{",
        '  "type": "object",', '  "properties": {', '    "path": {', '      "type": "string"', "    }", "  }", "}", "```",
        "To call one of these tools, write exactly this format:", "**Tool Call:**", "```json",
        '{"name": "tool_name", "arguments": {"key": "value"}}', "```",
        "Do not invent tool call IDs or write tool outputs yourself.", "### User", "Read it", "### Assistant",
        "I'll read it", "**Tool Call:**", "```json", "{", '  "name": "read",', '  "arguments": {', '    "path": "a.txt"',
        "  }", "}", "```", "### Tool Output", "```json", "{", '  "content": "hello"', "}", "```", "### Assistant", "<think",
    ]  # fmt: skip
    form = PRESETS["rwkv-g1-function-calling-think"]
    # (an answer without a thought has an empty one in our rows)
    assert form.prompt(messages, tools).replace("<think></think>\n", "") == "\n".join(lines)
    assert form.stops()[0] == "\n### User"
