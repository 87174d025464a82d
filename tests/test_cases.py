# ruff: noqa: E501 - one line a case
"""Inputs of the kinds that people reported for other tools (tests/cases), and what becomes of each: one line a case."""

from pathlib import Path

from rwkv_peft.roles import Role

CASES = Path(__file__).resolve().parent / "cases"
A = Role.ASSISTANT

# file -> settings, what is learnt of every row ("" where nothing is), and words that the report must have
DATA = {
    "k01-message-loss-false.jsonl": ({}, [" It does not sail on holidays.<end>"], []),
    "k01-row-loss_mask-list.jsonl": ({}, [" It does not sail on holidays.<end>"], []),
    "k02-alpaca-cot.jsonl": ({}, [" <think>\nSeven eights are fifty-six.\n</think>\n56<end>"], []),
    "k02-message-thinking.jsonl": ({"PROMPT_TYPE": "rwkv-g1-think"}, [">\nSeven eights are fifty-six.\n</think>\n56<end>"], []),
    "k02-pair-reasoning_content.jsonl": ({}, [" <think>\nSeven eights are fifty-six.\n</think>\n56<end>"], []),
    "k03-pair-system_prompt.jsonl": ({}, [" At sunset, as ever.<end>"], ["1 with a system text"]),
    "k04-functions-in-system.jsonl": ({}, ["It is low.<end>"], ["1 with tools", "1 with a system text"]),
    "k04-functions-top-level.jsonl": ({}, ["It is low.<end>"], ["1 with tools"]),
    "k04-tools-in-empty-system.jsonl": ({}, ["It is low.<end>"], ["1 with tools"]),
    "k07-arrow-null-padding.parquet": ({}, ['"arguments": {"place": "Heron Bay"}}', '"arguments": {"a": 2, "b": 3}}'], ["2 with tools"]),
    "k08-thought-without-opening-tag.jsonl": ({}, [" <think>\nSeven eights are 56.\n</think>\n56<end>"], []),
    "k13-one-message-a-row.jsonl": ({}, [" At sunset.<end>"], []),
    "m02-human-assistant-per-turn.jsonl": ({}, [" 日落时分。\n\n 日出时分。<end>"], []),
    "m02-struct-of-lists.parquet": ({}, [" At sunset.<end>"], []),
    "m03-answer-is-an-object.jsonl": ({}, [' {"name": "Tomas Quill", "age": 61}<end>'], []),
    "m03-number-answer.parquet": ({}, [" 42<end>", " 48<end>"], []),
    "m04-system-null.jsonl": ({}, [" Hello<end>"], []),
    "m04-tool-result-empty.jsonl": ({}, [" Done.<end>"], []),
    "m06-columns-dolly.jsonl": ({}, [" At sunset.<end>"], []),
    "m06-columns-orca.jsonl": ({}, [" At sunset, as ever.<end>"], ["1 with a system text"]),
}  # fmt: skip
