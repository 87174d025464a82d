"""Fails where a version of DeepSpeed changes what distributed/deepspeed_private.py uses, or a stale lock makes a run wait."""

import ast
import inspect
import os
import subprocess
import sys
import time

import pytest
import torch
from helpers.nodes import free_port

deepspeed = pytest.importorskip("deepspeed")

from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3  # noqa: E402
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer  # noqa: E402

from rwkv_peft.distributed import deepspeed as zero  # noqa: E402
from rwkv_peft.distributed import deepspeed_private  # noqa: E402


@pytest.fixture
def group():
    """A process group of this process alone."""
    values = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        deepspeed_private.disable_shm_comm()
        deepspeed.init_distributed("gloo")
        yield
        torch.distributed.destroy_process_group()
        deepspeed.comm.comm.cdb = None


def make_engine(stage: int, broadcast=lambda: None):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))
    zero_config = {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": False}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero_config,
    }
    if stage == 3:
        partition = deepspeed_private.partition_module(model[0], config)
        assert all(map(deepspeed_private.is_partitioned, model[0].parameters()))
        assert not any(map(deepspeed_private.is_partitioned, model[1].parameters()))
        partition(list(model[1].parameters()))
        assert all(map(deepspeed_private.is_partitioned, model.parameters()))
    groups = [{"params": list(layer.parameters())} for layer in model]
    with deepspeed_private.broadcast_by(broadcast):
        engine, optimizer, *_ = deepspeed.initialize(
            config=config, model=model, optimizer=torch.optim.AdamW(groups, lr=0.1), dist_init_required=False
        )
    return engine, optimizer


def test_deepspeed_is_the_version_that_was_checked():
    """Where it is not, run this file and test_strategy.py with the new one, and then set CHECKED_VERSION to it."""
    assert deepspeed.__version__.partition("+")[0] == deepspeed_private.CHECKED_VERSION


def parameters_of(kind: type, method: str) -> list[str]:
    """By the source text: wrappers for profiling hide the signature."""
    source = ast.parse(inspect.getsource(sys.modules[kind.__module__]))
    [body] = [n.body for n in ast.walk(source) if isinstance(n, ast.ClassDef) and n.name == kind.__name__]
    [function] = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == method]
    return [argument.arg for argument in function.args.args]


@pytest.mark.parametrize(
    ("kind", "method", "parameters"),
    [
        (deepspeed.DeepSpeedEngine, "_broadcast_model", ["self"]),
        (DeepSpeedZeroOptimizer, "_lazy_init_hp_params_optimizer_state", ["self"]),
        (DeepSpeedZeroOptimizer, "scaled_global_norm", ["self", "norm_type"]),
        (DeepSpeedZeroOptimizer, "unscale_and_clip_grads", ["self", "grad_groups_flat", "total_norm"]),
        (DeepSpeedZeroOptimizer_Stage3, "_get_norm_groups", ["self"]),
        (DeepSpeedZeroOptimizer_Stage3, "unscale_and_clip_grads", ["self", "sub_group_id", "total_norm"]),
    ],
)
def test_methods_that_are_replaced_or_called_have_these_parameters(kind, method, parameters):
    assert parameters_of(kind, method) == parameters


def test_shm_comm_is_asked_of_compatible_ops():
    assert "__compatible_ops__" in inspect.getsource(sys.modules["deepspeed.comm.torch"])


def test_a_step_uses_what_is_replaced(group):
    """All stages with one process group: DeepSpeed keeps references to the first one of a process."""
    for stage in (1, 2, 3):
        step_uses_what_is_replaced(stage)


