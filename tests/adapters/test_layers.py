"""Law 4, layer by layer: a fresh adapter changes nothing, a trained one merges into what it does, the frozen weight stays.

The definitions are the papers' formulas, written slowly here, and HF peft, which must give the same outputs, gradients and
merged weights from the same tensors.
"""

import copy
import json
import math
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rwkv_peft.adapters import hf_peft
from rwkv_peft.adapters.base import Adapter
from rwkv_peft.adapters.bat import Bat
from rwkv_peft.adapters.dora import Dora
from rwkv_peft.adapters.hf_peft import PeftLayer
from rwkv_peft.adapters.lora import Lora
from rwkv_peft.adapters.miss import Miss
from rwkv_peft.adapters.pissa import Pissa, principal
from rwkv_peft.common.errors import UserError
from rwkv_peft.export.peft_adapter import peft_weights
from rwkv_peft.model.layers import Linear
from rwkv_peft.quantize import MODES, QuantLinear

INPUTS, OUTPUTS, RANK = 16, 24, 4

OURS = {
    "lora": (Lora, {"rank": RANK, "alpha": 12.0}),
    "rslora": (Lora, {"rank": RANK, "alpha": 12.0, "rslora": True}),
    "dora": (Dora, {"rank": RANK, "alpha": 12.0}),
    "rsdora": (Dora, {"rank": RANK, "alpha": 12.0, "rslora": True}),
    "pissa": (Pissa, {"rank": RANK, "niter": 0}),
    "pissa_fast": (Pissa, {"rank": RANK, "niter": 4}),
    "miss": (Miss, {"rank": RANK}),
    "miss_ragged": (Miss, {"rank": 5}),
    "bat": (Bat, {"rank": RANK}),
}

