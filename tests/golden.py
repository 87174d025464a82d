"""Golden runs: small runs of two versions of the kit, through their scripts, whose results must be the same bit for bit.

    python tests/golden.py COMMIT                  compare this working tree with a commit
    python tests/golden.py --record FILE           write down what this working tree gives
    python tests/golden.py --compare FILE          compare with what was written down (on this machine)
    --only NAME ...                                some of the runs        --list  their names

Compared are exit codes, the names of all files, every record of loss.jsonl but its times, every tensor of every checkpoint and
state, sidecars and manifests but times and paths, token files, and exported files. Arithmetic differs between processors, so
results hold for one machine only. Exit code 1 where something differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from helpers import tiny  # noqa: E402

FAST = {
    "MODEL_PATH": "v7.pth", "DATA_PATH": "chat", "PRECISION": "fp32", "EPOCH_COUNT": "2", "lora_r": "4", "lora_alpha": "8",
    "lora_dropout": "0.1", "pissa_r": "4", "disha_r": "4", "svd_niter": "2", "LR_INIT": "1e-2", "LR_FINAL": "1e-3",
    "WARMUP_STEPS": "2", "MICRO_BSZ": "2", "SAVE_STEPS": "2", "WEIGHT_DECAY": "0.01", "GRAD_CP": "0",
}  # fmt: skip
SETTINGS = dict[str, str]


class Run(NamedTuple):
    """A run: settings of training.sh; of a second start that resumes it; arguments of merge.sh (none: it is not called);
    settings of make_tokenize.sh. code: of the first start."""

    train: SETTINGS = {}
    resume: SETTINGS | None = None
    merge: tuple[str, ...] | None = ()
    tokenize: SETTINGS = {}
    code: int = 0


RUNS = {
    "lora": Run({"lora_parts": "att,ffn"}, {"EPOCH_COUNT": "3"},
                ("--export", "safetensors", "--export", "gguf-f32", "--export", "peft")),
    "lora v6": Run({"MODEL_PATH": "v6.pth"}),
    "lora v5": Run({"MODEL_PATH": "v5.pth"}),
    "dora": Run({"use_dora": "1"}),
    "rslora plus": Run({"use_rslora": "1", "loraplus_lr_ratio": "4", "EMB_FINETUNE": "1"}),
    "pissa": Run({"FINETUNE_MODE": "pissa"}),
    "miss": Run({"FINETUNE_MODE": "miss"}, {"EPOCH_COUNT": "3"}),
    "bat": Run({"FINETUNE_MODE": "bat"}),
    "state": Run({"FINETUNE_MODE": "state"}, None, ("--export", "state", "--export", "rwkvcpp")),
    "state shifts": Run({"FINETUNE_MODE": "state", "state_shifts": "1"}),
    "lisa": Run({"FINETUNE_MODE": "lisa", "lisa_r": "1", "lisa_k": "2"}, {"EPOCH_COUNT": "3"}),
    "full": Run({"FINETUNE_MODE": "full", "OPTIM": "adamw8bit"}),
    "full v6 adafactor": Run({"FINETUNE_MODE": "full", "MODEL_PATH": "v6.pth", "OPTIM": "adafactor"}),
    "bf16": Run({"MODEL_PATH": "bf16.pth", "PRECISION": "bf16"}),
    "int8": Run({"QUANT": "int8"}),
    "nf4": Run({"QUANT": "nf4", "QUANT_PARTS": "att,ffn,emb,head"}),
    "fp8 emb": Run({"QUANT": "fp8"}),
    "pad": Run({"DATALOAD": "pad", "LOSS_MASK": "pad"}),
    "bucket": Run({"DATALOAD": "bucket", "MICRO_BSZ": "auto"}),
    "only": Run({"DATALOAD": "only", "MICRO_BSZ": "1", "MINI_BSZ": "2"}),
    "get": Run({"DATALOAD": "get", "CTX_LEN": "32"}),
    "concat mixture": Run({"DATA_PATH": "chat:2 text:1", "PACK": "concat", "LOSS_MASK": "pad", "CTX_LEN": "48"}),
    "infctx": Run({"TRAIN_TYPE": "infctx", "DATALOAD": "pad", "CHUNK_CTX": "16", "INFCTX_GRAD": "full"}),
    "infctx detach": Run({"TRAIN_TYPE": "infctx", "DATALOAD": "get", "CHUNK_CTX": "16", "CTX_LEN": "32"}),
    "grad cp": Run({"GRAD_CP": "1", "OP": "torch"}),
    "streaming": Run(
        {"STREAMING": "1", "EPOCH_COUNT": "1", "DATA_PATH": "chat.jsonl", "MAX_STEPS": "6", "CTX_LEN": "48"}, {"MAX_STEPS": "9"}
    ),
    "ddp": Run({"GPU_COUNT": "2", "MICRO_BSZ": "1"}, {"EPOCH_COUNT": "3"}),
    "fsdp": Run({"GPU_COUNT": "2", "MICRO_BSZ": "1", "STRATEGY": "fsdp", "FINETUNE_MODE": "full"}),
    "deepspeed": Run({"GPU_COUNT": "2", "MICRO_BSZ": "1", "STRATEGY": "deepspeed_stage_2"}),
    "validation": Run({"VAL_DATA": "chat", "VAL_STEPS": "1", "KEEP_BEST": "1", "SAMPLE_PROMPTS": "hi", "SAMPLE_STEPS": "2",
                       "SAMPLE_TOKENS": "4"}, None, ("latest", "best"), {"VALID_PERCENT": "30"}),
    "chatml x17": Run({}, None, (), {"PROMPT_TYPE": "chatml", "EOT": "x17", "EXPAND": "1"}),
    "average": Run({}, None, ("--average", "latest/0:1", "latest/1:2")),
    "wrong settings": Run({"LR_INIT": "fast", "OPTIM": "adamv", "lora_r": "0"}, None, None, {}, 2),
}  # fmt: skip

# what differs between two equal runs
VOLATILE = re.compile(
    r"seconds|changed|began|^key$|_per_s$|time|mark|path$|date|_at$|memory|machine|host|sha256|versions|^code$|^pid$"
)
HASHED = (".bin", ".idx", ".st", ".safetensors", ".gguf", ".state", ".txt")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def tensors_of(value: Any) -> Any:
    """A checkpoint with the digests of its tensors in place of them."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().contiguous().reshape(-1)
        return f"{value.dtype} {tuple(value.shape)} {digest(flat.view(torch.uint8).numpy().tobytes() if len(flat) else b'')}"
    if isinstance(value, dict):
        return {str(key): tensors_of(one) for key, one in value.items() if not VOLATILE.search(str(key))}
    if isinstance(value, list | tuple):
        return [tensors_of(one) for one in value]
    return repr(value)