def step_uses_what_is_replaced(stage: int) -> None:
    broadcasts, norms, clipped = [], [], []
    engine, optimizer = make_engine(stage, lambda: broadcasts.append(stage))
    assert broadcasts == ([] if stage == 3 else [stage])
    assert deepspeed_private.is_stage_3(optimizer) == (stage == 3)

    def norm(gradients):
        norms.append(torch.cat([g.flatten() for g in gradients]).norm())
        return norms[-1]

    def clip(gradients, total):
        clipped.append((sum(g.numel() for g in gradients), float(total)))

    deepspeed_private.replace_clipping(optimizer, norm, clip)
    parameters = list(engine.module.parameters())
    assert [deepspeed_private.full_shape(p) for p in parameters] == [(5, 3), (5,), (1, 5), (1,)]
    values = sum(flat.numel() for flat in deepspeed_private.flat_parameters(optimizer))
    assert values >= 26  # DeepSpeed pads
    engine.backward(engine(torch.ones(2, 3)).sum())
    engine.step()
    assert len(norms) == 1 and float(norms[0]) > 0
    assert sum(count for count, _ in clipped) >= 26
    assert [total for _, total in clipped] == pytest.approx([float(norms[0])] * len(clipped))
    assert engine.was_step_applied() and float(engine.get_global_grad_norm()) == pytest.approx(float(norms[0]))
    deepspeed_private.link_moments(optimizer)
    for parameter in parameters:
        moment = deepspeed.utils.safe_get_full_optimizer_state(parameter, "exp_avg")
        assert moment is not None and tuple(moment.shape) == deepspeed_private.full_shape(parameter)
    if stage == 3:
        whole = torch.arange(15.0).view(5, 3)
        assert deepspeed_private.local_shard(parameters[0], whole).tolist() == whole.flatten().tolist()
    before = [deepspeed.utils.safe_get_full_fp32_param(p).clone() for p in parameters]
    deepspeed_private.replace_clipping(optimizer, lambda _: torch.tensor(float("inf")), clip)
    engine.backward(engine(torch.ones(2, 3)).sum())
    engine.step()
    assert not engine.was_step_applied()
    for parameter, value in zip(parameters, before, strict=True):
        assert torch.equal(deepspeed.utils.safe_get_full_fp32_param(parameter), value)


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """The lock of a build in a folder of this test, where a process was killed."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = deepspeed_private.cpu_adam_build_directory() / "lock"
    assert path.parent == tmp_path / "cpu_adam"
    path.touch()
    monkeypatch.setattr(zero, "LOCK_POLL", 0.05)
    return path


def test_torch_locks_a_build_by_a_file_that_it_holds_open(lock):
    from torch.utils.file_baton import FileBaton

    lock.unlink()
    baton = FileBaton(str(lock))
    assert baton.try_acquire() and zero.is_open(lock)
    assert not FileBaton(str(lock)).try_acquire()
    baton.release()
    assert not lock.exists()
    assert "FileBaton(os.path.join(build_directory, 'lock'))" in inspect.getsource(torch.utils.cpp_extension)


def test_an_old_lock_that_no_process_holds_is_removed_and_reported(lock, capsys):
    os.utime(lock, (0, time.time() - zero.STALE_LOCK - 1))
    zero.remove_stale_lock(lock.parent)
    assert not lock.exists()
    assert capsys.readouterr().err == f"removed {lock}: a build that was killed had left it\n"


def test_a_new_lock_that_no_process_holds_is_removed_when_it_is_old(lock, capsys, monkeypatch):
    monkeypatch.setattr(zero, "STALE_LOCK", 0.5)
    zero.remove_stale_lock(lock.parent)
    assert not lock.exists()
    waiting, removed = capsys.readouterr().err.splitlines()
    assert f"{lock} was left by a build that was killed" in waiting and removed.startswith("removed ")


def test_a_lock_that_a_process_holds_stays(lock, capsys):
    os.utime(lock, (0, 0))
    hold = f"import time; file = open({str(lock)!r}); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        zero.remove_stale_lock(lock.parent)
        process.kill()
    assert lock.exists() and not capsys.readouterr().err


def test_a_stale_lock_is_removed_before_the_build(lock, monkeypatch):
    os.utime(lock, (0, 0))
    there = []
    monkeypatch.setattr(deepspeed.ops.adam, "DeepSpeedCPUAdam", lambda *_, **__: there.append(lock.exists()))
    zero.ZeroSharding(zero.Strategy("memory", 2, True), False).own_optimizer([], (0.9, 0.99), 1e-8)
    assert there == [False]


def test_no_lock_is_no_error(tmp_path):
    zero.remove_stale_lock(tmp_path / "none")
