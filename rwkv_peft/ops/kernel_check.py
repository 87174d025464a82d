"""Check that a recurrence computes on this machine what the definition says.

The check covers the forward pass, every gradient, several sequences in one row, states in and out, and inputs that careless
kernels fail on. Compiled kernels meet GPUs and drivers that they were never tried on, so they are checked at their first use,
and training uses those that have passed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_peft.common import json_reader
from rwkv_peft.common.atomic_io import write_json

from . import block_ops, kernel_cache, reference
from .block_ops import Wkv7Inputs, Wkv7Params

LENGTHS = (1, 70, 60)  # tokens of the sequences: shorter than a chunk, longer, and nearly one
HEADS, SIZE = 2, 64
KINDS = ("random", "repeated", "forgetful")
# largest difference from the definition, of the norm of an output or a gradient (float32: seen 5e-6; bfloat16: its rounding)
LIMITS = {torch.float32: 3e-5, torch.bfloat16: 2**-6, torch.float16: 2**-8}
# the same for the other operations: for bfloat16, what a norm makes of its rounding
AROUND_LIMITS = {torch.float32: 3e-5, torch.bfloat16: 2**-7}
AROUND_LENGTHS, AROUND_HEADS = (
    (1, 63, 70),
    3,
)  # with a bound where a kernel's part has one, and channels that fill no block
FAINT, SHORT = 1e-2, 1e-4


class KernelCheck(NamedTuple):
    """error: the largest relative difference seen; what: where."""

    error: float
    limit: float
    what: str

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit."""
        return self.error <= self.limit


def inputs(version: str, kind: str, size: int = SIZE) -> list[Tensor]:
    """Return inputs that a model of the version could give to its recurrence, float64.

    Args:
        version: Of RWKV.
        kind: "random"; "repeated": the same key again and again, replaced almost wholly; "forgetful": decays at their lower end.
        size: Of a head.
    """
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    shape = 1, sum(LENGTHS), HEADS, size
    r, k, v = normal(*shape), normal(*shape), normal(*shape)
    if version != "x070":
        w = -torch.exp(normal(*(shape[2:] if version == "x052" else shape)) - 1)
        if kind == "repeated":
            k, w = k[:, :1].expand(shape).clone(), torch.full_like(w, -1e-3)
        if kind == "forgetful":
            w = w * 1e3
        return [r, w, k, v, normal(HEADS, size)]
    direction = torch.nn.functional.normalize(k[:, :1].expand(shape) if kind == "repeated" else k, dim=-1)
    replaced = torch.full(shape, 0.999, dtype=torch.float64) if kind == "repeated" else torch.sigmoid(normal(*shape))
    random = -0.6065 * torch.sigmoid(normal(*shape))
    w = random if kind == "random" else torch.full(shape, -1e-3 if kind == "repeated" else -0.6065, dtype=torch.float64)
    return [r, w, k, v, -direction, direction * replaced]


def check_against_reference(
    version: str, wkv: Callable, device: str | torch.device, dtype: torch.dtype, size: int = SIZE
) -> KernelCheck:
    """Compare a recurrence with its definition.

    Args:
        version: Of RWKV.
        wkv: The recurrence.
        device: Where it runs.
        dtype: Of the inputs; the logarithm of the decay and states are float32.
        size: Of a head.
    """
    bounds = (0, *(sum(LENGTHS[: i + 1]) for i in range(len(LENGTHS))))
    worst = KernelCheck(0.0, LIMITS[dtype], "")
    for kind in KINDS:
        given = inputs(version, kind, size)
        # the logarithm of the decay and the bonus are float32 in a model, whatever the rest is
        kinds = [torch.float32 if i == 1 or x.dim() == 2 else dtype for i, x in enumerate(given)]
        given = [x.to(device, kept).requires_grad_() for x, kept in zip(given, kinds, strict=True)]
        start = torch.randn(len(LENGTHS), HEADS, size, size, generator=torch.Generator().manual_seed(1))
        start = start.to(device).requires_grad_()
        exact, s0 = (
            [x.detach().cpu().double().requires_grad_() for x in given],
            start.detach().cpu().double().requires_grad_(),
        )
        wanted = outputs(reference.DEFINITIONS[version], exact, s0, bounds)
        results = outputs(wkv, given, start, bounds)
        names = [
            "y",
            "state",
            *(f"gradient of {n}" for n in ("rwkvab" if version == "x070" else "rwkvu")),
            "gradient of s0",
        ]
        for name, one, other in zip(names, results, wanted, strict=True):
            whole = other.detach().norm()
            if (
                name == "gradient of w"
            ):  # where everything is forgotten it is nothing; a difference of sums, as fla has, is not
                whole = whole.clamp_min(float(wanted[4].detach().norm()) / 10)  # k's
            error = float((one.detach().cpu().double() - other.detach()).norm() / whole.clamp_min(1e-30))
            if not error <= worst.error:  # NaN is worse than anything
                worst = KernelCheck(error if error == error else float("inf"), worst.limit, f"{name}, {kind} inputs")
    return worst


def outputs(wkv: Callable, given: list[Tensor], s0: Tensor, bounds: tuple[int, ...]) -> list[Tensor]:
    """Return the output, the last state and every gradient, for fixed random output gradients."""
    y, state = wkv(*given, s0, bounds)
    rng = torch.Generator().manual_seed(2)
    # (numbers that every format holds)
    dy, dstate = (torch.randn(x.shape, generator=rng).bfloat16() for x in (y, state))
    grads = torch.autograd.grad([y, state], [*given, s0], [dy.to(y), dstate.to(state)])
    return [y, state, *grads]


