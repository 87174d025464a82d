"""What must hold of whatever is around the recurrence, of whatever backend: it equals ops/block_ops.py.

module: has the functions of neighbours. wkv: the recurrence that goes with it.
"""

from __future__ import annotations

import types

import pytest
import torch

from helpers import wkv_laws as laws
from rwkv_peft.ops import block_ops, torch_wkv7
from rwkv_peft.ops.block_ops import Wkv7Inputs, Wkv7Params

H, N = 3, 16
C = H * N
PACKS = [(0, 1), (0, 33), (0, 1, 2, 40), (0, 17, 64)]
# largest error, relative to the definition in float64
NOISE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}

packs = pytest.mark.parametrize("bounds", PACKS)
dtypes = pytest.mark.parametrize("dtype", NOISE)


def where(bounds):
    host = torch.tensor(bounds)
    return types.SimpleNamespace(cu_seqlens=tuple(bounds), host=host, first=host[:-1])


def compare(dtype, ours, definition, inputs):
    """Outputs and all gradients of the kit in dtype beside the definition's in float64."""

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


def token_shift_mix(module, dtype, bounds, count):
    torch.manual_seed(0)
    inputs = torch.randn(bounds[-1], C), torch.randn(len(bounds) - 1, C), *torch.rand(count, C)
    call = lambda module: lambda x, before, *shares: module.token_shift_mix(x, before, shares, where(bounds))  # noqa: E731
    compare(dtype, call(module), call(block_ops), inputs)


def wkv7_block(module, wkv, dtype, bounds, first_layer):
    torch.manual_seed(0)
    T, S = bounds[-1], len(bounds) - 1
    gates = [torch.randn(T, C) for _ in Wkv7Inputs._fields]
    if first_layer:
        gates[6:] = [None, None]
    inputs = *gates, *(torch.randn(C) for _ in Wkv7Params._fields), torch.randn(S, H, N, N)

    def call(module, wkv):
        def around(*x):
            return module.wkv7_block(wkv, Wkv7Inputs(*x[:8]), Wkv7Params(*x[8:13]), x[13], where(bounds), H)

        return around

    compare(dtype, call(module, wkv), call(block_ops, torch_wkv7.wkv7), inputs)


def only_the_gradients_that_are_asked_for(module, wkv):
    """A frozen parameter's is None, and what only it would need is not allocated."""
    gates, own = [torch.randn(9, C).requires_grad_() for _ in range(8)], [torch.randn(C) for _ in range(5)]
    y, _ = module.wkv7_block(wkv, Wkv7Inputs(*gates), Wkv7Params(*own), torch.zeros(1, H, N, N), where((0, 9)), H)
    y.sum().backward()
    assert all(x.grad is not None for x in gates) and all(x.grad is None for x in own)


def a_key_of_zero_length_is_no_nan(module, wkv):
    """kk is divided by a length that is kept above zero, whose slope is nothing there."""
    gates, own = (
        [torch.randn(5, C).requires_grad_() for _ in range(8)],
        [torch.randn(C).requires_grad_() for _ in range(5)],
    )
    gates[2] = torch.zeros(5, C, requires_grad=True)
    result = []
    for module_of, wkv_of in ((module, wkv), (block_ops, torch_wkv7.wkv7)):
        y, _ = module_of.wkv7_block(
            wkv_of, Wkv7Inputs(*gates), Wkv7Params(*own), torch.zeros(1, H, N, N), where((0, 5)), H
        )
        result.append(torch.autograd.grad(y.sum(), [*gates, *own]))
    for ours, theirs in zip(*result, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def squared_relu(module, dtype, shape):
    torch.manual_seed(0)
    compare(dtype, module.square_relu, block_ops.square_relu, [torch.randn(shape)])


def losses_and_slopes(module, dtype, columns, scale):
    """Whatever the number of columns is, and however far apart the logits are."""
    logits, targets = (torch.randn(9, columns) * scale).to(dtype), torch.randint(columns, (9,))
    loss, slopes = block_ops.cross_entropy_grad(logits.double(), targets, True)
    ours, result = module.cross_entropy_grad(logits.clone(), targets, True)
    assert abs(float(ours - loss)) <= 1e-5 * max(1.0, abs(float(loss)))
    assert (result.double() - slopes).abs().max() <= (2**-8 if dtype == torch.bfloat16 else 1e-5)
    kept = logits.clone()
    assert float(module.cross_entropy_grad(kept, targets, False)[0]) == float(ours) and torch.equal(kept, logits)


def a_logit_that_is_nan_makes_the_loss_nan(module):
    logits = torch.randn(3, 32)
    logits[1, 7] = float("nan")
    assert module.cross_entropy_grad(logits, torch.tensor([1, 2, 3]), True)[0].isnan()
