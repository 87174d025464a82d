"""The C++ kernels: what is around the recurrence equals its definition, and how a library comes about, or does not."""

import ctypes
import os
import re
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import block_laws as of_neighbours
from helpers import wkv_laws as laws
from helpers.block_laws import NOISE, C, H, N, where
from helpers.kit import EVERYTHING, ROOT
from helpers.tiny import wkv_inputs

from rwkv_peft.common.errors import SettingErrors
from rwkv_peft.model.state import SeqBounds
from rwkv_peft.ops import block_ops, dispatch, kernel_cache, lowrank_merge, reference, torch_wkv7
from rwkv_peft.ops.block_ops import Wkv7Inputs, Wkv7Params
from rwkv_peft.ops.cpu import build, fused
from rwkv_peft.ops.cpu import wkv as cpu
from rwkv_peft.ops.lowrank_merge import QUESTIONS


@of_neighbours.dtypes
@of_neighbours.packs
@pytest.mark.parametrize("count", [1, 2, 6])
def test_mixes_equal_their_definition(dtype, bounds, count):
    of_neighbours.token_shift_mix(fused, dtype, bounds, count)


@of_neighbours.dtypes
@of_neighbours.packs
@pytest.mark.parametrize("first_layer", [True, False])
def test_what_is_around_wkv7_equals_its_definition(dtype, bounds, first_layer):
    of_neighbours.wkv7_block(fused, cpu.wkv7, dtype, bounds, first_layer)


def test_only_the_gradients_that_are_asked_for_are_made():
    of_neighbours.only_the_gradients_that_are_asked_for(fused, cpu.wkv7)


def test_a_key_of_zero_length_is_no_nan():
    of_neighbours.a_key_of_zero_length_is_no_nan(fused, cpu.wkv7)


@of_neighbours.dtypes
@pytest.mark.parametrize("shape", [(3, 16), (7, 3, 32)])
def test_the_squared_relu_equals_its_definition(dtype, shape):
    of_neighbours.squared_relu(fused, dtype, shape)


@of_neighbours.dtypes
@pytest.mark.parametrize("columns", [1, 15, 16, 50, 1000])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_losses_and_slopes_of_logits_equal_their_definition(dtype, columns, scale):
    of_neighbours.losses_and_slopes(fused, dtype, columns, scale)


@pytest.mark.parametrize("target", [-1, 40])
def test_a_target_outside_of_its_row_is_refused(target):
    with pytest.raises(IndexError, match="outside of the 40 logits"):
        fused.cross_entropy_grad(torch.randn(2, 40), torch.tensor([1, target]), True)


def test_gates_of_different_formats_are_not_taken_for_one():
    gates = [torch.randn(9, C, dtype=torch.bfloat16) for _ in range(8)]
    gates[1] = gates[1].float()
    own, s0 = [torch.randn(C).bfloat16() for _ in range(5)], torch.zeros(1, H, N, N)
    result = [
        m.wkv7_block(torch_wkv7.wkv7, Wkv7Inputs(*gates), Wkv7Params(*own), s0, where((0, 9)), H)[0]
        for m in (fused, block_ops)
    ]
    assert torch.equal(*result)


@pytest.mark.parametrize("weight", NOISE)
@pytest.mark.parametrize("dtype", NOISE)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_a_product_of_a_few_rows_reads_the_weight_as_it_is_stored(dtype, weight, rows):
    x, w = torch.randn(rows, 48).to(dtype), torch.randn(50, 48).to(weight)
    exact = x.double() @ w.double().T
    with torch.no_grad():
        result = fused.linear(x, w)
    assert result.dtype == dtype and laws.errors([result.double()], [exact])[0] < NOISE[dtype]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("rows", "inputs", "rank"), [(1, 64, 1), (6, 64, 4), (13, 192, 7), (40, 128, 0), (20, 80, 3)])
