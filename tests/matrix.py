"""The matrix: every version x file x method x loader x mask x train type x compressed base, and what must hold in each cell.

The axes are read from the code's own tables, so a new version or method appears here by itself; what a value needs beside
its own name (a marker, a rank that fits, a learning rate) is in the dicts below. A cell is a value of every axis. The
settings either refuse it, with a variable and a sentence, or accept it, and then it runs: on a tiny model, through the real
commands, within this process, and is asked the laws in `laws`.

    python tests/matrix.py --docs               write docs/matrix.md
    python tests/matrix.py --all [--shard i/n]  run every accepted cell (or part i of n, from 1), one line each
    python tests/matrix.py --turns [--shard i/n] the same, but of cells that differ in the file alone run one: by turns
    python tests/matrix.py --some N [SEED]      run N accepted cells, drawn at random
    python tests/matrix.py --pairs, --triples   run those in which every pair, or every three values, occur
    python tests/matrix.py v7 fp32 lora ...     run one cell: its values, in the order of the axes
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import io
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
import torch.nn.functional as F
from helpers import tiny
from helpers.kit import ROOT
from helpers.scripts import shell_values
from helpers.training import FAST
from torch import Tensor

from rwkv_peft.adapters import inject
from rwkv_peft.adapters.base import Adapter
from rwkv_peft.adapters.specs import METHODS
from rwkv_peft.checkpoint import pth, run_dir, sidecars
from rwkv_peft.cli import train
from rwkv_peft.cli.merge import MergeConfig
from rwkv_peft.cli.merge import command as merge_command
from rwkv_peft.common import paths
from rwkv_peft.common.errors import SettingError
from rwkv_peft.config.shell import Script, parse_value
from rwkv_peft.config.train import TrainConfig
from rwkv_peft.data.binidx import Writer
from rwkv_peft.model import arch
from rwkv_peft.model.arch import ARCHS, NUMBERS
from rwkv_peft.model.rwkv import RWKV, build
from rwkv_peft.ops import dispatch
from rwkv_peft.quantize import QuantEmbedding, QuantLinear, quantise
from rwkv_peft.text.roles import Role
from rwkv_peft.train import model_setup, module
from rwkv_peft.train.callbacks import checkpoint
from rwkv_peft.train.optim import make_optimizer, parameter_groups
from rwkv_peft.train.run_record import options_of

DOCS = ROOT / "docs" / "matrix.md"
LOHA = {"peft_type": "LOHA", "r": 4, "alpha": 8}
FIELDS = {f.metadata["var"]: f for f in dataclasses.fields(TrainConfig)}
HINTS = typing.get_type_hints(TrainConfig)

Cell = tuple[str, ...]  # a value of every axis, in their order
Settings = dict[str, str]  # variables of training.sh


def words(variable: str) -> tuple[str, ...]:
    """The words that a setting may be."""
    return FIELDS[variable].metadata["choices"] or typing.get_args(HINTS[FIELDS[variable].name])


# ------------------------------------------------------------------------------------------------ the axes

# method or variant -> what it needs beside FINETUNE_MODE. Rates: those that overfit the tiny data in a few steps
METHOD_NEEDS: dict[str, Settings] = {
    "lora": {},
    "rslora": {"FINETUNE_MODE": "lora", "use_rslora": "1"},
    "lora all": {"FINETUNE_MODE": "lora", "lora_parts": "att,ffn,time,ln", "EMB_FINETUNE": "1"},
    "dora": {"FINETUNE_MODE": "lora", "use_dora": "1"},
    "pissa": {"pissa_r": "4", "svd_niter": "2"},
    "miss": {"disha_r": "4"},
    "bat": {"disha_r": "4"},
    "peft": {"PEFT_CONFIG": "loha.json"},
    "state": {"LR_INIT": "1", "EPOCH_STEPS": "20"},
    "state shifts": {"FINETUNE_MODE": "state", "state_shifts": "1", "LR_INIT": "1", "EPOCH_STEPS": "20"},
    "none": {"lora_parts": "time,ln", "EPOCH_STEPS": "12"},
    "lisa": {"lisa_r": "1", "lisa_k": "3"},
    "full": {},
}
FILES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # the base's number format; all is computed in fp32
LOADER_NEEDS: dict[str, Settings] = {
    "bucket": {"MICRO_BSZ": "auto"},
    "pack": {"MICRO_BSZ": "3"},
    "get": {"MICRO_BSZ": "3"},
}
BASE_NEEDS: dict[str, Settings] = {
    "4bit": {"QUANT_PARTS": "att,ffn,emb,head"}
}  # nf4 by its other name, of all it can be
MASK_NEEDS: dict[str, Settings] = {"se": {"MASK_START": "(", "MASK_END": ")"}}


def methods() -> dict[str, Settings]:
    variants = (*METHODS, *(name for name in METHOD_NEEDS if name not in METHODS))
    return {name: {"FINETUNE_MODE": name} | METHOD_NEEDS.get(name, {}) for name in variants}


def loaders() -> dict[str, Settings]:
    return {
        mode if pack == words("PACK")[0] else f"{mode} {pack}": {"DATALOAD": mode, "PACK": pack}
        | LOADER_NEEDS.get(mode, {})
        for mode, pack in itertools.product(words("DATALOAD"), words("PACK"))
    }


def train_types() -> dict[str, Settings]:
    return {
        f"{kind} {grad}" if kind == "infctx" else kind: {"TRAIN_TYPE": kind, "INFCTX_GRAD": grad}
        for kind, grad in itertools.product(words("TRAIN_TYPE"), words("INFCTX_GRAD"))
        if kind == "infctx" or grad == words("INFCTX_GRAD")[0]
    }


AXES: dict[str, dict[str, Settings]] = {
    "version": {NUMBERS[v]: {"MODEL_VERSION": NUMBERS[v]} for v in ARCHS},
    "file": {kind: {} for kind in FILES},
    "method": methods(),
    "loader": loaders(),
    "mask": {mask: {"LOSS_MASK": mask} | MASK_NEEDS.get(mask, {}) for mask in words("LOSS_MASK")},
    "train type": train_types(),
    "base": {("as it is" if q == "none" else q): {"QUANT": q} | BASE_NEEDS.get(q, {}) for q in words("QUANT")},
}
NAMES = tuple(AXES)
PLAIN: Settings = FAST | {
    "DATA_PATH": "rows", "CTX_LEN": "40", "CHUNK_CTX": "48", "MICRO_BSZ": "6", "SEED": "1", "GRAD_CLIP": "1.0",
    "LR_INIT": "4e-2", "LR_FINAL": "0", "EPOCH_COUNT": "1", "EPOCH_STEPS": "8", "NUM_WORKERS": "0",
}  # fmt: skip
MORE = 2  # steps of a resumed run


@functools.cache
def script_values(name: str) -> Mapping[str, str]:
    return types.MappingProxyType(shell_values(ROOT / name))


def settings_of(cell: Cell) -> Settings:
    result = dict(PLAIN)
    for axis, value in zip(NAMES, cell, strict=True):
        result |= AXES[axis][value]
    return result | {"MODEL_PATH": file_name(*cell[:2])}


def file_name(version: str, kind: str) -> str:
    """The base of these two values."""
    return f"{version}-{kind}.pth"


def cells() -> Iterator[Cell]:
    return itertools.product(*AXES.values())


@functools.cache
def value_of(variable: str, text: str):
    field = FIELDS[variable]
    return parse_value(text, HINTS[field.name], field.metadata)


def refusals(cell: Cell) -> list[SettingError]:
    """What the settings say against a cell; [] if they accept it. As Script.read finds it, but every text is read once."""
    given = script_values("training.sh") | settings_of(cell)
    values = {FIELDS[name].name: value_of(name, given[name]) for name in FIELDS}
    return TrainConfig.problems(types.SimpleNamespace(**values))


def read(settings: Settings) -> TrainConfig:
    return Script(ROOT / "training.sh", script_values("training.sh") | settings).read(TrainConfig)


@functools.cache
def answers() -> Mapping[Cell, list[SettingError]]:
    """The refusals of every cell."""
    return {cell: refusals(cell) for cell in cells()}


@functools.cache
def accepted() -> tuple[Cell, ...]:
    return tuple(cell for cell, problems in answers().items() if not problems)


# ------------------------------------------------------------------------------------------------ which cells run


def by_turns() -> list[Cell]:
    """One of the accepted cells that are the same in all but the file, which changes with every step along any axis."""
    at = NAMES.index("file")
    alike: dict[Cell, list[Cell]] = {}
    for cell in accepted():
        alike.setdefault(cell[:at] + cell[at + 1 :], []).append(cell)
    places = [{value: number for number, value in enumerate(values)} for values in AXES.values()]
    return [
        same[sum(place[value] for place, value in zip(places, same[0], strict=True)) % len(same)]
        for same in alike.values()
    ]


def groups_of(cell: Cell, size: int) -> Iterator[tuple]:
    """The choices of `size` values in a cell: (axis, value) of each."""
    return itertools.combinations(enumerate(cell), size)


@functools.cache
def covering(size: int, most: int = 10**9) -> list[Cell]:
    """Accepted cells in which every choice of `size` values of different axes occurs that occurs in any (at most `most`
    cells). Greedy: always a cell that has a choice still missing, made as full of missing ones as a few hundred tries from
    a fixed seed find. The same every time."""
    possible = accepted()
    by_choice: dict[tuple, list[Cell]] = {}
    for cell in possible:
        for choice in groups_of(cell, size):
            by_choice.setdefault(choice, []).append(cell)
    missing, chosen, rng = dict.fromkeys(by_choice), [], random.Random(0)
    while missing and len(chosen) < most:
        having = by_choice[next(iter(missing))]
        tries = having if len(having) <= 200 else rng.sample(having, 200)
        best = max(tries, key=lambda cell: sum(choice in missing for choice in groups_of(cell, size)))
        chosen.append(best)
        for choice in groups_of(best, size):
            missing.pop(choice, None)
    return chosen


# ------------------------------------------------------------------------------------------------ the tiny world

PROMPTS = ((1, 2, 3), (1, 2), (1, 2, 3, 4), (1,), (1, 2, 3, 4, 5), (1, 2))
OPEN, CLOSE, ANSWER = ord("(") + 1, ord(")") + 1, (50, 51, 52)  # ids of the World vocabulary are its bytes + 1


def write_rows(prefix: Path) -> None:
    """Six rows of two turns each, all with ids below 64: a prompt, "(", an answer, ")"."""
    with Writer(prefix, {"": np.uint16, ".roles": np.uint8}) as writer:
        for prompt in PROMPTS:
            ids, roles = [], []
            for turn in (prompt, prompt[:1]):
                ids += [*turn, OPEN, *ANSWER, CLOSE]
                roles += [Role.USER] * len(turn) + [Role.HEADING] + [Role.ASSISTANT] * (len(ANSWER) + 1)
            writer.add({"": np.array([*ids, 0]), ".roles": np.array([*roles, Role.ASSISTANT])})
        writer.commit()


@contextlib.contextmanager
def world(root: Path) -> Iterator[Path]:
    """A project with tiny bases of every version and the rows; the kit works there, in silence, until this ends."""
    for folder in ("data", "model", "output", "merge"):
        (root / folder).mkdir(parents=True)
    for version, (kind, dtype) in itertools.product(ARCHS, FILES.items()):
        file = root / "model" / file_name(NUMBERS[version], kind)
        tiny.save_model(file, shape=tiny.geometry(2, 32, 64, 16, version), dtype=dtype)
    (root / "loha.json").write_text(json.dumps(LOHA))
    write_rows(root / "data" / "rows")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(paths, "ROOT", root))
        stack.enter_context(mock.patch.object(paths, "OUTPUT", root / "output"))
        stack.enter_context(mock.patch("os.fsync", lambda file: None))  # what a power cut leaves is asked elsewhere
        stack.enter_context(
            mock.patch.object(checkpoint, "draw_loss", lambda folder: None)
        )  # takes longer than the run
        yield root


class Seen(module.TrainingModule):
    """The run's module, which also keeps what it began with and what it was given."""

    newest: Seen | None = None

    def __init__(self, model: RWKV, *arguments, **named):
        super().__init__(model, *arguments, **named)
        Seen.newest = self
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.first_logits = logits(model)
        self.batches: list = []

    def training_step(self, batch, index):
        self.batches.append(batch)
        return super().training_step(batch, index)


