"""Files that other clients load, written from a model's .pth or from a learnt state.

Each write(source, target, geometry, prompting) is a generator: it writes the whole file, atomically and a few MB at a time,
and then yields sentences about what is in it and what loads it. geometry is that of the model, or of the state's base.
prompting: how the model was trained to be asked; formats that have a place for it hold it.

A new format is a module beside this one and a row of EXPORTS.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwkv_peft.checkpoint.prompt_format import PromptFormat
    from rwkv_peft.model.arch import Geometry

Write = Callable[[Path, Path, "Geometry", "PromptFormat"], Iterator[str]]


@dataclass(frozen=True)
class Export:
    """A kind of file that `./merge.sh --export` writes.

    kind: what the user types. ending: of the file, behind the name of the model or run. source: what it is made of: "model",
    "state", or "run" (the checkpoint of an adapter). program: what loads it, "" where that is ./chat.sh as well. write: what
    writes it; None for the adapter folder, which merge/write.py makes of the run's own files. help: a line of --help, "" for
    none. also: kinds that are written with it.
    """

    kind: str
    ending: str
    source: str
    program: str
    write: Write | None
    help: str = ""
    also: tuple[str, ...] = ()


def writer(module: str, function: str = "write", **options: Any) -> Write:
    """A writer whose module, and torch with it, is imported when it is used: --help and chat need the table only."""

    def write(source: Path, target: Path, geometry: Geometry, prompting: PromptFormat) -> Iterator[str]:
        made = getattr(importlib.import_module(f"{__name__}.{module}"), function)
        return made(source, target, geometry, prompting, **options)

    return write


EXPORTS = {
    export.kind: export
    for export in (
        Export("safetensors", ".st", "model", "Ai00 and web-rwkv", writer("web_rwkv"), "Ai00, web-rwkv (.st)"),
        Export(
            "gguf", ".gguf", "model", "llama.cpp", writer("gguf_export", number="float16"),
            "llama.cpp (.gguf, float16; gguf-bf16 and gguf-f32 keep more)",
        ),
        Export("gguf-bf16", ".bf16.gguf", "model", "llama.cpp", writer("gguf_export", number="bfloat16")),
        Export("gguf-f32", ".f32.gguf", "model", "llama.cpp", writer("gguf_export", number="float32")),
        Export("peft", "", "run", "", None, "the peft package: an adapter folder (lora, dora, pissa and miss runs)"),
        Export(
            "state", ".pth", "state", "", writer("state", "write_pth"),
            "RWKV-Runner, the rwkv package (.pth) and Ai00 (.state): a tuned state alone", ("state-ai00",),
        ),
        Export("state-ai00", ".state", "state", "Ai00", writer("state", "write_ai00")),
        Export(
            "rwkvcpp", ".rwkvcpp.bin", "state", "rwkv.cpp", writer("rwkvcpp"), "rwkv.cpp: a tuned state as its buffer"
        ),
    )
}  # fmt: skip
# what may be typed behind --export
KINDS = tuple(kind for kind in EXPORTS if not any(kind in export.also for export in EXPORTS.values()))
