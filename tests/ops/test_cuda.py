"""Law 3 for the CUDA kernels, without a GPU: their source as it is, each block's threads one after another on the host
(cuda/emulate.h), in both orders. And that they compile for every GPU that matters, where there is an nvcc."""

import ctypes
import functools
import itertools
import math
import re
import shutil
import subprocess
import types

import pytest
import torch
from helpers import block_laws as of_neighbours
from helpers import tiny
from helpers import wkv_laws as laws
from helpers.kit import few
from helpers.tiny import wkv6_inputs, wkv_inputs

from rwkv_peft.model import arch
from rwkv_peft.model.rwkv import build as build_model
from rwkv_peft.ops import dispatch, kernel_check, reference
from rwkv_peft.ops.cuda import build, fused, wkv


def without_asking(way: wkv.Way) -> wkv.Recurrence7:
    """A recurrence that goes this way whatever the GPU is."""
    return wkv.Recurrence7((way._replace(possible=lambda _r: True),), always=True)


ON_TENSOR_CORES = {f"x070 {name}": way for name, way in wkv.WAYS.items()}
KERNELS = {"x070": wkv.wkv7, "x060": wkv.wkv6, "x052": wkv.wkv5}
KERNELS |= {name: without_asking(way) for name, way in ON_TENSOR_CORES.items()}
REFERENCE = {
    name: {"x070": reference.wkv7, "x060": reference.wkv6, "x052": reference.wkv5}[name[:4]] for name in KERNELS
}
NAMES = {name: "rwkvab" if name.startswith("x070") else "rwkvu" for name in KERNELS}
VERSIONS = tuple(arch.ARCHS)
DTYPES = (torch.float32, torch.bfloat16)
KINDS = ("random", "repeated", "fast", "slow")
COMPILER = shutil.which("g++")
CAPABILITIES = "80", "86", "89", "90", "120"

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no g++")


@functools.cache
def library(size: int, folder: str, *flags: str) -> ctypes.CDLL:
    file = f"{folder}/emulated{size}{''.join(flags)}.so"
    source = str(build.SOURCES / "host.cpp")
    command = [
        COMPILER,
        "-DEMULATE",
        f"-DN={size}",
        *flags,
        "-O1",
        "-std=c++17",
        "-shared",
        "-fPIC",
        source,
        "-o",
        file,
    ]
    subprocess.run(command, check=True, capture_output=True)
    return ctypes.CDLL(file)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(autouse=True)
def emulated(monkeypatch, folder, request):
    """What starts a kernel, here; tensor cores do not round what they multiply, unless a test is marked `rounded`. A test may
    have `order`: 1 runs the threads of a block from the last to the first."""
    order = request.node.callspec.params.get("order", 0) if hasattr(request.node, "callspec") else 0
    flags = () if request.node.get_closest_marker("rounded") else ("-DEXACT",)

    def launcher(_device, size):
        def launch(name, grid, args, threads=0, shared=0):
            assert all(not torch.is_tensor(x) or x.is_contiguous() for x in args), name
            values = [ctypes.c_int(x) if isinstance(x, int) else ctypes.c_void_p(pointer(x)) for x in args]
            pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
            block = threads or size, shared
            assert library(size, folder, *flags).emulated(name.encode(), *grid, *block, pointers, order) == 0, name

        return launch

    monkeypatch.setattr(build, "launcher", launcher)


def pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def inputs_of(version, *shape, **how):
    if version.startswith("x070"):
        return wkv_inputs(*shape, **how)
    return wkv6_inputs(*shape, constant=version == "x052", **how)


@pytest.mark.smoke
@pytest.mark.parametrize("version", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tokens", "order"), few([(1, 0), (2, 0), (64, 0), (65, 1), (130, 0), (130, 1)], [(1, 0), (65, 1)])
)
def test_a_kernel_equals_the_reference_forward_and_every_gradient(version, kind, tokens, order):
    inputs, s0 = inputs_of(version, 2, tokens, 2, 16, kind=kind), laws.start(2, 2, 16)
    laws.equals_the_reference(KERNELS[version], REFERENCE[version], NAMES[version], inputs, s0)


@pytest.mark.slow
@pytest.mark.rounded
@pytest.mark.parametrize("version", KERNELS)
def test_a_kernel_is_exact_to_the_rounding_of_bf16_inputs_and_outputs(version):
    inputs, s0 = inputs_of(version, 1, 70, 2, 16, dtype=torch.bfloat16), laws.start(1, 2, 16)
    laws.equals_the_reference_to_the_rounding_of_bf16(KERNELS[version], REFERENCE[version], inputs, s0)


@pytest.mark.slow
@pytest.mark.parametrize("version", KERNELS)
def test_the_head_size_of_the_official_models(version):
    inputs, s0 = inputs_of(version, 1, 67, 1, 64), laws.start(1, 1, 64)
    laws.equals_the_reference(KERNELS[version], REFERENCE[version], NAMES[version], inputs, s0)


