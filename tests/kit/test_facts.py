"""Tables of facts: no method, version or backend is missing from one, and what is missing is named."""

import dataclasses
import re
from pathlib import Path

import pytest

from rwkv_peft.adapters.base import Adapter
from rwkv_peft.adapters.specs import MOST_ALPHA, Method
from rwkv_peft.chat.diagnose import remaining_steps
from rwkv_peft.common.errors import SettingErrors
from rwkv_peft.config.train import TrainConfig
from rwkv_peft.model.arch import ARCHS, Arch
from rwkv_peft.model.rwkv import VERSIONS
from rwkv_peft.ops import dispatch, reference


def test_every_version_has_an_operator_and_what_its_blocks_keep():
    assert {*ARCHS} == {*dispatch.WKV} == {*reference.DEFINITIONS} == {*VERSIONS}
    assert all({*arch.activations} == {"cpu", "torch"} for arch in ARCHS.values())


@pytest.mark.parametrize("fact", [field.name for field in dataclasses.fields(Arch)])
def test_a_version_that_lacks_a_fact_is_an_error_with_its_name(fact):
    facts = {field.name: getattr(ARCHS["x070"], field.name) for field in dataclasses.fields(Arch) if field.name != fact}
    with pytest.raises(TypeError, match=fact):
        Arch(**facts)


def test_a_method_that_says_nothing_of_its_activations_is_an_error():
    with pytest.raises(TypeError, match="activations"):
        Method("a method that was written today")


def test_an_adapter_that_says_nothing_of_its_rows_is_an_error():
    with pytest.raises(TypeError, match="Glue lacks row_axes"):

        class Glue(Adapter):
            tensors = ("glue",)


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
    docs = Path(__file__).resolve().parents[2] / "docs"
    rows = []
    for page in ("reliability.md", "reliability_zh.md"):
        lines = [
            line.split("|") for line in (docs / page).read_text(encoding="utf-8").splitlines() if line[:3] == "| F"
        ]
        rows.append([(line[1], re.findall(r"`[^`]*\.py`", line[-2])) for line in lines])
    assert rows[0] == rows[1] and len(rows[0]) >= 40
    for _, names in rows[0]:
        for name in names:
            assert any((docs.parent / folder / name.strip("`")).is_file() for folder in ("", "tests/faults")), name
