"""The preset templates of PROMPT_TYPE, by name, each with its source and date.

Official: RWKV-v7/RWKV7-G1x-templates.txt in BlinkDL/RWKV-LM, as of 2026-07-18. Organisation: the renderer of
rwkv-rs/vllm-rwkv and transformers-rwkv (templates "bot", "assistant", "function_calling"), 2026-08 and later.
"""

from __future__ import annotations

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

# (description for --help, template)
_ALL: tuple[tuple[str, Template], ...] = (
    # model card of BlinkDL/rwkv-7-world, "Recommended fine-tuning format"
    ("User: Q, blank line, Assistant: A", Template("rwkv-world", **_WORLD, clean=_ALL_ROLES)),
    # "Question: xxx\n\nAnswer:" of the same cards
    (
        "Question: and Answer:",
        Template(
            "rwkv-qa",
            **_WORLD | {"format_user": "Question: {{content}}", "format_assistant": "Answer: {{content}}"},
            clean=_ALL_ROLES,
        ),
    ),
    # "Instruction: xxx\n\nInput: xxx\n\nResponse:" of the same cards
    (
        "Instruction:, Input: and Response:",
        Template(
            "rwkv-instruct",
            **_WORLD
            | {
                "format_user": "Instruction: {{content}}",
                "format_user_input": "Instruction: {{content}}\n\nInput: {{input}}",
                "format_assistant": "Response: {{content}}",
            },
            clean=_ALL_ROLES,
        ),
    ),
    # official, "Basic templates"
    ("rwkv-world for G1 models: answers keep blank lines and thoughts", Template("rwkv-g1", **_G1)),
    # official, "Think mode"
    ("every answer begins with a thought; the prompt ends with <think", Template("rwkv-g1-think", **_G1, **_THINK)),
    # official, "Control think length" (from G1c): the cue ends the user's turn
    (
        "the same, and the cue (think) ends the user's turn",
        Template("rwkv-g1-think-cue", **_G1, **_THINK, **_NO_THOUGHT, user_cue=" (think)"),
    ),
    (
        "the cue is (think a bit)",
        Template("rwkv-g1-think-bit", **_G1, **_THINK, **_NO_THOUGHT, user_cue=" (think a bit)"),
    ),
    (
        "the cue is (think a lot)",
        Template("rwkv-g1-think-lot", **_G1, **_THINK, **_NO_THOUGHT, user_cue=" (think a lot)"),
    ),
    ("every thought is empty; the prompt ends with <think></think", Template("rwkv-g1-fakethink", **_G1, **_FAKETHINK)),
    # official, "fake thinking": the older of the two forms, which was rwkv-g1-fakethink here until 2026-11
    (
        "the older empty thought, with a line break inside",
        Template("rwkv-g1-emptythink-2025", **_G1, think="fake", opening="<think>\n</think"),
    ),
    ("from G1h: User✿Q✿, line break, Bot✿A✿", Template("rwkv-g1-bot", **_BOT)),
    ("the same; the prompt ends with Bot✿<think", Template("rwkv-g1-bot-think", **_BOT, **_THINK, **_NO_THOUGHT)),
    (
        "the same; the prompt ends with Bot✿<think></think",
        Template("rwkv-g1-bot-fakethink", **_BOT, **_FAKETHINK),
    ),
    # official, "Function call": the client sends "Assistant: ```json" and gets a call
    (
        "function calls in ```json blocks; the prompt ends with ```json",
        Template("rwkv-g1-tools", **_G1, opening="```json"),
    ),
    # what g1k writes by itself: RWKV-Agent of No-22-Github, docs/design/corpus-g1k-wire-format.md, 2026-09-24
    (
        "function calls in <tool_call>, results in <tool_response>",
        Template(
            "rwkv-g1-toolcall",
            **_G1
            | {
                "format_observation": "User: <tool_response>{{content}}</tool_response>",
                "format_function": "<tool_call>{{content}}</tool_call>",
                "format_tools": "<tools>{{content}}</tools>",
                "json_style": "compact",
            },
        ),
    ),
    # organisation, "function_calling"
    ("function calls under ### System, ### User, ### Assistant", Template("rwkv-g1-function-calling", **_FUNCTIONS)),
    (
        "the same; the prompt ends with <think",
        Template("rwkv-g1-function-calling-think", **_FUNCTIONS, **_THINK, **_NO_THOUGHT),
    ),
    (
        "the same; the prompt ends with <think></think",
        Template("rwkv-g1-function-calling-fakethink", **_FUNCTIONS, **_FAKETHINK),
    ),
    # rwkv.cn, Prompt-Format: the material first, then the question
    (
        "the material first, then the question",
        Template(
            "rwkv-g1-rag",
            **_G1 | {"format_system": "{{content}}", "format_user_input": "{{input}}\n\nUser: {{content}}"},
        ),
    ),
    # "Fill-in-the-middle", from G1c: rwkv_lightning's /FIM/v1/batch-FIM, Albatross; 2026-03 and later
    (
        "fills the middle between columns prefix and suffix",
        Template(
            "rwkv-g1-fim",
            format_user="✿prefix✿✿suffix✿✿middle✿{{content}}",
            format_user_input="✿prefix✿✿suffix✿{{input}}✿middle✿{{content}}",
            format_assistant="{{content}}",
            format_separator="",
            stop_words=("✿",),
            reserved=("✿",),
            strip=False,
            infill=True,
        ),
    ),
    # stanford_alpaca: two introductions, with and without an input
    (
        "### Instruction:, ### Input:, ### Response:",
        Template(
            "alpaca",
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
        ),
    ),
    # OpenAI's markup, with the tool tags of Qwen
    (
        "<|im_start|> and <|im_end|>",
        Template(
            "chatml",
            format_system="<|im_start|>system\n{{content}}<|im_end|>",
            format_user="<|im_start|>user\n{{content}}<|im_end|>",
            format_assistant="<|im_start|>assistant\n{{content}}<|im_end|>",
            format_observation="<|im_start|>user\n<tool_response>\n{{content}}\n</tool_response><|im_end|>",
            format_function="<tool_call>\n{{content}}\n</tool_call>",
            format_tools="# Tools\n<tools>\n{{content}}\n</tools>",
            format_separator="\n",
            stop_words=("<|im_end|>",),
        ),
    ),
    # "default" of LLaMA-Factory and MindSpeed-RL
    (
        "Human: and Assistant:, a line break between",
        Template(
            "default",
            format_system="System: {{content}}",
            format_user="Human: {{content}}",
            format_assistant="Assistant: {{content}}",
            format_observation="Observation: {{content}}",
            format_separator="\n",
        ),
    ),
    # RWKV_LM_EXT (without the empty line that it leaves for an empty input)
    (
        "🐱: and 🤖:",
        Template(
            "ext-cat",
            format_system="{{content}}",
            format_user="🐱:{{content}}",
            format_assistant="🤖:{{content}}",
            format_separator="\n",
        ),
    ),
    (
        "the contents and nothing else",
        Template("empty", format_user="{{content}}", format_assistant="{{content}}", format_separator="", strip=False),
    ),
)
PRESETS: dict[str, Template] = {template.name: template for _, template in _ALL}
ABOUT: dict[str, str] = {template.name: about for about, template in _ALL}

# what a name meant in files of older versions, which record a template's name without its content
BEFORE = {"rwkv-g1-fakethink": "rwkv-g1-emptythink-2025"}
