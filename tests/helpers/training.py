"""Training in this process: the shipped script's values with changes, and what a run has left."""

import json

from helpers.kit import ROOT
from helpers.scripts import shell_values
from rwkv_peft.checkpoint import pth
from rwkv_peft.cli import train
from rwkv_peft.config.shell import Script
from rwkv_peft.config.train import TrainConfig
from rwkv_peft.preprocess.config import TokenizeConfig
from rwkv_peft.preprocess.tokenize import tokenize as make

FAST = {
    "MODEL_PATH": "tiny.pth", "DATA_PATH": "chat", "PRECISION": "fp32", "EPOCH_COUNT": "1", "lora_r": "4",
    "lora_alpha": "8", "lora_dropout": "0", "WARMUP_STEPS": "0", "LR_INIT": "1e-2", "LR_FINAL": "1e-2", "GRAD_CP": "0",
    "MICRO_BSZ": "2", "RUN_NAME": "run", "LR_SCHEDULE": "constant", "OPTIM": "adamw", "KEEP_LAST": "0",
}  # fmt: skip


def tokenize(path, epochs: int = 1, end_of_doc: bool = True, **changes) -> dict:
    """make_tokenize.sh's values with changes; returns the report."""
    values = shell_values(ROOT / "make_tokenize.sh") | {"WORKERS": "1"} | changes
    return make(path, Script(ROOT / "make_tokenize.sh", values).read(TokenizeConfig), epochs, end_of_doc)


def config(**changes) -> TrainConfig:
    return Script(ROOT / "training.sh", shell_values(ROOT / "training.sh") | FAST | changes).read(TrainConfig)


def run(root, name: str = "run", **changes):
    """Train; returns what was saved last, and the records of its steps."""
    train.command(config(RUN_NAME=name, **changes), [])
    folder = root / "output" / name
    newest = max(folder.glob("rwkv-[0-9]*.pth"), key=lambda p: int(p.stem[5:]))
    records = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    return pth.load(newest), records
