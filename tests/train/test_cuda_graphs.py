"""CUDA_GRAPHS: blocks that are replayed train as those that are not, and what is wrong or fails is not used.

Nothing here is a GPU: a stand-in computes again from what is at the recorded addresses, into buffers that stay.
"""

import pytest
import torch
from helpers import tiny
from helpers.graphs import BOUNDS, batch, learner, steps
from helpers.kit import few
from helpers.training import run

from rwkv_peft.adapters.specs import OPTIMS
from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.config import train_checks
from rwkv_peft.ops.cuda import wkv7_chunked, workspace
from rwkv_peft.train import cuda_graphs
from rwkv_peft.train.cuda_graphs import Recorded
from rwkv_peft.train.memory_estimate import memory_bytes
from rwkv_peft.train.report import recorded_shapes


def stand_in(body, x, wanted, change=lambda tensors: tensors):
    x = x.detach().clone().requires_grad_(x.requires_grad)
    inputs = [*([x] if x.requires_grad else []), *wanted]

    def gradients(slope):
        with torch.enable_grad():
            return torch.autograd.grad(body(x), inputs, slope, allow_unused=True)

    def forward():
        out.copy_(body(x).detach())

    def backward():
        for kept, new in zip(grads, change(gradients(slope)), strict=True):
            if kept is not None:
                kept.copy_(new)

    out = body(x).detach()
    slope = torch.zeros_like(out)
    grads = change(gradients(slope))
    return Recorded(x, out, slope, grads, forward, backward, (body,))


@pytest.fixture
def said(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "record", stand_in)
    return []


@pytest.mark.smoke
@pytest.mark.parametrize("version", few(["x070", "x060"], ["x070"]))
@pytest.mark.parametrize("method", ["lora", "full", "state"])
@pytest.mark.parametrize("recompute", ["nothing", "cheap"])
def test_what_is_replayed_learns_the_same_to_the_last_bit(said, version, method, recompute):
    """Two micro-batches a step: the gradients of the first must outlive the replay of the second."""
    plain, replayed = learner(method, version, recompute), learner(method, version, recompute, said=said)
    assert all(torch.equal(a, b) for a, b in zip(steps(plain), steps(replayed), strict=True))
    assert said == ["CUDA graph recorded: 24 tokens, 3 sequences"]


def test_some_shapes_are_recorded_at_their_third_time_and_all_others_go_one_by_one(said, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_RECORDED", 2)
    three = [(0, 12, 24), (0, 10, 24), (0, 24)]
    plain, replayed = learner(), learner(said=said)
    steps(replayed, 2, 2, three[:2])
    assert said == []
    steps(replayed, 4, 3, three)
    assert len(said) == len(replayed.replay.recorded) == 2
    steps(plain, 2, 2, three[:2])
    steps(plain, 4, 3, three)
    now = zip(plain.parameters(), replayed.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in now)


@pytest.mark.smoke(1)
@pytest.mark.parametrize("wrong", ["an output", "a gradient", "nan", "a gradient is missing", "there are none"])
def test_what_replays_something_else_is_not_used_and_that_is_reported(said, monkeypatch, wrong):
    changes = {
        "a gradient": lambda grads: [None if g is None else g * 1.01 for g in grads],
        "nan": lambda grads: [None if g is None else g * torch.nan for g in grads],
        "a gradient is missing": lambda grads: [None, *grads[1:]],
        "there are none": lambda grads: [None] * len(grads),
    }

    def record(body, x, wanted):
        if wrong == "an output":
            return stand_in(lambda x: body(x) * 1.01, x, wanted)
        return stand_in(body, x, wanted, changes[wrong])

    monkeypatch.setattr(cuda_graphs, "record", record)
    plain, tried = learner(), learner(said=said)
    assert all(torch.equal(a, b) for a, b in zip(steps(plain), steps(tried), strict=True))
    assert len(said) == 1 and "CUDA graphs are not used: ValueError: replayed, the blocks compute something" in said[0]


def test_what_cannot_be_recorded_is_reported_once_and_changes_nothing(said, monkeypatch):
    def fails(body, x, wanted):
        torch.rand(1)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graphs, "record", fails)
    plain, tried = learner(dropout=0.2), learner(dropout=0.2, said=said)
    torch.manual_seed(1)
    wanted = steps(plain)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(wanted, steps(tried), strict=True))
    assert said == [
        "CUDA graphs are not used: RuntimeError: CUDA error: operation not permitted when stream is capturing"
    ]


