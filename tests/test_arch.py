"""The file tells its own shape: sizes of every released model, and words for every file that is none of ours."""

import pytest
import tiny
import torch

from rwkv_peft.errors import UserError
from rwkv_peft.model import arch
from rwkv_peft.model.arch import Geometry
from rwkv_peft.model.rwkv import RWKV

# layers, width, ranks w=a, v, g, parameters: the released models (hf-adapter's docs/PUBLISHED_MODELS.md)
RELEASED = {
    "0.1B": (12, 768, 64, 32, 128, 191_034_624),
    "0.4B": (24, 1024, 64, 32, 128, 450_767_872),
    "1.5B": (24, 2048, 96, 64, 256, 1_527_404_544),
    "2.9B": (32, 2560, 96, 64, 320, 2_947_735_040),
    "7.2B": (32, 4096, 128, 96, 480, 7_199_141_888),
    "13.3B": (61, 4096, 192, 128, 384, 13_269_245_952),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_are_recognised_with_their_published_number_of_parameters(name):
    layers, width, rank, rank_v, rank_g, parameters = RELEASED[name]
    shape = Geometry(layers, width, 64, 65536, 4 * width, rank, rank, rank_v, rank_g)
    assert arch.detect(arch.shapes(shape), name) == shape
    with torch.device("meta"):
        model = RWKV(shape, None)
    state = model.state_dict()
    assert {n: tuple(t.shape) for n, t in state.items()} == arch.shapes(shape)
    assert sum(t.numel() for t in state.values()) == parameters


def found(**changes):
    shapes = dict(arch.shapes(tiny.geometry()))
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
        ({"blocks.0.att.time_maa_x": (1, 1, 32)}, r"is RWKV-6 \(x060\); this version of the kit works with RWKV-7"),
        ({"blocks.0.att.time_mix_g": (1, 1, 32)}, r"is RWKV-5 \(x052\)"),
        (found(blocks__1__att__key__weight=None), "blocks.1.att.key.weight is missing"),
        (found(blocks__0__ffn__key__weight=(128, 31)), r"blocks.0.ffn.value.weight|blocks.0.ffn.key.weight is"),
        (found(head__weight=(9, 32)), r"head.weight is \[9, 32\] instead of \[65536, 32\]"),
        (found(emb__weight=None), "a tensor that gives its size is missing"),
        (found() | {"blocks.0.ffn.s_emb.weight": (1,)}, "DeepEmbed"),
    ],
)
def test_a_file_that_is_no_whole_rwkv7_says_what_it_is(shapes, words):
    with pytest.raises(UserError, match=words):
        arch.detect(shapes, "x.pth")


def test_unknown_tensors_and_layer_0_values_are_let_through():
    extra = {"blocks.0.att.v0": (1, 1, 32), "blocks.0.att.v1": (32, 8), "blocks.0.att.v2": (8, 32), "note": (3,)}
    assert arch.detect(arch.shapes(tiny.geometry()) | extra, "x.pth") == tiny.geometry()


def test_parts_mean_what_they_say():
    names = list(arch.shapes(tiny.geometry()))
    assert arch.whole_tensors(names, ["head", "emb"]) == ["emb.weight", "head.weight"]
    ln = arch.whole_tensors(names, ["ln"])
    assert "blocks.0.ln0.weight" in ln and "ln_out.bias" in ln and "blocks.1.att.ln_x.bias" in ln
    time = arch.whole_tensors(names, ["time"])
    assert "blocks.1.att.w1" in time and "blocks.0.ffn.x_k" in time and not any("weight" in n for n in time)
    assert arch.whole_tensors(names, ["att", "ffn"]) == []


def test_weight_decay_and_rate_factors_follow_the_official_recipe():
    shapes = arch.shapes(tiny.geometry())
    decayed = {n for n, s in shapes.items() if arch.decays(n, s)}
    assert "head.weight" in decayed and "blocks.0.att.key.weight" in decayed
    assert not any(n.endswith(("w1", "w2", "r_k", "x_r", "bias", "ln1.weight", "ln_x.weight")) for n in decayed)
    assert arch.lr_scale("blocks.3.att.w0") == 2.0 and arch.lr_scale("blocks.3.att.w1") == 1.0