@pytest.mark.smoke(2)
@pytest.mark.parametrize("version", KERNELS)
@pytest.mark.parametrize("cut", [1, 45])
def test_two_halves_with_the_carried_state_equal_the_whole(version, cut):
    laws.halves_equal_the_whole(KERNELS[version], inputs_of(version, 2, 70, 2, 16), laws.start(2, 2, 16), cut)


@pytest.mark.parametrize("version", KERNELS)
@pytest.mark.parametrize("bounds", [(0, 1, 2, 60), (0, 64, 128, 130)])
def test_packed_sequences_do_what_they_do_alone(version, bounds):
    inputs, s0 = inputs_of(version, 1, bounds[-1], 2, 16), laws.start(len(bounds) - 1, 2, 16)
    laws.packed_equals_alone(KERNELS[version], inputs, s0, bounds)


@pytest.mark.parametrize("version", KERNELS)
def test_no_initial_state_is_a_zero_state(version):
    zero = torch.zeros(2, 2, 16, 16)
    laws.no_state_is_a_zero_state(KERNELS[version], inputs_of(version, 2, 40, 2, 16), zero)


@pytest.mark.parametrize("version", KERNELS)
def test_inputs_are_left_as_they_are(version):
    laws.leaves_its_inputs_as_they_are(KERNELS[version], inputs_of(version, 1, 64, 1, 16), laws.start(1, 1, 16))


@pytest.mark.parametrize("version", KERNELS)
def test_poisoned_memory_does_not_show(monkeypatch, version):
    packed = functools.partial(KERNELS[version], cu_seqlens=(0, 20, 75))
    given = inputs_of(version, 1, 75, 2, 16), laws.start(2, 2, 16)
    laws.uses_no_memory_that_it_did_not_write(monkeypatch, packed, *given)


ON_ROUNDED = [(way, torch.bfloat16) for way in ON_TENSOR_CORES]


