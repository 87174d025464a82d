"""Law 3 for WKV-7: every backend equals the float64 reference, outputs and all gradients; and what follows from the
recurrence."""

import functools

import pytest
import torch
from helpers import wkv_laws as laws
from helpers.tiny import wkv_inputs

from rwkv_peft.ops import dispatch, reference

WKV7 = dispatch.available("x070", "cpu")  # test_ops_cuda has the kernels of GPUs
BACKENDS = [name for name in WKV7 if name != "reference"]
KINDS = ("random", "repeated", "fast", "slow")


@pytest.mark.smoke
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [2, 31, 32, 33, 100])
def test_a_backend_equals_the_reference_forward_and_every_gradient(backend, kind, tokens):
    inputs, s0 = wkv_inputs(2, tokens, 3, 16, kind), laws.start(2, 3, 16)
    laws.equals_the_reference(WKV7[backend], reference.wkv7, "rwkvab", inputs, s0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_is_exact_to_the_rounding_of_bf16_inputs_and_outputs(backend):
    inputs, s0 = wkv_inputs(1, 70, 2, 16, dtype=torch.bfloat16), laws.start(1, 2, 16)
    laws.equals_the_reference_to_the_rounding_of_bf16(WKV7[backend], reference.wkv7, inputs, s0)


@pytest.mark.parametrize("backend", WKV7)
def test_gradients_are_those_of_finite_differences(backend):
    inputs, s0 = wkv_inputs(1, 5, 1, 4, dtype=torch.float64), laws.start(1, 1, 4, torch.float64)
    torch.autograd.gradcheck(WKV7[backend], (*inputs, s0))


@pytest.mark.parametrize("backend", WKV7)
@pytest.mark.parametrize("cut", [1, 5, 32, 45])
def test_two_halves_with_the_carried_state_equal_the_whole(backend, cut):
    laws.halves_equal_the_whole(WKV7[backend], wkv_inputs(2, 50, 2, 16), laws.start(2, 2, 16), cut)


@pytest.mark.parametrize("backend", WKV7)
@pytest.mark.parametrize("bounds", [(0, 1, 2, 60), (0, 32, 64, 96), (0, 7, 40, 41, 90)])
def test_packed_sequences_do_what_they_do_alone(backend, bounds):
    inputs, s0 = wkv_inputs(1, bounds[-1], 2, 16), laws.start(len(bounds) - 1, 2, 16)
    laws.packed_equals_alone(WKV7[backend], inputs, s0, bounds)


@pytest.mark.parametrize("backend", WKV7)
def test_no_initial_state_is_a_zero_state(backend):
    laws.no_state_is_a_zero_state(WKV7[backend], wkv_inputs(2, 40, 2, 16), torch.zeros(2, 2, 16, 16))


@pytest.mark.parametrize("backend", WKV7)
@pytest.mark.parametrize("bounds", [(0, 3), (1, 10), (0, 5, 5, 10), (0, 6, 4, 10)])
def test_bounds_that_do_not_rise_from_zero_to_the_end_are_refused(backend, bounds):
    laws.refuses_bounds(WKV7[backend], wkv_inputs(1, 10, 1, 4), bounds)


@pytest.mark.parametrize("backend", WKV7)
@pytest.mark.parametrize("heads", [1, 2])
def test_inputs_are_left_as_they_are(backend, heads):
    """One head, and tokens that fill their chunks: chunks are views of the inputs then."""
    laws.leaves_its_inputs_as_they_are(WKV7[backend], wkv_inputs(1, 64, heads, 4), laws.start(1, heads, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_poisoned_memory_does_not_show(monkeypatch, backend):
    packed = functools.partial(WKV7[backend], cu_seqlens=(0, 20, 75))
    laws.uses_no_memory_that_it_did_not_write(monkeypatch, packed, wkv_inputs(1, 75, 2, 16), laws.start(2, 2, 16))
