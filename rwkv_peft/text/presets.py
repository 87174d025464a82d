"""The preset templates of PROMPT_TYPE, by name, each with its source and date.

Official: RWKV-v7/RWKV7-G1x-templates.txt in BlinkDL/RWKV-LM, as of 2026-07-18. Organisation: the renderer of
rwkv-rs/vllm-rwkv and transformers-rwkv (templates "bot", "assistant", "function_calling"), 2026-08 and later.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from typing import Any

from .roles import Role
from .template import Template

_ALL_ROLES = frozenset({Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TOOL})
_ALL_BUT_ANSWERS = _ALL_ROLES - {Role.ASSISTANT}  # thoughts and code of the G1 models contain blank lines

# Ai00 stops at a blank line, and RWKV-Runner at "\n\nUser": so no blank line inside any turn
_WORLD: dict[str, Any] = {
    "format_system": "System: {{content}}",
    "format_user": "User: {{content}}",
    "format_assistant": "Assistant: {{content}}",
    "format_observation": "User: Function output:\n{{content}}",
    "format_function": "```json\n{{content}}\n```",
    "format_tools": "Tools:\n{{content}}\nReturn only a JSON function call.",
}
# official: "it's better to clean System: and User: inputs"
# sampling of the official evaluation of G1 (BlinkDL/Albatross, MATH500, 2026): temperature 1, top_k 32, top_p 0.28
_G1: dict[str, Any] = _WORLD | {"clean": _ALL_BUT_ANSWERS, "temperature": 1.0, "top_p": 0.28, "top_k": 32}
# the prompt ends with "<think": the model writes the rest of the thought itself
_THINK: dict[str, Any] = {"think": "always", "opening": "<think"}
# official, and rwkv.cn Prompt-Format of 2026-03-27 ("must be"): the prompt ends with "<think></think", after which the model
# writes ">", a line break and the answer ("></" is one token, 5439)
_NO_THOUGHT: dict[str, Any] = {"format_no_thought": "<think></think>\n"}
_FAKETHINK: dict[str, Any] = {"think": "fake", "opening": "<think></think"} | _NO_THOUGHT
# from G1h (2026-07): ✿, token 10060, ends every turn. "normal" of vllm-rwkv, lighteval-rwkv and SkyRL, whose stop is ✿
_BOT: dict[str, Any] = _G1 | {
    "format_system": "System✿{{content}}✿",
    "format_user": "User✿{{content}}✿",
    "format_assistant": "Bot✿{{content}}✿",
    "format_observation": "User✿Function output:\n{{content}}✿",
    "format_separator": "\n",
    "stop_words": ("✿",),
    "reserved": ("✿",),
    "bos": True,  # the tokenizer of rwkv-rs/transformers-rwkv begins with token 0
}
# "function_calling" of vllm-rwkv, whose stop is "\n### User"
_FUNCTIONS: dict[str, Any] = {
    "format_system": "### System\n{{content}}",
    "format_user": "### User\n{{content}}",
    "format_assistant": "### Assistant\n{{content}}",
    "format_observation": "### Tool Output\n```json\n{{content}}\n```",
    "format_function": "**Tool Call:**\n```json\n{{content}}\n```",
    "format_tool": "### `{{name}}`\n**Description:** {{description}}\n**Parameters:**\n```json\n{{parameters}}\n```",
    "format_tools": "{{content}}\nTo call one of these tools, write exactly this format:\n**Tool Call:**\n```json\n"
    '{"name": "tool_name", "arguments": {"key": "value"}}\n```\n'
    "Do not invent tool call IDs or write tool outputs yourself.",
    "format_separator": "\n",
    "json_style": "indent",
    "stop_words": ("\n### User",),
    "clean": _ALL_BUT_ANSWERS,
    "bos": True,  # as in _BOT
    "temperature": 1.0,
    "top_p": 0.28,
    "top_k": 32,
}

PRESETS: dict[str, Template] = {}
ABOUT: dict[str, str] = {}  # name -> description for --help


def _add(name: str, about: str, *parts: Mapping[str, Any], **fields: Any) -> None:
    """Add a template with the fields of `parts`, the later ones first, except for `fields`."""
    PRESETS[name] = Template(name, **ChainMap(fields, *map(dict, reversed(parts))))
    ABOUT[name] = about


# model card of BlinkDL/rwkv-7-world, "Recommended fine-tuning format"
_add("rwkv-world", "User: Q, blank line, Assistant: A", _WORLD, clean=_ALL_ROLES)
# "Question: xxx\n\nAnswer:" of the same cards
_add(
    "rwkv-qa", "Question: and Answer:", _WORLD, clean=_ALL_ROLES,
    format_user="Question: {{content}}",
    format_assistant="Answer: {{content}}",
)  # fmt: skip
# "Instruction: xxx\n\nInput: xxx\n\nResponse:" of the same cards
_add(
    "rwkv-instruct", "Instruction:, Input: and Response:", _WORLD, clean=_ALL_ROLES,
    format_user="Instruction: {{content}}",
    format_user_input="Instruction: {{content}}\n\nInput: {{input}}",
    format_assistant="Response: {{content}}",
)  # fmt: skip
# official, "Basic templates"
_add("rwkv-g1", "rwkv-world for G1 models: answers keep blank lines and thoughts", _G1)
# official, "Think mode"
_add("rwkv-g1-think", "every answer begins with a thought; the prompt ends with <think", _G1, _THINK)
# official, "Control think length" (from G1c): the cue ends the user's turn
_THINK_CUE = _G1 | _THINK | _NO_THOUGHT
_add("rwkv-g1-think-cue", "the same, and the cue (think) ends the user's turn", _THINK_CUE, user_cue=" (think)")
_add("rwkv-g1-think-bit", "the cue is (think a bit)", _THINK_CUE, user_cue=" (think a bit)")
_add("rwkv-g1-think-lot", "the cue is (think a lot)", _THINK_CUE, user_cue=" (think a lot)")
_add("rwkv-g1-fakethink", "every thought is empty; the prompt ends with <think></think", _G1, _FAKETHINK)
# official, "fake thinking": the older of the two forms, which was rwkv-g1-fakethink here until 2026-11
_OLD_FAKETHINK = {"think": "fake", "opening": "<think>\n</think"}
_add("rwkv-g1-emptythink-2025", "the older empty thought, with a line break inside", _G1, _OLD_FAKETHINK)
_add("rwkv-g1-bot", "from G1h: User✿Q✿, line break, Bot✿A✿", _BOT)
_add("rwkv-g1-bot-think", "the same; the prompt ends with Bot✿<think", _BOT, _THINK, _NO_THOUGHT)
_add("rwkv-g1-bot-fakethink", "the same; the prompt ends with Bot✿<think></think", _BOT, _FAKETHINK)
# official, "Function call": the client sends "Assistant: ```json" and gets a call
_add("rwkv-g1-tools", "function calls in ```json blocks; the prompt ends with ```json", _G1, opening="```json")
# what g1k writes by itself: RWKV-Agent of No-22-Github, docs/design/corpus-g1k-wire-format.md, 2026-09-24
_add(
    "rwkv-g1-toolcall", "function calls in <tool_call>, results in <tool_response>", _G1,
    format_observation="User: <tool_response>{{content}}</tool_response>",
    format_function="<tool_call>{{content}}</tool_call>",
    format_tools="<tools>{{content}}</tools>",
    json_style="compact",
)  # fmt: skip
# organisation, "function_calling"
_FUNCTIONS_NAME = "rwkv-g1-function-calling"
_add(_FUNCTIONS_NAME, "function calls under ### System, ### User, ### Assistant", _FUNCTIONS)
_add(f"{_FUNCTIONS_NAME}-think", "the same; the prompt ends with <think", _FUNCTIONS, _THINK, _NO_THOUGHT)
_add(f"{_FUNCTIONS_NAME}-fakethink", "the same; the prompt ends with <think></think", _FUNCTIONS, _FAKETHINK)
# rwkv.cn, Prompt-Format: the material first, then the question
_add(
    "rwkv-g1-rag", "the material first, then the question", _G1,
    format_system="{{content}}",
    format_user_input="{{input}}\n\nUser: {{content}}",
)  # fmt: skip
# "Fill-in-the-middle", from G1c: rwkv_lightning's /FIM/v1/batch-FIM, Albatross; 2026-03 and later
_add(
    "rwkv-g1-fim", "fills the middle between columns prefix and suffix",
    format_user="✿prefix✿✿suffix✿✿middle✿{{content}}",
    format_user_input="✿prefix✿✿suffix✿{{input}}✿middle✿{{content}}",
    format_assistant="{{content}}",
    format_separator="",
    stop_words=("✿",),
    reserved=("✿",),
    strip=False,
    infill=True,
)  # fmt: skip
# stanford_alpaca: two introductions, with and without an input
_add(
    "alpaca", "### Instruction:, ### Input:, ### Response:",
    format_system="{{content}}",
    format_user="### Instruction:\n{{content}}",
    format_user_input="### Instruction:\n{{content}}\n\n### Input:\n{{input}}",
    format_assistant="### Response:\n{{content}}",
    format_observation="### Input:\n{{content}}",
    default_system="Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.",
    default_system_input="Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.",
    stop_words=("\n\n### ",),
)  # fmt: skip
# OpenAI's markup, with the tool tags of Qwen
_add(
    "chatml", "<|im_start|> and <|im_end|>",
    format_system="<|im_start|>system\n{{content}}<|im_end|>",
    format_user="<|im_start|>user\n{{content}}<|im_end|>",
    format_assistant="<|im_start|>assistant\n{{content}}<|im_end|>",
    format_observation="<|im_start|>user\n<tool_response>\n{{content}}\n</tool_response><|im_end|>",
    format_function="<tool_call>\n{{content}}\n</tool_call>",
    format_tools="# Tools\n<tools>\n{{content}}\n</tools>",
    format_separator="\n",
    stop_words=("<|im_end|>",),
)  # fmt: skip
# "default" of LLaMA-Factory and MindSpeed-RL
_add(
    "default", "Human: and Assistant:, a line break between",
    format_system="System: {{content}}",
    format_user="Human: {{content}}",
    format_assistant="Assistant: {{content}}",
    format_observation="Observation: {{content}}",
    format_separator="\n",
)  # fmt: skip
# RWKV_LM_EXT (without the empty line that it leaves for an empty input)
_add(
    "ext-cat", "🐱: and 🤖:",
    format_system="{{content}}",
    format_user="🐱:{{content}}",
    format_assistant="🤖:{{content}}",
    format_separator="\n",
)  # fmt: skip
_add(
    "empty", "the contents and nothing else",
    format_user="{{content}}",
    format_assistant="{{content}}",
    format_separator="",
    strip=False,
)  # fmt: skip

# what a name meant in files of older versions, which record a template's name without its content
BEFORE = {"rwkv-g1-fakethink": "rwkv-g1-emptythink-2025"}
