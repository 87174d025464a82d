"""Rows, dialogues, and the tokens that they become."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import strategies as st

from rwkv_peft.preprocess.pipeline import EncodeConfig, RowEncoder
from rwkv_peft.preprocess.reader import Block
from rwkv_peft.preprocess.truncate import Limits
from rwkv_peft.text.presets import PRESETS
from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import Dialogue, Message

WORLD = PRESETS["rwkv-world"]


S, U, A, T = Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TOOL


TURNS = [(U, "你好。"), (A, "在的。"), (U, "And 再见?"), (A, "再见。\nBye!")]


CHAT = [{"role": "user" if r is U else "assistant", "content": c} for r, c in TURNS]


ALPACA = {"instruction": "And 再见?", "input": "", "output": "再见。\nBye!", "history": [["你好。", "在的。"]]}


# the same dialogue, as every kind of data set writes it
SAME = {
    "messages": {"messages": CHAT},
    "messages as JSON text": {"messages": json.dumps(CHAT)},
    "parts": {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]},
    "conversations": {"conversations": CHAT, "messages": None},
    "sharegpt": {
        "conversations": [{"from": "human" if r is U else "gpt", "value": c} for r, c in TURNS],
        "id": 7,
    },
    "odd names": {"conversations": [{"from": " Prompter" if r is U else "BOT", "value": c} for r, c in TURNS]},
    "alpaca": ALPACA,
    "alpaca with null": {**ALPACA, "input": None, "system": None, "text": "something else"},
    "prompt/completion": {"prompt": "And 再见?", "completion": "再见。\nBye!", "history": [["你好。", "在的。"]]},
    "lists": {"prompt": CHAT[:3], "completion": CHAT[3:]},
    "text": {"text": "User: 你好。\n\nAssistant: 在的。\n\nUser: And 再见?\n\nAssistant: 再见。\nBye!"},
}


def encode_block_of(*rows, template=WORLD, limits=None, **options):
    recipe = EncodeConfig(template, limits=limits or Limits(), **options)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "surrogatepass")
    return RowEncoder(recipe).block(Block("x.jsonl", 1, data, 0))


def rows_of(encoded):
    ends = np.cumsum(encoded.sizes)
    return [(encoded.ids[e - n : e], encoded.roles[e - n : e]) for e, n in zip(ends, encoded.sizes, strict=True)]


TEXT = st.text(
    st.one_of(
        st.characters(codec="utf-8", exclude_characters="\0"), st.sampled_from("。，…\n\n:User Assistant你好🐱{}<>`")
    ),
    max_size=40,
)


DIALOGUES = st.lists(st.tuples(st.sampled_from([S, U, A, T, A]), TEXT), min_size=1, max_size=7)


def dialogue(turns) -> Dialogue:
    return Dialogue(tuple(Message(role, content) for role, content in turns))


LONG = [
    {"role": "system", "content": "Be kind. " * 3},
    {"role": "user", "content": "天地玄黄，宇宙洪荒。" * 4},
    {"role": "assistant", "content": "日月盈昃，辰宿列张。🐱" * 5},
]
