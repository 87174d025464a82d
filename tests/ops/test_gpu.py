"""On a GPU: the kernels are right, `auto` takes them, and a run on them learns what one on the torch backend learns."""

import importlib.util

import pytest
import torch
from helpers import graphs
from helpers.training import run

from rwkv_peft.ops import dispatch, kernel_check
from rwkv_peft.train.cuda_graphs import Graphs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


CASES = [(version, name) for version in dispatch.WKV for name in dispatch.every_way(version, "cuda")]


@pytest.mark.parametrize(("version", "backend"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backend_computes_what_the_definition_says(version, dtype, backend):
    if backend == "fla" and not importlib.util.find_spec("fla"):
        pytest.skip("needs fla-core: pip install -r requirements-fla.txt")
    result = kernel_check.check_against_reference(version, dispatch.every_way(version, "cuda")[backend], "cuda", dtype)
    assert result.passed, result


@pytest.mark.parametrize("version", dispatch.WKV)
def test_auto_takes_the_kernels(version):
    assert dispatch.choose("auto", version, "cuda").name == "cuda"


@pytest.mark.parametrize("settings", [{}, {"DATALOAD": "pad"}, {"TRAIN_TYPE": "infctx", "CHUNK_CTX": "16"}], ids=str)
def test_a_run_on_the_kernels_learns_what_one_on_torch_learns(ready, settings):
    common = {"EPOCH_COUNT": "3", "PRECISION": "fp32"} | settings
    _, one = run(ready, "torch", OP="torch", **common)
    _, other = run(ready, "cuda", OP="cuda", **common)
    assert [r["loss"] for r in other] == pytest.approx([r["loss"] for r in one], rel=1e-4)


@pytest.mark.parametrize(
    "settings", [{"DATALOAD": "pad"}, {"PACK": "concat"}, {"DATALOAD": "pad", "FINETUNE_MODE": "full"}], ids=str
)
def test_cuda_graphs_are_recorded_and_learn_the_same(ready, capsys, settings):
    common = {"EPOCH_COUNT": "6", "MINI_BSZ": "2", "PRECISION": "fp32", "GRAD_CP": "0", "OP": "cuda"} | settings
    _, one = run(ready, "one by one", **common)
    _, other = run(ready, "graphs", CUDA_GRAPHS="1", **common)
    assert "CUDA graph recorded" in capsys.readouterr().out
    assert [r["loss"] for r in other] == pytest.approx([r["loss"] for r in one], rel=1e-4)


def test_a_recording_has_all_that_it_reads():
    """What it does not hold has been given away, and overwritten."""
    reported = []
    model = graphs.learner(op="cuda").cuda()
    model.replay = Graphs(model, reported.append)
    given = [graphs.batch(seed, device="cuda") for seed in range(6)]
    graphs.steps(model, 3, 1, batches=given)
    assert reported and "recorded" in reported[0]
    torch.cuda.empty_cache()
    junk = [torch.full((2**20,), float("nan"), device="cuda") for _ in range(200)]
    del junk
    graphs.steps(model, 2, 2, batches=given)
    replayed = [graphs.loss_of(model, one).item() for one in given]
    model.replay = None
    assert replayed == pytest.approx([graphs.loss_of(model, one).item() for one in given], rel=1e-5)