def prove_around(
    around: ModuleType, wkv: Callable, device: str | torch.device, dtype: torch.dtype, size: int = SIZE
) -> KernelCheck:
    """Compare the other operations of a block with their definition in float64.

    Args:
        around: The module with the functions of block_ops.
        wkv: The recurrence that goes with it.
        device: Where they run.
        dtype: Of the inputs.
        size: Of a head.
    """
    rng = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    T, S, C, V = sum(AROUND_LENGTHS), len(AROUND_LENGTHS), AROUND_HEADS * size, 1000
    bounds = (0, *itertools.accumulate(AROUND_LENGTHS))
    host = torch.tensor(bounds)
    where = {d: SimpleNamespace(cu_seqlens=bounds, host=host, first=host[:-1].to(d)) for d in ("cpu", device)}
    targets = torch.randint(V, (T,), generator=rng)

    def block(module, wkv, place, gates, own, s0):
        return module.wkv7_block(wkv, Wkv7Inputs._make(gates), Wkv7Params(*own), s0, where[place], AROUND_HEADS)

    def first_block(module, wkv, place, gates, own, s0):
        return module.wkv7_block(
            wkv, Wkv7Inputs._make([*gates, None, None]), Wkv7Params(*own), s0, where[place], AROUND_HEADS
        )

    def token_shift_mix(module, _wkv, place, x, before, shares):
        return module.token_shift_mix(x, before, list(shares), where[place])

    def relu(module, _wkv, _place, x):
        return [module.square_relu(x)]

    def entropy(module, _wkv, place, logits):
        with torch.no_grad():
            loss, slopes = module.cross_entropy_grad(logits.clone(), targets.to(place), True)
        return [loss, slopes]

    gates, own, s0 = drawn(8, T, C), drawn(5, C), drawn(S, AROUND_HEADS, size, size)
    faint, short, s0_faint = gates.clone(), gates.clone(), s0 * FAINT
    faint[3], faint[7] = gates[3] * FAINT, gates[7] * FAINT  # values so small that the norm's least variance counts
    short[2, ::5] *= SHORT  # keys so short that a larger least length would show
    worst = KernelCheck(0.0, AROUND_LIMITS[dtype], "")
    for name, function, given in (
        ("a block", block, [gates, own, s0]), ("the first block", first_block, [gates[:6], own, s0]),
        ("a block of small values", block, [faint, own, s0_faint]), ("a block of short keys", block, [short, own, s0]),
        ("token shift", token_shift_mix, [drawn(T, C), drawn(S, C), drawn(6, C)]), ("the squared ReLU", relu, [drawn(T, C)]),
        ("cross entropy", entropy, [drawn(T, V)]),
    ):  # fmt: skip
        given = [x.float() if x is s0 or x is s0_faint else x.to(dtype) for x in given]  # (states are float32)
        results = all_of(function, around, wkv, device, [x.to(device) for x in given])
        exact = all_of(function, block_ops, reference.wkv7, "cpu", [x.double() for x in given])
        for one, other in zip(results, exact, strict=True):
            error = float((one.detach().cpu().double() - other).norm() / other.norm().clamp_min(1e-30))
            if not error <= worst.error:
                worst = KernelCheck(error if error == error else float("inf"), worst.limit, name)
    return worst


def all_of(function: Callable, module: ModuleType, wkv: Callable, place: Any, given: list[Tensor]) -> list[Tensor]:
    """Outputs, and gradients of what is given."""
    given = [x.detach().requires_grad_() for x in given]
    results = function(module, wkv, place, *given)
    learnt = [x for x in results if x.requires_grad]
    slopes = [torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).bfloat16() for x in learnt]
    grads = torch.autograd.grad(learnt, given, [s.to(x) for s, x in zip(slopes, learnt, strict=True)]) if learnt else ()
    return [*(x.detach() for x in results), *grads]


def remembered(
    what: str, prove: Callable[[torch.dtype], KernelCheck], device: torch.device, digest: str
) -> KernelCheck | None:
    """Return the check of a GPU's kernels; None if an earlier check with the same GPU, driver, torch and sources has passed.

    Args:
        what: Names what is checked.
        prove: Runs the check for an input format.
        device: The GPU.
        digest: Of everything that the result depends on.
    """
    gpu = torch.cuda.get_device_properties(device)
    key = f"{what} {gpu.name} {torch.version.cuda} {torch.__version__} {driver()} {digest}"
    file = kernel_cache.folder() / "proofs.json"
    try:
        known = json_reader.load_json(file)
    except (OSError, ValueError):
        known = {}
    if isinstance(known, dict) and key in known:
        return None
    proofs = [prove(dtype) for dtype in (torch.float32, torch.bfloat16)]
    worst = max(proofs, key=lambda proof: proof.error / proof.limit)
    if worst.passed:
        write_json(file, {**known, key: worst.error} if isinstance(known, dict) else {key: worst.error})
    return worst


def driver() -> str:
    """Return the version of NVIDIA's driver, or "" where it is not known."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            return file.readline().strip()
    except OSError:  # WSL has none; its driver is that of Windows
        return str(torch.cuda.driver_version()) if hasattr(torch.cuda, "driver_version") else ""
