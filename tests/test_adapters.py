"""Law 4: a fresh adapter changes nothing, a trained one merges into what it does, and frozen tensors stay."""

import pytest
import tiny
import torch
import torch.nn.functional as F

from rwkv_peft.adapters import attach
from rwkv_peft.adapters.registry import ADAPTERS
from rwkv_peft.errors import UserError
from rwkv_peft.model.layers import Linear

SIDECAR = {"rank": 4, "alpha": 12.0}
SHAPE = tiny.geometry(2, 32, 64, 16)


def layer():
    linear = Linear(16, 24)
    torch.nn.init.normal_(linear.weight)
    return linear


def adapter(name, dropout=0.0):
    return ADAPTERS[name](layer(), SIDECAR["rank"], SIDECAR["alpha"], dropout)


def randomised(name):
    made = adapter(name)
    for tensor in made.tensors:
        torch.nn.init.normal_(getattr(made, tensor))
    return made


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_fresh_adapter_changes_nothing(name):
    made, x = adapter(name), torch.randn(5, 16)
    assert torch.equal(made(x), made.linear(x))


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_merged_weight_does_what_forward_does(name):
    made, x = randomised(name), torch.randn(5, 16)
    merged = made.merge(made.linear.weight, {t: getattr(made, t) for t in made.tensors}, SIDECAR)
    torch.testing.assert_close(F.linear(x, merged), made(x), rtol=1e-5, atol=1e-5)


def test_lora_is_what_its_paper_says():
    made, x = randomised("lora"), torch.randn(5, 16)
    assert made.lora_A.shape == (4, 16) and made.lora_B.shape == (24, 4)
    expected = x @ (made.linear.weight + 12.0 / 4 * made.lora_B @ made.lora_A).T
    torch.testing.assert_close(made(x), expected)


def test_dropout_works_on_the_adapter_alone_and_only_while_training():
    made, x = ADAPTERS["lora"](layer(), 4, 12.0, 0.5), torch.randn(50, 16)
    assert torch.equal(made(x), made.linear(x))  # B is zero: nothing of the frozen path is dropped
    torch.nn.init.normal_(made.lora_B)
    assert not torch.equal(made(x), made(x))
    made.eval()
    assert torch.equal(made(x), made(x))


def adapted(parts=("att", "ffn", "ln"), rank=4, seed=0):
    model = tiny.model(seed, SHAPE)
    attach.adapt(model, "lora", parts, rank, 8.0, 0.0)
    return model


@pytest.mark.parametrize(
    ("parts", "contains", "lacks"),
    [
        (("att",), "blocks.0.att.key.lora_A", "blocks.0.ffn.key.lora_A"),
        (("ffn",), "blocks.1.ffn.value.lora_B", "blocks.0.att.output.lora_A"),
        (("att", "ln"), "ln_out.weight", "emb.weight"),
        (("att", "time"), "blocks.1.att.w1", "blocks.0.ln1.weight"),
        (("att", "emb", "head"), "emb.weight", "ln_out.weight"),
    ],
)
def test_parts_train_what_they_name_and_nothing_else(parts, contains, lacks):
    trained = attach.trained(adapted(parts))
    assert contains in trained and lacks not in trained
    assert all(p.dtype == torch.float32 for p in trained.values())


def test_what_is_saved_comes_back_into_another_model():
    first, second, x = adapted(), adapted(seed=0), torch.arange(1, 21)[None]
    for p in attach.trained(first).values():
        torch.nn.init.normal_(p, std=0.1)
    assert not torch.equal(first(x)[0], second(x)[0])
    attach.load_trained(second, {n: p.detach() for n, p in attach.trained(first).items()}, "x.pth")
    assert torch.equal(first(x)[0], second(x)[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("ln_out.weight"), "ln_out.weight is missing"),
        (lambda t: t.update(strange=torch.zeros(1)), "strange does not belong to this setting"),
        (lambda t: t.update({"ln_out.weight": torch.zeros(3)}), r"ln_out.weight is \[3\] instead of \[32\]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change, words):
    model = adapted()
    tensors = {n: p.detach() for n, p in attach.trained(model).items()}
    change(tensors)
    with pytest.raises(UserError, match=words):
        attach.load_trained(model, tensors, "x.pth")


def test_a_whole_model_with_a_fresh_adapter_is_the_model():
    x = torch.arange(1, 41)[None]
    assert torch.equal(adapted()(x)[0], tiny.model(0, SHAPE)(x)[0])
