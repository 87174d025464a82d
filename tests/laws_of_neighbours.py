"""What must hold of whatever stands around the recurrence, of whatever backend: it equals ops/neighbours.py.

module: has the functions of neighbours. wkv: the recurrence that goes with it.
"""

from __future__ import annotations

import types

import laws_of_ops as laws
import pytest
import torch

from rwkv_peft.ops import chunked, neighbours
from rwkv_peft.ops.neighbours import Gates, Own

H, N = 3, 16
C = H * N
PACKS = [(0, 1), (0, 33), (0, 1, 2, 40), (0, 17, 64)]
# largest error, relative to the definition in float64
NOISE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}

packs = pytest.mark.parametrize("borders", PACKS)
dtypes = pytest.mark.parametrize("dtype", NOISE)


def where(borders):
    host = torch.tensor(borders)
    return types.SimpleNamespace(cu_seqlens=tuple(borders), host=host, first=host[:-1])


def compare(dtype, ours, definition, inputs):
    """Outputs and all gradients of ours in dtype beside the definition's in float64."""

    def run(function, dtype):
        given = [None if x is None else x.to(dtype).detach().requires_grad_() for x in inputs]
        outputs = function(*given)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        torch.manual_seed(3)
        slopes = [torch.randn(y.shape, dtype=torch.float64).to(y.dtype) for y in outputs]
        leaves = [x for x in given if x is not None]
        return [x.detach().double() for x in (*outputs, *torch.autograd.grad(outputs, leaves, slopes))]

    rounded = [None if x is None else x.to(dtype) for x in inputs]
    exact = run(definition, torch.float64) if dtype == torch.float32 else None
    if exact is None:  # of the same rounded inputs
        inputs = [None if x is None else x.double() for x in rounded]
        exact = run(definition, torch.float64)
        inputs = rounded
    assert max(laws.errors(run(ours, dtype), exact)) < NOISE[dtype]


def mixes(module, dtype, borders, count):
    torch.manual_seed(0)
    inputs = torch.randn(borders[-1], C), torch.randn(len(borders) - 1, C), *torch.rand(count, C)
    call = lambda module: lambda x, before, *shares: module.mixes(x, before, shares, where(borders))  # noqa: E731
    compare(dtype, call(module), call(neighbours), inputs)


def around7(module, wkv, dtype, borders, first_layer):
    torch.manual_seed(0)
    T, S = borders[-1], len(borders) - 1
    gates = [torch.randn(T, C) for _ in Gates._fields]
    if first_layer:
        gates[6:] = [None, None]
    inputs = *gates, *(torch.randn(C) for _ in Own._fields), torch.randn(S, H, N, N)

    def call(module, wkv):
        def around(*x):
            return module.around7(wkv, Gates(*x[:8]), Own(*x[8:13]), x[13], where(borders), H)

        return around

    compare(dtype, call(module, wkv), call(neighbours, chunked.wkv7), inputs)


def only_the_gradients_that_are_asked_for(module, wkv):
    """A frozen parameter's is None, and what only it would need is not allocated."""
    gates, own = [torch.randn(9, C).requires_grad_() for _ in range(8)], [torch.randn(C) for _ in range(5)]
    y, _ = module.around7(wkv, Gates(*gates), Own(*own), torch.zeros(1, H, N, N), where((0, 9)), H)
    y.sum().backward()
    assert all(x.grad is not None for x in gates) and all(x.grad is None for x in own)


def a_key_of_zero_length_is_no_nan(module, wkv):
    """kk is divided by a length that is held above zero, whose slope is nothing there."""
    gates, own = (
        [torch.randn(5, C).requires_grad_() for _ in range(8)],
        [torch.randn(C).requires_grad_() for _ in range(5)],
    )
    gates[2] = torch.zeros(5, C, requires_grad=True)
    found = []
    for module_of, wkv_of in ((module, wkv), (neighbours, chunked.wkv7)):
        y, _ = module_of.around7(wkv_of, Gates(*gates), Own(*own), torch.zeros(1, H, N, N), where((0, 5)), H)
        found.append(torch.autograd.grad(y.sum(), [*gates, *own]))
    for ours, theirs in zip(*found, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def squared_relu(module, dtype, shape):
    torch.manual_seed(0)
    compare(dtype, module.square_relu, neighbours.square_relu, [torch.randn(shape)])


def losses_and_slopes(module, dtype, columns, scale):
    """Whatever the number of columns is, and however far apart the logits are."""
    logits, targets = (torch.randn(9, columns) * scale).to(dtype), torch.randint(columns, (9,))
    loss, slopes = neighbours.slopes(logits.double(), targets, True)
    ours, found = module.slopes(logits.clone(), targets, True)
    assert abs(float(ours - loss)) <= 1e-5 * max(1.0, abs(float(loss)))
    assert (found.double() - slopes).abs().max() <= (2**-8 if dtype == torch.bfloat16 else 1e-5)
    kept = logits.clone()
    assert float(module.slopes(kept, targets, False)[0]) == float(ours) and torch.equal(kept, logits)


def a_logit_that_is_nan_makes_the_loss_nan(module):
    logits = torch.randn(3, 32)
    logits[1, 7] = float("nan")
    assert module.slopes(logits, torch.tensor([1, 2, 3]), True)[0].isnan()
