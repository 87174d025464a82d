"""./training.sh --selftest: compares every kernel that works on this machine with the definition of the recurrences."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from rwkv_peft.common import hardware
from rwkv_peft.common.errors import UserError
from rwkv_peft.model.arch import NUMBERS
from rwkv_peft.ops import dispatch, fla, kernel_check
from rwkv_peft.ops.cpu import build as cpu_build
from rwkv_peft.ops.cuda import build as cuda_build

MISSING = cpu_build.KernelUnavailable, cuda_build.KernelUnavailable, fla.KernelUnavailable


def selftest() -> None:
    """Print a line for every version, backend and dtype. Raise UserError if one computes something else."""
    kind = hardware.device_kind()
    failed: list[str] = []
    device = hardware.local_device(0)
    print(f"{hardware.describe_device()}; torch {torch.__version__}")
    print(
        f"{kernel_check.HEADS} heads of {kernel_check.SIZE}, sequences of {kernel_check.LENGTHS} tokens, "
        f"{len(kernel_check.KINDS)} kinds of inputs; forward,"
    )
    print("every gradient, states in and out: the largest difference from the float64 definition, of the norm of each")
    for what, name, check in list_checks(kind):
        for dtype in (torch.float32, torch.bfloat16):
            label = f"{what} OP={name:<22}{str(dtype).removeprefix('torch.'):<9}"
            try:
                if name == "cpu":
                    cpu_build.library()
                elif (package := name.split()[0]) in dispatch.FOR_GPU:
                    dispatch.FOR_GPU[package].digest()
                result = check(device, dtype)
            except MISSING as missing:
                print(f"{label} missing: {missing}")
                break
            verdict = "passed" if result.passed else "FAILED"
            print(f"{label} {verdict}  {result.error:.1e} of {result.limit:.1e} allowed ({result.what})")
            failed += [] if result.passed else [f"OP={name} for {what} in {dtype}"]
    if failed:
        raise UserError(
            f"{', '.join(failed)}: computes something else than the definition; please report the lines above."
        )


def list_checks(
    kind: str,
) -> Iterator[tuple[str, str, Callable[[torch.device, torch.dtype], kernel_check.KernelCheck]]]:
    """Yield what is checked, of which backend, and the function that checks it. kind: cpu or cuda."""
    for version in dispatch.WKV:
        for name, wkv in dispatch.every_way(version, kind).items():
            if name != "reference":
                yield (
                    f"RWKV-{NUMBERS[version].lstrip('v')}",
                    name,
                    functools.partial(kernel_check.check_against_reference, version, wkv),
                )
    for name, wkv in dispatch.available("x070", kind).items():
        if name in dispatch.AROUND:
            yield "blocks", name, functools.partial(kernel_check.prove_around, dispatch.AROUND[name], wkv)
