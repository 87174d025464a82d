# ruff: noqa: E501 - tables of rows
"""Calls, results and tools in texts and parts, and what programs for chats export."""

import json

import pytest
from helpers.messages import CALL, TOOL, A, S, T, U, read, refused, said

from rwkv_peft.preprocess.schemas import Reader
from rwkv_peft.text.presets import PRESETS

Q = {"role": "user", "content": "When is low tide?"}
TAGGED = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
RESULT = "<tool_response>\n42\n</tool_response>"
WRAPPED = json.dumps({"type": "function", "function": TOOL})
QWEN = (
    f"Be nice.\n\n# Tools\n\nYou may call one or more functions.\n\n<tools>\n{WRAPPED}\n</tools>\n\nFor each function call, return:\n"
    '<tool_call>\n{"name": <function-name>}\n</tool_call>'
)
HERMES = (
    "You are a function calling AI model. You are provided with function signatures within <tools></tools> XML tags. Here they "
    f'are: <tools> [{WRAPPED}] </tools> For each call return <tool_call>\n{{"arguments": <args>}}\n</tool_call>'
)


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize(("system", "left"), [(QWEN, "Be nice."), (HERMES, "You are a function calling AI model.")])
@pytest.mark.parametrize("tools", [{}, {"tools": [TOOL]}])
@pytest.mark.parametrize("speaker", ["tool", "user"])
def test_calls_results_and_tools_in_texts_become_keys_and_messages(system, left, tools, speaker):
    asked = [{"role": "system", "content": system}, Q, assistant(f"I look.\n{TAGGED}")]
    row = {"messages": [*asked, {"role": speaker, "content": RESULT}, assistant("At four.")], **tools}
    result, reader = read(row)
    assert json.loads(result.tools) == [TOOL] and not reader.unused
    call = (A, "I look." + json.dumps(CALL))
    assert said(row) == [(S, left), (U, "When is low tide?"), call, (T, "42"), (A, "At four.")]


def test_what_stood_in_tags_is_written_once_in_the_form_of_the_template():
    row = {
        "messages": [
            {"role": "system", "content": QWEN},
            Q,
            assistant(TAGGED),
            {"role": "tool", "content": RESULT},
            assistant("x"),
        ]
    }
    dialogue = Reader().read(row)[1]
    for name, tag, tools in (("rwkv-g1-toolcall", 1, 1), ("rwkv-world", 0, 0)):
        text = "".join(PRESETS[name].render(dialogue)[0])
        assert text.count("<tool_response>") == text.count("<tool_call>") == tag and text.count("<tools>") == tools
        assert text.count('"parameters"') == 1


def test_tools_of_the_row_and_of_the_system_text_that_disagree_reject_the_row():
    row = {"messages": [{"role": "system", "content": QWEN}, Q, assistant("x")], "tools": [{"name": "other"}]}
    refused(row, "two values", "tide", "other", "tools of the system message")


def test_lists_of_tools_that_differ_in_the_order_of_keys_agree():
    turned = dict(reversed(TOOL.items()))
    assert read({"messages": [Q, assistant("x")], "tools": [TOOL], "functions": [turned]})[0].tools


@pytest.mark.parametrize(
    ("answer", "verdicts"),
    [
        ("Write `<tool_call>{}</tool_call>` for it", set()),
        (f"~~~~\n{TAGGED}\n~~~~", set()),
        (f"```\n{TAGGED}\n```", set()),
        (f"{TAGGED} and more", {"fault: tags"}),
        ("<tool_call>when?</tool_call>", {"fault: tags"}),
        ("<tool_call>{}</tool_call>", {"fault: tags"}),
        (TAGGED.replace("}}", "}"), {"fault: tags"}),
        (TAGGED.removesuffix("</tool_call>"), {"fault: tags"}),
        ('I look. <functioncall> {"name": "tide"} and more', {"fault: tags"}),
    ],
)
def test_tags_of_calls_that_are_quoted_or_hold_no_call_are_text(answer, verdicts):
    for row in ({"prompt": "a", "response": answer}, {"messages": [Q, assistant(answer)]}):
        result, reader = read(row)
        assert result.messages[-1].content == answer and reader.verdicts == verdicts


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": f"{RESULT} and more"},
        {"role": "user", "content": f"{RESULT} and more"},
        {"role": "system", "content": QWEN.replace(WRAPPED, WRAPPED[:-1])},
    ],
)
def test_results_and_tools_between_tags_that_stay_text_are_counted(message):
    assert read({"messages": [message, Q, assistant("x")]})[1].verdicts == {"fault: tags"}


def test_calls_in_texts_are_read_behind_a_thought_and_in_pairs():
    for row in (
        {"messages": [Q, assistant(f"<think>\nI write <tool_call>\n</think>\n{TAGGED}\n{TAGGED}")]},
        {"prompt": "a", "response": f"<think>I write <tool_call></think>{TAGGED}{TAGGED}", "system": QWEN},
    ):
        message = read(row)[0].messages[-1]
        assert json.loads(message.call) == [CALL, CALL] and "I write" in message.think and not message.content


