"""Estimate of the memory of a run, from sizes alone, before anything is loaded. bench/memory.py compares it with measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rwkv_peft.adapters.specs import METHODS, Optim
from rwkv_peft.config.strategies import STRATEGIES, Strategy
from rwkv_peft.model.arch import ARCHS, Geometry
from rwkv_peft.ops.loss import CHUNK_VALUES

# bytes of a trained value: float32 weight and gradient; on a CPU also the gaps that malloc leaves between them
MASTER_BYTES = {"cuda": 8, "cpu": 11}
# bytes of a token and channel while one block's gradients are computed, with trained layers and without
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
    strategy: Strategy = STRATEGIES["single"],
    processes: int = 1,
    recorded: int = 0,
) -> int:
    """Return the peak memory on the device, in bytes, of one process.

    Args:
        shapes: of all tensors of the base that are not quantized, by name.
        trained: number of trained values.
        tokens: of a micro-batch (infctx: of a chunk).
        geometry: of the model.
        itemsize: bytes of a value in the working dtype.
        grad_cp: 0, 1 or selective.
        method: a key of METHODS.
        device: cpu or cuda.
        op: the backend that computes.
        optim: one of OPTIMS.
        largest: values of the largest tensor that is trained whole.
        compressed: bytes of the quantized tensors.
        sequences: that begin in a micro-batch; each has a state.
        strategy: one of STRATEGIES.
        processes: the world size.
        recorded: shapes of which CUDA_GRAPHS keeps the activations.
    """
    channels, layers = geometry.n_embd, geometry.n_layer
    inner = geometry.dim_ffn / channels
    kept = ARCHS[geometry.version].activations[op if op == "cpu" else "torch"]
    shares = METHODS[method].activations
    recomputable, more = ((kept.inputs + inner) * share for share in shares or (0, 0))
    per_block = tokens * channels * ((kept.values + inner + recomputable + more) * itemsize + kept.floats * 4)
    activations = {
        "0": layers * per_block,
        "selective": layers * (per_block - tokens * channels * recomputable * itemsize),
        "1": layers * tokens * channels * 2 * itemsize + per_block,
    }[grad_cp]
    work = tokens * channels * WORK[shares is not None]
    # (measured with packs of rows of 5 tokens, where states take more than all the rest)
    states = sequences * channels * geometry.head_size * 4 * (3 if grad_cp == "1" else 3 + 2 * layers)
    rows = min(tokens, max(1, CHUNK_VALUES // geometry.vocab_size))
    logits = rows * geometry.vocab_size * (itemsize if op in ("cpu", "cuda") else 8 + itemsize)
    all_values = sum(math.prod(s) for s in shapes.values())
    frozen = 0 if method == "full" else all_values * itemsize
    master = MASTER_BYTES[device]
    learning = trained * (master + optim.moments) + (largest * optim.copies if device == "cpu" else 0)
    on_host = strategy.offload and device == "cuda"  # (without a GPU, both are the same memory)
    if strategy.spread == "weights":
        # beside the shards: a block that is whole while it computes, and embedding and head
        outside = sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("blocks."))
        whole = (all_values - outside) // layers + outside
        frozen = (0 if on_host else frozen // processes) + whole * (4 if method == "full" else itemsize)
        compressed = (0 if on_host else compressed // processes) + compressed // layers
        # (DeepSpeed shards a copy of the weights, and has buffers for what it sends)
        more = trained * 4 // processes + BUCKETS if strategy.stage else 0
        learning = 0 if on_host else learning // processes + more
    elif strategy.spread:
        shards = 0 if on_host else trained * (4 + optim.moments) // processes  # (with a copy of the weights here, too)
        gradients = master - 4 if strategy.stage == 1 else 0 if on_host else (master - 4) // processes
        learning = trained * (4 + gradients) + shards
    passes = (1 + recorded) * (activations + work + states)
    return int(frozen + compressed + learning + passes + logits + OVERHEAD[device])
