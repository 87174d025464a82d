"""The learning rate: exact at both ends, and the curve it says in between."""

import functools
import math

import pytest
import torch
from helpers import tiny
from torch import nn

from rwkv_peft.model import arch
from rwkv_peft.train.lr_schedule import SCHEDULES, learning_rate
from rwkv_peft.train.optim import make_optimizer, parameter_groups


def curve(name, steps=101, warmup=0, first=1e-3, last=1e-5):
    return [learning_rate(step, steps, name, first, last, warmup) for step in range(steps)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_the_first_and_the_last_rate_are_exact(name, warmup):
    rates = curve(name, warmup=warmup)
    assert rates[max(warmup - 1, 0)] == 1e-3
    assert rates[-1] == (1e-3 if name == "constant" else 1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_rises_in_equal_parts(name):
    rates = curve(name, warmup=4)
    assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])


@pytest.mark.parametrize(
    ("name", "half"),
    [
        ("cos", 1e-5 + 0.5 * (1e-3 - 1e-5)),
        ("linear", 0.5 * (1e-3 + 1e-5)),
        ("exp", math.sqrt(1e-3 * 1e-5)),
        ("wsd", 1e-3),
        ("constant", 1e-3),
    ],
)
def test_half_way_is_where_the_formula_says(name, half):
    assert curve(name)[50] == pytest.approx(half)


def test_wsd_is_stable_and_then_goes_down_to_the_last_rate():
    rates = curve("wsd")
    assert set(rates[:91]) == {1e-3}
    assert rates[95] == pytest.approx(0.5 * (1e-3 + 1e-5))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_rates_too(name, steps):
    assert all(1e-5 <= rate <= 1e-3 for rate in curve(name, steps))
    assert all(0 < rate <= 1e-3 for rate in curve(name, steps, warmup=10))


def test_groups_decay_large_matrices_only_and_scale_what_the_recipe_scales():
    sizes = {
        "head.weight": (9, 4),
        "blocks.0.att.w0": (1, 1, 4),
        "blocks.0.ln1.weight": (4,),
        "blocks.0.att.w1": (4, 2),
    }
    parameters = {n: nn.Parameter(torch.ones(s)) for n, s in sizes.items()}
    groups = parameter_groups(parameters.items(), 0.1, arch.decays, functools.partial(arch.lr_scale, tiny.geometry()))
    by_parameter = {id(p): (g["weight_decay"], g["lr"]) for g in groups for p in g["params"]}
    assert {n: by_parameter[id(p)] for n, p in parameters.items()} == {
        "head.weight": (0.1, 1.0), "blocks.0.att.w0": (0.0, 2.0), "blocks.0.ln1.weight": (0.0, 1.0),
        "blocks.0.att.w1": (0.0, 1.0),
    }  # fmt: skip
    optimizer = make_optimizer("adamw", groups, 0.9, 0.99, 1e-8, True)
    assert len(optimizer.param_groups) == len(groups)


def test_lora_plus_speeds_up_lora_b_alone():
    parameters = {f"blocks.0.att.key.lora_{x}": nn.Parameter(torch.ones(2, 2)) for x in "AB"}
    groups = parameter_groups(parameters.items(), 0.0, arch.decays, lambda name: 1.0, lora_plus=16.0)
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    assert rates[id(parameters["blocks.0.att.key.lora_B"])] == 16.0
    assert rates[id(parameters["blocks.0.att.key.lora_A"])] == 1.0