@dataclasses.dataclass(frozen=True)
class Run:
    """A training that has ended. losses: of its steps."""

    folder: Path
    config: TrainConfig
    seen: Seen
    losses: list[float]
    cell: Cell = ()

    @property
    def model(self) -> RWKV:
        return self.seen.model

    @property
    def checkpoint(self) -> Path:
        return run_dir.checkpoint_file(self.folder)

    @functools.cached_property
    def setup(self) -> inject.AdapterConfig:
        c = self.config
        return inject.AdapterConfig(c.method, options_of(c), c.parts, 0.0, c.quantised, c.quantised_parts, c.quant_kept)

    @functools.cached_property
    def base(self) -> Mapping[str, Tensor]:
        """The base's tensors; float32, as the run computes, whatever the file has."""
        stored = pth.load(paths.resolve_model(self.config.model_path))
        return {name: tensor.float() for name, tensor in stored.items()}

    @functools.cached_property
    def start(self) -> dict[str, Tensor]:
        """What adapters began with."""
        file = run_dir.init_file(self.folder, self.config.method)
        return pth.load(file) if file.is_file() else {}


def run(name: str, settings: Settings) -> Run:
    config = read(settings | {"RUN_NAME": name})
    with (
        mock.patch.object(model_setup, "TrainingModule", Seen),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        train.command(config, [])
    folder = paths.OUTPUT / name
    records = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    seen, Seen.newest = Seen.newest, None
    return Run(folder, config, seen, [r["loss"] for r in records if r["loss"] is not None])


PROBE = torch.tensor([[*range(1, 21)], [*range(40, 60)]])


@torch.no_grad()
def logits(model: RWKV) -> Tensor:
    was, _ = model.training, model.eval()
    out, _ = model(PROBE)
    model.train(was)
    return out


def model_of(tensors: Mapping[str, Tensor]) -> RWKV:
    geometry = arch.detect({name: tuple(t.shape) for name, t in tensors.items()}, "the matrix")
    return build(geometry, tensors, dispatch.choose("torch", geometry.version))


# ------------------------------------------------------------------------------------------------ the laws


def frozen_weight(run: Run, layer: str, weight: Tensor) -> Tensor:
    """What the run's frozen layer holds of a weight of the base, by definition: without what its adapter takes out, and as
    the codes of its compressed form say it."""
    start, setup = run.start, run.setup
    if setup.method == "pissa" and f"{layer}.init_lora_A" in start:
        weight = weight - start[f"{layer}.init_lora_B"] @ start[f"{layer}.init_lora_A"]
    if layer in setup.compressed(run.model.geometry):
        weight = quantise(weight, setup.quant).dense(torch.float32)
    return weight


def base_in_memory(run: Run) -> dict[str, Tensor]:
    """The base's tensors as the run had them before its first step, by definition."""
    result, start = {}, run.start
    for name, tensor in run.base.items():
        layer = name.removesuffix(".weight")
        result[name] = frozen_weight(run, layer, tensor)
        if f"{layer}.init_lora_A" in start:
            result[name] = result[name] + start[f"{layer}.init_lora_B"] @ start[f"{layer}.init_lora_A"]
    return result


def distance(ours: Tensor, theirs: Tensor, run: Run) -> float:
    """Relative to the second. Where weights were rounded to the file's format, that of nine tenths of the tokens: a head whose
    output is next to nothing may change its sign by rounding, and its norm makes that large."""
    if run.cell[NAMES.index("file")] == "fp32":
        return float((ours - theirs).norm() / theirs.norm())
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).flatten().quantile(0.9))


