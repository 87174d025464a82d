"""Law 3 for WKV-6 and WKV-5: every backend equals the float64 reference, whatever the decay; and what follows from the
recurrence."""

import functools

import pytest
import torch
from helpers import wkv_laws as laws
from helpers.tiny import wkv6_inputs

from rwkv_peft.ops import dispatch, reference

REFERENCE = {"x060": reference.wkv6, "x052": reference.wkv5}
OPS = [(version, name) for version in REFERENCE for name in dispatch.available(version, "cpu")]
BACKENDS = [(version, name) for version, name in OPS if name != "reference"]
KINDS = ("random", "repeated", "fast", "slow", "mixed")


def inputs_of(version, *shape, **how):
    return wkv6_inputs(*shape, constant=version == "x052", **how)


@pytest.mark.smoke
@pytest.mark.parametrize("version, backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [2, 31, 32, 33, 100])
def test_a_backend_equals_the_reference_forward_and_every_gradient(version, backend, kind, tokens):
    inputs, s0 = inputs_of(version, 2, tokens, 3, 16, kind=kind), laws.start(2, 3, 16)
    laws.equals_the_reference(dispatch.WKV[version][backend], REFERENCE[version], "rwkvu", inputs, s0)


@pytest.mark.parametrize("version, backend", BACKENDS)
def test_a_backend_is_exact_to_the_rounding_of_bf16_inputs_and_outputs(version, backend):
    inputs, s0 = inputs_of(version, 1, 70, 2, 16, dtype=torch.bfloat16), laws.start(1, 2, 16)
    laws.equals_the_reference_to_the_rounding_of_bf16(dispatch.WKV[version][backend], REFERENCE[version], inputs, s0)


@pytest.mark.parametrize("version, backend", OPS)
def test_gradients_are_those_of_finite_differences(version, backend):
    inputs = inputs_of(version, 1, 5, 1, 4, dtype=torch.float64)
    torch.autograd.gradcheck(dispatch.WKV[version][backend], (*inputs, laws.start(1, 1, 4, torch.float64)))


@pytest.mark.parametrize("version, backend", OPS)
@pytest.mark.parametrize("cut", [1, 5, 32, 45])
def test_two_halves_with_the_carried_state_equal_the_whole(version, backend, cut):
    inputs, s0 = inputs_of(version, 2, 50, 2, 16), laws.start(2, 2, 16)
    laws.halves_equal_the_whole(dispatch.WKV[version][backend], inputs, s0, cut)


@pytest.mark.parametrize("version, backend", OPS)
@pytest.mark.parametrize("bounds", [(0, 1, 2, 60), (0, 32, 64, 96), (0, 7, 40, 41, 90)])
def test_packed_sequences_do_what_they_do_alone(version, backend, bounds):
    inputs, s0 = inputs_of(version, 1, bounds[-1], 2, 16), laws.start(len(bounds) - 1, 2, 16)
    laws.packed_equals_alone(dispatch.WKV[version][backend], inputs, s0, bounds)


@pytest.mark.parametrize("version, backend", OPS)
def test_no_initial_state_is_a_zero_state(version, backend):
    zero = torch.zeros(2, 2, 16, 16)
    laws.no_state_is_a_zero_state(dispatch.WKV[version][backend], inputs_of(version, 2, 40, 2, 16), zero)


@pytest.mark.parametrize("version, backend", OPS)
@pytest.mark.parametrize("bounds", [(0, 3), (1, 10), (0, 5, 5, 10), (0, 6, 4, 10)])
def test_bounds_that_do_not_rise_from_zero_to_the_end_are_refused(version, backend, bounds):
    laws.refuses_bounds(dispatch.WKV[version][backend], inputs_of(version, 1, 10, 1, 4), bounds)


@pytest.mark.parametrize("version, backend", OPS)
@pytest.mark.parametrize("heads", [1, 2])
def test_inputs_are_left_as_they_are(version, backend, heads):
    """One head, and tokens that fill their chunks: chunks are views of the inputs then."""
    inputs, s0 = inputs_of(version, 1, 64, heads, 4), laws.start(1, heads, 4)
    laws.leaves_its_inputs_as_they_are(dispatch.WKV[version][backend], inputs, s0)


@pytest.mark.parametrize("version, backend", OPS)
def test_a_decay_of_zero_forgets_everything_and_learns_nothing(version, backend):
    inputs, s0 = inputs_of(version, 1, 70, 2, 16), laws.start(1, 2, 16)
    with torch.no_grad():
        inputs[1].fill_(-torch.inf)
    y, end, _, dw, *_ = result = laws.run(dispatch.WKV[version][backend], inputs, s0)
    r, _, k, v, u = (x.detach().double() for x in inputs)
    wanted = (r * u * k).sum(-1, keepdim=True) * v
    wanted[:, 1:] += (r[:, 1:] * k[:, :-1]).sum(-1, keepdim=True) * v[:, :-1]
    wanted[:, 0] += torch.einsum("bhvk,bhk->bhv", s0.detach().double(), r[:, 0])
    assert laws.errors([y], [wanted])[0] < laws.NOISE
    assert laws.errors([end], [torch.einsum("bhv,bhk->bhvk", v[:, -1], k[:, -1])])[0] < laws.NOISE
    assert not dw.any() and all(x.isfinite().all() for x in result)


@pytest.mark.parametrize("version, backend", BACKENDS)
def test_what_came_before_a_decay_of_exp_minus_10000_leaves_no_trace_behind_it(version, backend):
    wkv, begin = dispatch.WKV[version][backend], 11
    inputs = [x.detach() for x in inputs_of(version, 1, 60, 2, 16)]
    (inputs[1] if version == "x052" else inputs[1][:, begin]).fill_(-1e4)
    other = [x.clone() for x in inputs]
    for x in (other[2], other[3]):
        x[:, :begin] = 1e3 * torch.randn_like(x[:, :begin])
    y, end = wkv(*inputs)
    y_other, end_other = wkv(*other)
    assert torch.equal(y[:, begin + 1 :], y_other[:, begin + 1 :]) and torch.equal(end, end_other)
    assert not torch.equal(y[:, begin], y_other[:, begin])  # the token itself still sees them


@pytest.mark.parametrize("version, backend", BACKENDS)
def test_poisoned_memory_does_not_show(monkeypatch, version, backend):
    packed = functools.partial(dispatch.WKV[version][backend], cu_seqlens=(0, 20, 75))
    inputs, s0 = inputs_of(version, 1, 75, 2, 16), laws.start(2, 2, 16)
    laws.uses_no_memory_that_it_did_not_write(monkeypatch, packed, inputs, s0)