def test_a_recording_that_breaks_off_ends_the_run(said, monkeypatch):
    """What CUDA has begun cannot be taken back: going on would be wrong in ways that no one sees."""

    def breaks(body, x, wanted):
        raise cuda_graphs.RecordingFailed("RuntimeError: operation not permitted")

    monkeypatch.setattr(cuda_graphs, "record", breaks)
    with pytest.raises(UserError, match="cannot be recorded here .*not permitted.*Set CUDA_GRAPHS=0"):
        steps(learner(said=said))


def test_dropout_is_out_of_the_comparison_and_in_what_is_replayed(said, monkeypatch):
    recorded = []

    def record(body, x, wanted):
        recorded.append({m.dropout for m in model.modules() if hasattr(m, "dropout")})
        return stand_in(body, x, wanted)

    monkeypatch.setattr(cuda_graphs, "record", record)
    model = learner(dropout=0.2, said=said)
    steps(model, 1)
    rng = torch.random.get_rng_state()
    model.replay.try_to_record(("key",), model.emb(batch(0).ids[0], torch.float32, "cpu"), Plain())
    assert recorded == [{0.0}, {0.2}] and torch.equal(torch.random.get_rng_state(), rng)


class Plain:
    """Bounds of one sequence of 24 tokens."""

    cu_seqlens, host, first, last = (0, 24), torch.tensor([0, 24]), torch.tensor([0]), torch.tensor([23])

    def __len__(self):
        return 1


def test_what_hands_on_states_or_wants_no_gradient_is_never_replayed(said):
    model = learner(said=said)
    for seed in range(6):
        ids = batch(seed).ids
        with torch.no_grad():
            model.features(ids, cu_seqlens=BOUNDS, carry=False)
        _, state = model.features(ids, cu_seqlens=BOUNDS)
        model.features(ids, state, BOUNDS, carry=False)
    assert said == [] and not model.replay.occurrences


def test_a_recording_keeps_the_tables_whose_addresses_it_has():
    spans = ((0, 3), (3, 70))
    with workspace.keeping() as kept:
        first, second = workspace.tables(spans, torch.device("cpu")), wkv7_chunked.tables(spans, torch.device("cpu"))
        assert workspace.tables(spans, torch.device("cpu")) is first
    workspace.tables(spans, torch.device("cpu"))
    assert [id(x) for x in kept] == [id(first), id(second), id(first)]


@pytest.mark.parametrize("lengths, shapes", [(None, 1), ("8 16", 2), ("2 4 8 16 32 64", cuda_graphs.MAX_RECORDED)])
def test_the_estimate_of_memory_counts_the_passes_that_recordings_keep(lengths, shapes):
    settings = {"CUDA_GRAPHS": True, "DATALOAD": "bucket" if lengths else "pad", "TRAIN_LENGTHS": lengths}
    assert recorded_shapes(settings) == shapes and recorded_shapes(settings | {"CUDA_GRAPHS": False}) == 0
    shape = tiny.geometry()
    sizes = {name: tensor.shape for name, tensor in tiny.tensors(0, shape).items()}

    def memory(tokens, recorded):
        return memory_bytes(
            sizes, 1000, tokens, shape, 2, "0", "lora", "cuda", "cuda", OPTIMS["adamw"], recorded=recorded
        )

    assert memory(512, shapes) - memory(512, 0) == pytest.approx(shapes * (memory(512, 1) - memory(512, 0)), abs=8)
    assert memory(512, 1) - memory(512, 0) > 2 * (memory(256, 1) - memory(256, 0)) * 0.9


def test_without_a_gpu_they_are_refused(ready):
    with pytest.raises(SettingErrors, match="CUDA_GRAPHS.*is for GPUs, and none was found; use 0"):
        run(ready, CUDA_GRAPHS="1", GRAD_CP="0")


def test_kernels_that_they_are_not_for_are_reported(ready, monkeypatch, capsys):
    monkeypatch.setattr(train_checks, "_check_cuda_graphs", lambda given: iter(()))
    run(ready, CUDA_GRAPHS="1", GRAD_CP="0")
    assert "CUDA graphs are not used: they are for OP=cuda, and this run computes with" in capsys.readouterr().out