@torch.no_grad()
def first_step(run: Run) -> float:
    """Relative difference between the first loss and that of the base (compressed as it is in memory) on the same batch,
    which goes through the base in one piece whatever the train type."""
    batch, base = run.seen.batches[0], model_of(base_in_memory(run))
    out, _ = base(batch.ids, cu_seqlens=batch.cu_seqlens)
    result = F.cross_entropy(out[0, batch.positions], batch.targets, reduction="sum") / batch.step_targets
    return abs(run.losses[0] - float(result)) / float(result)


def learning(run: Run) -> float:
    """The loss of the last steps, as a share of the first."""
    return float(np.mean(run.losses[-3:])) / run.losses[0]


def frozen(run: Run) -> float:
    """How many of the base's tensors that are not trained are not what they were, to the last bit."""
    model, wrong, base = run.model, 0, run.base
    trained, untouched = set(inject.trainable_params(model)), 0
    if run.config.method == "lisa":  # blocks come and go
        trained |= {f"{layer}.weight" for layer in arch.linear_layers(model.geometry, run.config.parts)}
    for name, tensor in base.items():
        if name in trained:
            continue
        owner, _, leaf = name.rpartition(".")
        holder = model.get_submodule(owner)
        if isinstance(holder, Adapter):
            holder = holder.linear
        tensor = frozen_weight(run, name.removesuffix(".weight"), tensor)
        compressed = isinstance(holder, (QuantLinear, QuantEmbedding))
        if compressed != (owner in run.setup.compressed(model.geometry)):
            wrong += 1
            continue
        wrong += not torch.equal(holder.dense() if compressed else getattr(holder, leaf), tensor)
        untouched += 1
    assert untouched or run.config.method == "full", "nothing is frozen: this law would say nothing"
    return wrong


