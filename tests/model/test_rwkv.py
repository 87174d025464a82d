"""Law 1, the `rwkv` package judges our logits; law 2, halves, padding and packs change nothing."""

import ctypes

import pytest
import torch
from helpers import tiny
from helpers.kit import few
from helpers.logits import IDS, ids, judged

from rwkv_peft.adapters import inject
from rwkv_peft.checkpoint import pth
from rwkv_peft.model import arch
from rwkv_peft.model.rwkv import build, fresh_state, set_state
from rwkv_peft.model.state import BlockState
from rwkv_peft.ops import dispatch

CASES = [(version, layers, False) for version in tiny.VERSIONS for layers in (1, 3)]
CASES.remove(("x052", 1, False))  # the package itself fails on a v5 of one layer
CASES += [("x070", layers, True) for layers in (1, 3)]  # files with v0, v1, v2 in layer 0, where no one uses them


@pytest.mark.smoke(1)
@pytest.mark.parametrize(("version", "layers", "layer0_v"), few(CASES, [(v, 3, False) for v in tiny.VERSIONS]))
def test_logits_equal_those_of_the_rwkv_package(tmp_path, version, layers, layer0_v):
    shape = tiny.geometry(layers, 128, 512, 64, version)
    tensors = tiny.tensors(3, shape)
    if layer0_v:
        tensors |= {f"blocks.0.att.v{i}": torch.randn(s) for i, s in ((0, (1, 1, 128)), (1, (128, 32)), (2, (32, 128)))}
    pth.save(tmp_path / "tiny.pth", tensors)
    whole, steps = judged(tmp_path / "tiny.pth", version=version)
    result = arch.detect({n: s.shape for n, s in pth.read_header(tmp_path / "tiny.pth").items()}, "tiny.pth")
    for backend in dispatch.available(version, "cpu"):
        with torch.inference_mode():
            ours, _ = build(result, pth.load(tmp_path / "tiny.pth"), dispatch.choose(backend, version))(
                torch.tensor([IDS])
            )
        for theirs in (whole, steps):
            assert (ours[0] - theirs).abs().max() < 2e-5 * theirs.abs().max()


def small(version: str, layers: int = 2):
    return tiny.geometry(layers, 32, 64, 16, version)


@pytest.fixture(scope="module", params=tiny.VERSIONS)
def model(request):
    torch.manual_seed(0)
    return tiny.model(shape=small(request.param), dtype=torch.float64)


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_two_halves_with_the_carried_state_equal_the_whole(model, cut):
    x = ids(2, 50)
    whole, end = model(x)
    first, state = model(x[:, :cut])
    second, after = model(x[:, cut:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    for a, b in zip(after, end, strict=True):
        for s, t in zip(a.tensors(), b.tensors(), strict=True):
            torch.testing.assert_close(s, t)


def test_token_by_token_equals_all_at_once(model):
    x, state, steps = ids(1, 20), None, []
    for t in range(20):
        logits, state = model(x[:, t : t + 1], state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), model(x)[0])


def test_padding_behind_a_sequence_changes_nothing_in_it(model):
    x = ids(1, 20)
    padded = torch.cat([x, torch.zeros(1, 30, dtype=torch.long)], 1)
    torch.testing.assert_close(model(padded)[0][:, :20], model(x)[0])


BOUNDS = (0, 1, 18, 50, 64)


def test_packed_sequences_have_the_logits_they_have_alone(model):
    x = ids(1, 64)
    packed, _ = model(x, cu_seqlens=BOUNDS)
    alone = [model(x[:, a:b])[0] for a, b in zip(BOUNDS, BOUNDS[1:], strict=False)]
    torch.testing.assert_close(packed, torch.cat(alone, 1))


def test_without_bounds_a_pack_would_leak(model):
    """That the law above could fail: the second sequence does see the first when no one resets."""
    x = ids(1, 64)
    assert (model(x)[0] - model(x, cu_seqlens=BOUNDS)[0]).abs().max() > 1e-3


def test_the_gradient_of_a_pack_is_the_sum_of_the_gradients_alone(model):
    x, parameters = ids(1, 64), list(model.parameters())

    def gradients(run):
        logits = run()
        # (the decays of RWKV-6 and -5 have no part in a sequence of one token)
        return torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True, materialize_grads=True)

    packed = gradients(lambda: model(x, cu_seqlens=BOUNDS)[0])
    alone = [gradients(lambda a=a, b=b: model(x[:, a:b])[0]) for a, b in zip(BOUNDS, BOUNDS[1:], strict=False)]
    for together, *parts in zip(packed, *alone, strict=True):
        torch.testing.assert_close(together, sum(parts))


