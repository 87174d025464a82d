"""The file shows its own shape: sizes of every released model, and words for every file that is none of the kit."""

import pytest
import torch
from helpers import tiny

from rwkv_peft.common.errors import UserError
from rwkv_peft.model import arch
from rwkv_peft.model.arch import Geometry
from rwkv_peft.model.init_weights import initial_tensors
from rwkv_peft.model.rwkv import skeleton

# layers, width, ranks w=a, v, g, parameters: the released models (hf-adapter's docs/PUBLISHED_MODELS.md)
RELEASED = {
    "0.1B": (12, 768, 64, 32, 128, 191_034_624),
    "0.4B": (24, 1024, 64, 32, 128, 450_767_872),
    "1.5B": (24, 2048, 96, 64, 256, 1_527_404_544),
    "2.9B": (32, 2560, 96, 64, 320, 2_947_735_040),
    "7.2B": (32, 4096, 128, 96, 480, 7_199_141_888),
    "13.3B": (61, 4096, 192, 128, 384, 13_269_245_952),
}


# layers, width, width of the channel mix, ranks of mix and decay, parameters: our sums over the official shapes, which for
# v6-1.6B, 3B and 7B are also those that their model cards round
EARLIER = {
    ("x060", "1.6B"): (24, 2048, 7168, 32, 64, 1_599_873_024),
    ("x060", "3B"): (32, 2560, 8960, 32, 64, 3_099_863_040),
    ("x060", "7B"): (32, 4096, 14336, 64, 128, 7_635_746_816),
    ("x060", "14B"): (61, 4096, 14336, 64, 128, 14_069_088_256),
    ("x052", "7B"): (32, 4096, 14336, 0, 0, 7_518_044_160),
}
SIZES = {
    f"v7 {name}": (Geometry("x070", layers, width, 64, 65536, 4 * width, rank, rank, v, g), count)
    for name, (layers, width, rank, v, g, count) in RELEASED.items()
} | {
    f"{version} {name}": (Geometry(version, layers, width, 64, 65536, ffn, rank_w=w, rank_mix=mix), count)
    for (version, name), (layers, width, ffn, mix, w, count) in EARLIER.items()
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_released_models_are_recognised_with_their_published_number_of_parameters(name):
    shape, parameters = SIZES[name]
    assert arch.detect(arch.shapes(shape), name) == shape
    state = skeleton(shape, tiny.ops(shape)).state_dict()
    assert {n: tuple(t.shape) for n, t in state.items()} == arch.shapes(shape)
    assert sum(t.numel() for t in state.values()) == parameters


@pytest.mark.parametrize("version", tiny.VERSIONS)
def test_a_new_model_has_every_tensor_of_its_version_and_finite_values(version):
    shape = tiny.geometry(3, 64, 100, 16, version)
    made = initial_tensors(shape, 0)
    assert {n: tuple(t.shape) for n, t in made.items()} == arch.shapes(shape)
    assert all(torch.isfinite(t).all() for t in made.values())
    assert not made["blocks.1.ffn.value.weight"].any() and made["blocks.1.att.key.weight"].std() > 0


def result(version="x070", **changes):
    shapes = dict(arch.shapes(tiny.geometry(version=version)))
    for name, shape in changes.items():
        name = name.replace("__", ".")
        if shape is None:
            del shapes[name]
        else:
            shapes[name] = shape
    return shapes


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"x": (1,)}, "is not an RWKV model"),
        ({"blocks.0.att.key.lora_A": (8, 32)}, "is an adapter"),
        ({"blocks.0.att.time_state": (2, 16, 16)}, "is an adapter"),
        (
            {"blocks.0.att.time_maa_x": (1, 1, 32)},
            r"looks like RWKV-6 \(x060\), but a tensor that gives its size is missing",
        ),
        ({"blocks.0.att.time_mix_g": (1, 1, 32), "blocks.0.att.time_decay": (2,)}, r"is RWKV-5.1; this kit works with"),
        ({"blocks.0.att.time_mix_k": (1, 1, 32)}, r"is RWKV-4; this kit works with RWKV-5 \(x052\), RWKV-6"),
        (
            result(version="x060", blocks__0__att__gate__weight=None),
            "damaged RWKV-6 .x060. file: blocks.0.att.gate.weight",
        ),
        (result() | {"blocks.1.att.time_state": (2, 8, 16)}, r"time_state is \[2, 8, 16\] instead of \[2, 16, 16\]"),
        (result(blocks__1__att__key__weight=None), "blocks.1.att.key.weight is missing"),
        (result(blocks__0__ffn__key__weight=(128, 31)), r"blocks.0.ffn.value.weight|blocks.0.ffn.key.weight is"),
        (result(head__weight=(9, 32)), r"head.weight is \[9, 32\] instead of \[65536, 32\]"),
        (result(emb__weight=None), "a tensor that gives its size is missing"),
        (result() | {"blocks.0.ffn.s_emb.weight": (1,)}, "DeepEmbed"),
    ],
)
def test_a_file_that_is_no_whole_model_says_what_it_is(shapes, words):
    with pytest.raises(UserError, match=words):
        arch.detect(shapes, "x.pth")


