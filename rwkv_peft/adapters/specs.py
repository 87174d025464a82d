"""The methods of FINETUNE_MODE: what each is called, which settings belong to it, what it can be combined with.

Facts only, without torch: settings are checked by them before anything is loaded, and tests and docs are generated from
them. What a method computes is in adapters/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class Method:
    """What is known of a method without computing it. A row that lacks a field without a default is an error at import.

    Attributes:
        words: What it is, for the plan of a run.
        activations: What its layers keep of a token for the backward pass, in shares of their inputs' size: what is cheap to
            recompute, and what is not; None for a method that trains no matrix of the blocks.
        options: Keyword of the adapter -> the variable of training.sh that sets it; they are written into the sidecar.
        dropout: The variable of its dropout.
        load: The variable that names an earlier checkpoint of it to continue from.
        layer: The class in adapters/ that wraps linear layers of att and ffn, as module.Class; "" for a method that
            wraps none.
        parts: Whether lora_parts says what is trained.
        saves_model: Its checkpoints are whole models; MODEL_PATH continues from them.
    """

    words: str
    activations: tuple[float, float] | None
    options: Mapping[str, str] = field(default_factory=dict)
    dropout: str = ""
    load: str = ""
    layer: str = ""
    parts: bool = True
    saves_model: bool = False

    @property
    def wraps(self) -> bool:
        """Whether the method puts adapters on linear layers."""
        return bool(self.layer)


MOST_ALPHA = 10**9  # of lora_alpha in training.sh, LORA_ALPHA in merge.sh and the sidecars

LORA = {"rank": "lora_r", "alpha": "lora_alpha", "rslora": "use_rslora"}

METHODS: dict[str, Method] = {
    "lora": Method("LoRA", (1, 0), LORA, "lora_dropout", "lora_load", layer="lora.Lora"),
    # also the output, for the magnitude's gradient
    "dora": Method("DoRA", (1, 1), LORA, "lora_dropout", "lora_load", layer="dora.Dora"),
    "pissa": Method("PiSSA", (1, 0), {"rank": "pissa_r", "niter": "svd_niter"}, load="pissa_load", layer="pissa.Pissa"),
    # only the input's sums over groups of channels
    "miss": Method("MiSS", (0, 0), {"rank": "disha_r"}, load="disha_load", layer="miss.Miss"),
    "bat": Method("Bat", (0, 1), {"rank": "disha_r"}, load="disha_load", layer="bat.Bat"),
    "peft": Method(
        "a method of the peft package", (1, 0), {"config": "PEFT_CONFIG"}, load="peft_load", layer="hf_peft.PeftLayer"
    ),
    "state": Method("state tuning", None, {"shifts": "state_shifts"}, load="state_load", parts=False),
    "none": Method("no adapter, whole tensors", None, load="lora_load"),
    "lisa": Method("LISA", (1, 0), {"layers": "lisa_r", "every": "lisa_k"}, saves_model=True),
    "full": Method("every weight", (1, 0), parts=False, saves_model=True),
}
# other names of the field -> ours
ALIASES = {"bone": "miss", "disha": "miss", "state_tuning": "state"}
MODES = (
    *(name for name in METHODS if name != "dora"),
    *ALIASES,
)  # words of FINETUNE_MODE; DoRA is lora with use_dora=1
PARTS = ("att", "ffn", "time", "ln", "emb", "head")
QUANTS = ("int8", "nf4", "fp4", "fp8")
QUANT_ALIASES = {"4bit": "nf4"}


def method_of(mode: str, use_dora: bool) -> str:
    """FINETUNE_MODE and use_dora -> a name in METHODS."""
    name = ALIASES.get(mode, mode)
    return "dora" if name == "lora" and use_dora else name


def load_variables() -> dict[str, list[str]]:
    """The variables that go on from a checkpoint -> the words of FINETUNE_MODE that they belong to."""
    variables: dict[str, list[str]] = {}
    for mode in MODES:
        if load := METHODS[ALIASES.get(mode, mode)].load:
            variables.setdefault(load, []).append(mode)
    return variables


class Optim(NamedTuple):
    """An optimizer.

    Attributes:
        moments: Bytes that it keeps for a trained value.
        package: What must be installed for it, or "".
        copies: Bytes for each value of the largest trained tensor while that one is updated on a CPU (bench/memory.py
            --optim): bitsandbytes computes there in float32.
    """

    moments: float
    package: str = ""
    copies: float = 0.0


# OPTIM -> what it is
OPTIMS = {
    "adamw": Optim(8),
    "adamw8bit": Optim(2, "bitsandbytes", 25),
    "lion": Optim(4, "bitsandbytes", 14),
    "lion8bit": Optim(1, "bitsandbytes", 24),
    "adafactor": Optim(0.1, copies=4),
}
