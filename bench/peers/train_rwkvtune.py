"""rwkvtune: its model, its LoRA, its Lightning module's loss and optimizer. No bf16: its trainer turns to fp32 on a CPU."""

from __future__ import annotations

import os

os.environ["RWKV_DEVICE"] = "cpu"  # which operator it loads

# ruff: noqa: E402
from importlib.metadata import version

import protocol
import torch
from rwkvtune.models.rwkv7 import RWKV7Model
from rwkvtune.models.rwkv7.config import SimpleTrainConfig
from rwkvtune.peft import LoraConfig, get_peft_model
from rwkvtune.training.lightning_module import RWKV7LightningModule


def make():
    weights = torch.load(given.child, map_location="cpu", weights_only=True, mmap=True)
    vocab, width = weights["emb.weight"].shape
    config = SimpleTrainConfig(
        n_layer=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        n_embd=width, vocab_size=vocab, ctx_len=given.ctx, micro_bsz=given.batch, grad_cp=given.grad_cp,
        dim_att_lora=weights["blocks.0.att.w1"].shape[1], dim_gate_lora=weights["blocks.0.att.g1"].shape[1],
        dim_mv_lora=weights["blocks.1.att.v1"].shape[1],
        lr_init=1e-5, adam_eps=1e-8, weight_decay=0.0, accelerator="cpu", precision="fp32",
    )  # fmt: skip
    model = RWKV7Model(config)
    found = model.load_state_dict(weights)
    assert not found.missing_keys and not found.unexpected_keys, found
    lora = LoraConfig(r=given.rank, lora_alpha=2 * given.rank)
    lora.modules_to_save = []  # an empty list given above would become ["ln", "time"]
    module = RWKV7LightningModule(config, model=get_peft_model(model, lora))
    module.train()
    inputs, targets = protocol.tokens(given.batch, given.ctx, vocab)
    batch = {"input_ids": inputs, "labels": targets}
    step = protocol.training_step(lambda: module.training_step(batch, 0), module.configure_optimizers())
    return {"implementation": "rwkvtune", "version": version("rwkvtune")}, step


given = protocol.given()
protocol.serve(given.threads, make, 1)
