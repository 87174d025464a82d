"""A run as an adapter folder of Hugging Face's peft: adapter_config.json and adapter_model.safetensors.

Layers keep the names they have in a .pth file (blocks.0.att.key); it fits a model whose modules have these names. An
adapter's class knows peft's settings and tensors for it (`Adapter.to_peft`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from rwkv_peft.adapters.base import Adapter
from rwkv_peft.adapters.registry import ADAPTERS
from rwkv_peft.adapters.specs import ALIASES
from rwkv_peft.common.errors import UserError
from rwkv_peft.common.formatting import join_names

BEFORE = "base_model.model."  # what peft writes before every name


def has_peft_form(method: str) -> bool:
    """Whether peft has an adapter that does the same as this method's."""
    adapter = ADAPTERS.get(ALIASES.get(method, method), Adapter)
    return adapter.to_peft is not Adapter.to_peft


def peft_weights(tensors: Mapping[str, Tensor], sidecar: dict, layers: Iterable[str]) -> tuple[dict, dict[str, Tensor]]:
    """What adapter_config.json holds, and the tensors of adapter_model.safetensors by peft's names.

    tensors: the run's, and for PiSSA also what it began with, under the names of our files. layers: what was adapted.
    """
    method, layers = sidecar["method"], sorted(layers)
    adapter = ADAPTERS.get(ALIASES.get(method, method), Adapter)
    if not has_peft_form(method):
        why = f" ({adapter.no_peft})" if adapter.no_peft else ""
        raise UserError(f"A {method} run cannot be written as a peft adapter{why}. Merge it with ./merge.sh instead.")
    leaves = (*adapter.tensors, *adapter.start)
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
    settings: dict[str, Any] = {}
    named: dict[str, Tensor] = {}
    for layer in layers:
        settings, own = adapter.to_peft({leaf: tensors[f"{layer}.{leaf}"].float() for leaf in leaves}, sidecar)
        named |= {f"{BEFORE}{layer}.{leaf}": tensor.contiguous() for leaf, tensor in own.items()}
    common = {
        "target_modules": layers, "bias": "none", "inference_mode": True, "task_type": None,
        "base_model_name_or_path": sidecar.get("base"),
    }  # fmt: skip
    return settings | common, named
