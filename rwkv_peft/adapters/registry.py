"""The classes that wrap linear layers, by the name of their method (methods.METHODS) in sidecars."""

from __future__ import annotations

from .base import Adapter
from .bat import Bat
from .dora import Dora
from .hf_peft import PeftLayer
from .lora import Lora
from .miss import Miss
from .pissa import Pissa

ADAPTERS: dict[str, type[Adapter]] = {
    "lora": Lora, "dora": Dora, "pissa": Pissa, "miss": Miss, "bat": Bat,
    "peft": PeftLayer,
}  # fmt: skip
