"""Which implementation computes: the one table of backends, and what `auto` becomes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_peft.common.errors import SettingError, SettingErrors
from rwkv_peft.ops.cuda.workspace import SIZES as CUDA_SIZES

from . import block_ops, fla, kernel_check, loss, reference, torch_wkv6, torch_wkv7
from .block_ops import Where, Wkv7Inputs, Wkv7Params
from .cpu import build, fused
from .cpu import wkv as cpu
from .cuda import build as cuda_build
from .cuda import fused as cuda_fused
from .cuda import wkv as cuda
from .lowrank_merge import Folded
from .recompute import recomputable, recomputing

# version -> backend -> function; the signatures are those of the definition in reference.py
BACKENDS: dict[str, dict[str, Callable[..., Any]]] = {
    "x070": {
        "torch": torch_wkv7.wkv7,
        "cpu": cpu.wkv7,
        "cuda": cuda.wkv7,
        "fla": fla.wkv7,
    },
    "x060": {
        "torch": torch_wkv6.wkv6,
        "cpu": cpu.wkv6,
        "cuda": cuda.wkv6,
        "fla": fla.wkv6,
    },
    "x052": {
        "torch": torch_wkv6.wkv5,
        "cpu": cpu.wkv5,
        "cuda": cuda.wkv5,
        "fla": fla.wkv5,
    },
}
for version in BACKENDS:
    if version not in reference.DEFINITIONS:
        raise TypeError(f"rwkv_peft/ops/reference.py: DEFINITIONS has no row for {version}")
WKV: dict[str, dict[str, Callable[..., Any]]] = {
    version: {"reference": reference.DEFINITIONS[version], **row} for version, row in BACKENDS.items()
}

# what runs on a kind of device and nowhere else
OF_DEVICE = {"cpu": "cpu", "cuda": "cuda", "fla": "cuda"}


class ForGPU(NamedTuple):
    """Kernels for GPUs.

    Attributes:
        words: What they are, for the user.
        digest: Returns a hash of everything that their results depend on.
        missing: The exception raised where they are not available.
    """

    words: str
    digest: Callable[[], str]
    missing: type[Exception]


# kernels for GPUs, the quickest first
FOR_GPU = {
    "cuda": ForGPU("CUDA kernels", lambda: cuda_build.state(), cuda_build.KernelUnavailable),
    "fla": ForGPU("flash-linear-attention", lambda: fla.version(), fla.KernelUnavailable),
}


class KernelVariants(NamedTuple):
    """Recurrences that a backend chooses between, by the shape of what it is given: token by token, and others.

    others: their names. only: from one of them to the recurrence that is always computed so; among: from those that may be chosen
    beside token by token.
    """

    others: tuple[str, ...]
    only: Callable[[str], Callable]
    among: Callable[[Sequence[str]], Callable]


# backend -> its block operations; the others use the definition
AROUND: dict[str, ModuleType] = {"cpu": fused, "cuda": cuda_fused}

# (backend, version) -> that
WAYS = {("cuda", "x070"): KernelVariants(tuple(cuda.WAYS), cuda.only, cuda.among)}


@dataclass(frozen=True)
class Ops:
    """What a model of one version computes with: a backend's recurrence and its other operations.

    Attributes:
        name: The backend.
        wkv: The recurrence.
        around: The module with the functions of block_ops.
        why: What the backend is and why it was chosen, for the user, or "".
    """

    name: str
    wkv: Callable
    around: ModuleType = block_ops
    why: str = ""

    @property
    def reads(self) -> tuple[torch.dtype, ...]:
        """Formats of weights that a product of a few rows reads as they are."""
        return self.around.READS

    def decode_step(self, model) -> Callable | None:
        """What takes the place of a finished model's blocks for a single token, if there is such a thing: see decode7.py."""
        return self.around.decode_step(model)

    def recomputing(self):
        """A context in which what mixes, square_relu and layer_norm make is not kept for the backward pass."""
        return recomputing()

    def token_shift(self, x: Tensor, before: Tensor, where: Where) -> Tensor:
        """As block_ops.token_shift."""
        return block_ops.token_shift(x, before, where)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """As block_ops.linear."""
        return self.around.linear(x, weight)

    def token_shift_mix(self, x: Tensor, before: Tensor, shares: Sequence[Tensor], where: Where) -> list[Tensor]:
        """As block_ops.token_shift_mix."""
        return recomputable(
            lambda x, before, *shares: self.around.token_shift_mix(x, before, shares, where), x, before, *shares
        )

    def square_relu(self, x: Tensor) -> Tensor:
        """As block_ops.square_relu."""
        return recomputable(self.around.square_relu, x)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x: [T, C]; weight, bias: [C] in the dtype of x."""
        return recomputable(block_ops.layer_norm, x, weight, bias)

    def wkv7_block(
        self, gates: Sequence, own: Sequence[Tensor], s0: Tensor, where: Where, heads: int
    ) -> tuple[Tensor, Tensor]:
        """gates, own: in the order of block_ops.Wkv7Inputs and block_ops.Wkv7Params."""
        return self.around.wkv7_block(self.wkv, Wkv7Inputs(*gates), Wkv7Params(*own), s0, where, heads)

    def fold(self, weight: Tensor, B: Tensor, A: Tensor, x: Tensor) -> Folded:
        """As lowrank_merge.fold."""
        return self.around.fold(weight, B, A, x)

    def cross_entropy(self, x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        """loss.linear_cross_entropy: the sum over rows x [R, C]."""
        return loss.linear_cross_entropy(x, head, targets, self.around.cross_entropy_grad)


def available(version: str, device: str) -> dict[str, Callable]:
    """The recurrences that can be asked for on a kind of device, by backend."""
    return {name: wkv for name, wkv in WKV[version].items() if OF_DEVICE.get(name, device) == device}


def every_way(version: str, device: str) -> dict[str, Callable]:
    """`available`, and what one of them chooses between by itself."""
    functions = available(version, device)
    for (name, of), ways in WAYS.items():
        if name in functions and of == version:
            functions |= {f"{name} tokens": ways.among(()), **{f"{name} {way}": ways.only(way) for way in ways.others}}
    return functions


def choose(op: str, version: str, device: str = "cpu", head_size: int = 64) -> Ops:
    """What computes a version (x070 ...) on a kind of device. Raises Problems for what is not there."""
    there = WKV.get(version, {})
    if op != "auto" and (op not in OF_DEVICE or op not in there):
        return made(op, version)
    if op != "auto" and OF_DEVICE[op] != device:
        wants = (
            "is for NVIDIA GPUs, and none was found"
            if OF_DEVICE[op] == "cuda"
            else "is for training without a GPU, and there is one"
        )
        raise SettingErrors(SettingError("OP", f"{wants}; use auto"))
    if not there.keys() & {kind for kind, of in OF_DEVICE.items() if of == device}:
        return made("torch", version, f"there is no kernel for RWKV {version}")
    if device == "cuda":
        if head_size in CUDA_SIZES:
            return on_gpu(op, version, head_size)
        words = f"{heads(CUDA_SIZES)}, and these have {head_size}"
        if op != "auto":
            raise SettingErrors(SettingError("OP", f"{words}; use auto"))
        return made("torch", version, words)
    try:
        build.library()
        if head_size not in cpu.SIZES:
            raise build.KernelUnavailable(f"{heads(cpu.SIZES)}, and these have {head_size}")
    except build.KernelUnavailable as missing:
        if op == "cpu":
            raise SettingErrors(SettingError("OP", f"the C++ kernels are missing: {missing}")) from None
        return made("torch", version, f"half as fast as the C++ kernels, which are missing: {missing}")
    return made("cpu", version, f"C++ kernels, {build.capability()}")


def heads(sizes: Sequence[int]) -> str:
    """Return a sentence about the head sizes that have kernels."""
    return f"there are kernels for heads of {', '.join(map(str, sizes))} channels"


def on_gpu(op: str, version: str, size: int) -> Ops:
    """Kernels that compute on this GPU what the definition says. They are asked once for a GPU and a driver."""
    reasons = []
    for name in [kind for kind in FOR_GPU if kind in WKV[version]] if op == "auto" else (op,):
        check, wrong = check_kernel(name, version, size, recurrence(version, by_tokens(name, version), size))
        if not wrong:
            ops = made(name, version, f"{FOR_GPU[name].words}{seen(check)}")
            return what_is_right(ops, version, size)
        if op == name:
            raise SettingErrors(SettingError("OP", f"{FOR_GPU[name].words} cannot be used: {wrong}; use auto"))
        reasons.append(f"OP={name}: {wrong}")
    return made("torch", version, f"slower than kernels for GPUs, which are not used. {'. '.join(reasons)}")


def what_is_right(ops: Ops, version: str, size: int) -> Ops:
    """A backend whose recurrence token by token is right: with what else of it is right as well."""
    if ways := WAYS.get((ops.name, version)):
        right = []
        for way in ways.others:
            _, wrong = check_kernel(ops.name, f"{version} {way}", size, recurrence(version, ways.only(way), size))
            right += [] if wrong else [way]
            ops = replace(ops, why=f"{ops.why}; not {way}: {wrong}") if wrong else ops
        ops = replace(ops, wkv=ways.among(right)) if len(right) < len(ways.others) else ops
    if ops.around is not block_ops:
        wkv = by_tokens(ops.name, "x070")
        _, wrong = check_kernel(
            ops.name,
            "around",
            size,
            lambda device, dtype: kernel_check.prove_around(ops.around, wkv, device, dtype, size),
        )
        if wrong:
            ops = replace(ops, around=block_ops, why=f"{ops.why}; the rest of a block on torch: {wrong}")
    return ops


def by_tokens(name: str, version: str) -> Callable:
    """The recurrence of a backend in the way that every shape can go."""
    ways = WAYS.get((name, version))
    return ways.among(()) if ways else WKV[version][name]


def recurrence(version: str, wkv: Callable, size: int) -> Callable:
    """From a device and a format to the proof of a recurrence."""
    return lambda device, dtype: kernel_check.check_against_reference(version, wkv, device, dtype, size)


def seen(check: kernel_check.KernelCheck | None) -> str:
    """Return the measured error as words, or ""."""
    return f", error {check.error:.1e} on this GPU" if check else ""


def check_kernel(name: str, what: str, size: int, prove: Callable) -> tuple[kernel_check.KernelCheck | None, str]:
    """What kernels of FOR_GPU have shown on this GPU just now (None: at an earlier time), and why they cannot be used, or ""."""
    kind = FOR_GPU[name]
    try:
        digest = kind.digest()
        device = torch.device("cuda", torch.cuda.current_device())
        check = kernel_check.remembered(f"{name} {what} {size}", functools.partial(prove, device), device, digest)
    except kind.missing as missing:
        return None, str(missing)
    except Exception as error:  # whatever a driver, a GPU or a package has against them: torch computes as well
        words = (str(error).splitlines() or [""])[0][:200]
        must_still_compute(name, words)
        return None, f"they do not run on this GPU ({type(error).__name__}: {words})"
    if check is None or check.passed:
        return check, ""
    return check, f"they are wrong on this GPU ({check.what}: {check.error:.1e})"


def must_still_compute(name: str, words: str) -> None:
    """Problems if what a kernel has done left the GPU unusable to this process: nothing can be computed on it any more."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        message = (
            f"{FOR_GPU[name].words} broke off on this GPU ({words}), which leaves it unusable to this run; use torch"
        )
        raise SettingErrors(SettingError("OP", message)) from error


def made(name: str, version: str, why: str = "") -> Ops:
    """Return the operators of a backend. Raises SettingErrors if the backend does not compute this version."""
    if name not in (there := WKV.get(version, {})):
        words = (
            f"use one of auto, {', '.join(there)}" if there else "rwkv_peft/ops/dispatch.py: BACKENDS has no row for it"
        )
        raise SettingErrors(SettingError("OP", f"nothing called {name} computes RWKV {version}; {words}"))
    return Ops(name, WKV[version][name], AROUND.get(name, block_ops), why)
