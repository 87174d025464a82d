"""Law 3 for the CUDA kernels, without a GPU: their source as it is, each block's threads one after another on the host
(cuda/emulate.h), in both orders. And that they compile for every GPU that matters, where there is an nvcc."""

import ctypes
import functools
import re
import shutil
import subprocess

import laws_of_ops as laws
import pytest
import torch
from tiny import wkv6_inputs, wkv_inputs

from rwkv_peft.ops import proof, reference
from rwkv_peft.ops.cuda import build, wkv

KERNELS = {"x070": wkv.wkv7, "x060": wkv.wkv6, "x052": wkv.wkv5}
REFERENCE = {"x070": reference.wkv7, "x060": reference.wkv6, "x052": reference.wkv5}
NAMES = {"x070": "rwkvab", "x060": "rwkvu", "x052": "rwkvu"}
KINDS = ("random", "repeated", "fast", "slow")
COMPILER = shutil.which("g++")
CAPABILITIES = ("80", "86", "89", "90", "120")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no g++")


@functools.cache
def library(size: int, folder: str) -> ctypes.CDLL:
    file = f"{folder}/emulated{size}.so"
    source = str(build.SOURCES / "host.cpp")
    command = [COMPILER, "-DEMULATE", f"-DN={size}", "-O1", "-std=c++17", "-shared", "-fPIC", source, "-o", file]
    subprocess.run(command, check=True, capture_output=True)
    return ctypes.CDLL(file)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(autouse=True, params=[0, 1], ids=["forwards", "backwards"])
def emulated(monkeypatch, folder, request):
    def launcher(_device, size):
        def launch(name, grid, args):
            assert all(not torch.is_tensor(x) or x.is_contiguous() for x in args), name
            values = [ctypes.c_void_p(x.data_ptr()) if torch.is_tensor(x) else ctypes.c_int(x) for x in args]
            pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
            assert library(size, folder).emulated(name.encode(), *grid, pointers, request.param) == 0, name

        return launch

    monkeypatch.setattr(build, "launcher", launcher)


def inputs_of(version, *shape, **how):
    if version == "x070":
        return wkv_inputs(*shape, **how)
    return wkv6_inputs(*shape, constant=version == "x052", **how)


@pytest.mark.parametrize("version", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 2, 64, 65, 130])
def test_a_kernel_equals_the_reference_forward_and_every_gradient(version, kind, tokens):
    inputs, s0 = inputs_of(version, 2, tokens, 2, 16, kind=kind), laws.start(2, 2, 16)
    laws.equals_the_reference(KERNELS[version], REFERENCE[version], NAMES[version], inputs, s0)


@pytest.mark.parametrize("version", KERNELS)
def test_a_kernel_is_exact_to_the_rounding_of_bf16_inputs_and_outputs(version):
    inputs, s0 = inputs_of(version, 1, 70, 2, 16, dtype=torch.bfloat16), laws.start(1, 2, 16)
    laws.equals_the_reference_to_the_rounding_of_bf16(KERNELS[version], REFERENCE[version], inputs, s0)


@pytest.mark.parametrize("version", KERNELS)
def test_the_head_size_of_the_official_models(version):
    inputs, s0 = inputs_of(version, 1, 67, 1, 64), laws.start(1, 1, 64)
    laws.equals_the_reference(KERNELS[version], REFERENCE[version], NAMES[version], inputs, s0)


@pytest.mark.parametrize("version", KERNELS)
@pytest.mark.parametrize("cut", [1, 45])
def test_two_halves_with_the_carried_state_equal_the_whole(version, cut):
    laws.halves_equal_the_whole(KERNELS[version], inputs_of(version, 2, 70, 2, 16), laws.start(2, 2, 16), cut)


@pytest.mark.parametrize("version", KERNELS)
@pytest.mark.parametrize("borders", [(0, 1, 2, 60), (0, 64, 128, 130)])
def test_packed_sequences_do_what_they_do_alone(version, borders):
    inputs, s0 = inputs_of(version, 1, borders[-1], 2, 16), laws.start(len(borders) - 1, 2, 16)
    laws.packed_equals_alone(KERNELS[version], inputs, s0, borders)


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


@pytest.mark.parametrize("version", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_proof_that_a_gpu_must_give_is_passed(version, dtype):
    found = proof.prove(version, KERNELS[version], "cpu", dtype)
    assert found.passed, found


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("source", ["wkv7", "wkv6"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernels_compile_for_every_gpu_and_nothing_spills(tmp_path, source, capability, request):
    if "backwards" in request.node.name:
        pytest.skip("once is enough")
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
    assert len(spilled) >= 12 and set(spilled) == {"0"}, done.stderr
