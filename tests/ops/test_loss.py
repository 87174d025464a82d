"""The chunked head and cross entropy equal the plain ones, and never hold more than a chunk of logits."""

import pytest
import torch
from helpers import tiny

from rwkv_peft.ops import dispatch
from rwkv_peft.ops.cpu import wkv as cpu
from rwkv_peft.ops.loss import linear_cross_entropy, naive_cross_entropy

R, C, V = 23, 12, 50


def setting(dtype=torch.float64):
    x, weight = torch.randn(R, C, dtype=dtype), torch.randn(V, C, dtype=dtype)
    return x.requires_grad_(), weight.requires_grad_(), torch.randint(0, V, (R,))


@pytest.mark.parametrize("chunk", [1, V, 7 * V, 1 << 22])
def test_value_and_gradients_equal_the_definition(chunk):
    x, weight, targets = setting()
    exact = torch.nn.functional.cross_entropy(x @ weight.T, targets, reduction="sum")
    result = linear_cross_entropy(x, weight, targets, chunk_values=chunk)
    torch.testing.assert_close(result, exact)
    for a, b in zip(
        torch.autograd.grad(result * 3, [x, weight]), torch.autograd.grad(exact * 3, [x, weight]), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_the_definition_is_what_it_says():
    x, weight, targets = setting(torch.float32)
    torch.testing.assert_close(linear_cross_entropy(x, weight, targets), naive_cross_entropy(x, weight, targets))


def test_a_frozen_head_gets_no_gradient_and_none_is_computed():
    x, weight, targets = setting()
    weight = weight.detach()
    loss = linear_cross_entropy(x, weight, targets)
    assert [t.shape for t in loss.grad_fn.saved_tensors] == [(R, C)]  # nothing of the head's size is kept
    loss.backward()
    assert x.grad is not None and weight.grad is None


def test_no_row_is_a_loss_of_zero_with_zero_gradients():
    x, weight, _ = setting()
    loss = linear_cross_entropy(x[:0], weight, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and not x.grad.any() and not weight.grad.any()


def test_logits_are_never_larger_than_a_chunk(monkeypatch):
    seen = []
    original = torch.Tensor.logsumexp

    def watch(self, *args, **kwargs):
        seen.append(self.numel())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "logsumexp", watch)
    linear_cross_entropy(*setting(), chunk_values=4 * V)
    assert max(seen) <= 4 * V and len(seen) == 6


def refused_twice(y, x):
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


def test_a_second_derivative_is_refused_rather_than_wrong():
    """The gradients of these are made by hand, and nothing knows theirs."""
    x, weight, targets = setting(torch.float32)
    refused_twice(linear_cross_entropy(x, weight, targets), x)
    if dispatch.choose("auto", "x070").name == "cpu":
        r, *others = (x.requires_grad_() for x in tiny.wkv_inputs(1, 5, 1, 16))
        refused_twice(cpu.wkv7(r, *others)[0], others[-1])
