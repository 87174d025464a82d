"""What every WKV must do, of whatever version and backend. The files test_ops_wkv*.py say for which inputs.

wkv: (*inputs, s0, cu_seqlens) -> (y, sT). Inputs of four dimensions are [B, T, H, N]; those of two, [H, N], are the same
for all tokens.
"""

from __future__ import annotations

import functools

import pytest
import torch

NOISE = 2e-6  # a few roundings of float32


def start(sequences, heads, size, dtype=torch.float32):
    return torch.randn(sequences, heads, size, size, dtype=dtype).requires_grad_()


def run(wkv, inputs, s0):
    """Outputs and gradients, for random gradients of both outputs."""
    torch.manual_seed(7)
    y, end = wkv(*inputs, s0)
    dy, dend = torch.randn(y.shape, dtype=torch.float64), torch.randn(end.shape, dtype=torch.float64)
    grads = torch.autograd.grad([y, end], [*inputs, s0], [dy.to(y.dtype), dend.to(end.dtype)])
    return [x.detach().double() for x in (y, end, *grads)]


def errors(result, exact):
    return [((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in zip(result, exact, strict=True)]


def part(inputs, begin, end):
    return [x[:, begin:end] if x.dim() == 4 else x for x in inputs]


def equals_the_reference(wkv, reference, names, inputs, s0):
    exact = run(reference, inputs, s0)
    result = errors(run(wkv, inputs, s0), exact)
    limit = errors(run(functools.partial(reference, dtype=torch.float32), inputs, s0), exact)
    names = ("y", "sT", *(f"d{name}" for name in names), "ds0")
    for name, error, yardstick in zip(names, result, limit, strict=True):
        # twice the error of the plain loop; where that is next to nothing, a few roundings
        assert error <= max(2 * yardstick, NOISE), f"{name}: {error:.1e}, the plain float32 loop has {yardstick:.1e}"


def equals_the_reference_to_the_rounding_of_bf16(wkv, reference, inputs, s0):
    exact = run(reference, [x.detach().double().requires_grad_() for x in inputs], s0)
    assert max(errors(run(wkv, inputs, s0), exact)) < 2**-8


def halves_equal_the_whole(wkv, inputs, s0, cut):
    def halves(*given):
        first, middle = wkv(*part(given[:-1], 0, cut), given[-1])
        second, end = wkv(*part(given[:-1], cut, None), middle)
        return torch.cat([first, second], 1), end

    assert max(errors(run(halves, inputs, s0), run(wkv, inputs, s0))) < NOISE


def packed_equals_alone(wkv, inputs, s0, bounds):
    def alone(*given):
        parts = [
            wkv(*part(given[:-1], begin, end), given[-1][i : i + 1])
            for i, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False))
        ]
        return torch.cat([y for y, _ in parts], 1), torch.cat([s for _, s in parts])

    packed = run(functools.partial(wkv, cu_seqlens=bounds), inputs, s0)
    assert max(errors(packed, run(alone, inputs, s0))) < NOISE


def no_state_is_a_zero_state(wkv, inputs, zero):
    y, end = wkv(*inputs)
    y0, end0 = wkv(*inputs, zero)
    assert torch.equal(y, y0) and torch.equal(end, end0) and end.dtype == torch.float32


def refuses_bounds(wkv, inputs, bounds):
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        wkv(*inputs, None, bounds)


def leaves_its_inputs_as_they_are(wkv, inputs, s0):
    before = [x.detach().clone() for x in (*inputs, s0)]
    run(wkv, inputs, s0)
    assert all(torch.equal(a, b) for a, b in zip((*inputs, s0), before, strict=True))


def uses_no_memory_that_it_did_not_write(monkeypatch, wkv, inputs, s0):
    """Memory that is used before it is written would be NaN."""

    def poison(original):
        def make(*args, **kwargs):
            made = original(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return make

    clean = run(wkv, inputs, s0)
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    assert all(torch.equal(a, b) for a, b in zip(clean, run(wkv, inputs, s0), strict=True))