def untrained(run: Run) -> float:
    """How many trained tensors are still what they began as, to the last bit."""
    now = dict(run.model.named_parameters())
    if run.config.method == "lisa":
        return float(not any(not torch.equal(now[n], b) for n, b in run.seen.before.items()))
    return sum(torch.equal(now[n], b) for n, b in run.seen.before.items() if now[n].requires_grad)


def merged_by_command(run: Run, kind: str) -> RWKV:
    """The model that merge.sh makes of the newest checkpoint."""
    values = script_values("merge.sh") | {"RUN": run.folder.name, "MERGE_BASE": kind}
    folder = paths.ROOT / "merge"
    shutil.rmtree(folder)
    folder.mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        merge_command(Script(ROOT / "merge.sh", values).read(MergeConfig), [])
    (file,) = folder.glob("*.pth")
    assert pth.read_header(file).keys() >= run.base.keys()
    return model_of(pth.load(file))


def attached(run: Run) -> RWKV:
    """What chat.sh talks to: the base as its file has it, with the checkpoint on it."""
    saved = pth.load(run.checkpoint)
    if METHODS[run.config.method].saves_model:
        return model_of(saved)
    model = model_of(pth.load(paths.resolve_model(run.config.model_path)))
    sidecar = sidecars.read_sidecar(run.checkpoint, ("method",))
    setup = inject.setup_of(sidecar, "the matrix")
    inject.attach_checkpoint(model, saved, setup, "the matrix", None, run.start or None)
    return model