def test_folding_a_product_of_low_rank_is_its_definition(rows, inputs, rank, threads):
    weight = torch.randn(rows, inputs).bfloat16()
    B, A, x = torch.randn(rows, rank), torch.randn(rank, inputs), torch.randn(QUESTIONS, inputs)
    torch.set_num_threads(threads)
    ours = fused.fold(weight, B, A, x)
    torch.set_num_threads(1)
    exact = block_ops.fold(weight, *(t.double() for t in (B, A, x)))
    sure = lowrank_merge.fold(weight, B, A, x)
    assert ours.made.dtype == torch.bfloat16 and (ours.made != exact.made).float().mean() < 0.01
    torch.testing.assert_close(ours.made.float(), sure.made.float(), rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(ours.exact.double(), exact.exact, rtol=1e-5, atol=1e-5 * inputs**0.5)
    torch.testing.assert_close(ours.rounded, x @ ours.made.float().T, rtol=1e-5, atol=1e-5 * inputs**0.5)
    torch.testing.assert_close(ours.squares.double(), exact.squares, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none_when_it_is_folded(bad):
    weight = torch.randn(9, 128).bfloat16()
    weight[4, 70] = bad
    result = fused.fold(weight, torch.randn(9, 2), torch.randn(2, 128), torch.randn(QUESTIONS, 128))
    assert [not bool(torch.isfinite(row).all()) for row in result.rounded.T] == [i == 4 for i in range(9)]
    assert result.made[4, 70].float().isfinite().logical_not()


def test_a_product_that_is_learnt_from_has_its_gradients():
    x, w = torch.randn(1, 48, requires_grad=True), torch.randn(50, 48, requires_grad=True)
    result = torch.autograd.grad(fused.linear(x, w).square().sum(), [x, w])
    exact = torch.autograd.grad(block_ops.linear(x, w).square().sum(), [x, w])
    assert all(torch.equal(a, b) for a, b in zip(result, exact, strict=True))


def test_a_logit_that_is_nan_makes_the_loss_nan():
    of_neighbours.a_logit_that_is_nan_makes_the_loss_nan(fused)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_number_of_threads_does_not_matter(threads):
    inputs, s0 = wkv_inputs(1, 70, 2, 64), laws.start(3, 2, 64)
    before = torch.get_num_threads()
    result = []
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            y, end = cpu.wkv7(*inputs, s0, (0, 5, 40, 70))
            result.append([y, end, *torch.autograd.grad([y, end], [*inputs, s0], [y.detach(), end.detach()])])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*result, strict=True))


