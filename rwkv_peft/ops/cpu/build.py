"""cpu/*.cpp -> a library for this processor, compiled at first use and kept in the user's cache.

Plain C functions without a header of torch in sight: that compiles in seconds, and fits any version of torch. The name of a
built library is a hash of all that went into it, so nothing stale is ever used, and machines can share a cache.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from ...project import ROOT
from .. import cache

SOURCES = ROOT / "cpu"
COMPILERS = ("g++", "clang++", "c++")
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-Wno-psabi",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
)
# what torch.backends.cpu.get_cpu_capability() says (ATEN_CPU_CAPABILITY overrules it) -> flags; others: what every one can
CAPABILITIES = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
MOST_SECONDS = 120


def capability() -> str:
    """What this processor is taken for."""
    found = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": "AVX-512"}.get(
        found, found if found in CAPABILITIES else f"plain {platform.machine()} instructions"
    )


class Missing(Exception):
    """There is no library; the text says why, as a sentence's second half."""


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels. Missing if they cannot be built here."""
    sources = sorted(SOURCES.glob("*.cpp"))
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if not sources:
        raise Missing(f"its sources are not in {SOURCES}")
    if compiler is None:
        raise Missing(f"there is no C++ compiler ({', '.join(COMPILERS)}); on Debian or Ubuntu: sudo apt install g++")
    flags = [*FLAGS, *CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), ())]
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, timeout=MOST_SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{compiler} does not run ({error})") from None
    digest = hashlib.sha256(repr((flags, version, platform.machine(), platform.system())).encode())
    for path in [*sources, *sorted(SOURCES.glob("*.h"))]:
        digest.update(path.name.encode() + path.read_bytes())
    file = cache.folder() / f"cpu-{digest.hexdigest()[:24]}.so"
    if not file.is_file():
        compiled(compiler, flags, sources, file)
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise Missing(f"what {compiler} made does not load ({error})") from None


def compiled(compiler: str, flags: list[str], sources: list[Path], file: Path) -> None:
    """Build into a name of our own, then rename: whoever comes at the same time sees nothing, or all of it."""
    fresh = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        # without OpenMP (Apple's clang) it runs on one thread
        for threads in (["-fopenmp"], []):
            command = [compiler, *flags, *threads, *map(str, sources), "-o", str(fresh)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=MOST_SECONDS)
            if done.returncode == 0:
                os.replace(fresh, file)
                return
        reason = next((line for line in done.stderr.splitlines() if "error" in line), "it does not say why")
        raise Missing(f"{compiler} cannot compile it: {reason.strip()[:300]}")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{compiler} does not run ({error})") from None
    finally:
        fresh.unlink(missing_ok=True)


@functools.cache
def function(name: str, pointers: int, numbers: int):
    """A kernel's function: so many pointers, then 64-bit numbers, then the number of threads. It returns 0, or 1 where it has
    no kernel for these numbers."""
    found = getattr(library(), name)
    found.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * numbers + [ctypes.c_int]
    found.restype = ctypes.c_int
    return found