def merged(run: Run) -> float:
    """merge.sh's model against base + checkpoint."""
    return distance(logits(merged_by_command(run, "original")), logits(attached(run)), run)


def attached_as_trained(run: Run) -> float | None:
    """Base + checkpoint against the model that was trained, where both have the same base."""
    return None if run.config.quant != "none" else distance(logits(attached(run)), logits(run.model), run)


def merged_compressed(run: Run) -> float | None:
    """merge.sh's model for MERGE_BASE=quantised against the model that was trained."""
    return (
        None
        if run.config.quant == "none"
        else distance(logits(merged_by_command(run, "quantised")), logits(run.model), run)
    )


def resumes(first: Run) -> float | None:
    """Loaded against left in memory: how many tensors differ, to the last bit, in a run that resumes from the
    checkpoint, before its first step and after MORE steps with a fresh optimizer; and whether its first logits do."""
    method = METHODS[first.config.method]
    if method.saves_model and first.cell[NAMES.index("file")] != "fp32":
        return None  # a whole model is saved in the base's format: the finer numbers of memory are gone
    where = {method.load or "MODEL_PATH": str(first.checkpoint)}
    settings = settings_of(first.cell) | where | {"EPOCH_STEPS": str(MORE)}
    # with the same seed adapters would begin with the same numbers, whether they were loaded or not
    second = run(f"{first.folder.name}-on", settings | {"SEED": "7"})
    model, now = first.model, dict(first.model.named_parameters())
    wrong = [name for name, tensor in second.seen.before.items() if not torch.equal(now[name].detach(), tensor)]
    # sums over another layout in memory are rounded otherwise
    wrong += [f"{n} (layout)" for n, tensor in second.seen.before.items() if now[n].stride() != tensor.stride()]
    wrong += [] if now.keys() == second.seen.before.keys() else ["the names"]
    wrong += [] if torch.equal(logits(model), second.seen.first_logits) else ["the logits"]
    if first.config.method != "lisa":  # its blocks are drawn again
        train_on(first, second)
        after = dict(second.model.named_parameters())
        wrong += [f"{name} later" for name in now if not torch.equal(now[name], after[name])]
    if wrong:  # pytest shows it where the law fails
        print(f"resumes: {len(wrong)} differ, like {', '.join(wrong[:4])}")
    return len(wrong)


