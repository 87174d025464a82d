"""PROMPT_TYPE: the templates that the kit brings, by name. Sources stand beside each."""

from __future__ import annotations

from ..roles import Role
from .template import Template

SPEAKERS = frozenset({Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TOOL})
LISTENERS = SPEAKERS - {Role.ASSISTANT}  # thoughts and code of the G1 models hold blank lines

# Ai00 stops at a blank line, and RWKV-Runner at "\n\nUser": so no blank line inside any turn
WORLD = {
    "format_system": "System: {{content}}",
    "format_user": "User: {{content}}",
    "format_assistant": "Assistant: {{content}}",
    "format_observation": "User: Function output:\n{{content}}",
    "format_function": "```json\n{{content}}\n```",
    "format_tools": "Tools:\n{{content}}\nReturn only a JSON function call.",
}
# RWKV-v7/RWKV7-G1x-templates.txt in BlinkDL/RWKV-LM
G1 = WORLD | {"clean": LISTENERS}

PRESETS: dict[str, Template] = {
    template.name: template
    for template in (
        # model card of BlinkDL/rwkv-7-world, "Recommended fine-tuning format"
        Template("rwkv-world", **WORLD, clean=SPEAKERS),
        # "Question: xxx\n\nAnswer:" of the same cards
        Template(
            "rwkv-qa",
            **WORLD | {"format_user": "Question: {{content}}", "format_assistant": "Answer: {{content}}"},
            clean=SPEAKERS,
        ),
        # "Instruction: xxx\n\nInput: xxx\n\nResponse:" of the same cards
        Template(
            "rwkv-instruct",
            **WORLD
            | {
                "format_user": "Instruction: {{content}}",
                "format_user_input": "Instruction: {{content}}\n\nInput: {{input}}",
                "format_assistant": "Response: {{content}}",
            },
            clean=SPEAKERS,
        ),
        Template("rwkv-g1", **G1),
        # the client sends "Assistant: <think": the model writes the rest of the thought itself
        Template("rwkv-g1-think", **G1, think="always", opening="<think"),
        # the client sends an empty thought: "fake thinking, nice results and fast"
        Template("rwkv-g1-fakethink", **G1, think="fake", opening="<think>\n</think"),
        # the client sends "Assistant: ```json" and gets a function call
        Template("rwkv-g1-tools", **G1, opening="```json"),
        # rwkv.cn, Prompt-Format: the material first, then the question
        Template(
            "rwkv-g1-rag",
            **G1 | {"format_system": "{{content}}", "format_user_input": "{{input}}\n\nUser: {{content}}"},
        ),
        # stanford_alpaca: two introductions, with and without an input
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
        # OpenAI's markup, with the tool tags of Qwen
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
        # "default" of LLaMA-Factory and MindSpeed-RL
        Template(
            "default",
            format_system="System: {{content}}",
            format_user="Human: {{content}}",
            format_assistant="Assistant: {{content}}",
            format_observation="Observation: {{content}}",
            format_separator="\n",
        ),
        # RWKV_LM_EXT (without the empty line that it leaves for an empty input)
        Template(
            "ext-cat",
            format_system="{{content}}",
            format_user="🐱:{{content}}",
            format_assistant="🤖:{{content}}",
            format_separator="\n",
        ),
        # nothing but the contents
        Template("empty", format_user="{{content}}", format_assistant="{{content}}", format_separator="", strip=False),
    )
}

# what a name meant in the files of versions that did not write a template's content beside it
BEFORE: dict[str, str] = {}
