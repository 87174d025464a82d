"""How to add an adapter, a schema, a tracker, a version of RWKV and an export: each is added to a copy of the kit, in as few
files as CONTRIBUTING.md says, and used there. What is forgotten is an error with the name of the missing fact."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.kit import ROOT, Kit

from rwkv_peft.checkpoint import pth

HERE = Path(__file__).parent / "additions"

TRACKER = '''
def open_lines(project: str, folder: Path, settings: Mapping, earlier: str | None, step: int) -> TrackerRun:
    """Append a line for each step to lines/PROJECT.txt."""
    (folder / "lines").mkdir(exist_ok=True)
    file = open(folder / "lines" / f"{project}.txt", "a", encoding="utf-8")
    return TrackerRun(lambda numbers, at: print(at, *numbers, file=file, flush=True), file.close)


'''
ARCH = r"""
V8 = Arch(
    version="x080", number="v8", name="RWKV-8 (x080)", marker="blocks.0.att.blend_g", heads=V5.heads, linears=V5.linears,
    whole=EMB_AND_HEAD | NORMS | {"time": r"blocks\.\d+\.(att\.(blend_[kvrg]|time_decay|time_faaaa)|ffn\.time_mix_[kr])"},
    lr_scales=V5.lr_scales, ranks={},
    layer=lambda geometry, layer: {
        name.replace("att.time_mix_", "att.blend_"): size for name, size in layer_of_v5(geometry, layer).items()
    },
    activations=V5.activations,
)
"""
Edit = tuple[str, str]  # a pattern that one place of the file has, and what is written before it
# kind -> file -> the name of a new file in tests/kit/additions, or edits
ADDITIONS: dict[str, dict[str, str | list[Edit]]] = {
    "adapter": {
        "rwkv_peft/adapters/ia3.py": "ia3.py",
        "rwkv_peft/adapters/specs.py": [
            (
                r'    "dora": Method',
                '    "ia3": Method("(IA)3", (1, 1), {"gain": "ia3_gain"}, load="lora_load", layer="ia3.Ia3"),\n',
            )
        ],
        "rwkv_peft/config/train.py": [(r"    wandb: str = ", '    ia3_gain: float = setting("ia3_gain", gt=0, le=10)\n')],
        "training.sh": [
            (r"# Name of a wandb project", "# The number that the gains of ia3 begin with. 初始增益\nia3_gain=1.0\n\n"),
        ],
    },
    "schema": {"rwkv_peft/preprocess/keys.py": [(r'"trans_instruction", ', '"brain_teaser", ')]},
    "tracker": {
        "rwkv_peft/common/trackers.py": [
            (r"# name of a tracker, and", TRACKER), (r'"wandb": open_wandb', '"lines": open_lines, '),
        ],
        "rwkv_peft/config/train.py": [
            (r"    wandb: str = ", '    lines: str = setting("LINES", resume="free", tracker="lines")\n')
        ],
        "training.sh": [
            (r"# Name of a wandb project", '# Name of a file of lines; empty: none. 记录文件名\nLINES=""\n\n'),
        ],
    },
    "version": {
        "rwkv_peft/model/rwkv8.py": "rwkv8.py",
        "rwkv_peft/model/arch.py": [(r"\nARCHS = ", ARCH), (r"V7, V6, V5\)", "V8, ")],
        "rwkv_peft/ops/reference.py": [(r'"x070": wkv7', '"x080": wkv5, ')],
        "rwkv_peft/ops/dispatch.py": [(r'    "x070": \{\n        "torch"', '    "x080": {"torch": torch_wkv6.wkv5},\n')],
    },
    "export": {
        "rwkv_peft/export/npz.py": "npz.py",
        "rwkv_peft/export/__init__.py": [
            (r'        Export\("safetensors"', '        Export("npz", ".npz", "model", "numpy", writer("npz"), "numpy"),\n'),
        ],
    },
}  # fmt: skip
MOST_FILES = {"adapter": 4, "schema": 1, "tracker": 3, "version": 4, "export": 2}
ROWS = [{"brain_teaser": f"What is {n} + {n}?", "answer": f"{n + n}."} for n in range(8)]


def add(root: Path, kind: str, only: str = "") -> None:
    """Add one kind of thing to a copy of the kit, in all its files or in one."""
    for name, edits in ADDITIONS[kind].items():
        if only and name != only:
            continue
        if isinstance(edits, str):
            shutil.copy(HERE / edits, root / name)
            continue
        for pattern, text in edits:
            code = (root / name).read_text(encoding="utf-8")
            result = list(re.finditer(pattern, code))
            assert len(result) == 1, f"{name} has {len(result)} places like {pattern}"
            (root / name).write_text(code[: result[0].start()] + text + code[result[0].start() :], encoding="utf-8")


def python(kit: Kit, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=kit.root, capture_output=True, text=True)


def prepared(kit: Kit, **settings: object) -> None:
    """A new base and rows of the schema, and settings of a short run."""
    made = python(
        kit, "-m", "rwkv_peft.cli.init_model", "--out", "model/new.pth", "--version", "v8", "--layers", "2", "--width", "64",
        "--head-size", "16", "--dtype", "fp32",
    )  # fmt: skip
    assert not made.returncode, made.stderr
    generator = torch.Generator().manual_seed(
        1
    )  # (a new model's outputs are zero: too little for a first step to change)
    base = {
        n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in pth.load(kit.root / "model/new.pth").items()
    }
    pth.save(kit.root / "model/new.pth", base)
    kit.data("rows.jsonl", *ROWS)
    kit.run("make_tokenize.sh", "rows.jsonl")
    kit.set(
        MODEL_PATH="new.pth", DATA_PATH="rows", PRECISION="fp32", EPOCH_COUNT="1", FINETUNE_MODE="ia3", RUN_NAME="first",
        LINES="numbers", LR_INIT="1e-2", **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Kit:
    kit = Kit(tmp_path_factory.mktemp("extended") / "my kit")
    for kind in ADDITIONS:
        add(kit.root, kind)
    prepared(kit)
    return kit


@pytest.mark.parametrize("kind", MOST_FILES)
def test_an_addition_takes_few_files(kind):
    assert len(ADDITIONS[kind]) <= MOST_FILES[kind]


@pytest.mark.slow
def test_all_five_work_together_from_rows_to_an_export(extended):
    """The plan counts the new adapter's memory; its merge is the layer that was trained."""
    plan = extended.run("training.sh", "--dry-run").stdout
    assert "RWKV-8 (x080)" in plan and "(IA)3" in plan
    extended.run("training.sh")
    run = extended.root / "output/first"
    lines = (run / "lines/numbers.txt").read_text().splitlines()
    assert len(lines) == len((run / "loss.jsonl").read_text().splitlines())
    merged = extended.run("merge.sh", "output/first/rwkv-0.pth").stdout
    assert "answer" in merged
    [model] = (extended.root / "merge").glob("*.pth")
    gains, base, new = (pth.load(path) for path in (run / "rwkv-0.pth", extended.root / "model/new.pth", model))
    name = "blocks.1.ffn.key"
    assert not torch.equal(gains[f"{name}.gain"], torch.ones_like(gains[f"{name}.gain"]))
    torch.testing.assert_close(new[f"{name}.weight"], base[f"{name}.weight"] * gains[f"{name}.gain"][:, None])
    extended.run("merge.sh", "--export", "npz", str(model))
    [export] = (extended.root / "merge").glob("*.npz")
    assert np.load(export).keys() == new.keys()