every_version = pytest.mark.parametrize("version", tiny.VERSIONS)


class Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def live_bytes() -> int:
    """What malloc has given out, glibc's own count."""
    count = ctypes.CDLL(None).mallinfo2
    count.restype = Mallinfo
    result = count()
    return result.uordblks + result.hblkhd


@every_version
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("recompute", ["cheap", "blocks"])
def test_computing_again_changes_no_gradient(version, backend, recompute):
    shape, x = small(version), ids(2, 30)
    gradients = []
    for how in ("nothing", recompute):
        model = build(shape, tiny.tensors(0, shape), tiny.ops(shape, backend), recompute=how)
        set_state(model, {n: torch.ones(t.shape) for n, t in fresh_state(shape, shifts=True).items()})
        loss = model(x)[0].square().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@every_version
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc's count of memory")
def test_computing_again_keeps_less(version, backend):
    shape, x, kept = tiny.geometry(4, 128, 64, 16, version), ids(1, 200) % 64, {}
    for how in ("nothing", "cheap", "blocks"):
        model = build(shape, tiny.tensors(0, shape), tiny.ops(shape, backend), recompute=how)
        inject.inject_adapters(
            model, inject.AdapterConfig("lora", {"rank": 4, "alpha": 4.0, "rslora": False}, ("att", "ffn"))
        )
        before = live_bytes()
        loss = model(x)[0].square().sum()
        kept[how] = live_bytes() - before
        del loss
    # the mixes of RWKV-6 depend on the text: they are not cheap; and torch keeps more of what is not
    share = 0.85 if backend == "cpu" and version != "x060" else 1.0
    assert kept["blocks"] < kept["cheap"] < share * kept["nothing"]


@every_version
def test_every_parameter_of_the_file_takes_part(version):
    """A tensor without a gradient would be one that the model reads and ignores."""
    model = tiny.model(shape=small(version, 3))
    model(torch.arange(1, 41)[None])[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_model_is_built_from_mapped_files_without_copying_them(tmp_path):
    shape = small("x070")
    tensors = pth.load(tiny.save_model(tmp_path / "m.pth", shape=shape))
    model = build(shape, tensors, tiny.ops(shape))
    assert model.emb.weight.data_ptr() == tensors["emb.weight"].data_ptr()


@every_version
def test_bf16_activations_stay_close_to_float32(version):
    shape, x = small(version), ids(1, 40)
    exact, _ = tiny.model(shape=shape)(x)
    rough, _ = tiny.model(shape=shape, dtype=torch.bfloat16)(x)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("version", ["x060", "x052"])
def test_a_decay_too_strong_for_float32_is_no_decay_to_nan(version):
    """exp(exp(100)) is infinite; the decay is 0 and so is its gradient."""
    shape = small(version)
    tensors = tiny.tensors(0, shape)
    tensors["blocks.0.att.time_decay"] = torch.full_like(tensors["blocks.0.att.time_decay"], 100.0)
    model = build(shape, tensors, tiny.ops(shape))
    model(ids(1, 20))[0].square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@every_version
@pytest.mark.parametrize("op", dispatch.available("x070", "cpu"))
def test_a_learnt_state_is_what_every_sequence_begins_with(op, version):
    shape, x = small(version), ids(1, 64)
    plain = tiny.model(shape=shape, dtype=torch.float64)
    state = {name: torch.randn(t.shape) for name, t in fresh_state(shape, shifts=True).items()}
    begun = build(shape, tiny.tensors(0, shape) | state, tiny.ops(shape, op), torch.float64, keep=torch.float64)

    def from_state(tokens):
        blocks = [
            BlockState(
                *(state[f"blocks.{i}.{n}"][None].double() for n in ("att.ts_state", "att.time_state", "ffn.ts_state"))
            )
            for i in range(2)
        ]
        return plain(tokens, blocks)[0]

    alone = [from_state(x[:, a:b]) for a, b in zip(BOUNDS, BOUNDS[1:], strict=False)]
    torch.testing.assert_close(begun(x, cu_seqlens=BOUNDS)[0], torch.cat(alone, 1), rtol=1e-6, atol=1e-6)
    assert (begun(x)[0] - plain(x)[0]).abs().max() > 1e-3