def train_on(first: Run, second: Run) -> None:
    """The second run's steps, on the first run's model as it is in memory."""
    model, config = first.model, second.config
    scale = functools.partial(arch.lr_scale, model.geometry)
    trained = inject.trainable_params(model)
    optimizer = make_optimizer(
        config.optim,
        parameter_groups(trained.items(), config.weight_decay, arch.decays, scale, config.loraplus_lr_ratio),
        config.beta1, config.beta2, config.adam_eps,
    )  # fmt: skip
    scales = [group["lr"] for group in optimizer.param_groups]
    model.train()
    for step, batch in enumerate(second.seen.batches):
        for group, factor in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = factor * second.seen.rate_of(step)
        optimizer.zero_grad()
        (first.seen.summed_loss(batch) / batch.step_targets).backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], config.grad_clip)
        optimizer.step()


# law -> what is measured, and how much it may be. goes_on trains the model on, so it comes last
ROUNDING = 5e-5  # of logits; seen: 5e-6
ROUNDING_OF = {"bf16": 0.1}  # where what is compared was rounded to the file's format; seen: 0.03
LAWS: dict[str, tuple[Callable[[Run], float | None], float]] = {
    "first step": (first_step, 2e-6),
    "learning": (learning, 0.5),
    "frozen": (frozen, 0),
    "untrained": (untrained, 0),
    "attached": (attached_as_trained, ROUNDING),
    "merged": (merged, ROUNDING),
    "merged compressed": (merged_compressed, ROUNDING),
    "resumes": (resumes, 0),
}
# (law, method) -> more than that
ALLOWED = {
    # what a text begins with is soon forgotten by a random base, so it can say little about the end of a text
    ("learning", "state"): 0.75,
    ("learning", "state shifts"): 0.75,
    # the shift of the last block's ffn is read by a text's first token alone, behind which no answer comes
    ("untrained", "state shifts"): 1,
}


def asked(cell: Cell, laws: Sequence[str] = tuple(LAWS)) -> dict[str, float]:
    """Run a cell and ask it laws: what each measured. A law that has nothing to say about a cell is left out."""
    first = dataclasses.replace(run("cell", settings_of(cell)), cell=cell)
    try:
        result = {law: LAWS[law][0](first) for law in laws}
        return {law: value for law, value in result.items() if value is not None}
    finally:
        for folder in paths.OUTPUT.glob("cell*"):
            shutil.rmtree(folder)


