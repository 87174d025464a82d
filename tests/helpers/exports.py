"""Small models to export, and what the clients of an export compute."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from helpers import tiny
from rwkv_peft.checkpoint.prompt_format import PromptFormat
from rwkv_peft.export import EXPORTS
from rwkv_peft.model import arch
from rwkv_peft.text.presets import PRESETS

IDS = [5, 77, 300, 2, 2, 2, 499, 13, 1, 260, 42, 9]


WORLD = PromptFormat(PRESETS["rwkv-world"])


DTYPES = {"gguf": torch.float16, "gguf-bf16": torch.bfloat16, "gguf-f32": torch.float32}


V7_V6 = ["x070", "x060"]


def small(version="x070", layers=2, vocab=64):
    return tiny.geometry(layers, 32, vocab, 16, version)


def states_of(shape, full=False, seed=1):
    """A learnt state whose numbers float16 can hold exactly, in no particular order."""
    generator = torch.Generator().manual_seed(seed)
    names = [n for n in arch.state_shapes(shape) if full or n.endswith(".att.time_state")]
    sizes = arch.state_shapes(shape)
    return {n: torch.randn(sizes[n], generator=generator).half().float() for n in reversed(names)}


def write(kind, source, target, shape, asked=WORLD):
    return " ".join(EXPORTS[kind].write(source, target, shape, asked))


# a process of its own: the package reads its environment when it is imported
JUDGE = """
import json, os, sys
os.environ.update(RWKV_V7_ON=sys.argv[1], RWKV_JIT_ON="0", RWKV_CUDA_ON="0")
import torch
from rwkv.model import RWKV
model, answers = RWKV(model=sys.argv[2], strategy="cpu fp32"), []
for heads in torch.load(sys.argv[4], weights_only=True):
    zero = torch.zeros(heads[0].shape[0] * heads[0].shape[1]) if heads else None
    state = [x for matrix in heads for x in (zero.clone(), matrix.contiguous(), zero.clone())] or None
    answers.append(model.forward(json.loads(sys.argv[3]), state, full_output=True)[0])
torch.save(torch.stack(answers), sys.argv[5])
"""


def judged(path, version, cases, ids=IDS):
    """Logits of the rwkv package [case, T, V]. A case: the matrices of its state list by layer, [] for none."""
    asked, answer = path.with_name("asked.pt"), path.with_name("answer.pt")
    torch.save(cases, asked)
    arguments = ["1" if version == "x070" else "0", str(path).removesuffix(".pth"), json.dumps(ids), asked, answer]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", JUDGE, *map(str, arguments)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return torch.load(answer, weights_only=True)
