"""What the machine can compute in, and what PRECISION=auto becomes on it."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import torch

from .errors import SettingError, SettingErrors
from .formatting import plural

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


def device_kind() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device(rank: int) -> torch.device:
    """Where a process of this local rank computes."""
    return torch.device("cuda", rank) if device_kind() == "cuda" else torch.device("cpu")


def device_words() -> str:
    if device_kind() == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        return f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GB"
    return f"CPU, {plural(torch.get_num_threads(), 'thread')} (no CUDA device was found)"


def peak_memory() -> int:
    """Bytes that this process has held at most: of its GPU, as nvidia-smi counts them, or where there is none of the host."""
    if device_kind() == "cuda":
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def embedding_on_host(wanted: str, possible: bool, size: int) -> bool:
    """What EMB_ON_CPU becomes. possible: whether it can stay there; size: its bytes on the GPU. Raises Problems without a GPU."""
    if device_kind() != "cuda":
        if wanted == "1":
            raise SettingErrors(SettingError("EMB_ON_CPU", "is for GPUs, and none was found; use auto"))
        return False
    if wanted != "auto":
        return wanted == "1"
    return possible and size >= torch.cuda.get_device_properties(0).total_memory / 100


def cpu_has_bf16(cpuinfo: str | None = None) -> bool:
    """Whether the processor multiplies bf16 itself. Where it does not, bf16 is about ten times slower than fp32."""
    return (
        re.search(r"^(flags|Features)\s*:.*\b(amx_bf16|avx512_bf16|bf16)\b", cpuinfo or cpu_words(), re.M) is not None
    )


def cpu_gains_by_bf16(cpuinfo: str | None = None) -> bool:
    """Whether it is faster in bf16. Intel's AVX-512 multiplies no more bf16 than fp32 numbers in the same time, and what is
    converted comes on top: a LoRA step of 0.1B took 2.37 s instead of 1.52 s there; AMX takes half of fp32's time. (AMD's AVX-512
    and ARM multiply twice as many by their makers' tables; not measured here.)
    """
    words = cpuinfo or cpu_words()
    plain = "amx_bf16" not in words and re.search(r"^vendor_id\s*: GenuineIntel", words, re.M)
    return cpu_has_bf16(words) and not plain


def cpu_words() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else "unknown"


def resolve_precision(wanted: str) -> str:
    """Auto -> what this machine computes best. Raises Problems for what it cannot do."""
    on_gpu = device_kind() == "cuda"
    if wanted == "auto":
        if on_gpu:
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return "bf16" if cpu_gains_by_bf16() else "fp32"
    if wanted == "tf32" and not on_gpu:
        raise SettingErrors(SettingError("PRECISION", "is for NVIDIA GPUs, and none was found; use auto or fp32"))
    return wanted