def most(law: str, cell: Cell) -> float:
    """How much a law allows in a cell."""
    limit = ALLOWED.get((law, cell[NAMES.index("method")]), LAWS[law][1])
    return ROUNDING_OF.get(cell[NAMES.index("file")], limit) if limit == ROUNDING else limit


def broken(cell: Cell, result: Mapping[str, float]) -> dict[str, float]:
    """The laws that do not hold in it, with what they measured."""
    return {law: value for law, value in result.items() if not value <= most(law, cell)}


# ------------------------------------------------------------------------------------------------ docs/matrix.md


def sentence(problem: SettingError) -> str:
    return f"`{problem.name}` {problem.message}"


def alone(axis: str) -> dict[str, str]:
    """Values of an axis that no accepted cell has, with the sentence that refuses them."""
    at = NAMES.index(axis)
    living = {cell[at] for cell in accepted()}
    return {value: sentence(refusals(with_values({at: value}))[0]) for value in AXES[axis] if value not in living}


def with_values(values: Mapping[int, str]) -> Cell:
    """The cell of each axis's first value but for these."""
    return tuple(values.get(at, next(iter(AXES[axis]))) for at, axis in enumerate(NAMES))


def refused_pairs(first: str, second: str) -> dict[tuple[str, str], str]:
    """Pairs of values, each accepted with others, that no accepted cell has, with the sentence that refuses them."""
    i, j = NAMES.index(first), NAMES.index(second)
    living = {(cell[i], cell[j]) for cell in accepted()}
    mine, theirs = ([value for value in AXES[axis] if value not in alone(axis)] for axis in (first, second))
    return {
        (a, b): sentence(refusals(with_values({i: a, j: b}))[0])
        for a, b in itertools.product(mine, theirs)
        if (a, b) not in living
    }


