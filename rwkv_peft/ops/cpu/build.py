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
import tempfile
from pathlib import Path

import torch

from rwkv_peft.common.paths import ROOT
from rwkv_peft.ops import kernel_cache

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
    level = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": "AVX-512"}.get(
        level, level if level in CAPABILITIES else f"plain {platform.machine()} instructions"
    )


class KernelUnavailable(Exception):
    """There is no library; the text says why, as a sentence's second half."""


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels. Missing if they cannot be built here."""
    sources = sorted(SOURCES.glob("*.cpp"))
    if not sources:
        raise KernelUnavailable(f"its sources are not in {SOURCES}")
    compilers = list(dict.fromkeys(filter(None, map(shutil.which, COMPILERS))))
    if not compilers:
        raise KernelUnavailable(
            f"there is no C++ compiler ({', '.join(COMPILERS)}); on Debian or Ubuntu: sudo apt install g++"
        )
    reasons = []
    for compiler in compilers:
        try:
            return of_compiler(compiler, sources)
        except KernelUnavailable as missing:
            reasons.append(str(missing))
    raise KernelUnavailable("; ".join(dict.fromkeys(reasons)))


def of_compiler(compiler: str, sources: list[Path]) -> ctypes.CDLL:
    """Load the kernels built by this compiler; build them first if they are not in the cache.

    A file's name ends with its size: a file that was cut off would end the process without a message, so it is not loaded.
    """
    flags = [*FLAGS, *CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), ())]
    version = output([compiler, "--version"]).stdout
    # without OpenMP (Apple's clang, or clang without libomp) it runs on one thread
    probe = output([compiler, "-fopenmp", "-x", "c++", "-shared", "-o", os.devnull, os.devnull])
    threads = [] if probe.returncode else ["-fopenmp"]
    digest = hashlib.sha256(repr((flags, threads, version, platform.machine(), platform.system())).encode())
    for path in [*sources, *sorted(SOURCES.glob("*.h"))]:
        digest.update(path.name.encode() + path.read_bytes())
    folder, stem = kernel_cache.folder(), f"cpu-{digest.hexdigest()[:24]}"
    for file in folder.glob(f"{stem}-*.so"):
        if file.name == f"{stem}-{file.stat().st_size}.so":
            try:
                return ctypes.CDLL(str(file))
            except OSError:  # damaged all the same: it is made again
                continue
    file = compiled([compiler, *flags, *threads, *map(str, sources)], folder, stem)
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise KernelUnavailable(f"what {compiler} made does not load ({error})") from None


def output(command: list[str]) -> subprocess.CompletedProcess:
    """Run a command and return what it printed. Raises KernelUnavailable if it does not run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=MOST_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelUnavailable(f"{command[0]} does not run ({error})") from None


def compiled(command: list[str], folder: Path, stem: str) -> Path:
    """Build into a name of our own, then rename: whoever comes at the same time sees nothing, or all of it."""
    handle, name = tempfile.mkstemp(prefix=f".{stem}-", dir=folder)
    fresh = Path(name)
    try:
        done = output([*command, "-o", name])
        if done.returncode:
            words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            telling = next((line for line in words if "No space" in line or " error" in line.lower()), "")
            last = " / ".join(dict.fromkeys([telling, *words[-1:]])).strip(" /")[:300]
            raise KernelUnavailable(
                f"{command[0]} cannot compile it: {last or f'it ended with code {done.returncode}'}"
            )
        os.fsync(handle)
        file = folder / f"{stem}-{fresh.stat().st_size}.so"
        os.replace(fresh, file)
        return file
    finally:
        os.close(handle)
        fresh.unlink(missing_ok=True)


@functools.cache
def function(name: str, pointers: int, numbers: int):
    """Return a kernel's C function.

    Args:
        name: Of the function in the library.
        pointers: How many pointers it takes first; then come 64-bit numbers, then the number of threads.
        numbers: How many 64-bit numbers it takes.

    Returns:
        A function that returns 0, or 1 where it has no kernel for these numbers.
    """
    symbol = getattr(library(), name)
    symbol.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * numbers + [ctypes.c_int]
    symbol.restype = ctypes.c_int
    return symbol