FORGOTTEN = [
    ("adapter", "rwkv_peft/adapters/ia3.py", "No module named 'rwkv_peft.adapters.ia3'"),
    ("adapter", "rwkv_peft/adapters/specs.py", "FINETUNE_MODE"),
    ("adapter", "rwkv_peft/config/train.py", "ia3_gain"),
    ("adapter", "training.sh", "ia3_gain"),
    ("schema", "rwkv_peft/preprocess/keys.py", "brain_teaser"),
    ("tracker", "rwkv_peft/common/trackers.py", "TRACKERS has no row for lines"),
    ("tracker", "rwkv_peft/config/train.py", "LINES"),
    ("tracker", "training.sh", "LINES"),
    ("version", "rwkv_peft/model/rwkv8.py", "No module named 'rwkv_peft.model.rwkv8'"),
    ("version", "rwkv_peft/model/arch.py", "version that is not known"),
    ("version", "rwkv_peft/ops/reference.py", "DEFINITIONS has no row for x080"),
    ("version", "rwkv_peft/ops/dispatch.py", "BACKENDS has no row"),
    ("export", "rwkv_peft/export/npz.py", "No module named 'rwkv_peft.export.npz'"),
    ("export", "rwkv_peft/export/__init__.py", "npz"),
]


def test_every_file_of_an_addition_is_tried_without():
    assert [(kind, file) for kind, file, _ in FORGOTTEN] == [
        (kind, file) for kind in ADDITIONS for file in ADDITIONS[kind]
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "file", "words"), FORGOTTEN)
def test_what_is_forgotten_is_an_error_with_its_name(extended, kind, file, words):
    command = {"schema": ["make_tokenize.sh", "rows.jsonl"], "export": ["merge.sh", "--export", "npz", "model/new.pth"]}
    path = extended.root / file
    whole = path.read_text(encoding="utf-8")
    path.unlink()
    if isinstance(ADDITIONS[kind][file], list):
        shutil.copy(ROOT / file, path)
        for other in ADDITIONS:
            if other != kind and file in ADDITIONS[other]:
                add(extended.root, other, only=file)
    if kind == "adapter" and file == "training.sh":
        extended.set(FINETUNE_MODE="ia3")
    try:
        script, *arguments = command.get(kind, ["training.sh", "--dry-run"])
        env = {"OMP_NUM_THREADS": "1"} | {k: v for k, v in os.environ.items() if k != "LOCAL_RANK"}
        done = subprocess.run([str(extended.root / script), *arguments], capture_output=True, text=True, env=env)
    finally:
        path.write_text(whole, encoding="utf-8")
    assert done.returncode and words in done.stderr, done.stderr
