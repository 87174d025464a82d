"""infctx: any context in the memory of a chunk. With full, loss and gradients are those of the whole; with detach, the loss."""

import pytest
import torch
from helpers import tiny

from rwkv_peft.adapters import inject
from rwkv_peft.ops.loss import linear_cross_entropy
from rwkv_peft.train.infctx import MODES, chunked_loss, split_chunks

BOUNDS = (0, 5, 41, 42, 90)


def shape_of(version: str):
    return tiny.geometry(2, 32, 64, 16, version)


def adapted(version, setup, **options):
    """A model whose adapters are not fresh, in float64 throughout."""
    torch.manual_seed(3)
    model = tiny.model(shape=shape_of(version), dtype=torch.float64, **options)
    inject.inject_adapters(model, setup)
    with torch.no_grad():
        for p in inject.trainable_params(model).values():
            p.add_(torch.randn(p.shape) * 0.1)
    return model.double()


LORA = inject.AdapterConfig("lora", {"rank": 4, "alpha": 8.0}, ("att", "ffn", "ln", "time", "emb", "head"))
STATE = inject.AdapterConfig("state", {"shifts": True})


def batch(tokens: int = 90):
    ids = torch.randint(0, 64, (1, tokens))
    positions = torch.tensor([0, 1, 4, 5, 6, 39, 40, 41, 60, 61, 88, 89])
    return ids, positions, torch.randint(0, 64, positions.shape)


def whole(model, ids, positions, targets, bounds=BOUNDS):
    x, _ = model.features(ids, cu_seqlens=bounds)
    return linear_cross_entropy(x[0, positions], model.head_weight(), targets)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(inject.trainable_params(model).values()), materialize_grads=True)


@pytest.mark.parametrize("version", tiny.VERSIONS)
@pytest.mark.parametrize("size", [1, 7, 32, 89, 90, 200])
def test_with_full_the_loss_and_every_gradient_are_those_of_the_plain_run(version, size):
    setup = LORA if size % 2 else STATE
    model, (ids, positions, targets) = adapted(version, setup), batch()
    plain = whole(model, ids, positions, targets)
    ours = chunked_loss(model, ids, BOUNDS, positions, targets, size, "full")
    torch.testing.assert_close(ours, plain)
    for a, b in zip(gradients(model, 3 * ours), gradients(model, 3 * plain), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("version", tiny.VERSIONS)
def test_with_detach_the_loss_is_that_of_the_plain_run_and_gradients_end_at_bounds(version):
    model, (ids, positions, targets) = adapted(version, LORA), batch()
    plain, ours = whole(model, ids, positions, targets), None
    ours = chunked_loss(model, ids, BOUNDS, positions, targets, 16, "detach")
    torch.testing.assert_close(ours, plain)
    theirs, result = gradients(model, plain), gradients(model, ours)
    assert not all(torch.allclose(a, b) for a, b in zip(result, theirs, strict=True))
    # what ends at a bound is what autograd gives when every chunk is a run of its own from a constant state
    total, state = [torch.zeros_like(g) for g in result], None
    for chunk in split_chunks(BOUNDS, 16):
        first = model.first_state(len(chunk.cu_seqlens) - 1)
        if chunk.continues:
            for s, carried in zip(first, state, strict=True):
                s.att_x, s.wkv, s.ffn_x = (
                    torch.cat([c[-1:].detach(), t[1:]]) for c, t in zip(carried.tensors(), s.tensors(), strict=True)
                )
        x, state = model.features(ids[:, chunk.begin : chunk.end], first, chunk.cu_seqlens)
        here = [i for i, p in enumerate(positions.tolist()) if chunk.begin <= p < chunk.end]
        loss = linear_cross_entropy(x[0, positions[here] - chunk.begin], model.head_weight(), targets[here])
        total = [t + g for t, g in zip(total, gradients(model, loss), strict=True)]
    for a, b in zip(result, total, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_chunks_without_a_target_are_no_nan(mode):
    model, (ids, _, _) = adapted("x070", LORA), batch()
    positions, targets = torch.tensor([88]), torch.tensor([7])
    loss = chunked_loss(model, ids, BOUNDS, positions, targets, 10, mode)
    assert all(torch.isfinite(g).all() for g in gradients(model, loss))
    nothing = chunked_loss(model, ids, BOUNDS, positions[:0], targets[:0], 10, mode)
    assert float(nothing) == 0 and not any(g.any() for g in gradients(model, nothing))


def test_dropout_falls_alike_in_both_passes_of_full_and_as_in_one_pass():
    setup = inject.AdapterConfig("lora", {"rank": 4, "alpha": 8.0}, ("att", "ffn"), dropout=0.5)
    model, (ids, positions, targets) = adapted("x070", setup).train(), batch()
    losses = []
    for mode in MODES:
        torch.manual_seed(5)
        losses.append(chunked_loss(model, ids, BOUNDS, positions, targets, 16, mode))
        after = torch.rand(1)
        losses.append(after)
    # the same masks fell ("full" sums the chunks from the last to the first)
    torch.testing.assert_close(losses[0], losses[2])
    assert torch.equal(losses[1], losses[3])  # and as many numbers were drawn


@pytest.mark.parametrize("recompute", ["nothing", "cheap", "blocks"])
def test_gradient_checkpointing_inside_chunks_changes_nothing(recompute):
    setup = inject.AdapterConfig("miss", {"rank": 4}, ("att", "ffn"))
    ids, positions, targets = batch()
    plain = adapted("x060", setup)
    model = adapted("x060", setup, recompute=recompute)
    for a, b in zip(
        gradients(model, chunked_loss(model, ids, BOUNDS, positions, targets, 32, "full")),
        gradients(plain, whole(plain, ids, positions, targets)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_chunks_tile_the_tokens_and_know_their_bounds():
    chunks = split_chunks((0, 5, 41, 42, 90), 21)
    assert [(c.begin, c.end) for c in chunks] == [(0, 5), (5, 26), (26, 42), (42, 63), (63, 84), (84, 90)]
    assert [c.cu_seqlens for c in chunks] == [(0, 5), (0, 21), (0, 15, 16), (0, 21), (0, 21), (0, 6)]
    assert [c.continues for c in chunks] == [False, False, True, False, True, True]
    assert [(c.begin, c.end) for c in split_chunks((0, 3, 7, 9), 9)] == [(0, 9)]


def test_where_a_sequence_is_cut_does_not_depend_on_what_lies_before_it():
    """Or the gradients of detach would change with the batch size and the number of GPUs."""
    for before in (0, 1, 5, 8, 30):
        bounds = (0, before, before + 50) if before else (0, 50)
        inside = [c.begin - before for c in split_chunks(bounds, 8) if c.continues and c.begin > before]
        assert inside == [8, 16, 24, 32, 40, 48]
