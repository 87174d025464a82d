"""Rows of messages, and what the reader makes of them or says of them."""

from __future__ import annotations

import json

import pytest

from rwkv_peft.preprocess.one_message import conversations
from rwkv_peft.preprocess.reader import Block
from rwkv_peft.preprocess.schemas import Reader
from rwkv_peft.preprocess.values import RowError
from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import Dialogue

S, U, A, T = Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TOOL


Q, ANSWER = {"role": "user", "content": "7 times 8?"}, {"role": "assistant", "content": "56"}


TOOL = {"name": "tide", "parameters": {"type": "object"}}


CALL = {"name": "tide", "arguments": {"place": "Bay"}}


def read(row, **options):
    reader = Reader(**options)
    _, result = reader.read(row)
    return result, reader


def said(row, **options):
    """Role and words of every message; thoughts as (thought, words); answers that are not learnt begin with -."""
    result, _ = read(row, **options)
    assert isinstance(result, Dialogue)
    return [
        (m.role, ("" if m.learn else "-") + (m.content if not m.think else f"({m.think}) {m.content}") + m.call)
        for m in result.messages
    ]


def refused(row, reason, *words, **options):
    with pytest.raises(RowError) as error:
        read(row, **options)
    assert error.value.reason == reason, str(error.value)
    for word in words:
        assert word in str(error.value)


def together(*rows, **options):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return [row for block in conversations([Block("x.jsonl", 1, data, 0)], **options) for _, row in block.data]
