"""The machine: its devices, and the precision that PRECISION=auto selects on it."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import torch

from .errors import SettingError, SettingErrors
from .formatting import plural

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


def device_kind() -> str:
    """Return "cuda" if there is a CUDA device, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def local_device(rank: int) -> torch.device:
    """Return the device of the process of this local rank."""
    return torch.device("cuda", rank) if device_kind() == "cuda" else torch.device("cpu")


def describe_device() -> str:
    """Describe the device for the run's report."""
    if device_kind() == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        return f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GB"
    return f"CPU, {plural(torch.get_num_threads(), 'thread')} (no CUDA device was found)"


def peak_memory() -> int:
    """Return the peak memory of this process in bytes: on its GPU, as nvidia-smi counts it, or without one on the host."""
    if device_kind() == "cuda":
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resolve_emb_on_cpu(wanted: str, possible: bool, size: int) -> bool:
    """Resolve EMB_ON_CPU: whether the embedding stays in host memory.

    Args:
        wanted: the setting: auto, 0 or 1.
        possible: whether it can stay there.
        size: bytes that it would take on the GPU. auto keeps it on the host from 1 % of the GPU's memory on.

    Raises:
        SettingErrors: wanted without a GPU.
    """
    if device_kind() != "cuda":
        if wanted == "1":
            raise SettingErrors(SettingError("EMB_ON_CPU", "is for GPUs, and none was found; use auto"))
        return False
    if wanted != "auto":
        return wanted == "1"
    return possible and size >= torch.cuda.get_device_properties(0).total_memory / 100


def cpu_has_bf16(cpuinfo: str | None = None) -> bool:
    """Return whether the processor multiplies bf16 natively; without that bf16 is about ten times slower than fp32."""
    flags = r"^(flags|Features)\s*:.*\b(amx_bf16|avx512_bf16|bf16)\b"
    return re.search(flags, cpuinfo or _read_cpuinfo(), re.M) is not None


def cpu_gains_by_bf16(cpuinfo: str | None = None) -> bool:
    """Return whether the processor is faster in bf16 than in fp32.

    Intel's AVX-512 multiplies as many bf16 as fp32 numbers in the same time, and the conversions come on top: a LoRA step of
    0.1B took 2.37 s instead of 1.52 s there; AMX takes half of fp32's time. (AMD's AVX-512 and ARM multiply twice as many
    by their makers' tables; not measured here.)
    """
    info = cpuinfo or _read_cpuinfo()
    plain_intel = "amx_bf16" not in info and re.search(r"^vendor_id\s*: GenuineIntel", info, re.M)
    return cpu_has_bf16(info) and not plain_intel


def _read_cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else "unknown"


def resolve_precision(wanted: str) -> str:
    """Resolve PRECISION: auto becomes what this machine computes best.

    Raises:
        SettingErrors: the machine cannot compute in it.
    """
    on_gpu = device_kind() == "cuda"
    if wanted == "auto":
        if on_gpu:
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return "bf16" if cpu_gains_by_bf16() else "fp32"
    if wanted == "tf32" and not on_gpu:
        raise SettingErrors(SettingError("PRECISION", "is for NVIDIA GPUs, and none was found; use auto or fp32"))
    return wanted
