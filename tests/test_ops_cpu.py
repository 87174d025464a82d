"""The C++ kernels: what stands around the recurrence equals its definition, and how a library comes about, or does not."""

import ctypes
import os
import re
import shutil
import stat
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import laws_of_ops as laws
import pytest
import torch
from conftest import EVERYTHING
from test_scripts import ROOT
from tiny import wkv_inputs

from rwkv_peft.errors import Problems
from rwkv_peft.model.state import Borders
from rwkv_peft.ops import cache, chunked, dispatch, folding, neighbours, reference
from rwkv_peft.ops.cpu import build, fused
from rwkv_peft.ops.cpu import wkv as cpu
from rwkv_peft.ops.folding import QUESTIONS
from rwkv_peft.ops.neighbours import Gates, Own

H, N = 3, 16
C = H * N
PACKS = [(0, 1), (0, 33), (0, 1, 2, 40), (0, 17, 64)]
# largest error, relative to the definition in float64
NOISE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}


def where(borders):
    host = torch.tensor(borders)
    return types.SimpleNamespace(cu_seqlens=tuple(borders), host=host, first=host[:-1])


def compare(dtype, ours, definition, inputs):
    """Outputs and all gradients of ours in dtype beside the definition's in float64."""

    def run(function, dtype):
        given = [None if x is None else x.to(dtype).detach().requires_grad_() for x in inputs]
        outputs = function(*given)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        torch.manual_seed(3)
        slopes = [torch.randn(y.shape, dtype=torch.float64).to(y.dtype) for y in outputs]
        leaves = [x for x in given if x is not None]
        return [x.detach().double() for x in (*outputs, *torch.autograd.grad(outputs, leaves, slopes))]

    rounded = [None if x is None else x.to(dtype) for x in inputs]
    exact = run(definition, torch.float64) if dtype == torch.float32 else None
    if exact is None:  # of the same rounded inputs
        inputs = [None if x is None else x.double() for x in rounded]
        exact = run(definition, torch.float64)
        inputs = rounded
    assert max(laws.errors(run(ours, dtype), exact)) < NOISE[dtype]


@pytest.mark.parametrize("dtype", NOISE)
@pytest.mark.parametrize("borders", PACKS)
@pytest.mark.parametrize("count", [1, 2, 6])
def test_mixes_equal_their_definition(dtype, borders, count):
    torch.manual_seed(0)
    inputs = torch.randn(borders[-1], C), torch.randn(len(borders) - 1, C), *torch.rand(count, C)
    call = lambda module: lambda x, before, *shares: module.mixes(x, before, shares, where(borders))  # noqa: E731
    compare(dtype, call(fused), call(neighbours), inputs)


@pytest.mark.parametrize("dtype", NOISE)
@pytest.mark.parametrize("borders", PACKS)
@pytest.mark.parametrize("first_layer", [True, False])
def test_what_stands_around_wkv7_equals_its_definition(dtype, borders, first_layer):
    torch.manual_seed(0)
    T, S = borders[-1], len(borders) - 1
    gates = [torch.randn(T, C) for _ in Gates._fields]
    if first_layer:
        gates[6:] = [None, None]
    inputs = *gates, *(torch.randn(C) for _ in Own._fields), torch.randn(S, H, N, N)

    def call(module, wkv):
        def around(*x):
            return module.around7(wkv, Gates(*x[:8]), Own(*x[8:13]), x[13], where(borders), H)

        return around

    compare(dtype, call(fused, cpu.wkv7), call(neighbours, chunked.wkv7), inputs)


def test_only_the_gradients_that_are_asked_for_are_made():
    """A frozen parameter's is None, and what only it would need is not allocated."""
    gates, own = [torch.randn(9, C).requires_grad_() for _ in range(8)], [torch.randn(C) for _ in range(5)]
    y, _ = fused.around7(cpu.wkv7, Gates(*gates), Own(*own), torch.zeros(1, H, N, N), where((0, 9)), H)
    y.sum().backward()
    assert all(x.grad is not None for x in gates) and all(x.grad is None for x in own)


