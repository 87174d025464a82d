"""Methods on whole models: what is trained, compressed, saved, and comes back. Single layers are in adapters/test_layers.py."""

from dataclasses import replace

import pytest
import torch
from helpers import tiny
from helpers.adapters import OPTIONS, moved

from rwkv_peft.adapters import inject
from rwkv_peft.adapters.deferred import materialize
from rwkv_peft.adapters.inject import AdapterConfig
from rwkv_peft.adapters.registry import ADAPTERS
from rwkv_peft.adapters.specs import METHODS, QUANTS
from rwkv_peft.common.errors import UserError
from rwkv_peft.model.arch import linear_layers
from rwkv_peft.model.layers import Linear
from rwkv_peft.model.rwkv import build
from rwkv_peft.quantize import QuantEmbedding, QuantLinear, codes_as_parameters
from rwkv_peft.train.callbacks.lisa import Lisa

PARTS = ("att", "ffn", "ln")
SETUPS = {name: AdapterConfig(name, OPTIONS[name], PARTS if method.parts else ()) for name, method in METHODS.items()}
ADAPTED = [name for name, method in METHODS.items() if not method.saves_model]
X = torch.arange(1, 41)[None]


def shape_of(version="x070"):
    return tiny.geometry(2, 32, 64, 16, version)


def adapted(setup, version="x070", seed=0, **options):
    model = tiny.model(seed, shape_of(version))
    return model, inject.inject_adapters(model, setup, **options)


@pytest.mark.parametrize("version", tiny.VERSIONS)
@pytest.mark.parametrize(
    ("parts", "contains", "lacks"),
    [
        (("att",), "blocks.0.att.key.lora_A", "blocks.0.ffn.key.lora_A"),
        (("ffn",), "blocks.1.ffn.value.lora_B", "blocks.0.att.output.lora_A"),
        (("att", "ln"), "ln_out.weight", "emb.weight"),
        (("att", "time"), {"x070": "blocks.1.att.w1", "x060": "blocks.1.att.time_maa_w1", "x052": "blocks.1.att.time_mix_g"},
         "blocks.0.ln1.weight"),
        (("att", "emb", "head"), "emb.weight", "ln_out.weight"),
    ],
)  # fmt: skip
def test_parts_train_what_they_name_and_nothing_else(version, parts, contains, lacks):
    model, _ = adapted(AdapterConfig("lora", OPTIONS["lora"], parts), version)
    trained = inject.trainable_params(model)
    assert (contains if isinstance(contains, str) else contains[version]) in trained and lacks not in trained
    assert all(p.dtype == torch.float32 for p in trained.values())


@pytest.mark.smoke
@pytest.mark.parametrize("version", tiny.VERSIONS)
@pytest.mark.parametrize("name", METHODS)
def test_a_whole_model_with_a_fresh_adapter_is_the_model(name, version):
    model, _ = adapted(SETUPS[name], version)
    exact = tiny.model(0, shape_of(version))(X)[0]
    torch.testing.assert_close(model(X)[0], exact, rtol=1e-4, atol=1e-5)
    if name not in ("pissa", "peft"):  # those round: they take the weight apart, or compute it by a longer way
        assert torch.equal(model(X)[0], exact)


@pytest.mark.parametrize("version", tiny.VERSIONS)
@pytest.mark.parametrize("name", METHODS)
def test_the_number_of_trained_values_is_known_from_the_shapes_alone(name, version):
    model, _ = adapted(SETUPS[name], version)
    if name == "lisa":  # and the blocks of its first draw
        Lisa(model, PARTS, OPTIONS[name]["layers"], 2, 0, torch.float32).follow(0)
    assert inject.count_trained(model.geometry, SETUPS[name]) == sum(
        p.numel() for p in inject.trainable_params(model).values()
    )


@pytest.mark.smoke
@pytest.mark.parametrize("quant", ["none", *QUANTS])
@pytest.mark.parametrize("name", ADAPTED)
def test_a_run_that_resumes_has_the_model_that_was_saved_to_the_last_bit(name, quant):
    """What *_load does: the same setup on the same base, then the saved tensors."""
    setup = AdapterConfig(name, OPTIONS[name], SETUPS[name].parts, quant=quant, quant_parts=("att", "ffn"))
    first, begun = adapted(setup, keep=torch.bfloat16)
    saved = moved(first)
    second, again = adapted(setup, keep=torch.bfloat16, start=begun)
    inject.load_trained(second, saved, "x.pth")
    assert torch.equal(first(X)[0], second(X)[0]) and set(begun) == set(again)
    assert all(torch.equal(begun[n], again[n]) for n in begun)


