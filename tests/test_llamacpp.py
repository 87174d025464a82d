"""llama.cpp itself judges our .gguf files: logits of the rwkv package, and the ids of our tokenizer.

    pip install llama-cpp-python==0.3.36     (builds from source, 6 minutes on 2 cores)
    pytest -m llamacpp tests/test_llamacpp.py

In a process of its own: llama.cpp ends the whole process where it does not like a file.
"""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from test_exports import DTYPES, V7_V6, judged, write

from merge.exports import gguf_file
from rwkv_peft import tokenizer

if importlib.util.find_spec("llama_cpp") is None:
    pytest.skip("llama.cpp is not installed: pip install llama-cpp-python==0.3.36", allow_module_level=True)

pytestmark = pytest.mark.llamacpp

IDS = [5, 77, 300, 2, 2, 2, 499, 13, 1, 260, 42, 9]
TEXT = "Hello, wörld! 你好。\n\nUser: 1+1=?\t\\ 'it' \"is\" \x00\x7f 🙂 <s>"
LLAMA = """
import ctypes, json, sys
import numpy, llama_cpp
if sys.argv[2] == "template":
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"), ("user", "?")]
    chat = (llama_cpp.llama_chat_message * 4)(*[(role.encode(), text.encode()) for role, text in turns])
    out = ctypes.create_string_buffer(999)
    size = llama_cpp.llama_chat_apply_template(sys.argv[3].encode(), chat, 4, True, out, 999)
    sys.exit(print("RESULT" + json.dumps(out.raw[: max(size, 0)].decode())))
model = llama_cpp.Llama(sys.argv[1], n_ctx=64, n_threads=1, logits_all=True, verbose=False)
if sys.argv[2] == "ids":
    print("RESULT" + json.dumps(model.tokenize(sys.argv[3].encode(), add_bos=False, special=False)))
else:
    model.eval(json.loads(sys.argv[3]))
    numpy.save(sys.argv[4], model.scores[: model.n_tokens])
"""


def llama(*arguments):
    done = subprocess.run([sys.executable, "-c", LLAMA, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=[(v, n) for v in V7_V6 for n in (1, 2, 8)], ids=lambda p: f"{p[0]}-{p[1]}")
def model(request, tmp_path_factory):
    """A tiny model that writes all tokens: path, geometry, logits of the rwkv package. Eight layers: v6 halves once."""
    version, layers = request.param
    shape = tiny.geometry(layers, 128, 65536, 64, version)
    path = tiny.save_model(tmp_path_factory.mktemp("m") / "m.pth", 3, shape)
    return path, shape, judged(path, version, [[]], IDS)[0]


# relative to the largest logit: float32 rounding, 11 bits, 8 bits
CLOSE = {"gguf-f32": 1e-5, "gguf": 5e-3, "gguf-bf16": 5e-2}


@pytest.mark.parametrize("kind", DTYPES)
def test_llama_cpp_has_the_logits_of_the_rwkv_package(model, tmp_path, kind):
    path, shape, wanted = model
    write(kind, path, tmp_path / "m.gguf", shape)
    llama(tmp_path / "m.gguf", "logits", json.dumps(IDS), tmp_path / "scores.npy")
    scores = torch.from_numpy(np.load(tmp_path / "scores.npy"))
    error = (scores - wanted).abs().max() / wanted.abs().max()
    print(f"{shape.version} {shape.n_layer} layers {kind}: {error:.1e}")
    assert error < CLOSE[kind]


def test_llama_cpp_makes_the_ids_of_our_tokenizer(tmp_path):
    shape = tiny.geometry(1, 64, 65536, 64)
    write("gguf", tiny.save_model(tmp_path / "m.pth", 0, shape), tmp_path / "m.gguf", shape)
    text = TEXT.replace("\x00", "").replace("<s>", "")  # an argument cannot hold NUL; <s> is token 0 for llama.cpp
    ids = json.loads(llama(tmp_path / "m.gguf", "ids", text).split("RESULT")[1])
    assert ids == list(tokenizer.encode(text))


def test_older_clients_of_llama_cpp_find_their_built_in_template_by_ours():
    """Those have no Jinja: they look for a mark in the template and take a layout of their own."""
    made = json.loads(llama("", "template", gguf_file.CHAT_TEMPLATE).split("RESULT")[1])
    assert made == "System: Be brief.\n\nUser: Hi\n\nAssistant: Ho\n\nUser: ?\n\nAssistant:"