def test_a_key_of_zero_length_is_no_nan():
    """kk is divided by a length that is held above zero, whose slope is nothing there."""
    gates, own = (
        [torch.randn(5, C).requires_grad_() for _ in range(8)],
        [torch.randn(C).requires_grad_() for _ in range(5)],
    )
    gates[2] = torch.zeros(5, C, requires_grad=True)
    found = []
    for module in (fused, neighbours):
        y, _ = module.around7(chunked.wkv7, Gates(*gates), Own(*own), torch.zeros(1, H, N, N), where((0, 5)), H)
        found.append(torch.autograd.grad(y.sum(), [*gates, *own]))
    for ours, theirs in zip(*found, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", NOISE)
@pytest.mark.parametrize("shape", [(3, 16), (7, 3, 32)])
def test_the_squared_relu_equals_its_definition(dtype, shape):
    torch.manual_seed(0)
    compare(dtype, fused.square_relu, neighbours.square_relu, [torch.randn(shape)])


@pytest.mark.parametrize("dtype", NOISE)
@pytest.mark.parametrize("columns", [1, 15, 16, 50, 1000])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_losses_and_slopes_of_logits_equal_their_definition(dtype, columns, scale):
    """Whatever the number of columns is, and however far apart the logits are."""
    logits, targets = (torch.randn(9, columns) * scale).to(dtype), torch.randint(columns, (9,))
    loss, slopes = neighbours.slopes(logits.double(), targets, True)
    ours, found = fused.slopes(logits.clone(), targets, True)
    assert abs(float(ours - loss)) <= 1e-5 * max(1.0, abs(float(loss)))
    assert (found.double() - slopes).abs().max() <= (2**-8 if dtype == torch.bfloat16 else 1e-5)
    kept = logits.clone()
    assert float(fused.slopes(kept, targets, False)[0]) == float(ours) and torch.equal(kept, logits)


@pytest.mark.parametrize("target", [-1, 40])
def test_a_target_outside_of_its_row_is_refused(target):
    with pytest.raises(IndexError, match="outside of the 40 logits"):
        fused.slopes(torch.randn(2, 40), torch.tensor([1, target]), True)


def test_gates_of_different_formats_are_not_taken_for_one():
    gates = [torch.randn(9, C, dtype=torch.bfloat16) for _ in range(8)]
    gates[1] = gates[1].float()
    own, s0 = [torch.randn(C).bfloat16() for _ in range(5)], torch.zeros(1, H, N, N)
    found = [m.around7(chunked.wkv7, Gates(*gates), Own(*own), s0, where((0, 9)), H)[0] for m in (fused, neighbours)]
    assert torch.equal(*found)


@pytest.mark.parametrize("weight", NOISE)
@pytest.mark.parametrize("dtype", NOISE)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_a_product_of_a_few_rows_reads_the_weight_as_it_is_stored(dtype, weight, rows):
    x, w = torch.randn(rows, 48).to(dtype), torch.randn(50, 48).to(weight)
    exact = x.double() @ w.double().T
    with torch.no_grad():
        found = fused.linear(x, w)
    assert found.dtype == dtype and laws.errors([found.double()], [exact])[0] < NOISE[dtype]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("rows", "inputs", "rank"), [(1, 64, 1), (6, 64, 4), (13, 192, 7), (40, 128, 0), (20, 80, 3)])
