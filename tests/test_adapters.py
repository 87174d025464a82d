"""Adapters on whole models: what is trained, what is saved and comes back. Single layers are in test_methods.py."""

import pytest
import tiny
import torch

from rwkv_peft.adapters import attach
from rwkv_peft.errors import UserError

SHAPE = tiny.geometry(2, 32, 64, 16)


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
