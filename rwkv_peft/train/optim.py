"""The optimizer of the trained tensors. Weight decay and learning-rate factors depend on the tensor's name and shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType

import torch
from torch import nn
from torch.optim import Optimizer

from rwkv_peft.adapters.specs import OPTIMS
from rwkv_peft.common.errors import SettingError, SettingErrors, pip_command
from rwkv_peft.distributed.sharding import Sharding


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    decays: Callable[[str, tuple[int, ...]], bool],
    lr_scale: Callable[[str], float],
    lora_plus: float = 1.0,
) -> list[dict]:
    """Return one group per combination of weight decay and learning-rate factor. `lr` is the factor; a schedule multiplies it.

    Args:
        parameters: with their names in files.
        weight_decay: of the tensors that decay.
        decays: whether a tensor decays, by its name and shape (model.arch).
        lr_scale: the factor of a tensor's rate, by its name (model.arch).
        lora_plus: factor of lora_B's rate over lora_A's (LoRA+, https://arxiv.org/abs/2402.12354).
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        rate = lr_scale(name) * (lora_plus if name.endswith("lora_B") else 1.0)
        key = (weight_decay if decays(name, tuple(parameter.shape)) else 0.0, rate)
        groups.setdefault(key, []).append(parameter)
    return [{"params": params, "weight_decay": decay, "lr": scale} for (decay, scale), params in groups.items()]


def make_optimizer(
    name: str, groups: list[dict], beta1: float, beta2: float, eps: float, fused: bool = True
) -> Optimizer:
    """Return an optimizer of OPTIMS.

    Args:
        name: a key of OPTIMS.
        groups: of parameters, whose `lr` are factors, which a schedule multiplies.
        beta1: of the first moment.
        beta2: of the second moment.
        eps: of AdamW.
        fused: whether AdamW is one kernel for all tensors. It unscales fp16 gradients itself, after clipping: not for fp16.
    """
    betas = beta1, beta2
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=eps, fused=fused)
    if name == "adafactor":
        return torch.optim.Adafactor(groups, lr=1.0)
    library = import_bitsandbytes()
    if name == "adamw8bit":
        return library.optim.AdamW8bit(groups, lr=1.0, betas=betas, eps=eps)
    return {"lion": library.optim.Lion, "lion8bit": library.optim.Lion8bit}[name](groups, lr=1.0, betas=betas)


def optimizer_of(
    spread: Sharding, name: str, groups: list[dict], betas: tuple[float, float], eps: float, fused: bool
) -> Optimizer:
    """Return the optimizer of a run: that of make_optimizer, unless the strategy replaces it."""
    return spread.own_optimizer(groups, betas, eps) or make_optimizer(name, groups, *betas, eps, fused)


def check_package(name: str) -> None:
    """Raise SettingErrors if the package of an optimizer is missing, before anything is loaded."""
    if OPTIMS[name].package:
        import_bitsandbytes()


def import_bitsandbytes() -> ModuleType:
    """Return the module. Raise SettingErrors if it is missing."""
    try:
        import bitsandbytes  # (here: an optional package)
    except ImportError as error:
        raise SettingErrors(
            SettingError("OPTIM", f"needs a package that is missing ({error}): {pip_command('bitsandbytes')}")
        ) from None
    return bitsandbytes