def test_folding_a_product_of_low_rank_is_its_definition(rows, inputs, rank, threads):
    weight = torch.randn(rows, inputs).bfloat16()
    B, A, x = torch.randn(rows, rank), torch.randn(rank, inputs), torch.randn(QUESTIONS, inputs)
    torch.set_num_threads(threads)
    ours = fused.fold(weight, B, A, x)
    torch.set_num_threads(1)
    exact = neighbours.fold(weight, *(t.double() for t in (B, A, x)))
    sure = folding.fold(weight, B, A, x)
    assert ours.made.dtype == torch.bfloat16 and (ours.made != exact.made).float().mean() < 0.01
    torch.testing.assert_close(ours.made.float(), sure.made.float(), rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(ours.exact.double(), exact.exact, rtol=1e-5, atol=1e-5 * inputs**0.5)
    torch.testing.assert_close(ours.rounded, x @ ours.made.float().T, rtol=1e-5, atol=1e-5 * inputs**0.5)
    torch.testing.assert_close(ours.squares.double(), exact.squares, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none_when_it_is_folded(bad):
    weight = torch.randn(9, 128).bfloat16()
    weight[4, 70] = bad
    found = fused.fold(weight, torch.randn(9, 2), torch.randn(2, 128), torch.randn(QUESTIONS, 128))
    assert [not bool(torch.isfinite(row).all()) for row in found.rounded.T] == [i == 4 for i in range(9)]
    assert found.made[4, 70].float().isfinite().logical_not()


def test_a_product_that_is_learnt_from_has_its_gradients():
    x, w = torch.randn(1, 48, requires_grad=True), torch.randn(50, 48, requires_grad=True)
    found = torch.autograd.grad(fused.linear(x, w).square().sum(), [x, w])
    exact = torch.autograd.grad(neighbours.linear(x, w).square().sum(), [x, w])
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))


def test_a_logit_that_is_nan_makes_the_loss_nan():
    logits = torch.randn(2, 40)
    logits[1, 20] = float("nan")
    assert fused.slopes(logits, torch.tensor([1, 2]), False)[0].isnan()


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_number_of_threads_does_not_matter(threads):
    inputs, s0 = wkv_inputs(1, 70, 2, 64), laws.start(3, 2, 64)
    before = torch.get_num_threads()
    found = []
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            y, end = cpu.wkv7(*inputs, s0, (0, 5, 40, 70))
            found.append([y, end, *torch.autograd.grad([y, end], [*inputs, s0], [y.detach(), end.detach()])])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# How a library comes about


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache, nothing remembered, and little to compile."""
    monkeypatch.setattr(cache, "folder", lambda: tmp_path)
    sources = tmp_path / "sources"
    sources.mkdir()
    for file in ("mix.cpp", "rows.h", "vec.h"):
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
    with pytest.raises(Problems, match=re.escape(words)):
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
    command = [str(slow), "-shared", "-fPIC", str(build.SOURCES / "mix.cpp")]
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
        fused.slopes(torch.randn(300, 32), torch.zeros(2, dtype=torch.long), True)
    logits, targets = torch.randn(3, 32), torch.tensor([1, 2, 3])
    wide = fused.slopes(logits.clone(), targets, False)[0]
    assert torch.equal(fused.slopes(logits.clone(), targets.int(), False)[0], wide)
    where = Borders((0, 10), "cpu")
    with pytest.raises(ValueError, match="does not go with"):
        fused.mixes(torch.randn(10, 48), torch.zeros(1, 48), [torch.randn(16)], where)
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        fused.mixes(torch.randn(8, 48), torch.zeros(1, 48), [torch.randn(48)], where)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2", *(["avx512"] if EVERYTHING else [])])
def test_every_instruction_set_obeys_the_laws(capability):
    """ATEN_CPU_CAPABILITY is torch's own word for what a processor is to be taken for."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    laws_of = ["tests/test_ops_cpu.py", "tests/test_ops_wkv7.py", "tests/test_ops_wkv6.py", "tests/test_token7.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *laws_of]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_shapes_without_a_kernel_go_through_the_definition():
    inputs, s0 = wkv_inputs(1, 9, 2, 24), laws.start(1, 2, 24)
    laws.equals_the_reference(cpu.wkv7, reference.wkv7, "rwkvab", inputs, s0)
    assert fused.square_relu(torch.ones(3, 5)).sum() == 15


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_heads_without_a_kernel_are_said_to_go_through_torch(device):
    found = dispatch.choose("auto", "x070", device, head_size=48)
    assert found.name == "torch" and "these have 48" in found.why
    with pytest.raises(Problems, match="these have 48"):
        dispatch.choose(device, "x070", device, head_size=48)