def test_a_call_in_words_and_in_a_key_is_one_where_they_agree():
    assert said({"messages": [Q, assistant(TAGGED, tool_calls=[CALL])]})[-1] == (A, json.dumps(CALL))
    refused({"messages": [Q, assistant(TAGGED, tool_calls=[{"name": "other"}])]}, "two values")


def test_calls_of_glaive_in_messages_are_read():
    text = '<functioncall> {"name": "tide", "arguments": \'{"place": "Bay"}\'} <|endoftext|>'
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": text}]}
    assert said(row)[-1] == (A, json.dumps(CALL))


@pytest.mark.parametrize("result", ["42", [{"type": "text", "text": "42"}]])
def test_parts_of_anthropic_are_calls_and_results(result):
    call = {"type": "tool_use", "id": "x", "name": "tide", "input": CALL["arguments"]}
    answer = {"type": "tool_result", "tool_use_id": "x", "content": result}
    row = {"messages": [Q, assistant([{"type": "text", "text": "I look."}, call]),
                        {"role": "user", "content": [answer, {"type": "text", "text": "And?"}]}, assistant("At four.")]}  # fmt: skip
    assert said(row)[1:] == [(A, "I look." + json.dumps(CALL)), (T, "42"), (U, "And?"), (A, "At four.")]


def test_parts_of_gemini_are_calls_and_results():
    row = {
        "contents": [
            {"role": "user", "parts": [{"text": "q"}]},
            {"role": "model", "parts": [{"functionCall": {"name": "tide", "args": CALL["arguments"]}}]},
            {"role": "user", "parts": [{"functionResponse": {"name": "tide", "response": {"at": 4}}}]},
            {"role": "model", "parts": [{"text": "At four."}]},
        ],
        "tools": [{"functionDeclarations": [TOOL]}],
    }
    assert said(row) == [(U, "q"), (A, json.dumps(CALL)), (T, '{"at": 4}'), (A, "At four.")]
    assert json.loads(read(row)[0].tools) == [TOOL]


# ---- exports ----


def node(message, parent):
    return {"message": message, "parent": parent, "children": []}


def chatgpt(role, text, **more):
    return {"author": {"role": role}, "content": {"content_type": "text", "parts": [text]}, "recipient": "all", **more}


EXPORTS = {
    "ChatGPT": {
        "title": "t", "create_time": 1.0, "conversation_id": "x", "is_archived": False, "current_node": "d",
        "mapping": {
            "r": node(None, None), "s": node(chatgpt("system", "", metadata={"is_visually_hidden_from_conversation": True}), "r"),
            "a": node(chatgpt("user", "7 times 8?"), "s"), "b": node(chatgpt("assistant", "54"), "a"),
            "c": node({"author": {"role": "assistant"}, "content": {"content_type": "thoughts", "thoughts": [{"content": "7*8"}]}}, "a"),
            "d": node(chatgpt("assistant", "56"), "c"),
        },
    },
    "DeepSeek": {
        "id": "1", "title": "t", "inserted_at": "2025",
        "mapping": {
            "root": node(None, None), "1": node({"fragments": [{"type": "REQUEST", "content": "7 times 8?"}]}, "root"),
            "2": node({"fragments": [{"type": "THINK", "content": "7*8"}, {"type": "RESPONSE", "content": "56"}]}, "1"),
        },
    },
    "DeepSeek, earlier": {
        "id": "1", "title": "t",
        "mapping": {"root": node(None, None), "1": node({"content": "7 times 8?", "files": []}, "root"),
                    "2": node({"content": "56", "reasoning_content": "7*8"}, "1")},
    },
    "Open WebUI": {
        "id": "1", "title": "t", "chat": {"title": "t", "models": ["m"], "history": {"currentId": "b", "messages": {
            "a": {"id": "a", "parentId": None, "role": "user", "content": "7 times 8?"},
            "c": {"id": "c", "parentId": "a", "role": "assistant", "content": "54"},
            "b": {"id": "b", "parentId": "a", "role": "assistant", "content": "<think>7*8</think>56", "model": "m"}}}},
    },
    "Open WebUI, list": {"chat": {"messages": [{"role": "user", "content": "7 times 8?"},
                                               {"role": "assistant", "content": "56", "reasoning_content": "7*8", "done": True}]}},
}  # fmt: skip


@pytest.mark.parametrize("program", EXPORTS)
def test_the_path_that_a_chat_program_shows_is_the_conversation(program):
    result, reader = read(EXPORTS[program])
    assert said(EXPORTS[program]) == [(U, "7 times 8?"), (A, "(7*8) 56")] and not reader.unused


def test_a_tree_of_a_chat_program_that_goes_in_a_circle_is_refused():
    mapping = {"a": node(chatgpt("user", "q"), "b"), "b": node(chatgpt("assistant", "x"), "a")}
    refused({"mapping": mapping, "current_node": "b"}, "no beginning")
