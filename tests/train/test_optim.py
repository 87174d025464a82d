"""OPTIM: every optimizer learns, keeps as many bytes as the table says, and is refused at once where its package is missing."""

import sys

import pytest
import torch

from rwkv_peft.adapters.specs import OPTIMS
from rwkv_peft.common.errors import SettingErrors
from rwkv_peft.train.optim import check_package, make_optimizer, parameter_groups

SIZE = 128  # bitsandbytes keeps 32 bits for tensors of less than 4,096 values


def minimised(name: str):
    """A least-squares problem, the distances on the way, and the optimizer."""
    torch.manual_seed(0)
    wanted, result = torch.randn(SIZE, SIZE), torch.nn.Parameter(torch.randn(SIZE, SIZE))
    groups = parameter_groups([("x", result)], 0.0, lambda *_: False, lambda _: 1.0)
    optimizer = make_optimizer(name, groups, 0.9, 0.99, 1e-8)
    distances = []
    for _ in range(60):
        for group in optimizer.param_groups:
            group["lr"] = 0.05
        loss = (result - wanted).square().mean()
        distances.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return distances, optimizer


@pytest.mark.parametrize("name", OPTIMS)
def test_an_optimizer_comes_closer(name):
    distances, _ = minimised(name)
    assert distances[-1] < 0.5 * distances[0]


@pytest.mark.parametrize("name", OPTIMS)
def test_an_optimizer_keeps_the_bytes_that_the_estimate_counts(name):
    _, optimizer = minimised(name)
    [state] = optimizer.state.values()
    kept = sum(x.nbytes for x in state.values() if torch.is_tensor(x))
    assert kept / SIZE**2 == pytest.approx(OPTIMS[name].moments, abs=0.2)


@pytest.mark.parametrize("name", [name for name, optim in OPTIMS.items() if optim.package])
def test_a_missing_package_is_reported_before_anything_is_loaded(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SettingErrors, match="OPTIM: needs a package that is missing .* pip install bitsandbytes"):
        check_package(name)


def test_what_torch_has_needs_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for name, optim in OPTIMS.items():
        if not optim.package:
            check_package(name)
