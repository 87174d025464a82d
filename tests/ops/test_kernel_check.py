"""The proof that kernels must give before a run uses them: right ones pass, wrong ones fail, and it is asked for once."""

import types

import pytest
import torch
from helpers.kit import few

from rwkv_peft.cli import train
from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.ops import block_ops, dispatch, fla, kernel_cache, kernel_check, torch_wkv6, torch_wkv7
from rwkv_peft.ops.cuda import build

TORCH = {"x070": torch_wkv7.wkv7, "x060": torch_wkv6.wkv6, "x052": torch_wkv6.wkv5}


@pytest.mark.parametrize("version", TORCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_right_passes(version, dtype):
    assert kernel_check.check_against_reference(version, TORCH[version], "cpu", dtype).passed


def test_the_definition_of_what_is_around_passes():
    """(In bfloat16 it rounds after every operation, which what is fused does not.)"""
    assert kernel_check.prove_around(block_ops, torch_wkv7.wkv7, "cpu", torch.float32).passed


def wrong(version, how):
    def wkv(*given):
        if how == "forgets where a sequence ends":
            *x, s0, bounds = given
            y, s = TORCH[version](*x, s0[:1], (0, bounds[-1]))
            return y, s.expand(len(s0), *s.shape[1:])
        y, s = TORCH[version](*given)
        if how == "a wrong gradient":
            y = y + 1e-3 * (y - y.detach())
        return (y, s * (1 + 1e-3)) if how == "a wrong state" else (y * torch.nan, s) if how == "NaN" else (y, s)

    return wkv


@pytest.mark.smoke(4)
@pytest.mark.parametrize("version", TORCH)
@pytest.mark.parametrize("how", ["forgets where a sequence ends", "a wrong gradient", "a wrong state", "NaN"])
def test_what_is_wrong_fails(version, how):
    assert not kernel_check.check_against_reference(version, wrong(version, how), "cpu", torch.float32).passed


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine that says it has one; what runs on it is a stand-in."""
    about = types.SimpleNamespace(name="Stand-in", total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: about)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(kernel_cache, "folder", lambda: tmp_path)
    monkeypatch.setattr(build, "compiler", lambda: "13.0")
    prove = kernel_check.check_against_reference
    monkeypatch.setattr(
        kernel_check, "check_against_reference", lambda version, wkv, device, *more: prove(version, wkv, "cpu", *more)
    )

    def no_package():
        raise fla.KernelUnavailable("is not installed")

    monkeypatch.setattr(fla, "version", no_package)

    prove_around = kernel_check.prove_around
    monkeypatch.setattr(
        kernel_check, "prove_around", lambda around, wkv, device, *more: prove_around(around, wkv, "cpu", *more)
    )

    def has(wkv, name="cuda", ways=(), tokens=None, **around):
        monkeypatch.setitem(dispatch.WKV["x070"], name, wkv)
        if name == "cuda":
            stand_in = types.SimpleNamespace(**{**vars(block_ops), **around})
            monkeypatch.setitem(dispatch.AROUND, name, stand_in)
            among = {(): tokens or wkv}
            others = dispatch.KernelVariants(
                tuple(dict(ways)), dict(ways).get, lambda right: among.get(tuple(right), tuple(right))
            )
            monkeypatch.setitem(dispatch.WAYS, (name, "x070"), others)
        if name == "fla":
            monkeypatch.setattr(fla, "version", lambda: f"version {id(wkv)}")

    return has


def test_kernels_that_pass_are_taken_and_are_asked_once(gpu, monkeypatch):
    gpu(torch_wkv7.wkv7)
    first = dispatch.choose("auto", "x070", "cuda")
    assert first.name == "cuda" and "on this GPU" in first.why
    monkeypatch.setattr(kernel_check, "check_against_reference", None)
    assert dispatch.choose("auto", "x070", "cuda").name == "cuda"
    for what in ("digest", "compiler"):
        with monkeypatch.context() as changed:
            changed.setattr(build, what, lambda: "another")
            assert dispatch.choose("auto", "x070", "cuda").name == "torch"  # asked again, and there is no one to ask


@pytest.mark.smoke(1)
@pytest.mark.parametrize("how", ["wrong", "missing", "refused", "other bindings"])
def test_kernels_that_fail_are_not_taken_and_the_reason_is_reported(gpu, how):
    def fails(*_given):
        if how == "other bindings":
            raise AttributeError("cuLaunchKernel")
        raise (
            build.KernelUnavailable("wkv7.cu cannot be compiled")
            if how == "missing"
            else RuntimeError("CUDA error: no kernel image")
        )

    gpu(wrong("x070", "a wrong state") if how == "wrong" else fails)
    for _ in range(2):  # a failure is not remembered
        result = dispatch.choose("auto", "x070", "cuda")
        assert result.name == "torch" and "which are not used. OP=cuda: " in result.why
    words = {"wrong": "wrong on this GPU", "missing": "cannot be compiled", "refused": "no kernel image"}.get(
        how, "AttributeError: cuLaunchKernel"
    )
    assert words in result.why
    with pytest.raises(SettingErrors, match=words):
        dispatch.choose("cuda", "x070", "cuda")


def test_a_kernel_that_leaves_the_gpu_unusable_is_reported_as_that(gpu, monkeypatch):
    """Nothing could be computed on it any more: torch, which would be taken instead, would fail with other words."""

    def fails(*_given):
        raise RuntimeError("CUDA error 700: an illegal memory access was encountered")

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    gpu(fails)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(SettingErrors, match="broke off on this GPU .*700.*; use torch"):
        dispatch.choose("auto", "x070", "cuda")


@pytest.mark.slow
@pytest.mark.parametrize(
    "bad", few([["in parts"], ["in a single pass"], ["in parts", "in a single pass"]], [["in parts"]])
)
def test_kernels_that_are_wrong_in_one_way_go_on_in_the_others(gpu, bad):
    ways = ["in parts", "in a single pass"]
    gpu(
        torch_wkv7.wkv7, ways=[(way, wrong("x070", "a wrong state") if way in bad else torch_wkv7.wkv7) for way in ways]
    )
    for op in ("auto", "cuda"):
        result = dispatch.choose(op, "x070", "cuda")
        assert result.name == "cuda" and result.wkv == (tuple(way for way in ways if way not in bad) or torch_wkv7.wkv7)
        for way in ways:
            assert (f"not {way}: they are wrong on this GPU" in result.why) == (way in bad)


def test_token_by_token_is_proved_by_itself_where_a_backend_would_go_another_way(gpu, monkeypatch):
    """What it chooses for the proof's short texts is not what it chooses for others."""
    asked = set()
    passed = kernel_check.KernelCheck(0.0, 1.0, "")
    monkeypatch.setattr(kernel_check, "prove_around", lambda _around, wkv, *_more: asked.add(wkv) or passed)
    ways = [("in a single pass", torch_wkv7.wkv7)]
    gpu(torch_wkv7.wkv7, ways=ways, tokens=wrong("x070", "a wrong state"))
    result = dispatch.choose("auto", "x070", "cuda")
    assert result.name == "torch" and "OP=cuda: they are wrong on this GPU" in result.why
    gpu(wrong("x070", "a wrong state"), ways=[("in a single pass", wrong("x070", "NaN"))], tokens=torch_wkv7.wkv7)
    result = dispatch.choose("auto", "x070", "cuda")
    assert result.name == "cuda" and result.wkv is torch_wkv7.wkv7 and "not in a single pass" in result.why
    assert asked == {torch_wkv7.wkv7}  # the rest of a block is proved with what is right


@pytest.mark.smoke(1)
@pytest.mark.parametrize("name", ["token_shift_mix", "square_relu", "cross_entropy_grad", "wkv7_block"])
def test_what_is_wrong_around_the_recurrence_is_left_to_torch(gpu, name):
    def wrong_one(*given):
        result = getattr(block_ops, name)(*given)
        if name == "square_relu":
            return result * 1.001
        return [result[0] * 1.001, *result[1:]]

    gpu(torch_wkv7.wkv7, **{name: wrong_one})
    result = dispatch.choose("auto", "x070", "cuda")
    assert result.name == "cuda" and result.around is block_ops
    assert "the rest of a block on torch: they are wrong on this GPU" in result.why


@pytest.mark.slow
def test_where_our_own_kernels_fail_flash_linear_attention_is_taken_if_it_is_there_and_right(gpu):
    gpu(wrong("x070", "NaN"))
    gpu(torch_wkv7.wkv7, "fla")
    assert dispatch.choose("auto", "x070", "cuda").name == dispatch.choose("fla", "x070", "cuda").name == "fla"
    gpu(wrong("x070", "a wrong state"), "fla")
    result = dispatch.choose("auto", "x070", "cuda")
    assert result.name == "torch" and "OP=cuda: " in result.why and "OP=fla: they are wrong on this GPU" in result.why


def test_what_is_for_another_device_is_refused():
    with pytest.raises(SettingErrors, match="is for NVIDIA GPUs, and none was found; use auto"):
        dispatch.choose("cuda", "x070", "cpu")
    with pytest.raises(SettingErrors, match="is for training without a GPU, and there is one; use auto"):
        dispatch.choose("cpu", "x070", "cuda")


@pytest.mark.slow
def test_the_selftest_prints_what_it_detected_and_fails_with_it(ready, capsys, monkeypatch):
    from helpers.training import config

    train.command(config(), ["--selftest"])
    said = capsys.readouterr().out
    assert said.count(" passed ") >= 6 and "RWKV-7 OP=torch" in said and "FAILED" not in said
    monkeypatch.setitem(dispatch.WKV["x060"], "torch", wrong("x060", "a wrong gradient"))
    with pytest.raises(UserError, match="OP=torch for RWKV-6"):
        train.command(config(), ["--selftest"])


def test_a_number_that_a_kernel_cannot_count_is_refused():
    assert build.packed([3, None, torch.zeros(1)])[0][:2] == (3, 0)
    with pytest.raises(ValueError, match="more than a kernel can count"):
        build.packed([2**31])


# a wrong neighbour, and what it looks like: each is caught by the proof
MUTANTS = {
    "the norm's least variance": ("wkv7_block", {"EPS": 1e-5}),
    "a decay of another scale": ("wkv7_block", {"LOG_DECAY_SCALE": -0.61}),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_small_changes_around_the_recurrence_are_caught(monkeypatch, mutant):
    name, constants = MUTANTS[mutant]
    definition = types.FunctionType(getattr(block_ops, name).__code__, vars(block_ops) | constants)
    stand_in = types.SimpleNamespace(**{**vars(block_ops), name: definition})
    assert not kernel_check.prove_around(stand_in, torch_wkv7.wkv7, "cpu", torch.float32).passed
