"""cuda/*.cu -> kernels of the GPU at hand, compiled when they are first used and kept in the user's cache.

By NVRTC, which comes with torch: a toolkit with nvcc, which few have under WSL, is not needed. The sources want no header but
their own, so that takes seconds. What torch itself has for this looks for a toolkit's headers and gives up without them; the
bindings below are NVIDIA's own, and come with torch as well.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rwkv_peft.common.atomic_io import atomic_write
from rwkv_peft.common.errors import pip_command
from rwkv_peft.common.formatting import first_line
from rwkv_peft.common.paths import ROOT
from rwkv_peft.ops import kernel_cache

SOURCES = ROOT / "cuda"
FILES = ("wkv7", "wkv6", "wkv7_chunked", "wkv7_onepass", "wkv7_block", "token_shift")
UNASKED = 48 << 10  # bytes of shared memory that a block may have without being allowed more
HEADERS = ("device.h", "tensor.h", "wkv7_parts.h")


class KernelUnavailable(Exception):
    """There are no kernels; the text says why, as a sentence's second half."""


Argument = Tensor | int | None  # None: a null pointer


class Launch(Protocol):
    """A function that starts a kernel on the current stream."""

    def __call__(
        self, name: str, grid: tuple[int, int], args: Sequence[Argument], threads: int = 0, shared: int = 0
    ) -> None:
        """Start a kernel.

        Args:
            name: Of the kernel.
            grid: Blocks.
            args: Of the kernel.
            threads: Of a block; 0: the head size.
            shared: Bytes of shared memory beside what the kernel declares.
        """


def launcher(device: torch.device, size: int) -> Launch:
    """What starts the kernels for heads of this size, a thread for each of its rows. Missing if they cannot be compiled."""
    index = torch.cuda.current_device() if device.index is None else device.index

    def launch(name: str, grid: tuple[int, int], args: Sequence[Argument], threads: int = 0, shared: int = 0) -> None:
        _, driver = bindings()
        values, kinds = packed(args)
        with torch.cuda.device(index):
            bind(index)
            function = functions(index, name.rsplit("_", 2)[0], size)(name)
            if shared > UNASKED:
                allow(index, name, size, shared)
            stream = torch.cuda.current_stream().cuda_stream
            block = threads or size, 1, 1
            checked(driver, driver.cuLaunchKernel(function, *grid, 1, *block, shared, stream, (values, kinds), 0))

    return launch


def packed(args: Sequence[Argument]) -> tuple[tuple[int, ...], tuple]:
    """Values and C types. ValueError for a number that an int does not hold: the bindings would cut it off in silence."""
    if any(isinstance(x, int) and not -(2**31) <= x < 2**31 for x in args):
        raise ValueError(f"one of {[x for x in args if isinstance(x, int)]} is more than a kernel can count")
    values = tuple(x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in args)
    return values, tuple(ctypes.c_int if isinstance(x, int) else ctypes.c_void_p for x in args)


def bind(index: int) -> None:
    """Give this thread the GPU's context if it has none.

    torch does not where the GPU is the first one and the thread has not called it yet, as in autograd's threads.
    """
    _, driver = bindings()
    if not int(checked(driver, driver.cuCtxGetCurrent())):
        gpu = checked(driver, driver.cuDeviceGet(index))
        checked(driver, driver.cuCtxSetCurrent(checked(driver, driver.cuDevicePrimaryCtxRetain(gpu))))


@functools.cache
def allow(index: int, name: str, size: int, shared: int) -> None:
    """Let a kernel have more shared memory than others."""
    _, driver = bindings()
    most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    function = functions(index, name.rsplit("_", 2)[0], size)(name)
    checked(driver, driver.cuFuncSetAttribute(function, most, shared))


@functools.cache
def bindings():
    """NVIDIA's Python bindings of NVRTC and of the driver."""
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as error:
        raise KernelUnavailable(f"a package is missing ({error}): {pip_command('cuda-bindings')}") from None
    return nvrtc, driver


def checked(driver, result: tuple):
    """What a call of the driver has returned. RuntimeError if it is an error."""
    if int(result[0]):
        _, words = driver.cuGetErrorString(result[0])
        raise RuntimeError(f"CUDA error {int(result[0])}: {words.decode() if words else 'unknown'}")
    return result[1] if len(result) > 1 else None


@functools.cache
def functions(index: int, file: str, size: int) -> Callable[[str], object]:
    """From a kernel's name to the kernel, for the GPU of this number."""
    _, driver = bindings()
    code = compiled(file, "".join(map(str, torch.cuda.get_device_capability(index))), size)
    module = checked(driver, driver.cuModuleLoadData(code))
    return functools.cache(lambda name: checked(driver, driver.cuModuleGetFunction(module, name.encode())))


def compiled(file: str, capability: str, size: int) -> bytes:
    """The machine code of a source file for GPUs of a capability (90 for 9.0). Missing if NVRTC does not make it."""
    nvrtc, _ = bindings()
    version = compiler()
    kept = kernel_cache.folder() / f"{file}-{capability}-{size}-{digest()}-{version}.cubin"
    if kept.is_file():
        return kept.read_bytes()
    source = (SOURCES / f"{file}.cu").read_bytes()
    headers, names = [(SOURCES / name).read_bytes() for name in HEADERS], [name.encode() for name in HEADERS]
    _, program = nvrtc.nvrtcCreateProgram(source, f"{file}.cu".encode(), len(headers), headers, names)
    options = [f"--gpu-architecture=sm_{capability}".encode(), f"-DN={size}".encode(), b"--std=c++17"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(error):
        _, length = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * length
        nvrtc.nvrtcGetProgramLog(program, log)
        words = log.decode(errors="replace").strip("\0 \n") or str(error)
        raise KernelUnavailable(f"NVRTC {version} cannot compile {file}.cu for sm_{capability} ({words[:300]})")
    _, length = nvrtc.nvrtcGetCUBINSize(program)
    code = b" " * length
    nvrtc.nvrtcGetCUBIN(program, code)
    nvrtc.nvrtcDestroyProgram(program)
    with atomic_write(kept) as out:
        out.write(code)
    return code


@functools.cache
def compiler() -> str:
    """The version of NVRTC. Missing without it."""
    nvrtc, _ = bindings()
    try:
        _, *version = nvrtc.nvrtcVersion()
    except RuntimeError as error:  # its library is not there
        words = first_line(error)
        raise KernelUnavailable(f"NVRTC does not load ({words}); it comes with torch's builds for CUDA") from None
    return ".".join(map(str, version))


@functools.cache
def digest() -> str:
    """Return a hash of the sources."""
    return hashed(SOURCES / name for name in (*(f"{file}.cu" for file in FILES), *HEADERS))


def state() -> str:
    """Return a hash of everything that a kernel check depends on.

    That is the sources, what compiles and launches them, and the check itself. Raises KernelUnavailable without a compiler.
    """
    here = Path(__file__).parent
    return f"{digest()} {hashed([*here.glob('*.py'), here.parent / 'kernel_check.py'])} {compiler()}"


def hashed(files: Iterable[Path]) -> str:
    """Return a hash of the names and contents of files."""
    sha = hashlib.sha256()
    for path in sorted(files):
        sha.update(path.name.encode() + path.read_bytes())
    return sha.hexdigest()[:16]