@pytest.mark.smoke
@pytest.mark.parametrize("version", tiny.VERSIONS)
@pytest.mark.parametrize("name", ADAPTED)
def test_a_saved_adapter_on_its_base_is_the_model_as_it_was_trained(name, version):
    first, begun = adapted(SETUPS[name], version)
    saved = moved(first)
    second = tiny.model(0, shape_of(version))
    setup = inject.setup_of({"method": name, **OPTIONS[name]}, "x.pth")
    inject.attach_checkpoint(second, saved, setup, "x.pth", start=begun)
    assert torch.equal(first.eval()(X)[0], second.eval()(X)[0])


@pytest.mark.parametrize("name", [n for n in ADAPTED if METHODS[n].wraps] + ["state"])
def test_only_what_is_named_is_compressed_and_the_model_stays_near(name):
    setup = AdapterConfig(
        name, OPTIONS[name], ("att",) if METHODS[name].parts else (), quant="int8", quant_parts=("att", "ffn")
    )
    model, _ = adapted(setup)
    compressed = {
        n.replace(".linear", "") for n, m in model.named_modules() if isinstance(m, (QuantLinear, QuantEmbedding))
    }
    assert compressed == set(linear_layers(model.geometry, ("att", "ffn")))
    exact = tiny.model(0, shape_of())(X)[0]
    assert 0 < (model(X)[0] - exact).norm() < 0.1 * exact.norm()
    assert not any(isinstance(p, QuantLinear) for p in model.state_dict())


def test_embedding_and_head_are_compressed_if_asked():
    setup = AdapterConfig("state", quant="nf4", quant_parts=("emb", "head"))
    model, _ = adapted(setup)
    assert isinstance(model.emb, QuantEmbedding) and isinstance(model.head, QuantLinear)
    assert model.head_weight().dtype == model.dtype
    exact = tiny.model(0, shape_of())(X)[0]
    assert (model(X)[0] - exact).norm() < 0.5 * exact.norm()