# How a library comes about


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache, nothing remembered, and little to compile."""
    monkeypatch.setattr(kernel_cache, "folder", lambda: tmp_path)
    sources = tmp_path / "sources"
    sources.mkdir()
    for file in ("token_shift.cpp", "rows.h", "vec.h"):
        shutil.copy(build.SOURCES / file, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    for cached in (build.library, build.function):
        cached.cache_clear()
    yield tmp_path
    for cached in (build.library, build.function):
        cached.cache_clear()


def test_auto_takes_the_kernels_and_says_so():
    ops = dispatch.choose("auto", "x070")
    assert ops.name == "cpu" and "C++ kernels" in ops.why


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        (None, "there is no C++ compiler"),
        ("#!/bin/sh\nexit 1\n", "cannot compile it"),
        (
            "#!/bin/sh\ncase $1 in --version) ;; *) echo 'x.cpp:1: error: I am broken' >&2; exit 1;; esac\n",
            "I am broken",
        ),
        ('#!/bin/sh\n[ $# = 1 ] && exit\nfor last; do :; done\necho nonsense > "$last"\n', "does not load"),
    ],
)
def test_without_a_compiler_that_works_auto_is_torch_and_cpu_is_refused(fresh, monkeypatch, compiler, words):
    path = None
    if compiler:
        path = fresh / "cc"
        path.write_text(compiler)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(shutil, "which", lambda name: path and str(path))
    ops = dispatch.choose("auto", "x070")
    assert ops.name == "torch" and words in ops.why and "half as fast" in ops.why
    with pytest.raises(SettingErrors, match=re.escape(words)):
        dispatch.choose("cpu", "x070")
    assert not list(fresh.glob("*.tmp"))


def test_a_second_use_compiles_nothing(fresh, monkeypatch):
    build.library()
    build.library.cache_clear()
    monkeypatch.setattr(build, "compiled", lambda *_: pytest.fail("compiled again"))
    build.library()


def test_first_uses_at_the_same_time_do_not_collide(fresh, tmp_path):
    """With a compiler that takes its time between the halves of a file: no half ever has a name that is loaded."""
    folder = tmp_path / "cache"
    folder.mkdir()
    slow = tmp_path / "slow"
    slow.write_text('#!/bin/sh\nfor last; do :; done\necho half > "$last"\nsleep 0.4\nexec g++ "$@"\n')
    slow.chmod(0o755)
    command = [str(slow), "-shared", "-fPIC", str(build.SOURCES / "token_shift.cpp")]
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(build.compiled, command, folder, "one") for _ in range(3)]
        while not all(one.done() for one in running):
            for file in folder.glob("one-*.so"):
                assert file.stat().st_size == int(file.stem.rpartition("-")[2])
    [file] = {one.result() for one in running}
    assert [p.name for p in folder.iterdir()] == [file.name]
    ctypes.CDLL(str(file)).square_relu_float32  # noqa: B018 (it is there)


@pytest.mark.parametrize("harm", ["cut off", "empty"])
def test_half_a_library_is_made_again(fresh, harm):
    """Loading one would end the process without a word."""
    build.library()
    [file] = fresh.glob("cpu-*.so")
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(whole[:40_000] if harm == "cut off" else b"")
    build.library.cache_clear()
    build.library()
    assert file.read_bytes() == whole


def test_a_compiler_that_is_broken_leaves_the_work_to_the_next(fresh, monkeypatch):
    broken = fresh / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    which = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name: str(broken) if name == "g++" else which("g++") if name == "c++" else None
    )
    assert dispatch.choose("auto", "x070").name == "cpu"


def test_a_number_that_is_none_stays_none():
    x = torch.randn(4, 32)
    x[1, 3] = torch.nan
    x.requires_grad_()
    y = fused.square_relu(x)
    [dx] = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y[1, 3].isnan() and dx[1, 3].isnan() and int(y.isnan().sum()) == 1
    assert fused.square_relu(x.detach().bfloat16())[1, 3].isnan()


def test_shapes_that_do_not_go_together_are_refused_before_a_kernel_sees_them():
    x = [torch.randn(1, 40, 2, 16) for _ in range(6)]
    for s0 in (torch.zeros(1, 2, 16, 8), torch.zeros(2, 2, 16, 16)):
        with pytest.raises(ValueError, match="does not go with"):
            cpu.wkv7(*x, s0)
    with pytest.raises(ValueError, match="does not go with"):
        cpu.wkv7(*x[:5], x[5][:, :39])
    with pytest.raises(ValueError, match="does not go with"):
        cpu.wkv6(*x[:4], torch.randn(2, 8))
    assert cpu.wkv7(*(z[:, :0] for z in x), torch.zeros(1, 2, 16, 16))[0].shape == (1, 0, 2, 16)
    with pytest.raises(ValueError, match="targets for logits"):
        fused.cross_entropy_grad(torch.randn(300, 32), torch.zeros(2, dtype=torch.long), True)
    logits, targets = torch.randn(3, 32), torch.tensor([1, 2, 3])
    wide = fused.cross_entropy_grad(logits.clone(), targets, False)[0]
    assert torch.equal(fused.cross_entropy_grad(logits.clone(), targets.int(), False)[0], wide)
    where = SeqBounds((0, 10), "cpu")
    with pytest.raises(ValueError, match="does not go with"):
        fused.token_shift_mix(torch.randn(10, 48), torch.zeros(1, 48), [torch.randn(16)], where)
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        fused.token_shift_mix(torch.randn(8, 48), torch.zeros(1, 48), [torch.randn(48)], where)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2", *(["avx512"] if EVERYTHING else [])])
def test_every_instruction_set_obeys_the_laws(capability):
    """ATEN_CPU_CAPABILITY is torch's own word for what a processor is to be taken for."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    laws_of = ["tests/ops/test_cpu.py", "tests/ops/test_wkv7.py", "tests/ops/test_wkv6.py", "tests/ops/test_decode7.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *laws_of]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_shapes_without_a_kernel_go_through_the_definition():
    inputs, s0 = wkv_inputs(1, 9, 2, 24), laws.start(1, 2, 24)
    laws.equals_the_reference(cpu.wkv7, reference.wkv7, "rwkvab", inputs, s0)
    assert fused.square_relu(torch.ones(3, 5)).sum() == 15


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_heads_without_a_kernel_are_said_to_go_through_torch(device):
    result = dispatch.choose("auto", "x070", device, head_size=48)
    assert result.name == "torch" and "these have 48" in result.why
    with pytest.raises(SettingErrors, match="these have 48"):
        dispatch.choose(device, "x070", device, head_size=48)
