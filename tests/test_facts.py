"""Tables of facts: no method, version or backend is missing from one, and what is missing is named."""

import re
from pathlib import Path

import pytest
import tiny

from rwkv_peft.adapters.specs import METHODS, MOST_ALPHA, OPTIMS
from rwkv_peft.chat.diagnose import remaining_steps
from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.config.train import TrainConfig
from rwkv_peft.model.arch import ARCHS
from rwkv_peft.ops import dispatch
from rwkv_peft.train import memory_estimate


def test_the_memory_estimate_knows_every_method_and_version():
    assert memory_estimate.LAYERS.keys() == METHODS.keys()
    versions = {*ARCHS}
    assert {version for _, version in memory_estimate.KEPT} == versions == {*dispatch.WKV}


@pytest.mark.parametrize(("method", "version", "words"), [("glue", "x070", "LAYERS"), ("lora", "x080", "KEPT")])
def test_a_missing_fact_is_an_error_with_its_name(method, version, words):
    shape = tiny.geometry()
    sizes = {name: tensor.shape for name, tensor in tiny.tensors(0, shape).items()}
    shape = type(shape)(**(vars(shape) | {"version": version}))
    with pytest.raises(UserError, match=f"estimate.py: {words} has no row for"):
        memory_estimate.memory_bytes(sizes, 1, 1, shape, 4, "0", method, "cpu", "cpu", OPTIMS["adamw"])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_version_without_kernels_is_computed_by_torch(monkeypatch, device):
    monkeypatch.setitem(dispatch.WKV, "x080", {"torch": dispatch.WKV["x070"]["torch"]})
    ops = dispatch.choose("auto", "x080", device)
    assert ops.name == "torch" and "there is no kernel for RWKV x080" in ops.why
    with pytest.raises(SettingErrors, match="nothing called cpu computes RWKV x080; use one of auto, torch"):
        dispatch.choose("cpu", "x080")


@pytest.mark.parametrize("op", ["auto", "torch", "cpu", "reference"])
def test_a_version_that_nothing_computes_is_named(op):
    with pytest.raises(SettingErrors, match="OP: .*RWKV x090"):
        dispatch.choose(op, "x090")


def test_alpha_has_one_bound():
    from rwkv_peft.cli.merge import MergeConfig

    bounds = {cls.__dataclass_fields__["lora_alpha"].metadata["le"] for cls in (TrainConfig, MergeConfig)}
    assert bounds == {MOST_ALPHA}


@pytest.mark.parametrize(
    ("micro_batches", "mini", "done", "left"), [(7, 2, 12, 0), (7, 2, 9, 3), (8, 2, 12, 0), (1, 4, 2, 1)]
)
def test_the_steps_of_an_epoch_are_rounded_up(micro_batches, mini, done, left):
    settings = {"STREAMING": False, "EPOCH_COUNT": 3, "EPOCH_STEPS": micro_batches, "MINI_BSZ": mini, "VAL_PATIENCE": 0}
    assert remaining_steps(settings, [{"step": done}], [], {"step": done}) == (left, False)


def test_the_table_of_faults_is_the_same_in_both_languages():
    docs = Path(__file__).resolve().parent.parent / "docs"
    rows = []
    for page in ("reliability.md", "reliability_zh.md"):
        lines = [
            line.split("|") for line in (docs / page).read_text(encoding="utf-8").splitlines() if line[:3] == "| F"
        ]
        rows.append([(line[1], re.findall(r"`[^`]*\.py`", line[-2])) for line in lines])
    assert rows[0] == rows[1] and len(rows[0]) >= 40
    for _, names in rows[0]:
        for name in names:
            assert any(
                (docs.parent / folder / name.strip("`")).is_file() for folder in ("", "tests", "tests/faults")
            ), name
