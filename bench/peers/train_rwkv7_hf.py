"""rwkv7-hf: the Hugging Face model with the peft package's LoRA, and the optimizer that transformers' Trainer takes."""

from __future__ import annotations

from importlib.metadata import version

import peft
import protocol
import torch
from rwkv7_hf import RWKV7ForCausalLM, converter

LAYERS = ["r_proj", "k_proj", "v_proj", "o_proj", "ffn.key", "ffn.value"]


def convert(path: str, dtype: torch.dtype) -> RWKV7ForCausalLM:
    """What `rwkv7-hf convert` does, without the folder in between."""
    weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    config = converter.infer_config(weights, str(dtype).removeprefix("torch."), "chunk", False)
    model = converter.build_template_model(config, dtype)
    expected, moved = model.state_dict(), {}
    for name, weight in weights.items():
        new, transposed = converter.translate_name(name, config.num_hidden_layers)
        if new:
            moved[new] = converter.prepare_translated_weight(
                weight, src_name=name, dst_name=new, transposed=transposed, expected=expected[new],
                dtype=expected[new].dtype,
            )  # fmt: skip
    model.load_state_dict(moved)
    return model


def make():
    model = convert(given.child, {"fp32": torch.float32, "bf16": torch.bfloat16}[given.precision])
    vocab = model.config.vocab_size
    lora = peft.LoraConfig(r=given.rank, lora_alpha=2 * given.rank, lora_dropout=0.0, target_modules=LAYERS)
    model = peft.get_peft_model(model, lora)
    model.train()
    if given.grad_cp:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, fused=True)
    inputs, targets = protocol.tokens(given.batch, given.ctx, vocab)

    def loss() -> torch.Tensor:
        # not labels=: the model leaves out the last token of those
        logits = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits.float(), targets.flatten())

    about = {
        "implementation": "rwkv7-hf",
        "version": version("rwkv7-hf"),
        "with": f"transformers {version('transformers')}, peft {version('peft')}",
    }
    return about, protocol.training_step(loss, optimizer)


given = protocol.given()
protocol.serve(given.threads, make, 1)
