"""Law 3: every backend equals the float64 reference, outputs and all gradients; and what follows from the recurrence."""

import pytest
import torch
from tiny import wkv_inputs

from rwkv_peft.ops import chunked, dispatch, reference

BACKENDS = {name: f for name, f in dispatch.WKV7.items() if name != "reference"}
KINDS = ("random", "repeated", "fast", "slow")
NAMES = ("y", "sT", "dr", "dw", "dk", "dv", "da", "db", "ds0")


def run(wkv, inputs, s0, cu_seqlens=None):
    """Outputs and gradients, for random gradients of both outputs."""
    torch.manual_seed(7)
    y, end = wkv(*inputs, s0, cu_seqlens)
    dy, dend = torch.randn(y.shape, dtype=torch.float64), torch.randn(end.shape, dtype=torch.float64)
    wanted = [x for x in (*inputs, s0) if x is not None]
    grads = torch.autograd.grad([y, end], wanted, [dy.to(y.dtype), dend.to(end.dtype)])
    return [x.detach().double() for x in (y, end, *grads)]


def errors(found, exact):
    return [((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in zip(found, exact, strict=True)]


def start(sequences, heads, size, dtype=torch.float32):
    return torch.randn(sequences, heads, size, size, dtype=dtype).requires_grad_()


def plain(dtype):
    """The reference's own loop in a lower precision: the yardstick for what that precision can give."""
    return lambda *args: reference.recurrence(*args, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [2, 31, 32, 33, 100])
def test_a_backend_equals_the_reference_forward_and_every_gradient(backend, kind, tokens):
    inputs, s0 = wkv_inputs(2, tokens, 3, 16, kind), start(2, 3, 16)
    exact = run(reference.wkv7, inputs, s0)
    found = errors(run(BACKENDS[backend], inputs, s0), exact)
    limit = errors(run(plain(torch.float32), inputs, s0), exact)
    for name, error, yardstick in zip(NAMES, found, limit, strict=True):
        # twice the error of the plain loop; where that is next to nothing, a few roundings of float32
        assert error <= max(2 * yardstick, 2e-6), f"{name}: {error:.1e}, the plain float32 loop has {yardstick:.1e}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_is_exact_to_the_rounding_of_bf16_inputs_and_outputs(backend):
    inputs = wkv_inputs(1, 70, 2, 16, dtype=torch.bfloat16)
    s0 = start(1, 2, 16)
    exact = run(reference.wkv7, [x.detach().double().requires_grad_() for x in inputs], s0)
    assert max(errors(run(BACKENDS[backend], inputs, s0), exact)) < 2**-8


@pytest.mark.parametrize("backend", dispatch.WKV7)
def test_gradients_are_those_of_finite_differences(backend):
    inputs = wkv_inputs(1, 5, 1, 4, dtype=torch.float64)
    s0 = start(1, 1, 4, torch.float64)
    torch.autograd.gradcheck(lambda *x: dispatch.WKV7[backend](*x[:6], x[6]), (*inputs, s0))


@pytest.mark.parametrize("backend", dispatch.WKV7)
@pytest.mark.parametrize("cut", [1, 5, 32, 45])
def test_two_halves_with_the_carried_state_equal_the_whole(backend, cut):
    wkv = dispatch.WKV7[backend]
    inputs, s0 = wkv_inputs(2, 50, 2, 16), start(2, 2, 16)

    def halves(*args):
        first, middle = wkv(*(x[:, :cut] for x in args[:6]), args[6])
        second, end = wkv(*(x[:, cut:] for x in args[:6]), middle)
        return torch.cat([first, second], 1), end

    assert max(errors(run(lambda *a: halves(*a), inputs, s0), run(wkv, inputs, s0))) < 2e-6


@pytest.mark.parametrize("backend", dispatch.WKV7)
@pytest.mark.parametrize("borders", [(0, 1, 2, 60), (0, 32, 64, 96), (0, 7, 40, 41, 90)])
def test_packed_sequences_do_what_they_do_alone(backend, borders):
    wkv = dispatch.WKV7[backend]
    inputs, s0 = wkv_inputs(1, borders[-1], 2, 16), start(len(borders) - 1, 2, 16)

    def alone(*args):
        parts = [
            wkv(*(x[:, a:b] for x in args[:6]), args[6][i : i + 1])
            for i, (a, b) in enumerate(zip(borders, borders[1:], strict=False))
        ]
        return torch.cat([y for y, _ in parts], 1), torch.cat([s for _, s in parts])

    packed = run(lambda *a: wkv(*a[:6], a[6], borders), inputs, s0)
    assert max(errors(packed, run(lambda *a: alone(*a), inputs, s0))) < 2e-6


@pytest.mark.parametrize("backend", dispatch.WKV7)
def test_no_initial_state_is_a_zero_state(backend):
    inputs = wkv_inputs(2, 40, 2, 16)
    y, end = dispatch.WKV7[backend](*inputs)
    y0, end0 = dispatch.WKV7[backend](*inputs, torch.zeros(2, 2, 16, 16))
    assert torch.equal(y, y0) and torch.equal(end, end0) and end.dtype == torch.float32


@pytest.mark.parametrize("backend", dispatch.WKV7)
@pytest.mark.parametrize("borders", [(0, 3), (1, 10), (0, 5, 5, 10), (0, 6, 4, 10)])
def test_borders_that_do_not_rise_from_zero_to_the_end_are_refused(backend, borders):
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        dispatch.WKV7[backend](*wkv_inputs(1, 10, 1, 4), None, borders)


def test_poisoned_memory_does_not_show(monkeypatch):
    """Memory that is used before it is written would be NaN."""

    def poison(original):
        def make(*args, **kwargs):
            made = original(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return make

    inputs, s0 = wkv_inputs(1, 75, 2, 16), start(2, 2, 16)
    clean = run(lambda *a: chunked.wkv7(*a[:6], a[6], (0, 20, 75)), inputs, s0)
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    poisoned = run(lambda *a: chunked.wkv7(*a[:6], a[6], (0, 20, 75)), inputs, s0)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))
