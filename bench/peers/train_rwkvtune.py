"""rwkvtune: its model, its LoRA, its Lightning module's loss and optimizer. No bf16 on a CPU: its trainer turns to fp32
there; on a GPU that is Lightning's "bf16", float32 weights and autocast."""

from __future__ import annotations

import os

import protocol

given = protocol.given()
os.environ["RWKV_DEVICE"] = given.device  # which operator it loads

# ruff: noqa: E402
from importlib.metadata import version

import torch
from rwkvtune.models.rwkv7 import RWKV7Model
from rwkvtune.models.rwkv7.config import SimpleTrainConfig
from rwkvtune.peft import LoraConfig, get_peft_model
from rwkvtune.training import lightning_module

lightning_module.DEEPSPEED_AVAILABLE = (
    False  # where it is installed, a trainer is asked what it does with it, and there is none
)


def make():
    weights = torch.load(given.child, map_location="cpu", weights_only=True, mmap=True)
    vocab, width = weights["emb.weight"].shape
    config = SimpleTrainConfig(
        n_layer=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        n_embd=width, vocab_size=vocab, ctx_len=given.ctx, micro_bsz=given.batch, grad_cp=given.grad_cp,
        dim_att_lora=weights["blocks.0.att.w1"].shape[1], dim_gate_lora=weights["blocks.0.att.g1"].shape[1],
        dim_mv_lora=weights["blocks.1.att.v1"].shape[1],
        lr_init=1e-5, adam_eps=1e-8, weight_decay=0.0, accelerator={"cuda": "gpu"}.get(given.device, "cpu"),
        precision=given.precision,
    )  # fmt: skip
    model = RWKV7Model(config)
    keys = model.load_state_dict(weights)
    assert not keys.missing_keys and not keys.unexpected_keys, keys
    lora = LoraConfig(r=given.rank, lora_alpha=2 * given.rank)
    lora.modules_to_save = []  # an empty list given above would become ["ln", "time"]
    module = lightning_module.RWKV7LightningModule(config, model=get_peft_model(model, lora))
    module.train().to(given.device)
    inputs, targets = (x.to(given.device) for x in protocol.tokens(given.batch, given.ctx, vocab))
    batch = {"input_ids": inputs, "labels": targets}

    def loss():
        with torch.autocast(given.device, torch.bfloat16, enabled=given.precision == "bf16"):
            return module.training_step(batch, 0)

    step = protocol.training_step(loss, module.configure_optimizers())
    return {"implementation": "rwkvtune", "version": version("rwkvtune")}, step


protocol.serve(given.threads, make, 1, device=given.device)
