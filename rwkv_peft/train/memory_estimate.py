"""Memory a run will need, from the sizes alone, shown before anything is loaded. bench/memory.py holds it to what is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rwkv_peft.adapters.specs import METHODS, Optim
from rwkv_peft.config.strategies import STRATEGIES, Strategy
from rwkv_peft.model.arch import ARCHS, Geometry
from rwkv_peft.ops.loss import CHUNK_VALUES

ALONE = STRATEGIES["single"]

# of a trained value: float32 weight and gradient; on a CPU also the holes that malloc leaves between them
MASTER_BYTES = {"cuda": 8, "cpu": 11}
# bytes of a token and channel while one block's gradients are made, with layers that learn and without
WORK = {True: 130, False: 90}
BUCKETS = 400 << 20  # of DeepSpeed's stage 3
OVERHEAD = {"cuda": 700 << 20, "cpu": 555 << 20}  # CUDA context; libraries, loss.png and the writing of checkpoints


def memory_bytes(
    shapes: Mapping[str, tuple[int, ...]],
    trained: int,
    tokens: int,
    geometry: Geometry,
    itemsize: int,
    grad_cp: str,
    method: str,
    device: str,
    op: str,
    optim: Optim,
    largest: int = 0,
    compressed: int = 0,
    sequences: int = 1,
    strategy: Strategy = ALONE,
    processes: int = 1,
    recorded: int = 0,
) -> int:
    """Peak bytes on the device, of one process.

    shapes: all tensors of the base that are not compressed. trained: number of trained values. tokens: of one micro-batch
    (infctx: of one chunk). itemsize: bytes of a value in the working dtype. grad_cp: 0, 1 or selective. op: what computes.
    method: of methods.METHODS. largest: values of the largest tensor that is trained whole. compressed: bytes of the tensors
    that are. sequences: that begin in one micro-batch; each has a state. strategy, processes: how they share what is trained.
    recorded: shapes that CUDA_GRAPHS holds on to.
    """
    channels, layers = geometry.n_embd, geometry.n_layer
    inner = geometry.dim_ffn / channels
    kept = ARCHS[geometry.version].activations[op if op == "cpu" else "torch"]
    shares = METHODS[method].activations
    again, more = ((kept.inputs + inner) * share for share in shares or (0, 0))
    of_block = tokens * channels * ((kept.values + inner + again + more) * itemsize + kept.floats * 4)
    activations = {
        "0": layers * of_block,
        "selective": layers * (of_block - tokens * channels * again * itemsize),
        "1": layers * tokens * channels * 2 * itemsize + of_block,
    }[grad_cp]
    work = tokens * channels * WORK[shares is not None]
    # (seen with packs of rows of 5 tokens, where they are more than all the rest)
    states = sequences * channels * geometry.head_size * 4 * (3 if grad_cp == "1" else 3 + 2 * layers)
    rows = min(tokens, max(1, CHUNK_VALUES // geometry.vocab_size))
    logits = rows * geometry.vocab_size * (itemsize if op in ("cpu", "cuda") else 8 + itemsize)
    all_values = sum(math.prod(s) for s in shapes.values())
    frozen = 0 if method == "full" else all_values * itemsize
    master = MASTER_BYTES[device]
    learning = trained * (master + optim.moments) + (largest * optim.copies if device == "cpu" else 0)
    host = strategy.offload and device == "cuda"  # (without a GPU, both are the same memory)
    if strategy.spread == "weights":
        # beside the pieces: a block that is whole for its turn, and embedding and head
        outside = sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("blocks."))
        whole = (all_values - outside) // layers + outside
        frozen = (0 if host else frozen // processes) + whole * (4 if method == "full" else itemsize)
        compressed = (0 if host else compressed // processes) + compressed // layers
        # (DeepSpeed cuts a copy of the weights, and has room for what it sends)
        more = trained * 4 // processes + BUCKETS if strategy.stage else 0
        learning = 0 if host else learning // processes + more
    elif strategy.spread:
        pieces = 0 if host else trained * (4 + optim.moments) // processes  # (a copy of the weights here, too)
        gradients = master - 4 if strategy.stage == 1 else 0 if host else (master - 4) // processes
        learning = trained * (4 + gradients) + pieces
    passes = (1 + recorded) * (activations + work + states)
    return int(frozen + compressed + learning + passes + logits + OVERHEAD[device])
