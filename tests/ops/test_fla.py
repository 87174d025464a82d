"""flash-linear-attention as a backend: what it is called with, and under Triton's interpreter, what it computes."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.kit import EVERYTHING, ROOT

from rwkv_peft.common.errors import SettingErrors
from rwkv_peft.ops import dispatch, fla, kernel_check, torch_wkv6, torch_wkv7

OURS = {"x070": fla.wkv7, "x060": fla.wkv6, "x052": fla.wkv5}
needs_fla = pytest.mark.skipif(
    not importlib.util.find_spec("fla"), reason="needs fla-core: pip install -r requirements-fla.txt"
)


def stand_in(module, name):
    """The package's functions, with its layout of states, made of the kit."""

    def kernel(*x, scale, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu, **more):
        assert scale == 1.0 and output_final_state and initial_state.dtype == torch.float32
        assert more == ({"safe_gate": False, "lower_bound": None, "chunk_size": 16} if name == "chunk_rwkv7" else {})
        s0, bounds = initial_state.transpose(-1, -2), None if cu_seqlens is None else cu_seqlens.tolist()
        assert cu_seqlens is None or torch.equal(cu_seqlens.cpu(), cu_seqlens_cpu)
        if name == "chunk_rwkv7":
            y, end = torch_wkv7.wkv7(*x, s0, bounds)
        else:
            r, k, v, w, u = x
            y, end = torch_wkv6.wkv6(r, w, k, v, u, s0, bounds)
        return y, end.transpose(-1, -2)

    assert (module, name) in (("rwkv7", "chunk_rwkv7"), ("rwkv6", "chunk_rwkv6"))
    return kernel


@pytest.mark.smoke(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("version", OURS)
def test_inputs_states_and_bounds_get_there_as_the_package_wants_them(monkeypatch, version, dtype):
    monkeypatch.setattr(fla, "fits", lambda r: True)
    monkeypatch.setattr(fla, "function", stand_in)
    assert kernel_check.check_against_reference(version, OURS[version], "cpu", dtype).passed


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch):
    fla.version.cache_clear()
    for missing, words in (("triton", "Triton, which comes with torch for CUDA, is not"), ("fla", "pip install")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, m=missing: None if name == m else object())
        monkeypatch.setattr(fla, "PACKAGE", "no-such-package")
        with pytest.raises(SettingErrors, match=words):
            dispatch.on_gpu("fla", "x070", 64)
    fla.version.cache_clear()


def test_where_there_is_no_gpu_it_is_refused():
    with pytest.raises(SettingErrors, match="is for NVIDIA GPUs, and none was found"):
        dispatch.choose("fla", "x070")


def interpreted(*words):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "tests/helpers/fla_interpreted.py", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return kernel_check.KernelCheck(**json.loads(done.stdout))


@needs_fla
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"] if EVERYTHING else ["float32"])
@pytest.mark.parametrize("version", OURS)
def test_the_package_computes_what_the_definition_says(version, dtype):
    result = interpreted(version, dtype)
    assert result.passed, result


@needs_fla
@pytest.mark.slow
def test_its_quick_path_would_be_wrong_where_keys_are_repeated():
    """Why fla.run7 names safe_gate. If this fails, the package was fixed, and chunks of 64 may be worth a try."""
    result = interpreted("x070", "float32", "safe")
    assert not result.passed and "repeated" in result.what
