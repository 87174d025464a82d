"""llama.cpp itself judges our .gguf files: logits of the rwkv package, and the ids of our tokenizer.

    pip install llama-cpp-python==0.3.36     (builds from source, 6 minutes on 2 cores)
    pytest -m llamacpp tests/export/test_llamacpp.py

In a process of its own: llama.cpp ends the whole process where it does not like a file.
"""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.exports import DTYPES, V7_V6, judged, write
from helpers.training import run, tokenize

from rwkv_peft.checkpoint import prompt_format, pth, sidecars
from rwkv_peft.cli import merge
from rwkv_peft.model.generate import advance, generate
from rwkv_peft.model.rwkv import build
from rwkv_peft.text import tokenizer
from rwkv_peft.text.chat_template import WORLD_LAYOUT, to_jinja
from rwkv_peft.text.presets import PRESETS
from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import Message

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
    made = json.loads(llama("", "template", to_jinja(PRESETS["rwkv-world"])).split("RESULT")[1])
    assert made == WORLD_LAYOUT


# ---- the exported model stops where ours stops ----

# PROMPT_TYPE, EOT -> texts that a .gguf has no place for, and what its answers show without them
TRAINED = {
    ("rwkv-world", "doc"): "",
    ("rwkv-g1-think", "doc"): "",
    ("rwkv-g1-bot", "doc"): "",
    ("rwkv-g1-bot-fakethink", "doc"): "",
    ("chatml", "doc"): "<|im_end|>",
    ("rwkv-world", "x17"): "",
    ("chatml", "x17"): "<|im_end|>",
}
ASKED = {"Red?": "A ripe tomato", "Poem?": "One line.\n\nAnother.", "Sea?": "Salt, wind."}
CHAT = """
import json, sys
import llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=256, n_threads=1, verbose=False)
found = {}
for question in json.loads(sys.argv[2]):
    made = model.create_chat_completion(
        [{"role": "user", "content": question}], temperature=0.0, max_tokens=60, repeat_penalty=1.0, stop=json.loads(sys.argv[3])
    )["choices"][0]
    found[question] = [made["message"]["content"], made["finish_reason"]]
print("RESULT" + json.dumps(found))
"""


@pytest.mark.parametrize(("name", "eot"), TRAINED)
def test_the_exported_model_stops_where_ours_stops(ready, name, eot, capsys):
    """A model that has learnt its rows by heart; llama.cpp has the file alone: its chat template and its stop tokens."""
    # without a token that ends a turn, a row of one turn: behind its answer comes token 0
    more = [("user", "And?"), ("assistant", "No.")] if name != "rwkv-g1-think" else []
    rows = [
        {"messages": [{"role": role, "content": words} for role, words in (("user", q), ("assistant", a), *more)]}
        for q, a in ASKED.items()
    ]
    tokenize(tiny.write_jsonl(ready / "data" / "asked.jsonl", rows), PROMPT_TYPE=name, EOT=eot)
    tiny.save_model(ready / "model" / "tiny.pth", shape=tiny.geometry(2, 64, 65536, 64))  # heads of 64, as llama.cpp's
    run(
        ready, "run", DATA_PATH="asked", FINETUNE_MODE="full", EPOCH_COUNT="120", EPOCH_SAVE="120", MICRO_BSZ="1",
        DATALOAD="only", LR_INIT="5e-3", LR_FINAL="1e-3", LR_SCHEDULE="linear",
    )  # fmt: skip
    [path] = (ready / "output" / "run").glob("rwkv-[0-9]*.pth")
    merge.command(merge.MergeConfig("", "", "original", "", "", ""), [str(path), "--export", "gguf-f32"])
    [file] = (ready / "merge").glob("*.gguf")
    asked = prompt_format.read_prompt_format(sidecars.read_sidecar(path, ()), "", path)
    model = build(tiny.geometry(2, 64, 65536, 64), pth.load(path), tiny.ops(tiny.geometry()), torch.float32).eval()
    ours = {}
    for question in ASKED:
        ids = asked.encode(asked.template.prompt([Message(Role.USER, question)], ending=asked.ending))
        with torch.no_grad():
            pieces = generate(model, *advance(model, ids), 60, 0.0, 1.0, 0, asked.template.stops(), asked.stop_tokens)
            ours[question] = "".join(pieces)
    shown = TRAINED[name, eot]

    def theirs(*stops: str) -> dict:
        done = subprocess.run(
            [sys.executable, "-c", CHAT, str(file), json.dumps(list(ASKED)), json.dumps(stops)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.split("RESULT")[1])

    reported = list(asked.stop_strings_beside_tokens)
    alone, helped = theirs(), theirs(*reported)
    with capsys.disabled():
        print(f"\n{name}, EOT={eot}: stop tokens {asked.stop_tokens}")
        for question in ASKED:
            print(
                f"  {question} ours {ours[question]!r}, llama.cpp alone {alone[question]}, with {reported} {helped[question]}"
            )
    # the answers were learnt, and end where the row's turn ended: the model would go on with the next question
    wanted = {q: a.replace("\n\n", "\n") if Role.ASSISTANT in asked.template.clean else a for q, a in ASKED.items()}
    assert all(ours[q].strip().endswith(a) for q, a in wanted.items()), ours
    assert {q: text for q, (text, _) in helped.items()} == ours
    assert all(why == "stop" for _, why in helped.values())
    if not shown:  # the file alone is enough
        assert {q: text for q, (text, _) in alone.items()} == ours