# settings of peft, at least one for each method of the table
PEFT = {
    "c3a": {"peft_type": "C3A", "block_size": 4},
    "deft": {"peft_type": "DEFT", "r": 4},
    "delora": {"peft_type": "DELORA", "r": 4},
    "fourierft": {"peft_type": "FOURIERFT", "n_frequency": 20},
    "gralora": {"peft_type": "GRALORA", "r": 8, "hybrid_r": 2},
    "hira": {"peft_type": "HIRA", "r": 4},
    "hra": {"peft_type": "HRA", "r": 4},
    "ia3": {"peft_type": "IA3"},
    "loha": {"peft_type": "LOHA", "r": 8, "alpha": 16},
    "lokr": {"peft_type": "LOKR", "r": 4},
    "lokr_both": {"peft_type": "LOKR", "r": 1, "decompose_both": True},
    "peft_lora": {"peft_type": "LORA", "r": 4, "lora_alpha": 8},
    "peft_dora": {"peft_type": "LORA", "r": 4, "use_dora": True},
    "peft_miss": {"peft_type": "MISS", "r": 4},
    "peft_bat": {"peft_type": "MISS", "r": 4, "init_weights": "bat"},
    "peft_mini": {"peft_type": "MISS", "r": 4, "init_weights": "mini", "mini_r": 3},
    "oft": {"peft_type": "OFT", "r": 0, "oft_block_size": 4},
    "oft_cayley": {"peft_type": "OFT", "r": 0, "oft_block_size": 4, "use_cayley_neumann": False},
    "peanut": {"peft_type": "PEANUT", "r": 4},
    "road": {"peft_type": "ROAD", "group_size": 4},
    "shira": {"peft_type": "SHIRA", "r": 4},
    "waveft": {"peft_type": "WAVEFT", "n_frequency": 20},
}
CASES = (*OURS, *PEFT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("configs")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def settings(folder):
    """name of a case -> the keyword arguments of its layer; peft's come from a file, as the user's do."""

    def of(name):
        if name in OURS:
            return OURS[name][1]
        path = folder / f"{name}.json"
        path.write_text(json.dumps(PEFT[name]))
        return {"config": hf_peft.read_config(path)}

    return of


def layer(inputs=INPUTS, outputs=OUTPUTS, dtype=torch.float32):
    linear = Linear(inputs, outputs).to(dtype).requires_grad_(False)
    nn.init.normal_(linear.weight)
    return linear


def method(name) -> type[Adapter]:
    return OURS[name][0] if name in OURS else PeftLayer


def randomise(adapter, by=0.2):
    """As training would leave it: every trained tensor moved. Returns all that merging is given."""
    kept = adapter.begun()
    with torch.no_grad():
        for leaf in adapter.tensors:
            getattr(adapter, leaf).add_(torch.randn_like(getattr(adapter, leaf)), alpha=by)
    return kept | {leaf: getattr(adapter, leaf).detach() for leaf in adapter.tensors}


def test_every_method_of_peft_that_is_offered_is_tried_here():
    assert {config["peft_type"] for config in PEFT.values()} == set(hf_peft.METHODS)


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_adapter_changes_nothing(name, settings):
    linear, x = layer(), torch.randn(5, INPUTS)
    before = linear(x)
    after = method(name)(linear, **settings(name))(x)
    if name in ("pissa", "pissa_fast", "deft", "hra") or "oft" in name:  # to the rounding of sums that cancel
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(after, before)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_the_merged_weight_does_what_forward_does(name, kind, settings):
    linear = layer(dtype=kind)
    weight, x = linear.weight.clone(), torch.randn(3, 5, INPUTS, dtype=kind)
    adapter = method(name)(linear, **settings(name))
    tensors = randomise(adapter)
    merged = adapter.merge(weight, tensors, settings(name))
    assert merged.dtype == kind and merged.shape == weight.shape
    assert (F.linear(x, merged) - F.linear(x, weight)).norm() > 1e-2 * F.linear(x, weight).norm()
    close = 1e-5 if kind == torch.float32 or name in SINGLE else 1e-11
    torch.testing.assert_close(adapter.eval()(x), F.linear(x, merged), rtol=close, atol=10 * close)


# these compute parts of their sums in float32 whatever they are given
SINGLE = ("fourierft", "waveft", "pissa", "pissa_fast", "c3a", "deft", "delora")


@pytest.mark.parametrize("name", CASES)
def test_a_weight_in_bfloat16_merges_in_float32_and_outputs_keep_the_dtype_of_inputs(name, settings):
    linear = layer(dtype=torch.bfloat16)
    weight, x = linear.weight.clone(), torch.randn(50, INPUTS)
    adapter = method(name)(linear, **settings(name))
    assert all(getattr(adapter, leaf).dtype == torch.float32 for leaf in adapter.tensors)
    tensors = randomise(adapter)
    merged, adapter = adapter.merge(weight, tensors, settings(name)), adapter.eval()
    assert merged.dtype == torch.float32
    assert (adapter(x) - F.linear(x, merged)).norm() < 1e-5 * F.linear(x, merged).norm()
    low = adapter(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low.float() - F.linear(x, merged)).norm() < 2**-6 * F.linear(x, merged).norm()


@pytest.mark.parametrize("name", CASES)
def test_every_trained_tensor_gets_a_gradient_and_the_frozen_weight_stays(name, settings):
    adapter, x = method(name)(layer(), **settings(name)), torch.randn(5, INPUTS)
    assert {n for n, p in adapter.named_parameters() if p.requires_grad} == set(adapter.tensors)
    weight = adapter.linear.weight.clone()
    randomise(adapter)
    optimizer = torch.optim.SGD([p for p in adapter.parameters() if p.requires_grad], lr=1e-3)
    before = {leaf: getattr(adapter, leaf).detach().clone() for leaf in adapter.tensors}
    adapter(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(adapter.linear.weight, weight) and adapter.linear.weight.grad is None
    for leaf in adapter.tensors:
        assert not torch.equal(getattr(adapter, leaf), before[leaf]), leaf


@pytest.mark.parametrize("name", ["lora", "rslora", "pissa", "miss", "miss_ragged", "bat"])
def test_gradients_are_those_of_finite_differences(name, settings):
    """The norm of DoRA counts as a constant, so peft is its judge below."""
    adapter = method(name)(layer(8, 8, torch.float64), **settings(name)).double()
    randomise(adapter)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, *_: adapter(x), (x, *(getattr(adapter, leaf) for leaf in adapter.tensors)))


@pytest.mark.parametrize(("name", "mode"), [(n, m) for n in OURS for m in MODES] + [(n, "nf4") for n in PEFT])
def test_an_adapter_over_a_quantised_layer_is_the_adapter_over_its_dense_weight(name, mode, settings):
    linear, x = layer(64, 48), torch.randn(5, 64)
    adapter = method(name)(linear, **settings(name))
    randomise(adapter)
    adapter.eval().linear = QuantLinear(adapter.linear.weight, mode)
    result, quantised = adapter(x), adapter.linear
    adapter.linear = layer(64, 48)
    adapter.linear.weight = nn.Parameter(quantised.dense(torch.float32), requires_grad=False)
    torch.testing.assert_close(result, adapter(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_survives_being_copied_with_its_model(name, settings):
    first, x = method(name)(layer(), **settings(name)).eval(), torch.randn(5, INPUTS)
    second = copy.deepcopy(first)
    before = first(x)
    randomise(second)
    assert torch.equal(first(x), before) and not torch.allclose(second(x), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_an_adapter_made_on_the_host_or_on_the_gpu_does_the_same_there(name, settings):
    linear, x = layer(), torch.randn(5, INPUTS)
    moved = method(name)(copy.deepcopy(linear), **settings(name))
    tensors, weight = randomise(moved), linear.weight.clone()
    expected = moved.eval()(x)
    torch.testing.assert_close(moved.cuda()(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        moved.merge(weight.cuda(), {n: t.cuda() for n, t in tensors.items()}, settings(name)).cpu(),
        moved.merge(weight, {n: t.cpu() for n, t in tensors.items()}, settings(name)),
        rtol=1e-4,
        atol=1e-4,
    )
    made = method(name)(linear.cuda(), **settings(name))
    assert all(t.is_cuda for t in (*made.parameters(), *made.buffers()))
    torch.testing.assert_close(made.eval()(x.cuda()).cpu(), F.linear(x, weight.cpu()), rtol=1e-4, atol=1e-4)


# what the papers say


def defined_lora(W, t, scale):
    return W + scale * t["lora_B"] @ t["lora_A"]


def defined_dora(W, t, scale):
    moved = defined_lora(W, t, scale)
    return torch.stack([m * row / row.norm() for m, row in zip(t["lora_magnitude"], moved, strict=True)])


def defined_miss(W, t, scale):
    D = t["disha"]
    return torch.stack([W[:, i] + D[i % len(D)] for i in range(W.shape[1])], dim=1)


def defined_bat(W, t, scale):
    D, out = t["disha"], torch.empty_like(W)
    r = D.shape[-1]
    for a in range(0, W.shape[0], r):
        for b in range(0, W.shape[1], r):
            block = W[a : a + r, b : b + r]
            out[a : a + r, b : b + r] = block @ (torch.eye(r) + D[b // r]) + D[b // r]
    return out


DEFINED = {
    "lora": (defined_lora, 12.0 / RANK),
    "rslora": (defined_lora, 12.0 / math.sqrt(RANK)),
    "dora": (defined_dora, 12.0 / RANK),
    "rsdora": (defined_dora, 12.0 / math.sqrt(RANK)),
    "miss": (defined_miss, None),
    "miss_ragged": (defined_miss, None),
    "bat": (defined_bat, None),
}


@pytest.mark.parametrize("name", DEFINED)
def test_a_method_is_what_its_paper_says(name, settings):
    linear, x = layer(), torch.randn(5, INPUTS)
    adapter = method(name)(linear, **settings(name))
    tensors, (define, scale) = randomise(adapter), DEFINED[name]
    torch.testing.assert_close(adapter(x), x @ define(linear.weight, tensors, scale).T, rtol=1e-5, atol=1e-5)


def test_pissa_begins_with_the_largest_singular_values_and_leaves_the_rest():
    linear = layer()
    W, S = linear.weight.clone(), torch.linalg.svdvals(linear.weight)
    adapter = Pissa(linear, RANK, 0)
    torch.testing.assert_close(torch.linalg.svdvals(linear.weight)[: len(S) - RANK], S[RANK:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.linalg.svdvals(adapter.lora_B @ adapter.lora_A)[:RANK], S[:RANK])
    torch.testing.assert_close(linear.weight + adapter.lora_B @ adapter.lora_A, W)
    # both factors carry the same share
    torch.testing.assert_close(adapter.lora_A.norm(dim=1), adapter.lora_B.norm(dim=0))


def test_pissa_resumes_from_what_it_began_with():
    first, W, x = layer(), None, torch.randn(5, INPUTS)
    W = first.weight.clone()
    begun = Pissa(first, RANK, 2).begun()
    second = Linear(INPUTS, OUTPUTS)
    second.weight = nn.Parameter(W, requires_grad=False)
    resumed = Pissa(second, RANK, 2, start=begun)
    assert torch.equal(second.weight, first.weight) and not second.weight.requires_grad
    assert torch.equal(resumed.lora_A, begun["init_lora_A"]) and torch.equal(resumed.lora_B, begun["init_lora_B"])
    assert resumed.lora_A.data_ptr() != begun["init_lora_A"].data_ptr()
    torch.testing.assert_close(resumed(x), F.linear(x, W), rtol=1e-5, atol=1e-5)


def test_an_untrained_pissa_merges_into_the_base_to_the_last_bit():
    linear = layer()
    W = linear.weight.clone()
    adapter = Pissa(linear, RANK, 2)
    tensors = adapter.begun() | {leaf: getattr(adapter, leaf).detach() for leaf in adapter.tensors}
    assert torch.equal(adapter.merge(W, tensors, {"rank": RANK}), W)


def test_pissa_does_not_touch_the_tensor_it_was_given():
    shared = torch.randn(OUTPUTS, INPUTS)
    kept, linear = shared.clone(), Linear(INPUTS, OUTPUTS)
    linear.weight = nn.Parameter(shared, requires_grad=False)
    Pissa(linear, RANK, 2)
    assert torch.equal(shared, kept) and not torch.equal(linear.weight, kept)


def decaying(outputs, inputs, power):
    """A weight whose singular values fall like 1/i^power."""
    U = torch.linalg.qr(torch.randn(outputs, inputs))[0]
    V = torch.linalg.qr(torch.randn(inputs, inputs))[0]
    return U * (torch.arange(inputs) + 1.0) ** -power @ V.T


@pytest.mark.parametrize(("niter", "missed"), [(2, 2e-2), (4, 2e-3), (8, 5e-5), (16, 2e-6)])
@pytest.mark.parametrize("shape", [(256, 128), (128, 256)])
def test_more_rounds_of_the_fast_svd_miss_less_of_what_the_exact_one_finds(niter, missed, shape):
    W = decaying(256, 128, 0.5)
    W = W if shape == (256, 128) else W.T
    (A0, B0), (A, B) = principal(W, 16, 0), principal(W, 16, niter)
    assert A.shape == (16, shape[1]) and B.shape == (shape[0], 16)
    best, result = (W - B0 @ A0).norm(), (W - B @ A).norm()
    assert best <= result * (1 + 1e-6) and result**2 - best**2 < missed * (B0 @ A0).norm() ** 2


def test_the_fast_svd_draws_from_no_outside_generator():
    W = torch.randn(64, 32)
    torch.manual_seed(1)
    first, after = principal(W, 4, 2), torch.randn(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.randn(3))
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, principal(W, 4, 2), strict=True))


def test_dropout_works_on_the_adapter_alone_and_only_while_training():
    linear, x = layer(), torch.randn(50, INPUTS)
    for made in (Lora(linear, RANK, 12.0, dropout=0.5), Dora(linear, RANK, 12.0, dropout=0.5)):
        assert torch.equal(made(x), linear(x))  # B is zero: nothing of the frozen path is dropped
        randomise(made)
        assert not torch.equal(made(x), made(x))
        made.eval()
        assert torch.equal(made(x), made(x))


def test_dropout_of_a_peft_method_works_only_while_training():
    made, x = PeftLayer(layer(), {"peft_type": "LORA", "r": 4, "lora_dropout": 0.5}), torch.randn(50, INPUTS)
    randomise(made)
    assert made.training and not torch.equal(made(x), made(x))
    made.eval()
    assert torch.equal(made(x), made(x))


@pytest.mark.parametrize("name", [name for name in CASES if name != "peft_dora"])
def test_rows_of_zeros_as_fresh_models_have_them_are_no_trouble(name, settings):
    for rows in (slice(3, 5), slice(None)):
        linear, x = layer(), torch.randn(5, INPUTS)
        linear.weight[rows] = 0
        weight = linear.weight.clone()
        adapter = method(name)(linear, **settings(name))
        torch.testing.assert_close(adapter(x), F.linear(x, weight), rtol=1e-5, atol=1e-5)
        adapter(x).sum().backward()
        assert all(torch.isfinite(getattr(adapter, leaf).grad).all() for leaf in adapter.tensors)


def test_peft_settings_that_give_nan_are_refused(settings):
    """peft's DoRA divides by the length of every row, ours takes care of zeros."""
    linear = layer()
    linear.weight[3] = 0
    with pytest.raises(UserError, match="a fresh LORA adapter changes"):
        PeftLayer(linear, **settings("peft_dora"))


def test_bat_keeps_nothing_of_the_size_of_the_weight_for_its_backward_pass():
    linear, sizes = layer(256, 256), []
    x, adapter = torch.randn(2, 256), Bat(linear, 8)
    randomise(adapter)

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() != linear.weight.untyped_storage().data_ptr():
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        adapter(x)
    assert max(sizes) <= adapter.disha.numel()


@pytest.mark.parametrize("name", CASES)
def test_names_shapes_and_sizes_are_known_without_a_layer(name, settings):
    adapter, kind = method(name)(layer(), **settings(name)), method(name)
    shapes = {leaf: tuple(getattr(adapter, leaf).shape) for leaf in adapter.tensors}
    assert kind.shapes(OUTPUTS, INPUTS, **settings(name)) == shapes
    assert kind.count(OUTPUTS, INPUTS, **settings(name)) == sum(
        p.numel() for p in adapter.parameters() if p.requires_grad
    )
    assert set(kind.starts(**settings(name))) == set(adapter.begun()) and set(adapter.begun()) <= set(kind.start)
    assert set(shapes) <= set(kind.tensors)
    assert kind.refusal(OUTPUTS, INPUTS, **settings(name)) == ""


@pytest.mark.parametrize(
    ("kind", "outputs", "inputs", "options", "words"),
    [
        (Pissa, 24, 16, {"rank": 17, "niter": 0}, "must be 16 or less"),
        (Pissa, 16, 24, {"rank": 17, "niter": 2}, "must be 16 or less"),
        (Miss, 24, 16, {"rank": 17}, "must be 16 or less"),
        (Bat, 24, 16, {"rank": 5}, "must divide 8, .*or use MiSS"),
        (Bat, 24, 20, {"rank": 8}, "must divide 4"),
        (Bat, 20, 24, {"rank": 8}, "must divide 4"),
    ],
)
def test_a_rank_that_a_layer_cannot_have_is_refused_before_it_is_made_and_when_it_is(
    kind, outputs, inputs, options, words
):
    assert re.match(words, kind.refusal(outputs, inputs, **options))
    with pytest.raises(UserError, match=f"The rank of .*, {options['rank']}, {words}"):
        kind(layer(inputs, outputs), **options)


@pytest.mark.parametrize("niter", [0, 2])
def test_a_weight_that_holds_nan_is_refused_by_pissa(niter):
    with pytest.raises(UserError, match="NaN or infinity"):
        principal(torch.full((8, 8), math.nan), 2, niter)


def test_what_an_earlier_pissa_began_with_must_fit():
    with pytest.raises(UserError, match="another base or rank"):
        Pissa(layer(), 3, 0, Pissa(layer(), 4, 0).begun())


def test_lora_may_have_a_higher_rank_than_its_layer():
    adapter, x = Lora(layer(), 30, 12.0), torch.randn(5, INPUTS)
    tensors = randomise(adapter)
    merged = adapter.merge(adapter.linear.weight, tensors, {"rank": 30, "alpha": 12.0})
    torch.testing.assert_close(adapter(x), F.linear(x, merged), rtol=1e-4, atol=1e-4)


# peft as the judge


def judge(linear, name):
    """peft's own layer for one of our methods, around a plain linear layer of the same weight."""
    import peft

    lora = {"target_modules": ["layer"], "r": RANK, "lora_alpha": 12}
    config = {
        "lora": lambda: peft.LoraConfig(**lora),
        "rslora": lambda: peft.LoraConfig(**lora, use_rslora=True),
        "dora": lambda: peft.LoraConfig(**lora, use_dora=True),
        "dora_dropout": lambda: peft.LoraConfig(**lora, use_dora=True, lora_dropout=0.5),
        "lora_dropout": lambda: peft.LoraConfig(**lora, lora_dropout=0.5),
        "pissa": lambda: peft.LoraConfig(**(lora | {"lora_alpha": RANK}), init_lora_weights="pissa"),
        "miss": lambda: peft.MissConfig(target_modules=["layer"], r=RANK),
        "miss_ragged": lambda: peft.MissConfig(target_modules=["layer"], r=5),
        "bat": lambda: peft.MissConfig(target_modules=["layer"], r=RANK, init_weights="bat"),
    }[name]()
    holder = nn.Module()
    holder.layer = nn.Linear(linear.in_features, linear.out_features, bias=False)
    holder.layer.weight = nn.Parameter(linear.weight.detach().clone())
    peft.inject_adapter_in_model(config, holder)
    return holder.layer


def theirs(layer):
    """peft's trained tensors by our names."""
    names = {"magnitude": "lora_magnitude", "lora_A": "lora_A", "lora_B": "lora_B", "miss": "disha"}
    trained = [(n, p) for n, p in layer.named_parameters() if p.requires_grad]
    return {next(ours for part, ours in names.items() if part in n): p for n, p in trained}


@pytest.mark.parametrize(
    "name", ["lora", "rslora", "dora", "lora_dropout", "dora_dropout", "pissa", "miss", "miss_ragged"]
)
def test_outputs_gradients_and_merged_weights_are_those_of_peft(name):
    linear = layer()
    kind, settings = OURS[name.removesuffix("_dropout")]
    other, weight = judge(linear, name), linear.weight.clone()
    ours = kind(linear, **settings, **({"dropout": 0.5} if "dropout" in name else {}))
    if name == "pissa":
        torch.testing.assert_close(linear.weight, other.get_base_layer().weight, rtol=1e-5, atol=1e-5)
        product = other.lora_B["default"].weight @ other.lora_A["default"].weight
        torch.testing.assert_close(ours.lora_B @ ours.lora_A, product, rtol=1e-5, atol=1e-5)
        with torch.no_grad():  # the same product has many factors: go on from ours
            other.get_base_layer().weight.copy_(linear.weight)
    tensors = randomise(ours)
    assert set(theirs(other)) == set(ours.tensors)
    for leaf, parameter in theirs(other).items():
        parameter.data.copy_(tensors[leaf])
    x, dy, result = torch.randn(7, INPUTS, requires_grad=True), torch.randn(7, OUTPUTS), []
    for made, parameters in ((ours, [getattr(ours, leaf) for leaf in theirs(other)]), (other, theirs(other).values())):
        torch.manual_seed(3)  # of dropout
        y = made.train()(x)
        result.append([y, *torch.autograd.grad(y, [x, *parameters], dy)])
    for mine, its in zip(*result, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
    other.merge()
    merged = ours.merge(weight, tensors, settings)
    torch.testing.assert_close(merged, other.get_base_layer().weight, rtol=1e-4, atol=1e-5)


def swapped(weight, rank):
    """The r x r blocks of a weight mirrored along the diagonal of blocks; each block stays as it is."""
    outputs, inputs = weight.shape
    blocks = weight.reshape(outputs // rank, rank, inputs // rank, rank)
    return blocks.permute(2, 1, 0, 3).reshape(inputs, outputs)


def test_bat_is_that_of_peft_with_the_blocks_of_outputs_and_inputs_swapped():
    """peft shares D along the outputs, RWKV-PEFT, whose files we read, along the inputs."""
    linear = layer()
    ours, mirrored = Bat(linear, RANK), layer(OUTPUTS, INPUTS)
    mirrored.weight = nn.Parameter(swapped(linear.weight, RANK), requires_grad=False)
    other, tensors = judge(mirrored, "bat"), randomise(ours)
    parameter = other.miss_block["default"]
    assert parameter.shape == ours.disha.shape
    parameter.data.copy_(tensors["disha"])
    dW = torch.randn(OUTPUTS, INPUTS)  # a gradient of the whole matrix: outputs for all unit vectors
    mine = ours(torch.eye(INPUTS)).T
    its = swapped(other(torch.eye(OUTPUTS)).T, RANK)
    torch.testing.assert_close(mine, its)
    grads = (torch.autograd.grad((matrix * dW).sum(), p)[0] for matrix, p in ((mine, ours.disha), (its, parameter)))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
    other.merge()
    torch.testing.assert_close(
        ours.merge(linear.weight, tensors, {}), swapped(other.get_base_layer().weight.detach(), RANK)
    )


# peft's methods


@pytest.mark.parametrize("name", ["shira", "fourierft", "waveft"])
def test_what_was_drawn_at_random_is_kept_and_comes_back(name, settings):
    linear, x, given = layer(), torch.randn(5, INPUTS), settings(name)
    if name != "shira":  # those would draw the same again: a file from another version of torch may not
        given = {"config": given["config"] | {"random_loc_seed": 5}}
    first = PeftLayer(linear, **given).eval()
    kept = randomise(first)
    assert set(first.begun()) == set(first.start) == set(hf_peft.METHODS[given["config"]["peft_type"]].start)
    torch.manual_seed(9)
    second = PeftLayer(linear, **settings(name), start=first.begun()).eval()
    for leaf in first.tensors:
        getattr(second, leaf).data.copy_(kept[leaf])
    assert torch.equal(first(x), second(x))
    torch.testing.assert_close(F.linear(x, PeftLayer.merge(linear.weight, kept, settings(name))), first(x))
    with pytest.raises(UserError, match="missing or of another shape"):
        PeftLayer(linear, **given, start={n: t[:, :-1] for n, t in first.begun().items()})


@pytest.mark.parametrize("name", PEFT)
def test_settings_that_keep_the_law_are_let_through(name, settings):
    assert PeftLayer.refusal(48, 64, **settings(name)) == ""


def test_settings_that_do_not_merge_into_what_they_do_are_refused(monkeypatch, settings):
    right = PeftLayer.merge
    monkeypatch.setattr(PeftLayer, "merge", staticmethod(lambda W, *rest: right(W, *rest) + 0.1 * torch.randn_like(W)))
    assert "not what its layer does" in PeftLayer.refusal(48, 64, **settings("loha"))


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "LORA", "r": 4, "init_lora_weights": False},
        {"peft_type": "LORA", "r": 4, "init_lora_weights": "pissa"},
        {"peft_type": "HRA", "r": 3},
        {"peft_type": "LOHA", "r": 4, "init_weights": False},
        {"peft_type": "MISS", "r": 40},
        {"peft_type": "C3A", "block_size": 7, "init_weights": True},
    ],
    ids=str,
)
def test_settings_that_would_not_begin_as_the_base_or_do_not_fit_the_layer_are_refused(config):
    with pytest.raises(UserError, match="a fresh .* adapter changes|peft cannot put"):
        PeftLayer(layer(), config)
    assert PeftLayer.refusal(OUTPUTS, INPUTS, config)


def test_dropout_of_whole_layers_is_no_reason_to_refuse():
    assert PeftLayer.refusal(OUTPUTS, INPUTS, {"peft_type": "LOKR", "r": 4, "module_dropout": 0.6}) == ""


@pytest.mark.parametrize("setting", [{"lora_alpha": 0}, {"lora_dropout": 1.0}], ids=str)
def test_settings_with_which_nothing_is_learnt_are_refused(setting):
    before = torch.random.get_rng_state()
    words = PeftLayer.refusal(OUTPUTS, INPUTS, {"peft_type": "LORA", "r": 4, **setting})
    assert "LORA learns nothing: lora_" in words
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not readable as JSON"),
        ("[" * 100_000, "is nested deeper than 64 levels"),
        ("[]", "does not say which method"),
        ('{"r": 4}', "does not say which method"),
        ('{"peft_type": "PROMPT_TUNING"}', "changes no weight.*LOHA"),
        ('{"peft_type": "VERA"}', "shares tensors between layers"),
        ('{"peft_type": "FOURIER"}', "not known here; did you mean FOURIERFT.*These are: C3A, DEFT"),
        ('{"peft_type": "LOHA", "rank": 4}', "LOHA has no setting rank"),
        ('{"peft_type": "LOHA", "target_modules": ["key"]}', "take target_modules out"),
        ('{"peft_type": "FOURIERFT", "init_weights": false}', "init_weights must be true"),
        ('{"peft_type": "MISS", "r": 4, "bias": "all"}', "take bias out"),
        ('{"peft_type": "LORA", "use_dora": true, "layers_pattern": "x"}', "take layers_pattern out"),
        (
            '{"peft_type": "LORA", "use_qalora": true}',
            "use_qalora of LORA cannot be set here, only init_lora_weights, l",
        ),
        ('{"peft_type": "OFT", "r": 8, "oft_block_size": 4}', "peft does not take these settings"),
        ('{"peft_type": "LORA", "init_lora_weights": "lora_ga"}', "init_lora_weights=lora_ga .*does not make"),
        ('{"peft_type": "LORA", "init_lora_weights": "eva"}', "init_lora_weights=eva .*does not make"),
    ],
)
def test_a_file_of_settings_that_cannot_be_used_says_why(tmp_path, text, words):
    path = tmp_path / "peft.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as error:
        hf_peft.read_config(path)
    assert "peft.json" in str(error.value)


def test_without_the_package_peft_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "peft.json").write_text('{"peft_type": "LOHA"}')
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setitem(sys.modules, "peft.mapping", None)
    with pytest.raises(UserError, match=r"pip install \"peft==0\.21\.\*\""):
        hf_peft.read_config(tmp_path / "peft.json")


def test_every_method_of_the_installed_peft_is_offered_or_refused_with_a_reason():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    installed = {str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    unknown = installed - set(hf_peft.METHODS) - set(hf_peft.REFUSED)
    assert unknown <= {"GLORA", "PSOFT", "SUPERTUNING"}  # not tried
    assert not set(hf_peft.METHODS) & set(hf_peft.REFUSED)


def test_a_saved_config_of_peft_is_read_as_it_is(tmp_path):
    import peft

    peft.LoHaConfig(r=3, alpha=5, inference_mode=True, base_model_name_or_path="x").save_pretrained(tmp_path)
    config = hf_peft.read_config(tmp_path / "adapter_config.json")
    assert config["peft_type"] == "LOHA" and (config["r"], config["alpha"]) == (3, 5)
    assert PeftLayer(layer(), config).hada_w1_a.requires_grad


# peft's files


def tiny_model(weights):
    model = nn.Module()
    model.forward = lambda x: torch.cat([model.get_submodule(n)(x) for n in weights], dim=-1)
    for name, weight in weights.items():
        owner, parts = model, name.split(".")
        for part in parts[:-1]:
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight.clone())
        owner.add_module(parts[-1], linear)
    return model


EXPORTED = {"lora": "lora", "rslora": "lora", "dora": "dora", "pissa": "pissa", "miss": "miss", "miss_ragged": "bone"}


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_folder_does_in_peft_what_the_run_does(name, tmp_path):
    import peft
    from safetensors.torch import save_file

    names = ("blocks.0.att.key", "blocks.0.att.output", "blocks.1.att.key", "blocks.0.ffn.key")
    weights = {n: torch.randn(OUTPUTS, INPUTS) for n in names}
    weights[names[0]][3] = 0.0  # (of which DoRA keeps no length)
    adapted, (kind, settings), expected, tensors, x = names[:2], OURS[name], [], {}, torch.randn(5, INPUTS)
    for layer_name, weight in weights.items():
        linear = Linear(INPUTS, OUTPUTS)
        linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
        if layer_name in adapted:
            linear = kind(linear, **settings)
            still = {"lora_magnitude": linear.lora_magnitude == 0} if name == "dora" else {}
            learnt = randomise(linear)
            for leaf, rows in still.items():
                learnt[leaf].masked_fill_(rows, 0.0)
            tensors |= {f"{layer_name}.{leaf}": t for leaf, t in learnt.items()}
        expected.append(linear(x))
    config, named = peft_weights(tensors, {"method": EXPORTED[name], **settings}, adapted)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(named, tmp_path / "adapter_model.safetensors")
    model = peft.PeftModel.from_pretrained(tiny_model(weights), tmp_path)
    torch.testing.assert_close(model(x), torch.cat(expected, -1), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(tiny_model(weights)(x), torch.cat(expected, -1), atol=1e-2)
    loaded = {n: t for n, t in peft.get_peft_model_state_dict(model).items()}
    assert set(loaded) == set(named) and all(torch.equal(loaded[n], t) for n, t in named.items())


@pytest.mark.parametrize(
    ("method", "tensors", "words"),
    [
        ("bat", {}, "along the outputs"),
        ("full", {}, "cannot be written"),
        ("lora", {"a.lora_A": torch.zeros(4, 4)}, "a.lora_B missing"),
        ("miss", {"a.disha": torch.zeros(4, 4), "ln_out.weight": torch.zeros(4)}, r"whole tensors \(ln_out.weight\)"),
        ("pissa", {"a.lora_A": torch.zeros(4, 4), "a.lora_B": torch.zeros(4, 4)}, "a.init_lora_A"),
    ],
)
def test_a_run_that_a_peft_folder_cannot_hold_is_refused(method, tensors, words):
    with pytest.raises(UserError, match=words):
        peft_weights(tensors, {"method": method, "rank": 4, "alpha": 4}, ["a"])