@pytest.mark.slow
@pytest.mark.rounded
@pytest.mark.parametrize(("version", "dtype"), few([*itertools.product(VERSIONS, DTYPES), *ON_ROUNDED], ON_ROUNDED))
def test_the_proof_that_a_gpu_must_give_is_passed(version, dtype):
    result = kernel_check.check_against_reference(version[:4], KERNELS[version], "cpu", dtype)
    assert result.passed, result


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_proof_of_what_is_around_is_passed(dtype):
    result = kernel_check.prove_around(fused, wkv.wkv7, "cpu", dtype)
    assert result.passed, result


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_a_model_on_the_kernels_learns_what_one_on_torch_learns(version):
    """Logits, the states behind packed sequences, and the gradient of every parameter."""
    shape, ids = tiny.geometry(version=version), torch.randint(1, 60000, (1, 75))
    result = []
    for op in ("torch", "cuda"):
        model = build_model(shape, tiny.tensors(0, shape), dispatch.made(op, version), torch.float32)
        logits, after = model(ids, cu_seqlens=(0, 4, 70, 75))
        loss = logits.logsumexp(-1).square().mean() + sum(s.wkv.square().mean() for s in after)
        loss.backward()
        result.append([logits.detach(), *(s.wkv.detach() for s in after), *(p.grad for p in model.parameters())])
    for one, other in zip(*result, strict=True):
        assert (one - other).norm() <= 1e-4 * one.norm()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("source", build.FILES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernels_compile_for_every_gpu_and_nothing_spills(tmp_path, source, capability):
    command = [
        "nvcc",
        f"-arch=sm_{capability}",
        "-std=c++17",
        "-cubin",
        "-Xptxas",
        "-v",
        "-o",
        str(tmp_path / "x.cubin"),
    ]
    done = subprocess.run([*command, str(build.SOURCES / f"{source}.cu")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spilled = re.findall(r"(\d+) bytes spill", done.stderr)
    assert len(spilled) >= 4 and set(spilled) == {"0"}, done.stderr


@of_neighbours.dtypes
@of_neighbours.packs
@pytest.mark.parametrize("count", [1, 2, 6])
@pytest.mark.parametrize("order", [0, 1])
def test_mixes_equal_their_definition(dtype, bounds, count, order):
    of_neighbours.token_shift_mix(fused, dtype, bounds, count)


@pytest.mark.smoke
@of_neighbours.dtypes
@of_neighbours.packs
@pytest.mark.parametrize("first_layer", [True, False])
@pytest.mark.parametrize("order", [0, 1])
def test_what_is_around_wkv7_equals_its_definition(dtype, bounds, first_layer, order):
    of_neighbours.wkv7_block(fused, wkv.wkv7, dtype, bounds, first_layer)


@pytest.mark.parametrize("way", ON_TENSOR_CORES)
def test_what_is_around_wkv7_goes_with_every_way_of_the_recurrence(way):
    of_neighbours.wkv7_block(fused, KERNELS[way], torch.float32, (0, 17, 64), False)


def test_only_the_gradients_that_are_asked_for_are_made():
    of_neighbours.only_the_gradients_that_are_asked_for(fused, wkv.wkv7)


def test_a_key_of_zero_length_is_no_nan():
    of_neighbours.a_key_of_zero_length_is_no_nan(fused, wkv.wkv7)


@of_neighbours.dtypes
@pytest.mark.parametrize("shape", [(3, 16), (7, 3, 32)])
def test_the_squared_relu_equals_its_definition(dtype, shape):
    of_neighbours.squared_relu(fused, dtype, shape)


@pytest.mark.smoke
@of_neighbours.dtypes
@pytest.mark.parametrize("columns", [1, 50, 1000])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("order", [0, 1])
def test_losses_and_slopes_of_logits_equal_their_definition(dtype, columns, scale, order):
    of_neighbours.losses_and_slopes(fused, dtype, columns, scale)


def test_a_logit_that_is_nan_makes_the_loss_nan():
    of_neighbours.a_logit_that_is_nan_makes_the_loss_nan(fused)


def test_the_way_is_chosen_by_the_shape(monkeypatch):
    """Few heads and sequences go in parts, many in a single pass; and token by token what there are no such kernels for, or is
    too short for them."""
    about = types.SimpleNamespace(multi_processor_count=132, total_memory=140 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: about)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))

    class Given:
        def __init__(self, heads=12, sequences=1, tokens=4096, size=64, dtype=torch.bfloat16, is_cuda=True):
            self.shape, self.device = (sequences * tokens, heads, size), "cuda"
            self.dtype, self.is_cuda, self.spans = dtype, is_cuda, ((0, tokens),) * sequences

        def __len__(self):
            return self.shape[0]

        def numel(self):
            return math.prod(self.shape)

    def way(*shape, among=wkv.wkv7, **how):
        given = Given(*shape, **how)
        return among.way(given, given.spans)

    assert way() is way(40) is way(32, 8) is wkv.PARTS
    assert way(40, 16) is way(64, 9) is way(tokens=200) is way(12, 64, 16) is wkv.SINGLE
    for how in ({"tokens": 15}, {"dtype": torch.float32}, {"size": 128}, {"is_cuda": False}):
        assert way(**how) is wkv.TOKENS
    assert way(among=wkv.among(["in a single pass"])) is way(tokens=3, among=wkv.only("in a single pass")) is wkv.SINGLE
    assert way(40, 16, among=wkv.among(["in parts"])) is way(among=wkv.among([])) is wkv.TOKENS
    assert way(size=128, among=wkv.only("in parts")) is wkv.TOKENS
    about.total_memory = 10**9
    assert way() is wkv.SINGLE and way(tokens=1024) is wkv.PARTS
    assert way(12, 40, 64) is way(32, 64, 16) is wkv.SINGLE and way(32, 40, 64) is way(32, 100, 16) is wkv.TOKENS
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 9))
    assert way(tokens=1024) is wkv.PARTS and way(40, 16) is wkv.TOKENS
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    assert way(tokens=1024) is way(40, 16) is way(among=wkv.only("in a single pass")) is wkv.TOKENS


def test_the_states_that_are_kept_are_those_of_the_other_ways():
    """Every 64th, in the same places."""
    inputs, s0 = inputs_of("x070", 1, 150, 2, 16), laws.start(2, 2, 16)
    kept = []
    for way in (wkv.TOKENS, *wkv.WAYS.values()):
        flat = [x.reshape(150, 2, 16) for x in inputs]
        y, _ = wkv.WKV7.apply(*flat, s0, ((0, 20), (20, 150)), way)
        kept.append(y.grad_fn.saved_tensors[-1])
    for other in kept[1:]:
        assert kept[0].shape == other.shape == (4, 2, 16, 16)
        assert (kept[0] - other).norm() <= 1e-6 * kept[0].norm()


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_is_kept_where_no_gradient_is_made(monkeypatch, version):
    """Even if a parameter that learns is among the inputs, as a learnt state is in validation."""
    asked, launcher = [], build.launcher

    def watched(device, size):
        launch = launcher(device, size)

        def seen(name, grid, args, *more):
            if "_forward_" in name:  # ... kept, span, keep, H; RWKV-6 has one number more
                asked.append(args[-3] if version != "x070" else args[-2])
            launch(name, grid, args, *more)

        return seen

    monkeypatch.setattr(build, "launcher", watched)
    inputs, s0 = inputs_of(version, 1, 5, 1, 16), laws.start(1, 1, 16)
    KERNELS[version](*inputs, s0)
    with torch.no_grad():
        KERNELS[version](*inputs, s0)
    assert asked == [1, 0]
