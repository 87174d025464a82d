"""What EOT is for: a model that has learnt its rows stops by itself."""

import json

import pytest
import torch
from helpers import tiny
from helpers.training import run, tokenize

from rwkv_peft.model.generate import advance
from rwkv_peft.model.rwkv import build
from rwkv_peft.text import tokenizer
from rwkv_peft.text.presets import PRESETS
from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import Message

ASKED = {"Red?": "A ripe tomato", "草？": "绿色的。", "Sea?": "Salt, wind, gulls.", "Night?": "Dark"}


def answer(model, question: str, banned: tuple[int, ...]) -> str:
    """The likeliest answer up to where the model stops: token 0, or the blank line that begins another turn."""
    prompt = PRESETS["rwkv-world"].prompt([Message(Role.USER, question)])
    logits, state = advance(model, tokenizer.encode(prompt))
    said: list[int] = []
    for _ in range(30):
        token = int(logits.clone().index_fill_(0, torch.tensor(banned, dtype=torch.long), -torch.inf).argmax())
        if token == 0:
            return tokenizer.decode(said)
        said.append(token)
        if tokenizer.decode(said).endswith("\n\n"):
            return tokenizer.decode(said[:-1] if said[-1] == 261 else said).rstrip("\n")
        logits, state = advance(model, [token], state)
    return "it did not stop: " + tokenizer.decode(said)


@pytest.mark.slow
@pytest.mark.parametrize(("eot", "banned"), [("doc", ()), ("both", (0,)), ("both", ())])
def test_a_model_that_knows_its_rows_stops_behind_each_answer(ready, eot, banned):
    rows = [{"prompt": question, "completion": words} for question, words in ASKED.items()]
    tokenize(tiny.write_jsonl(ready / "data" / "asked.jsonl", rows), EOT=eot)
    tensors, records = run(
        ready, eot, DATA_PATH="asked", FINETUNE_MODE="full", EPOCH_COUNT="60", EPOCH_SAVE="100", MICRO_BSZ="1",
        DATALOAD="only", LR_INIT="5e-3", LR_FINAL="1e-3", LR_SCHEDULE="linear",
    )  # fmt: skip
    assert records[-1]["loss"] < 0.1
    model = build(tiny.geometry(), tensors, tiny.ops(tiny.geometry()), torch.float32).eval()
    with torch.no_grad():
        result = {question: answer(model, question, banned).strip() for question in ASKED}
    assert result == ASKED, json.dumps(result, ensure_ascii=False)
