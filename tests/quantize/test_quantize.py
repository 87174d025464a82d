"""A quantised weight is what its definition says, computes like the dense one, and is dense only while it multiplies."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from rwkv_peft.common.errors import UserError
from rwkv_peft.quantize import MODES, QuantEmbedding, QuantLinear, base, quantise
from rwkv_peft.quantize.int8_fp8 import fp8_values
from rwkv_peft.quantize.nf4_fp4 import FP4, NF4, FourBit, by_bitsandbytes, dynamic, pairs_of_levels

# largest error of a weight matrix, relative; what is measured is up to 5 % below it
BOUND = {"int8": 0.0095, "nf4": 0.094, "fp4": 0.125, "fp8": 0.028}
BITS = {"int8": 8.02, "nf4": 4.13, "fp4": 4.13, "fp8": 8.02}
LEVELS = {"nf4": NF4, "fp4": FP4}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(outputs=256, inputs=2048, deviation=0.02):
    return torch.randn(outputs, inputs) * deviation


def with_outlier():
    weight = normal(deviation=0.005)
    weight[3, 5] = 25 * 0.005
    return weight


def error(result, exact):
    return ((result.double() - exact.double()).norm() / exact.double().norm()).item()


# ---- the definition, slow and plain: lists of Python floats


def nearest(value, table):
    return min(table, key=lambda level: abs(level - value))


def e4m3():
    positive = [m / 8 * 2**-6 for m in range(8)] + [
        (1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)
    ]
    positive = positive[:-1]  # the last pattern is NaN; 448 is the largest number
    return positive + [-x for x in positive]


def eight_bit_dynamic():
    positive = []
    for decade, steps in enumerate((1, 2, 4, 8, 16, 32, 64)):
        width = 0.9 / steps
        positive += [(0.1 + width * (i + 0.5)) * 10.0 ** (decade - 6) for i in range(steps)]
    return [0.0, 1.0, *positive, *(-x for x in positive)]


def per_row(weight, table):
    largest = max(table)
    rows = []
    for row in weight:
        scale = max(abs(x) for x in row) / largest
        rows.append([nearest(x / scale, table) * scale if scale else 0.0 for x in row])
    return rows


def per_block(weight, levels):
    blocks = [[row[i : i + 64] for i in range(0, len(row), 64)] for row in weight]
    scales = [max(abs(x) for x in block) for row in blocks for block in row]
    mean = sum(scales) / len(scales)
    kept, table = [], eight_bit_dynamic()
    for i in range(0, len(scales), 256):
        offsets = [s - mean for s in scales[i : i + 256]]
        largest = max(abs(x) for x in offsets)
        kept += [nearest(x / largest, table) * largest + mean if largest else mean for x in offsets]
    # the codes are found with the exact scale, the values made with the one that is kept
    pairs = iter(zip(scales, kept, strict=True))
    rows = []
    for row in blocks:
        rows.append([])
        for block in row:
            exact, scale = next(pairs)
            rows[-1] += [nearest(x / exact, levels) * scale if exact else 0.0 for x in block]
    return rows


DEFINITION = {
    "int8": lambda weight: per_row(weight, range(-127, 128)),
    "fp8": lambda weight: per_row(weight, e4m3()),
    "nf4": lambda weight: per_block(weight, NF4),
    "fp4": lambda weight: per_block(weight, FP4),
}


@pytest.mark.parametrize("shape", [(6, 128), (5, 64), (7, 100), (3, 1), (70, 257)])
@pytest.mark.parametrize("mode", MODES)
def test_the_dense_weight_is_what_the_definition_says(mode, shape):
    weight = normal(*shape)
    weight[1] = 0
    expected = torch.tensor(DEFINITION[mode](weight.tolist()))
    torch.testing.assert_close(quantise(weight, mode).dense(torch.float32), expected, rtol=2e-5, atol=1e-9)


# ---- how near, how small


@pytest.mark.parametrize("make", [normal, with_outlier])
@pytest.mark.parametrize("mode", MODES)
def test_the_error_stays_below_the_bound_of_its_mode(mode, make):
    weight = make()
    result = quantise(weight, mode).dense(torch.float32)
    assert error(result, weight) < BOUND[mode]
    assert error(result[4:], weight[4:]) < BOUND[mode]  # the rows beside the outlier's do not pay for it


@pytest.mark.parametrize("mode", MODES)
def test_the_error_does_not_depend_on_the_scale_of_the_weight(mode):
    weight = normal()
    dense = quantise(weight, mode).dense(torch.float32)
    for power in (2.0**-40, 2.0**20):
        assert torch.equal(quantise(weight * power, mode).dense(torch.float32), dense * power)


@pytest.mark.parametrize("mode", MODES)
def test_a_huge_outlier_is_kept_and_costs_the_other_rows_little(mode):
    weight = normal()
    weight[3, 5] = 1000 * 0.02
    result = quantise(weight, mode).dense(torch.float32)
    assert result[3, 5].item() == pytest.approx(20.0, rel=0.01)
    assert error(result[4:], weight[4:]) < 1.2 * BOUND[mode]


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_takes_the_bits_that_its_mode_promises(mode):
    weight = normal(512, 2048)
    for layer in (quantise(weight, mode), QuantLinear(weight, mode), QuantEmbedding(weight, mode)):
        assert 4 <= 8 * layer.bytes / weight.numel() <= BITS[mode]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_the_dtype_of_the_weight_changes_nothing_but_its_own_rounding(mode, dtype):
    weight = normal(20, 96).to(dtype)
    result, same = quantise(weight, mode), quantise(weight.float(), mode)
    assert all(torch.equal(a, b) for a, b in zip(result.buffers(), same.buffers(), strict=True))
    assert torch.equal(result.dense(dtype), same.dense(torch.float32).to(dtype))


@pytest.mark.parametrize("mode", MODES)
def test_how_it_is_cut_into_pieces_and_how_it_lies_in_memory_change_nothing(mode, monkeypatch):
    weight, ids = normal(33, 200), torch.tensor([5, 5, 32, 0])
    whole = quantise(weight, mode)
    monkeypatch.setattr(base, "PIECE", {"cpu": 450})
    for other in (weight, weight.T.contiguous().T):
        cut = quantise(other, mode)
        assert all(torch.equal(a, b) for a, b in zip(cut.buffers(), whole.buffers(), strict=True))
        assert torch.equal(cut.dense(torch.float32), whole.dense(torch.float32))
        assert torch.equal(cut.rows(ids, torch.float32), whole.dense(torch.float32)[ids])


# ---- what is odd


@pytest.mark.parametrize("mode", MODES)
def test_zeros_stay_zeros(mode):
    weight = normal(12, 192)
    weight[2], weight[:, 64:128] = 0, 0
    result = quantise(weight, mode).dense(torch.float32)
    assert not result[weight == 0].any() and result[0, :64].any()
    assert not quantise(torch.zeros(3, 64), mode).dense(torch.bfloat16).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("mode", MODES)
def test_a_weight_that_holds_nan_or_infinity_is_refused(mode, bad):
    for dtype in DTYPES:
        weight = normal(70, 100).to(dtype)
        weight[69, 99] = bad
        with pytest.raises(UserError, match="^holds NaN or infinity$"):
            quantise(weight, mode)


@pytest.mark.parametrize("mode", MODES)
def test_the_smallest_and_the_largest_numbers_stay_finite(mode):
    for size in (1e-44, 1e-38, 3e38):
        weight = torch.full((2, 64), size)
        result = quantise(weight, mode).dense(torch.float32)
        assert torch.isfinite(result).all()
        torch.testing.assert_close(result, weight, rtol=1e-2, atol=1e-37)


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (0, 0)])
@pytest.mark.parametrize("mode", MODES)
def test_an_empty_weight_stays_empty(mode, shape):
    layer = QuantLinear(torch.empty(shape), mode)
    assert layer.dense().shape == shape
    assert torch.equal(layer(torch.ones(3, shape[1])), torch.zeros(3, shape[0]))


# ---- layers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24, 128), (10, 100)])
@pytest.mark.parametrize("mode", MODES)
def test_a_layer_and_its_gradient_are_those_of_the_dense_weight(mode, shape, dtype):
    layer = QuantLinear(normal(*shape, deviation=1), mode)
    assert (layer.out_features, layer.in_features) == shape
    ours, theirs = (torch.ones(2, 5, shape[1], dtype=dtype).normal_(generator=seed(1)).requires_grad_() for _ in "ab")
    y, expected = layer(ours), F.linear(theirs, layer.dense(dtype))
    assert y.dtype == dtype and torch.equal(y, expected)
    dy = torch.randn(y.shape).to(dtype)
    y.backward(dy), expected.backward(dy)
    assert torch.equal(ours.grad, theirs.grad)


def seed(number):
    return torch.Generator().manual_seed(number)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_finite_differences(mode):
    layer = QuantLinear(normal(4, 6, deviation=1), mode)
    torch.autograd.gradcheck(layer, torch.randn(3, 6, dtype=torch.float64, requires_grad=True))


@pytest.mark.smoke(2)
@pytest.mark.parametrize("mode", MODES)
def test_no_dense_weight_is_kept_between_forward_and_backward(mode, monkeypatch):
    layer, x = QuantLinear(normal(64, 128), mode), torch.randn(3, 128, requires_grad=True)
    made, saved = [], []
    dense = layer.weight.dense

    def watched(dtype):
        made.append(weakref.ref(weight := dense(dtype)))
        return weight

    monkeypatch.setattr(layer.weight, "dense", watched)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    gc.collect()
    assert len(made) == 1 and made[0]() is None and not saved
    y.sum().backward()
    assert len(made) == 2 and x.grad is not None


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_activation_checkpoints_give_the_same_gradients(mode, reentrant):
    first, second = QuantLinear(normal(32, 64), mode), QuantLinear(normal(8, 32), mode)
    x = torch.randn(5, 64, requires_grad=True)

    def block(x):
        return second(first(x).relu())

    (plain,) = torch.autograd.grad(block(x).square().sum(), x)
    checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, plain)


@pytest.mark.parametrize("mode", MODES)
def test_an_embedding_gives_the_rows_that_are_asked_for_and_makes_no_others(mode, monkeypatch):
    layer = QuantEmbedding(normal(50, 192), mode)
    expected = layer.dense(torch.bfloat16)
    monkeypatch.setattr(layer.weight, "dense", None)
    for ids in (
        torch.tensor([[0, 49, 7], [7, 7, 1]]),
        torch.tensor([3], dtype=torch.int32),
        torch.tensor([], dtype=int),
    ):
        result = layer(ids, torch.bfloat16)
        assert result.dtype == torch.bfloat16 and torch.equal(result, expected[ids.long()])
    for wrong in (-1, 50):
        with pytest.raises(IndexError):
            layer(torch.tensor([wrong]), torch.float32)


@pytest.mark.parametrize("mode", MODES)
def test_what_was_first_used_in_inference_mode_can_be_trained_through(mode):
    for table in (dynamic, pairs_of_levels, fp8_values):
        table.cache_clear()
    with torch.inference_mode():
        layer = QuantLinear(normal(8, 64), mode)
        layer(torch.randn(2, 64))
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dense().sum(0).expand(2, -1))


@pytest.mark.parametrize("make", [QuantLinear, QuantEmbedding])
@pytest.mark.parametrize("mode", MODES)
def test_a_quantised_weight_is_never_trained_saved_or_cast(mode, make):
    weight = torch.nn.Parameter(normal(10, 128))
    model = torch.nn.Sequential(make(weight, mode))
    before, kept = model[0].dense(), weight.detach().clone()
    assert not list(model.parameters()) and not model.state_dict()
    taken = model[0].bytes
    model.to(torch.bfloat16).half()
    assert torch.equal(model[0].dense(), before) and model[0].bytes == taken
    assert torch.equal(weight, kept) and not before.requires_grad
    assert {b.device.type for b in model.to("meta").buffers()} == {"meta"}


# ---- beside bitsandbytes


def theirs(weight, mode, double):
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type=mode)
    return codes.view(len(weight), -1), state, functional.dequantize_4bit(codes, state)


@pytest.mark.parametrize("mode", LEVELS)
def test_the_levels_are_those_of_bitsandbytes(mode):
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(torch.tensor(LEVELS[mode]), functional.get_4bit_type(mode, device="cpu"))
    assert torch.equal(dynamic(torch.device("cpu")), functional.create_dynamic_map())


@pytest.mark.parametrize("make", [normal, with_outlier])
@pytest.mark.parametrize("mode", LEVELS)
def test_four_bit_bytes_and_values_are_those_of_bitsandbytes(mode, make):
    weight = make()
    codes, state, dense = theirs(weight, mode, double=False)
    ours = quantise(weight, mode)
    assert torch.equal(ours.codes, codes)
    absmax = state.absmax.view(len(weight), -1)
    ours.scale = lambda rows: absmax[rows]  # as if the scales were not compressed
    torch.testing.assert_close(ours.dense(torch.float32), dense, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", LEVELS)
def test_double_quantisation_is_that_of_bitsandbytes(mode):
    weight = normal()
    codes, state, dense = theirs(weight, mode, double=True)
    ours = quantise(weight, mode)
    assert torch.equal(ours.codes, codes)
    torch.testing.assert_close(ours.scale_mean[0], state.offset, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.scale_max, state.state2.absmax, rtol=1e-5, atol=0)
    apart = (ours.scale_codes.flatten().int() - state.absmax.int()).abs()
    # a scale that is half-way between two levels may go to either
    assert apart.max() <= 1 and apart.sum() <= 0.002 * len(apart)
    same = (apart == 0).view(len(weight), -1, 1).expand(-1, -1, 64).reshape(weight.shape)
    torch.testing.assert_close(ours.dense(torch.float32)[same], dense[same], rtol=1e-5, atol=0)
    assert abs(error(ours.dense(torch.float32), weight) - error(dense, weight)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [64, 100, 2048])
@pytest.mark.parametrize("mode", LEVELS)
def test_bitsandbytes_dequantises_our_bytes_to_our_values(mode, inputs, dtype):
    pytest.importorskip("bitsandbytes")
    ours = quantise(normal(48, inputs), mode)
    result = by_bitsandbytes(ours.codes, ours.scale(slice(0, 48)), ours.levels, dtype)[:, :inputs]
    assert torch.equal(result, ours.dense(dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_gives_the_bytes_and_the_values_of_the_cpu(mode):
    weight = normal()
    here, there = quantise(weight, mode), quantise(weight.cuda(), mode)
    assert torch.equal(there.codes.cpu(), here.codes)
    moved = here.cuda()
    dense = moved.dense(torch.bfloat16)
    assert isinstance(moved, FourBit) == (mode in LEVELS)
    torch.testing.assert_close(dense.cpu(), quantise(weight, mode).dense(torch.bfloat16), rtol=2**-7, atol=0)
    assert torch.equal(moved.rows(torch.tensor([7, 3], device="cuda"), torch.bfloat16), dense[[7, 3]])
