"""The WKV recurrences of flash-linear-attention (https://github.com/fla-org/flash-linear-attention, the package fla-core).

Triton kernels for GPUs that the kit's own kernels do not support; an optional package. Its states are [keys][values], the
kit's [values][keys]. In fla-core 0.6.0 the path behind safe_gate, which `lower_bound` turns on as well, diverges where a key
comes again and again and is replaced almost wholly (errors up to millions of times the output). The other path is exact, so
it is requested explicitly.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rwkv_peft.common.errors import pip_command

from . import torch_wkv6, torch_wkv7
from .kernel_call import recurrence

CHUNK = 16
DTYPES = (torch.bfloat16, torch.float16)
PACKAGE = "fla-core"
HOW = pip_command('"fla-core==0.6.0" einops')

Spans = tuple[tuple[int, int], ...]


class KernelUnavailable(Exception):
    """The package cannot be used; the text says why, as a sentence's second half."""


@functools.cache
def version() -> str:
    """Of the package. Missing if it is not there."""
    if importlib.util.find_spec("triton") is None:
        raise KernelUnavailable("Triton, which comes with torch for CUDA, is not installed")
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise KernelUnavailable(f"the package flash-linear-attention is not installed: {HOW}") from None


def function(module: str, name: str) -> Callable:
    """One of the package's functions: importing them takes seconds."""
    version()
    try:
        return getattr(importlib.import_module(f"fla.ops.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise KernelUnavailable(f"fla-core {version()} does not load ({error}): {HOW}") from None


def fits(r: Tensor) -> bool:
    """Whether it computes these inputs as exactly as their format deserves: float32 goes through TF32 there."""
    return r.numel() > 0 and r.dtype in DTYPES and r.is_cuda


@functools.lru_cache(maxsize=8)  # every layer asks for the same one
def device_bounds(spans: Spans, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """cu_seqlens on the device and on the host; None for a single sequence."""
    if len(spans) == 1:
        return None
    host = torch.tensor([0, *(end for _, end in spans)], dtype=torch.int64)
    return host.to(device), host


def call(kernel: Callable, x: Sequence[Tensor], s0: Tensor, spans: Spans, **more) -> tuple[Tensor, Tensor]:
    """Run one of the package's functions and return the output and the last state in the kit's layout."""
    cu_seqlens, host = device_bounds(spans, s0.device) or (None, None)
    y, end = kernel(
        *x, scale=1.0, initial_state=s0.float().transpose(-1, -2).contiguous(), output_final_state=True,
        cu_seqlens=cu_seqlens, cu_seqlens_cpu=host, **more,
    )  # fmt: skip
    return y[0].to(x[0].dtype), end.transpose(-1, -2).to(s0.dtype)


def run7(r, w, k, v, a, b, s0: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
    """RWKV-7, one sequence after another in one row."""
    exact = {"safe_gate": False, "lower_bound": None, "chunk_size": CHUNK}
    x = [z[None].to(torch.float32 if z is w else r.dtype) for z in (r, w, k, v, a, b)]
    return call(function("rwkv7", "chunk_rwkv7"), x, s0, spans, **exact)


def run6(r, w, k, v, u, s0: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
    """w: [T, H, N], or [H, N] for all tokens (RWKV-5)."""
    x = [z[None].to(r.dtype) for z in (r, k, v)]
    return call(function("rwkv6", "chunk_rwkv6"), (*x, w.float().expand(r.shape)[None], u.float()), s0, spans)


def wkv7(r, w, k, v, a, b, s0: Tensor | None = None, cu_seqlens: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """reference.wkv7, with gradients for all inputs and s0; the state is float32, products are those of the inputs' dtype."""
    return recurrence(run7, fits, torch_wkv7.wkv7, (r, w, k, v, a, b), s0, cu_seqlens)


def wkv6(r, w, k, v, u, s0: Tensor | None = None, cu_seqlens: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """reference.wkv6, as wkv7."""
    return recurrence(run6, fits, torch_wkv6.wkv6, (r, w, k, v, u), s0, cu_seqlens)


def wkv5(r, w, k, v, u, s0: Tensor | None = None, cu_seqlens: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """reference.wkv5, as wkv7."""
    return recurrence(run6, fits, torch_wkv6.wkv5, (r, w, k, v, u), s0, cu_seqlens)