def test_unknown_tensors_and_layer_0_values_are_let_through():
    extra = {"blocks.0.att.v0": (1, 1, 32), "blocks.0.att.v1": (32, 8), "blocks.0.att.v2": (8, 32), "note": (3,)}
    assert arch.detect(arch.shapes(tiny.geometry()) | extra, "x.pth") == tiny.geometry()


@pytest.mark.parametrize("version", tiny.VERSIONS)
def test_parts_mean_what_they_say(version):
    """Together they are the whole model: no tensor belongs to no one, none to two."""
    shape = tiny.geometry(version=version)
    parts = {part: set(arch.whole_tensors(shape, [part])) for part in ("time", "ln", "emb", "head")}
    parts |= {part: {f"{n}.weight" for n in arch.linear_layers(shape, [part])} for part in ("att", "ffn")}
    assert set().union(*parts.values()) == set(arch.shapes(shape))
    assert sum(map(len, parts.values())) == len(arch.shapes(shape))
    assert parts["emb"] == {"emb.weight"} and parts["head"] == {"head.weight"}
    assert {"blocks.0.ln0.weight", "ln_out.bias", "blocks.1.att.ln_x.bias"} <= parts["ln"]
    assert {"x070": "blocks.1.att.w1", "x060": "blocks.1.att.time_maa_w2", "x052": "blocks.0.att.time_faaaa"}[
        version
    ] in parts["time"]
    gated = {"blocks.0.att.gate.weight": "att", "blocks.1.ffn.receptance.weight": "ffn"}
    assert all((name in parts[part]) == (version != "x070") for name, part in gated.items())


def test_weight_decay_and_rate_factors_follow_the_official_recipe():
    shapes = arch.shapes(tiny.geometry())
    decayed = {n for n, s in shapes.items() if arch.decays(n, s)}
    assert "head.weight" in decayed and "blocks.0.att.key.weight" in decayed
    assert not any(n.endswith(("w1", "w2", "r_k", "x_r", "bias", "ln1.weight", "ln_x.weight")) for n in decayed)
    assert arch.lr_scale(tiny.geometry(), "blocks.3.att.w0") == 2.0
    assert arch.lr_scale(tiny.geometry(), "blocks.3.att.w1") == 1.0
    assert arch.lr_scale(tiny.geometry(version="x060"), "blocks.3.att.time_decay_w1") == 2.0
    assert not arch.decays("blocks.0.att.time_state", (2, 16, 16)) and arch.decays("blocks.0.att.key.lora_A", (4, 32))
    assert not arch.decays("blocks.0.att.time_maa_w2", (5, 32, 32))
