"""One token through all blocks in one call of C++ is what the blocks say, one after another."""

import pytest
import torch
from helpers import tiny

from rwkv_peft.adapters import inject
from rwkv_peft.model.rwkv import build, for_generating, fresh_state, set_state

SIZES = [(1, 16, 16), (2, 64, 16), (3, 128, 64), (2, 256, 128), (2, 96, 32)]  # layers, width, head size


def ready(shape, stored=torch.float32, change=None):
    tensors = {name: t.to(stored) for name, t in tiny.tensors(0, shape).items()}
    model = build(shape, tensors, tiny.ops(shape, "cpu"))
    if change:
        change(model)
    return for_generating(model)


def walked(model, tokens, alone):
    """Logits and states of tokens, one at a time. alone: by the blocks, without what takes their place."""
    kept, model.one_token = model.one_token, None if alone else model.one_token
    logits, state = [], None
    with torch.inference_mode():
        for token in tokens:
            before = state and [[t.clone() for t in block.tensors()] for block in state]
            out, after = model(torch.tensor([[token]]), state)
            if state:
                for block, tensors in zip(state, before, strict=True):
                    assert all(torch.equal(a, b) for a, b in zip(block.tensors(), tensors, strict=True)), (
                        "changed in place"
                    )
            logits.append(out[0, 0])
            state = after
    model.one_token = kept
    return torch.stack(logits), state


def close(a, b):
    return (a - b).abs().max() <= 2e-5 * b.abs().max()


@pytest.mark.smoke
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers, width, size", SIZES)
def test_a_token_through_all_blocks_at_once_is_a_token_through_one_after_another(layers, width, size, stored, threads):
    model = ready(tiny.geometry(layers, width, 128, size), stored)
    assert model.one_token is not None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        mine, theirs = walked(model, [5, 6, 7, 5], False), walked(model, [5, 6, 7, 5], True)
    finally:
        torch.set_num_threads(before)
    assert close(mine[0], theirs[0])
    for ours, other in zip(mine[1], theirs[1], strict=True):
        assert all(close(a, b) and a.dtype == b.dtype for a, b in zip(ours.tensors(), other.tensors(), strict=True))


def test_it_begins_with_a_learnt_state():
    shape = tiny.geometry(2, 64, 128, 16)
    learnt = {name: torch.randn_like(t) for name, t in fresh_state(shape, shifts=True).items()}
    model = ready(shape, change=lambda m: set_state(m, learnt))
    assert model.one_token is not None
    assert close(walked(model, [5, 6], False)[0], walked(model, [5, 6], True)[0])
    assert not close(walked(model, [5, 6], False)[0], walked(ready(shape), [5, 6], False)[0])


def test_what_is_no_number_stays_none():
    shape = tiny.geometry(2, 64, 128, 16)
    model = ready(shape, change=lambda m: m.blocks[0].ffn.key.weight.data[3].fill_(torch.nan))
    assert model.one_token is not None and walked(model, [5], False)[0].isnan().all()


def with_lora(model):
    inject.inject_adapters(model, inject.AdapterConfig("lora", {"rank": 4, "alpha": 4.0}, ("att", "ffn")))


def fine(model):
    model.blocks[1].att.w1 = torch.nn.Parameter(model.blocks[1].att.w1.float() * 1.0001)


@pytest.mark.parametrize("version", ["x060", "x052"])
def test_other_versions_go_through_their_blocks(version):
    assert ready(tiny.geometry(2, 64, 128, 16, version)).one_token is None


@pytest.mark.parametrize("change", [with_lora, fine])
def test_a_model_that_is_not_all_plain_goes_through_its_blocks(change):
    model = ready(tiny.geometry(2, 64, 128, 16), torch.bfloat16, change)
    assert model.one_token is None
