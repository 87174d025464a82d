"""What ./chat.sh loads, and settings that ask greedily."""

from __future__ import annotations

from helpers.kit import ROOT
from helpers.scripts import shell_values
from rwkv_peft.chat import load as models
from rwkv_peft.cli import chat
from rwkv_peft.config.shell import Script


def load(base_was_named=False, **changes):
    values = shell_values(ROOT / "chat.sh") | {"PRECISION": "fp32", "MODEL_PATH": ""} | changes
    return models.load_chat_model(Script(ROOT / "chat.sh", values).read(chat.ChatConfig), base_was_named)


ASKING = chat.ChatConfig("", "", "rwkv-world", "auto", "", 5, 0.0, 1.0, 0, 0, "fp32")