def test_weights_that_are_kept_are_converted_and_trained_ones_are_float32():
    model, _ = adapted(AdapterConfig("lora", OPTIONS["lora"], ("att", "ln", "emb")), keep=torch.bfloat16)
    kinds = {n: p.dtype for n, p in model.named_parameters()}
    assert kinds["head.weight"] == kinds["blocks.0.att.key.linear.weight"] == torch.bfloat16
    assert {kinds[n] for n, p in model.named_parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.smoke
@pytest.mark.parametrize("loaded", [False, True], ids=["fresh", "going on"])
@pytest.mark.parametrize("file", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("keep", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("name", "quant"),
    [(n, "none") for n in METHODS if METHODS[n].parts or METHODS[n].saves_model] + [(n, "nf4") for n in ADAPTED],
)
def test_what_is_left_for_later_is_the_files_until_its_block_is_made(name, quant, keep, file, loaded):
    """How weights that will lie in pieces are made: never all at once."""
    shape = shape_of()
    tensors = {n: t.to(file) for n, t in tiny.tensors(0, shape).items()}
    setup = replace(SETUPS[name], quant=quant, quant_parts=("att", "ffn", "emb", "head"))
    models, later = [], {}
    for mine in (None, later):
        torch.manual_seed(1)
        model = build(shape, dict(tensors), tiny.ops(shape))
        begun = inject.inject_adapters(model, setup, keep, later=mine)
        if loaded and begun:
            model = build(shape, dict(tensors), tiny.ops(shape))
            inject.inject_adapters(model, setup, keep, begun, later=mine)
        models.append(model)
        if loaded:
            learnt = {n: torch.full(p.shape, 0.5) for n, p in inject.trainable_params(model).items()}
            inject.load_trained(model, learnt, "x.pth", mine)
    at_once, by_block = models
    places = {tensor.data_ptr() for tensor in tensors.values()}
    frozen = {
        n for n, p in at_once.named_parameters() if not p.requires_grad and n.endswith("weight") and p.dtype != file
    }
    assert frozen | set(setup.whole(shape)) <= names_of_weights(by_block, later)

    def lies_in_the_file(name):
        return by_block.get_parameter(name).data_ptr() in places

    assert all(map(lies_in_the_file, names_of_weights(by_block, later)))
    materialize(by_block, later, "blocks.0.")
    assert not any(n.startswith("blocks.0.") for n in later)
    assert all(map(lies_in_the_file, names_of_weights(by_block, later)))
    materialize(by_block, later)
    assert not later
    for model in models:
        codes_as_parameters(model)
    for (n, a), (m, b) in zip(at_once.named_parameters(), by_block.named_parameters(), strict=True):
        assert n == m and a.dtype == b.dtype and a.requires_grad == b.requires_grad and torch.equal(a, b), n
    assert torch.equal(at_once.eval()(X)[0], by_block.eval()(X)[0])


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("name", METHODS)
def test_what_processes_need_not_send_one_another_is_what_the_file_has(name, quant):
    """And all of it but what is learnt, compressed or (PiSSA) left over."""
    shape = shape_of()
    tensors = {n: t.bfloat16() for n, t in tiny.tensors(0, shape).items()}
    setup = (
        SETUPS[name] if METHODS[name].saves_model else replace(SETUPS[name], quant=quant, quant_parts=("att", "ffn"))
    )
    model = build(shape, dict(tensors), tiny.ops(shape))
    inject.inject_adapters(model, setup, torch.float32)
    codes_as_parameters(model)
    given = inject.given(model, setup)
    result = {inject.file_name(n) for n, _ in model.named_parameters() if given(n)}
    made = {*inject.trainable_params(model), *(f"{n}.weight" for n in setup.compressed(shape))}
    made |= {f"{n}.weight" for n in setup.wrapped(shape)} if name == "pissa" else set()
    assert result == set(tensors) - made
    for n, parameter in model.named_parameters():
        if given(n):
            assert torch.equal(parameter, tensors[inject.file_name(n)].float()) and not parameter.requires_grad, n


def names_of_weights(model, later):
    """Of what is left for later: parameters, and the weights of whole layers."""
    return {n if isinstance(find(model, n), torch.nn.Parameter) else f"{n}.weight" for n in later}


def find(model, name):
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("ln_out.weight"), "ln_out.weight is missing"),
        (lambda t: t.update(strange=torch.zeros(1)), "strange does not belong to this setting"),
        (lambda t: t.update({"ln_out.weight": torch.zeros(3)}), r"ln_out.weight is \[3\] instead of \[32\]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change, words):
    model, _ = adapted(SETUPS["lora"])
    tensors = {n: p.detach() for n, p in inject.trainable_params(model).items()}
    change(tensors)
    with pytest.raises(UserError, match=words):
        inject.load_trained(model, tensors, "x.pth")


def test_a_pissa_without_what_it_began_with_is_refused():
    first, _ = adapted(SETUPS["pissa"])
    with pytest.raises(UserError, match="has nothing of blocks.0.att.receptance; it is another run's"):
        inject.attach_checkpoint(tiny.model(0, shape_of()), inject.trainable_params(first), SETUPS["pissa"], "x.pth")


def test_a_weight_with_nan_is_not_compressed_in_silence():
    model = tiny.model(0, shape_of())
    with torch.no_grad():
        model.blocks[1].ffn.key.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="blocks.1.ffn.key.weight of the base: .*NaN or infinity. Take another"):
        inject.inject_adapters(model, AdapterConfig("state", quant="nf4", quant_parts=("ffn",)))


def test_a_row_of_zeros_learns_in_dora_as_in_lora_and_gets_no_length_of_its_own():
    torch.manual_seed(0)
    linear, rank, alpha = Linear(24, 16).requires_grad_(False), 4, 8.0
    torch.nn.init.normal_(linear.weight)
    linear.weight[3] = 0.0
    layer, x = ADAPTERS["dora"](linear, rank, alpha), torch.randn(5, 24)
    assert torch.equal(layer(x), linear(x)) and layer.lora_magnitude[3] == 0
    with torch.no_grad():
        layer.lora_B.add_(torch.randn_like(layer.lora_B) * 1e-4)
    layer(x).square().sum().backward()
    assert layer.lora_magnitude.grad[3] == 0 and layer.lora_magnitude.grad[2] != 0
    lora = alpha / rank * (layer.lora_B @ layer.lora_A)[3]
    torch.testing.assert_close(layer(x)[:, 3], x @ lora)
    tensors = {name: getattr(layer, name).detach() for name in layer.tensors}
    merged = ADAPTERS["dora"].merge(linear.weight, tensors, {"rank": rank, "alpha": alpha, "rslora": False})
    torch.testing.assert_close(x @ merged.T, layer(x).detach())