def lasting(value: Any, root: str) -> Any:
    """JSON without what differs between two equal runs."""
    if isinstance(value, dict):
        return {key: lasting(one, root) for key, one in value.items() if not VOLATILE.search(key)}
    if isinstance(value, list):
        return [lasting(one, root) for one in value]
    return value.replace(root, "") if isinstance(value, str) else value


def content(path: Path, root: str) -> Any:
    """What must be the same in a file."""
    if path.suffix == ".jsonl" and "loss" in path.name:
        return [lasting(json.loads(line), root) for line in path.read_text().splitlines()]
    if path.suffix == ".json":
        return lasting(json.loads(path.read_text()), root)
    if path.suffix in (".pth", ".pt"):
        return tensors_of(torch.load(path, weights_only=True, map_location="cpu"))
    return digest(path.read_bytes()) if path.suffix in HASHED else "there"


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested values by their places."""
    if isinstance(value, dict | list) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {place: one for key, part in pairs for place, one in flat(part, f"{name}/{key}").items()}
    return {name: value}


class Kit:
    """A version of the kit, in a folder of its own, and the bases that its runs begin with."""

    def __init__(self, root: Path, bases: Path):
        self.root = root
        (root / ".venv").symlink_to(sys.prefix)
        for base in bases.iterdir():
            os.link(base, root / "model" / base.name)
        tiny.write_jsonl(root / "data/chat.jsonl", tiny.CHATS * 2)
        tiny.write_jsonl(root / "data/text.jsonl", [{"text": f"Line {i}. " * 9} for i in range(9)])

    def script(self, name: str, settings: SETTINGS, *arguments: str) -> int:
        """Call a script whose lines are changed as a user would; returns its exit code."""
        text = (self.root / name).read_text()
        for variable, value in settings.items():
            text, times = re.subn(rf"^{variable}=.*$", f'{variable}="{value}"', text, flags=re.M)
            if times != 1:
                raise SystemExit(f"{self.root / name} sets {variable} {times} times")
        copy = self.root / f"golden-{name}"
        copy.write_text(text)
        copy.chmod(0o755)
        environment = {k: v for k, v in os.environ.items() if k != "LOCAL_RANK"} | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([copy, *arguments], capture_output=True, text=True, env=environment, timeout=600)
        self.said = done.stdout + done.stderr
        return done.returncode

    def results(self, name: str, run: Run) -> dict[str, Any]:
        """What a run gives, by its place."""
        for folder in ("output", "merge"):
            for path in (self.root / folder).glob("*"):
                if path.is_dir() and not path.is_symlink() and folder == "output":
                    shutil.rmtree(path)
                elif path.suffix not in (".py", ".md") and (path.is_symlink() or path.is_file()):
                    path.unlink()
        for path in (self.root / "data").glob("*"):
            if path.name.startswith(("chat.", "text.")) and path.suffix != ".jsonl":
                path.unlink()
        codes = [
            self.script("make_tokenize.sh", run.tokenize, str(self.root / f"data/{x}.jsonl")) for x in ("chat", "text")
        ]
        settings = FAST | run.train | {"RUN_NAME": name.replace(" ", "-")}
        codes.append(self.script("training.sh", settings))
        if codes[-1] != run.code:
            print(f"{name}: exit code {codes[-1]}\n{self.said}", file=sys.stderr)
        if run.resume is not None:
            codes.append(self.script("training.sh", settings | run.resume))
        if run.merge is not None:
            codes.append(self.script("merge.sh", {}, *run.merge))
        result: dict[str, Any] = {"exit codes": codes}
        for folder in ("data", "output", "merge"):
            for path in sorted((self.root / folder).rglob("*")):
                place = path.relative_to(self.root)
                ours = folder != "data" or path.name.startswith(("chat.", "text."))
                if ours and path.is_file() and "__pycache__" not in place.parts and path.suffix not in (".py", ".md"):
                    result |= flat(content(path, str(self.root)), str(place))
        return result


def of_commit(commit: str, root: Path) -> None:
    """The files of a commit."""
    root.mkdir()
    archive = subprocess.run(["git", "-C", ROOT, "archive", commit], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", root], input=archive, check=True)


def of_working_tree(root: Path) -> None:
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
    ).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [
        f"{place}: {old.get(place, 'is missing')} -> {new.get(place, 'is missing')}"
        for place in sorted(old.keys() | new.keys())
        if old.get(place, "is missing") != new.get(place, "is missing")
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("commit", nargs="?")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    if given.list:
        print(*RUNS, sep="\n")
        return 0
    if not (given.commit or given.record or given.compare):
        parser.error("a commit, --record or --compare is needed")
    bad, recorded = 0, {}
    with tempfile.TemporaryDirectory() as place:
        bases = Path(place) / "bases"
        bases.mkdir()
        for name, version, dtype in (("v7", "x070", torch.float32), ("v6", "x060", torch.float32), ("v5", "x052", torch.float32),
                                     ("bf16", "x070", torch.bfloat16)):  # fmt: skip
            tiny.save_model(bases / f"{name}.pth", shape=tiny.geometry(version=version), dtype=dtype)
        of_working_tree(Path(place) / "new kit")
        new, old = Kit(Path(place) / "new kit", bases), None
        if given.commit:
            of_commit(given.commit, Path(place) / "old kit")
            old = Kit(Path(place) / "old kit", bases)
        before = json.loads(given.compare.read_text()) if given.compare else {}
        for name in given.only:
            result = recorded[name] = json.loads(json.dumps(new.results(name, RUNS[name])))
            if not (old or before):
                print(f"{name:<16} {len(result):,} values", flush=True)
                continue
            known = json.loads(json.dumps(old.results(name, RUNS[name]))) if old else before[name]
            wrong = differences(known, result)
            bad += bool(wrong)
            print(f"{name:<16} {len(result):,} values, {len(wrong):,} differ", *wrong[:9], sep="\n  ", flush=True)
    if given.record:
        given.record.write_text(json.dumps(recorded, indent=1, sort_keys=True))
    print(f"{len(given.only)} runs" + (f", {bad} differ" if old or before else ""))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