def docs() -> str:
    """docs/matrix.md."""
    total, living = len(answers()), len(accepted())
    lines = [
        "# What goes with what", "",
        "Made by `python tests/matrix.py --docs` from the tables of the code; `tests/kit/test_matrix.py` checks that it is up to",
        "date. A cell is a value of every axis below. "
        f"Of {total:,} cells, `training.sh` accepts {living:,} and refuses the others",
        "before anything is loaded, each with the sentence given here.", "",
        "## The axes", "", "| axis | value | in `training.sh` |", "|---|---|---|",
    ]  # fmt: skip
    for axis, values in AXES.items():
        for value, settings in values.items():
            shown = " ".join(f"{name}={text}" for name, text in settings.items())
            lines.append(f"| {axis} | {value} | {f'`{shown}`' if shown else 'the number format of the base'} |")
    lines += ["", "(Ranks, rates and markers are those that the tests take.)", "", "## What is refused", ""]
    for axis in NAMES:
        lines += [f"- {axis} **{value}**, with everything: {why}." for value, why in alone(axis).items()]
    clean = []
    for first, second in itertools.combinations(NAMES, 2):
        refused = refused_pairs(first, second)
        if not refused:
            clean.append(f"{first} and {second}")
            continue
        columns = [value for value in AXES[second] if value not in alone(second)]
        reasons = list(dict.fromkeys(refused.values()))
        lines += [
            "",
            f"{first.capitalize()} and {second}:",
            "",
            f"| | {' | '.join(columns)} |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for a in AXES[first]:
            if a not in alone(first):
                marks = [str(reasons.index(refused[a, b]) + 1) if (a, b) in refused else "✓" for b in columns]
                lines.append(f"| {a} | {' | '.join(marks)} |")
        lines += ["", *(f"{number}. {why}." for number, why in enumerate(reasons, 1))]
    lines += [
        "", "Every value goes with every value of the other axis here:", "", *(f"- {pair}" for pair in clean), "",
        "A cell whose pairs of values are all accepted is accepted itself: no three of them get into each other's way.", "",
        "## What holds in every accepted cell", "",
        "A run of a tiny model through the real commands is asked:", "", "| law | what is measured | at most |", "|---|---|---|",
    ]  # fmt: skip
    for law, (measure, limit) in LAWS.items():
        said = " ".join((measure.__doc__ or "").split())
        more = "".join(f"; {kind} {value:g}" for kind, value in ROUNDING_OF.items() if limit == ROUNDING)
        more += "".join(f"; {method} {value:g}" for (name, method), value in ALLOWED.items() if name == law)
        lines.append(f"| {law} | {said} | {limit:g}{more} |")
    lines += [
        "", f"`./test.sh` asks {len(covering(1))} cells, in which every value occurs; `.ci/run` asks {len(covering(2))} in which "
        "every pair", "does that is accepted at all, and with `EVERYTHING=1` those "
        f"{len(covering(3))} in which every three do (without it, a",
        f"part of them). `python tests/matrix.py --turns` asks {len(by_turns()):,}, which is every accepted cell of all axes but "
        "the file's, the", "file's number formats taking turns; it did so last on 2026-11-23, in ten parts: six cells failed,",
        "were fixed and run again. `--all` asks every cell.", "",
    ]  # fmt: skip
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ the command


def try_cells(chosen: Sequence[Cell]) -> int:
    """Run cells, print a line for each and a summary; how many failed."""
    failed, seconds, worst = 0, time.process_time(), {}
    with tempfile.TemporaryDirectory() as folder, world(Path(folder) / "a project"):
        gc.disable()  # a seventh of the time goes into looking for what a cell leaves behind
        for number, cell in enumerate(chosen):
            if number % 20 == 0:
                gc.collect()
            began = time.process_time()
            try:
                result = asked(cell)
                wrong = broken(cell, result)
                line = " ".join(f"{law}={value:.1e}" for law, value in result.items())
            except (Exception, SystemExit) as error:
                wrong, result = {"ran": 1}, {}
                line = f"{type(error).__name__}: {error}\n{''.join(traceback.format_tb(error.__traceback__)[-3:])}"
            for law, value in result.items():
                worst[law] = max(worst.get(law, (-1, ())), (value, cell))
            failed += bool(wrong)
            mark = "FAILED " + ",".join(wrong) if wrong else "ok"
            print(f"{time.process_time() - began:5.2f} s  {mark}  {' | '.join(cell)}  {line}", flush=True)
    print(f"{len(chosen)} cells, {failed} failed, {time.process_time() - seconds:.0f} s")
    for law, (value, cell) in worst.items():
        print(f"  largest {law}: {value:.2e} in {' | '.join(cell)}")
    return failed


def main(words: list[str]) -> int:
    torch.set_num_threads(1)
    if words == ["--docs"]:
        DOCS.write_text(docs(), encoding="utf-8")
        return 0
    if words[:1] in (["--all"], ["--turns"]) and words[1:2] in ([], ["--shard"]):
        number, parts = map(int, words[2].split("/")) if words[1:] else (1, 1)
        return try_cells((accepted() if words[0] == "--all" else by_turns())[number - 1 :: parts]) > 0
    if words[:1] == ["--some"] and len(words) in (2, 3):
        return try_cells(random.Random(int((words[2:] or ["0"])[0])).sample(accepted(), int(words[1]))) > 0
    if words[:1] in (["--pairs"], ["--triples"]):
        return try_cells(covering(2 if words[0] == "--pairs" else 3)) > 0
    if len(words) == len(NAMES) and all(word in AXES[axis] for word, axis in zip(words, NAMES, strict=True)):
        for problem in refusals(tuple(words)):
            print(f"refused: {problem.name} {problem.message}")
        return 2 if refusals(tuple(words)) else try_cells([tuple(words)]) > 0
    print(__doc__)
    for axis, values in AXES.items():
        print(f"{axis}: {', '.join(values)}")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
