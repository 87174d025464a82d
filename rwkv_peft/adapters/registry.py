"""The adapter classes, by the name of their method (`specs.METHODS`), which sidecars hold too."""

from __future__ import annotations

import importlib

from .base import Adapter
from .specs import METHODS


def load_class(layer: str) -> type[Adapter]:
    """Return the class that `Method.layer` names, as module.Class."""
    module, name = layer.split(".")
    return getattr(importlib.import_module(f".{module}", __package__), name)


ADAPTERS = {name: load_class(method.layer) for name, method in METHODS.items() if method.layer}
