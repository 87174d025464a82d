"""What every implementation in bench/step.py has in common: the tokens, and how a process answers.

A process prints one JSON line when it is ready, then one for every line that comes in. It is given a JSON object: child (the
.pth), ctx, batch, rank, precision, threads, grad_cp, device. Only torch and numpy are imported: peers have an environment of
their own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor


def given() -> SimpleNamespace:
    """What the first argument says."""
    return SimpleNamespace(**json.loads(sys.argv[1]))


def tokens(batch: int, ctx: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 [batch, ctx], the same for everyone."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(1, vocab, (batch, ctx + 1)))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def training_step(loss_of: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
    """A whole step: forward and cross entropy (loss_of), backward, clipping to 1, optimizer."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]

    def step() -> Tensor:
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def serve(
    threads: int,
    make: Callable[[], tuple[dict, Callable]],
    warm_ups: int,
    loss_of: Callable[[Any], float] = float,
    device: str = "cpu",
) -> None:
    """make: builds what runs, and says what it is and how to take a step. loss_of: from what a step returns; not timed.

    device: whose memory is reported, and whose work is waited for.
    """
    on_gpu = device == "cuda"
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    begin = time.perf_counter()
    about, step = make()
    losses = [loss_of(step()) for _ in range(warm_ups)]
    ready = {"torch": torch.__version__, "first_loss": losses[0], "ready_s": time.perf_counter() - begin}
    print("\n" + json.dumps(about | ready), flush=True)  # peers may have left a line unfinished
    for _ in sys.stdin:
        if on_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        result = step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        host = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
        peak = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else host
        print(json.dumps({"seconds": seconds, "peak_mb": peak, "loss": loss_of(result)}), flush=True)
