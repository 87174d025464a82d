"""The words of STRATEGY: how several processes share one training. Only facts, without torch."""

from __future__ import annotations

from typing import NamedTuple


class Strategy(NamedTuple):
    """What a strategy does.

    Attributes:
        spread: what is sharded over the ranks: "" for nothing, "memory" for the optimizer state (and gradients, from
            stage 2 on), "weights" for these and the weights.
        stage: of DeepSpeed's ZeRO, 0 for none of it.
        offload: the shards are in the host's memory, and the optimizer computes there.
    """

    spread: str = ""
    stage: int = 0
    offload: bool = False


STRATEGIES = {
    "single": Strategy(),
    "ddp": Strategy(),
    "fsdp": Strategy("weights"),
    "deepspeed_stage_1": Strategy("memory", 1),
    "deepspeed_stage_2": Strategy("memory", 2),
    "deepspeed_stage_2_offload": Strategy("memory", 2, True),
    "deepspeed_stage_3": Strategy("weights", 3),
    "deepspeed_stage_3_offload": Strategy("weights", 3, True),
}


def resolve_strategy(word: str, processes: int) -> str:
    """Return what STRATEGY=auto selects, or the word itself."""
    if word != "auto":
        return word
    return "ddp" if processes > 1 else "single"
