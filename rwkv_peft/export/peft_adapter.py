"""A run of ours as an adapter folder of Hugging Face's peft: adapter_config.json and adapter_model.safetensors.

Layers keep the names they have in a .pth file (blocks.0.att.key); it fits a model whose modules are called so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from rwkv_peft.adapters.dora import Dora
from rwkv_peft.adapters.lora import Lora, scale
from rwkv_peft.adapters.miss import Miss
from rwkv_peft.adapters.pissa import Pissa
from rwkv_peft.common.errors import UserError
from rwkv_peft.common.formatting import join_names

BEFORE = "base_model.model."  # what peft writes before every name
METHODS = {"lora": Lora, "dora": Dora, "pissa": Pissa, "miss": Miss, "bone": Miss, "disha": Miss}

LORA_NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}


def peft_weights(tensors: Mapping[str, Tensor], sidecar: dict, layers: Iterable[str]) -> tuple[dict, dict[str, Tensor]]:
    """What adapter_config.json holds, and the tensors of adapter_model.safetensors by peft's names.

    tensors: the run's, and for PiSSA also what it began with, under the names of our files. layers: what was adapted.
    PiSSA becomes the LoRA of twice the rank that does the same: B' = [B, -B0], A' = [A; A0], scale 1; peft would compute
    the singular values anew instead.
    """
    method, layers = sidecar["method"], sorted(layers)
    if method not in METHODS:
        why = " (peft's bat shares its blocks along the outputs, ours along the inputs)" if method == "bat" else ""
        raise UserError(f"A {method} run cannot be written as a peft adapter{why}. Merge it with ./merge.sh instead.")
    leaves = (*METHODS[method].tensors, *METHODS[method].start)
    wanted = [f"{layer}.{leaf}" for layer in layers for leaf in leaves]
    if missing := [n for n in wanted if n not in tensors]:
        raise UserError(
            f"This {method} run cannot be written as a peft adapter: {join_names(missing, 3)} missing from it."
        )
    if whole := sorted(set(tensors) - set(wanted)):
        raise UserError(
            f"This run also trained whole tensors ({join_names(whole, 3)}), which a peft adapter has "
            f"no place for; without them it "
            "would not be what was trained. Merge it with ./merge.sh instead, or train with att and ffn alone."
        )
    own = {layer: {leaf: tensors[f"{layer}.{leaf}"].float() for leaf in leaves} for layer in layers}
    common = {
        "target_modules": layers, "bias": "none", "inference_mode": True, "task_type": None,
        "base_model_name_or_path": sidecar.get("base"),
    }  # fmt: skip
    if METHODS[method] is Miss:
        config = {"peft_type": "MISS", "r": sidecar["rank"], "init_weights": True, "miss_dropout": 0.0}
        return config | common, {f"{BEFORE}{layer}.miss_block": t["disha"].contiguous() for layer, t in own.items()}
    rank, alpha = sidecar["rank"], sidecar.get("alpha")
    if method == "pissa":
        rank, alpha = 2 * rank, 2 * rank
        own = {layer: side_by_side(t) for layer, t in own.items()}
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "init_lora_weights": True,
        "use_rslora": bool(sidecar.get("rslora", False)), "use_dora": method == "dora", "fan_in_fan_out": False,
    }  # fmt: skip
    if method == "dora":
        own = {layer: with_lengths(t, rank, alpha, config["use_rslora"]) for layer, t in own.items()}
    named = {f"{BEFORE}{layer}.{LORA_NAMES[leaf]}": x.contiguous() for layer, t in own.items() for leaf, x in t.items()}
    return config | common, named


def with_lengths(layer: dict[str, Tensor], rank: int, alpha: float, rslora: bool) -> dict[str, Tensor]:
    """peft has a length for every row; those of the base that are zero have what LoRA adds to them."""
    magnitude, learnt = layer["lora_magnitude"], scale(rank, alpha, rslora) * layer["lora_B"] @ layer["lora_A"]
    lengths = torch.linalg.vector_norm(learnt, dim=1)
    if ((magnitude == 0) & (lengths == 0)).any():
        raise UserError(
            "This dora run cannot be written as a peft adapter: its base has rows of zeros that have learnt nothing, and peft "
            "divides by their length. Merge it with ./merge.sh instead."
        )
    return layer | {"lora_magnitude": torch.where(magnitude == 0, lengths, magnitude)}


def side_by_side(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """B A - B0 A0 as one product."""
    return {
        "lora_A": torch.cat([layer["lora_A"], layer["init_lora_A"]]),
        "lora_B": torch.cat([layer["lora_B"], -layer["init_lora_B"]], dim=1),
    }
