"""EMB_ON_CPU: an embedding that stays in the host's memory, and what goes where then. (The meta device is in for a GPU.)"""

import types

import pytest
import torch
from helpers import tiny
from helpers.training import run

from rwkv_peft.common import hardware
from rwkv_peft.common.errors import SettingErrors
from rwkv_peft.data.dataset import Batch
from rwkv_peft.model.rwkv import build
from rwkv_peft.ops import dispatch
from rwkv_peft.train.module import TrainingModule


def on_host() -> torch.nn.Module:
    model = build(tiny.geometry(), tiny.tensors(), dispatch.choose("torch", "x070"))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.emb.on_host = True
    return model


def test_it_stays_where_it_is_and_its_rows_follow_the_model():
    model = on_host().to("meta")
    assert {name for name, p in model.named_parameters() if p.device.type == "cpu"} == {"emb.weight"}
    logits, state = model(torch.tensor([[1, 2, 3]]))
    assert logits.device.type == "meta" and state[0].wkv.device.type == "meta"


def test_rows_are_those_of_an_embedding_on_the_device():
    model, ids = on_host(), torch.tensor([[5, 0, 7, 5]])
    there, _ = model(ids)
    model.emb.on_host = False
    assert torch.equal(there, model(ids)[0])


def test_ids_stay_with_it_and_the_rest_of_a_batch_goes():
    ids = torch.tensor([[1, 2]])
    batch = Batch(ids, (0, 2), torch.tensor([0]), torch.tensor([2]), 1, 2)
    stand_in = types.SimpleNamespace(model=on_host())
    moved = TrainingModule.transfer_batch_to_device(stand_in, batch, torch.device("meta"), 0)
    assert (moved.ids.device.type, moved.positions.device.type, moved.targets.device.type) == ("cpu", "meta", "meta")
    stand_in.model.emb.on_host = False
    assert TrainingModule.transfer_batch_to_device(stand_in, batch, torch.device("meta"), 0).ids.device.type == "meta"


@pytest.mark.parametrize(
    ("wanted", "possible", "gigabytes", "becomes"),
    [
        ("auto", True, 8, True),
        ("auto", True, 80, False),
        ("auto", False, 8, False),
        ("0", True, 8, False),
        ("1", True, 80, True),
    ],
)
def test_auto_leaves_it_there_where_it_would_take_a_hundredth_of_the_gpu(
    monkeypatch, wanted, possible, gigabytes, becomes
):
    about = types.SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(hardware, "device_kind", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: about)
    assert hardware.resolve_emb_on_cpu(wanted, possible, 268 * 10**6) is becomes


def test_without_a_gpu_there_is_one_memory():
    assert not hardware.resolve_emb_on_cpu("auto", True, 10**12)
    with pytest.raises(SettingErrors, match="is for GPUs, and none was found; use auto"):
        hardware.resolve_emb_on_cpu("1", True, 10**12)


@pytest.mark.smoke(1)
@pytest.mark.parametrize("settings", [{}, {"TRAIN_TYPE": "infctx", "CHUNK_CTX": "16"}, {"VAL_PERCENT": "20"}], ids=str)
def test_a_run_learns_the_same(ready, monkeypatch, capsys, settings):
    _, plain = run(ready, "plain", **settings)
    without = capsys.readouterr().out
    monkeypatch.setattr(hardware, "resolve_emb_on_cpu", lambda *_given: True)
    _, records = run(ready, "host", **settings)
    result = capsys.readouterr().out
    assert [r["loss"] for r in records] == [r["loss"] for r in plain]
    assert "the embedding stays in the host's memory" in result and "embedding stays" not in without
