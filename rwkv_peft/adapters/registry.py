"""The methods that wrap linear layers, by the name they have in FINETUNE_MODE and in sidecars."""

from __future__ import annotations

from .base import Adapter
from .lora import Lora

ADAPTERS: dict[str, type[Adapter]] = {"lora": Lora}
