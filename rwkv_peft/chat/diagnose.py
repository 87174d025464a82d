"""./chat.sh --diagnose RUN: rows that it has learnt from, and held-out ones, go through the base and what became of it."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from rwkv_peft.adapters.specs import METHODS
from rwkv_peft.checkpoint import run_dir, sidecars, step_log
from rwkv_peft.checkpoint.prompt_format import Prompting, of_sidecar
from rwkv_peft.common import hashing, json_reader
from rwkv_peft.common import paths as project
from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.common.json_reader import Schema, is_bool, is_none_or, is_number, is_text, is_whole
from rwkv_peft.data.dataset import TokenDataset
from rwkv_peft.data.tokenized_files import data_files, mask_of, missing_data, open_sources
from rwkv_peft.model.generate import advance, generate
from rwkv_peft.model.rwkv import RWKV
from rwkv_peft.text import tokenizer
from rwkv_peft.text.roles import Role
from rwkv_peft.train.callbacks import validation
from rwkv_peft.train.report import MOST_RATE, MOST_STATE_RATE

from . import load
from .verdict import BLANK, Rows, Run, judge

MOST_ROWS, MOST_TOKENS, LEAST_ROWS = 64, 8192, 8  # of a file that go through the models
QUESTIONS = 3  # of the rows that were trained, and of the held-out ones
ANSWER = 48  # tokens
# of run.json
# what is needed of run.json, and what it may be
WANTED: Schema = {
    **dict.fromkeys(("DATA_PATH", "VAL_DATA", "LOSS_MASK", "MASK_START", "MASK_END", "OVERLONG", "DATALOAD"), is_text),
    **dict.fromkeys(("CTX_LEN", "EPOCH_COUNT", "EPOCH_STEPS", "MINI_BSZ"), lambda value: is_whole(value, 1)),
    "STREAMING": is_bool, "PACK": is_text, "LR_INIT": is_number, "VAL_PATIENCE": is_whole,
}  # fmt: skip
# of a line of loss.jsonl
RECORD: Schema = {"step": is_whole, "loss": is_none_or(is_number), "targets": is_whole}
SHOWN = 160  # characters of a text
WIDTH = 125  # of the lines of a verdict
MOST_READ = 1 << 30  # bytes of a file that is compared with what it was
TARGETS = 256  # whose logits are in memory at once


@dataclass(frozen=True)
class Row:
    """A document as the run has it. file, number: where it lies. tokens int64 [n]; weights [n - 1]: which targets are trained.
    asked: how many of its first tokens are the question; expected: those of the answer to it."""

    file: str
    number: int
    tokens: np.ndarray
    weights: np.ndarray
    asked: int
    expected: np.ndarray


def diagnose(name: str, base: str, precision: str, accept_edited: bool = False) -> None:
    """name: of a run, or of one of its checkpoints. base: where the base lies, "" for where the sidecar says."""
    folder = project.resolve_path(name, "output")
    if (
        not run_dir.is_epoch(name)
        and (folder / "run.json").is_file()
        and not run_dir.checkpoints(folder)
        and not any(run_dir.list_checkpoints(folder))
    ):
        return of_its_course(folder.resolve(), "has saved no checkpoint")
    adapter = load.adapter_file(name)
    chosen = load.of_run(adapter, base, accept_edited)
    sidecars.read(adapter, ("step",))
    settings, records, looks = facts_of(adapter.parent)
    if settings["STREAMING"] and settings["VAL_DATA"] in ("auto", "none"):
        return of_its_course(adapter.parent, "has learnt from a stream, and has no held-out rows")
    original = chosen.model if chosen.adapter else load.base_of(adapter, chosen.sidecar, base)
    model = load.built(original, precision)
    files, lines, targets = rows_of(settings, model.geometry.vocab_size)
    told = [r for r in records if r["step"] <= chosen.sidecar["step"]]
    changed = changed_files(settings, chosen.sidecar)
    all_seen = sum(r["targets"] for r in told) >= targets and not changed
    if changed:
        words = "not what the run learnt from (make_tokenize.sh has written it anew)"
        rows = "rows that stand below as trained may be new to it, and held-out ones may not be"
        lines.append(f"warning   {', '.join(changed)}: {words}; {rows}")
    elif files[0] and not all_seen:
        lines.append(
            "warning   it had not gone through all its rows by then: some of those below as trained are new to it"
        )
    trained, held = [[row for rows in by_file.values() for row in rows] for by_file in files]
    asked_as = of_sidecar(chosen.sidecar, project.display_path(adapter), original)
    print(
        f"{project.display_path(adapter)} ({METHODS[chosen.setup.method].words}) beside its base "
        f"{project.display_path(original)}"
    )
    for line in lines:
        print(line, flush=True)

    asked = {"trained": ask(trained), "held-out": ask(held)}
    everything = trained + held
    found: list[tuple[list[float], list[str]]] = []
    for which in ("base", "tuned"):
        if which == "tuned":
            if chosen.adapter:
                model = load.built(original, precision)
                load.put_on(model, chosen)
            else:
                model = load.built(chosen.model, precision)
        model = load.ready(model)
        bar = tqdm(everything, desc=which, disable=not sys.stderr.isatty(), leave=False, unit="row")
        losses = [loss_of(model, row) for row in bar]
        answers = [answer(model, row, asked_as) for rows in asked.values() for row in rows]
        found.append((losses, answers))
    (before, said_before), (after, said_after) = found

    sums = Rows(np.array([row.weights.sum() for row in everything]), np.array(before), np.array(after))
    places = {id(row): i for i, row in enumerate(everything)}

    def measured(rows: Sequence[Row]) -> Rows | None:
        return sums.part(np.array([places[id(row)] for row in rows])) if rows else None

    print("\n" + "\n".join(table(files, measured, trained, held)))
    number = 0
    for what, rows in asked.items():
        for row in rows:
            print(f"\n{what} row {row.number} of {row.file}")
            texts = {
                "asked": text_of(row.tokens[: row.asked]), "expected": text_of(row.expected), "base": said_before[number],
                "tuned": said_after[number],
            }  # fmt: skip
            print("\n".join(f"  {label:<9} {shortened(text)}" for label, text in texts.items()))
            number += 1
    pairs = zip([row for rows in asked.values() for row in rows], said_after, strict=True)
    right = [same(said, row.expected) for row, said in pairs][: len(asked["trained"])]
    step = chosen.sidecar["step"]
    sources = [(file, measured(rows), measured(files[1].get(file, []))) for file, rows in files[0].items()]
    run = Run(
        measured(trained),
        measured(held),
        sources if len(sources) > 1 else [],
        np.array([r["loss"] for r in told if r["loss"] is not None and not r.get("skipped")]),
        sum(bool(r.get("skipped")) for r in told),
        [(r["step"], r["loss"]) for r in looks if r["loss"] is not None and 0 < r["step"] <= step],
        settings["LR_INIT"],
        f"./merge.sh {run_dir.words_for(adapter.parent, 'best')}" if (adapter.parent / run_dir.BEST).is_file() else "",
        all_seen,
        *course(settings, records, looks, chosen.sidecar),
        (sum(right), len(right)),
        MOST_STATE_RATE if chosen.setup.method == "state" else MOST_RATE,
    )
    print()
    tell(run)


def of_its_course(folder: Path, why: str) -> None:
    """What can be told of a run without looking at rows. UserError where it has not taken a step."""
    settings, records, looks = facts_of(folder)
    if not records:
        raise UserError(f"{project.display_path(folder)}: has taken no step yet.")
    print(f"{project.display_path(folder)} {why}: this is what the course of its loss tells\n")
    losses = np.array([r["loss"] for r in records if r["loss"] is not None and not r.get("skipped")])
    seen = [(look["step"], look["loss"]) for look in looks if look["step"]]
    tell(Run(None, None, [], losses, sum(bool(r.get("skipped")) for r in records), seen, settings["LR_INIT"]))


def tell(run: Run) -> None:
    for finding in judge(run):
        filled = textwrap.fill(f"verdict   {finding.words}.", WIDTH, subsequent_indent=" " * 10, break_on_hyphens=False)
        print(filled.replace(BLANK, " "))


def changed_files(settings: dict, sidecar: dict) -> list[str]:
    """Which of a run's tokenized files have another content than when it learnt from them. Large ones are taken on trust: their
    index is there as well, and tells nearly every change."""
    known = [tuple(one) for one in sidecar.get("data") or ()]  # (several may have one name)
    names = {name for name, _ in known}
    if settings["STREAMING"]:
        return []
    paths = [
        Path(f"{prefix}{ending}") for prefix, _ in data_files(settings["DATA_PATH"])[0] for ending in (".bin", ".idx")
    ]
    there = [path for path in paths if path.name in names and path.is_file() and path.stat().st_size <= MOST_READ]
    return [project.display_path(path) for path in there if (path.name, hashing.sha256(path)) not in known]


def course(settings: dict, records: list[dict], looks: list[dict], sidecar: dict) -> tuple[int, bool]:
    """How many steps a run has still to do, and whether VAL_PATIENCE has ended it; of its newest checkpoint only."""
    done = records[-1]["step"] if records else 0
    if settings["STREAMING"] or sidecar["step"] < done:
        return 0, False
    planned = settings["EPOCH_COUNT"] * -(-settings["EPOCH_STEPS"] // settings["MINI_BSZ"])
    seen = [look for look in looks if look["loss"] is not None]
    ended = 0 < settings["VAL_PATIENCE"] <= validation.rounds_without_a_better(seen)
    return (0, ended) if ended else (max(0, planned - done), False)


def facts_of(folder: Path) -> tuple[dict[str, Any], list[dict], list[dict]]:
    """A run's settings, and the records of its steps and of its looks at held-out rows. UserError if it has no settings."""
    settings = json_reader.read(folder / "run.json", "record of a run's settings", WANTED, tuple(WANTED))
    looks = validation.read(folder)
    return settings, step_log.read(folder), validation.of_one_set(looks, looks[-1].get("data")) if looks else []


def rows_of(
    settings: dict, vocab_size: int
) -> tuple[tuple[dict[str, list[Row]], dict[str, list[Row]]], list[str], int]:
    """Rows by file: of those that were trained, and of the held-out ones, under the same name; what to say of them; and how many
    targets the former have, all together. UserError if there are none at all."""
    lines: list[str] = []
    trained: dict[str, list[Row]] = {}
    pairs, wrong = data_files(settings["DATA_PATH"]) if not settings["STREAMING"] else ([], [])
    if settings["STREAMING"]:
        lines.append("its rows were streamed: only held-out rows and the course of the loss can be looked at")
    lines += [f"warning   DATA_PATH: {words}" for words in wrong]
    targets = 0

    def put(by_file: dict[str, list[Row]], pair: tuple) -> int:
        try:
            found, whole = take(settings, pair, vocab_size, lines.append)
        except SettingErrors as problems:  # nothing that could be learnt from
            lines.append(f"warning   {project.display_path(pair[0])}: {problems.problems[0].message}")
            return 0
        by_file.setdefault(project.display_path(pair[0]).removesuffix(".valid"), []).extend(found)
        return whole

    for pair in there(pairs):
        targets += put(trained, pair)
    held: dict[str, list[Row]] = {}
    if settings["VAL_DATA"] in ("auto", "none"):
        others = [(prefix.with_name(f"{prefix.name}.valid"), weight) for prefix, weight in pairs]
    else:
        others, wrong = data_files(settings["VAL_DATA"])
        lines += [f"warning   VAL_DATA: {words}" for words in wrong]
    for pair in there(others):
        put(held, pair)
    if trained and not held:
        words = "what was learnt by heart cannot be told; VALID_PERCENT=5 in make_tokenize.sh sets some aside"
        lines.append(f"warning   there are no held-out rows: {words}")
    if not trained and not held:
        raise UserError("\n".join([*lines, "There is no row to look at: see DATA_PATH and VAL_DATA in training.sh."]))
    return (trained, held), lines, targets


def there(pairs: Sequence[tuple]) -> list[tuple]:
    return [pair for pair in pairs if not missing_data(pair[0])]


def take(settings: dict, pair: tuple, vocab_size: int, say: Callable[[str], None]) -> tuple[list[Row], int]:
    """Rows of a tokenized file, from all over it, as many as are quickly looked at; and the targets of all. Problems if none has
    anything to learn."""
    masks = settings["LOSS_MASK"], settings["MASK_START"], settings["MASK_END"]
    [source] = open_sources([pair], *masks, vocab_size, say)
    windows = settings["DATALOAD"] == "get" or settings["PACK"] == "concat"  # of which a long document has many
    overlong = "split" if windows else settings["OVERLONG"]
    data = TokenDataset([source], "only", mask_of(masks[0]), settings["CTX_LEN"], overlong, 0, False)
    mean = max(1, int(data.parts[0].items.length.mean()))
    count = min(data.rows, MOST_ROWS, max(LEAST_ROWS, MOST_TOKENS // mean))
    found, known = [], set()
    for number in np.linspace(0, data.rows - 1, count).round().astype(int).tolist():
        [piece], _, _ = data.parts_of(number)
        [(tokens, weights)] = data.row(number)
        if tokens.tobytes() in known:  # make_tokenize.sh repeats rows, if it is told to
            continue
        known.add(tokens.tobytes())
        asked, expected = 0, tokens[:0]
        roles = source.roles[piece.start : piece.stop] if source.roles is not None else np.zeros(0, dtype=np.uint8)
        answers = np.flatnonzero(roles == Role.ASSISTANT)
        if len(answers) and answers[0] > (tokens[0] == tokenizer.END_OF_DOC):  # a token 0 alone is no question
            asked = int(answers[0])
            others = np.flatnonzero(roles[asked:] != Role.ASSISTANT)
            expected = tokens[asked : asked + int(others[0]) if len(others) else len(roles)]
        found.append(Row(source.name, piece.document, tokens, weights, asked, expected))
    return found, data.facts().targets


def ask(rows: Sequence[Row]) -> list[Row]:
    """Those whose questions are asked: one of the beginning, one of the middle, one of the end."""
    asking = [row for row in rows if row.asked]
    places = np.linspace(0, len(asking) - 1, min(QUESTIONS, len(asking))).round().astype(int).tolist()
    return [asking[i] for i in places]


@torch.no_grad()
def loss_of(model: RWKV, row: Row) -> float:
    """The sum of the cross entropies of a row's trained targets."""
    device = model.ln_out.weight.device
    places = torch.from_numpy(np.flatnonzero(row.weights)).to(device)
    targets = torch.from_numpy(row.tokens[1:]).to(device)[places]
    x, _ = model.features(torch.from_numpy(row.tokens[None, :-1]).to(device), carry=False)
    total = 0.0
    for which, wanted in zip(places.split(TARGETS), targets.split(TARGETS), strict=True):
        logits = model.head(x[0, which]).float()
        total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
    return total


def answer(model: RWKV, row: Row, asked_as: Prompting) -> str:
    ids = row.tokens[: row.asked].tolist()
    try:
        stops = asked_as.template.stops(), asked_as.stop_tokens
        return "".join(generate(model, *advance(model, ids), ANSWER, 0.0, 1.0, 0, *stops))
    except UserError:  # of a model that has gone wrong, which the losses tell
        return "(no number)"


def text_of(tokens: np.ndarray) -> str:
    return tokenizer.decode(tokens[tokens != tokenizer.END_OF_DOC].tolist())


def same(said: str, expected: np.ndarray) -> bool:
    """Whether an answer is the expected one, as far as it may go: ANSWER tokens, and no half of a character."""
    wanted = text_of(expected[:ANSWER]).rstrip("\ufffd").strip()
    return bool(wanted) and said.rstrip("\ufffd").strip() == wanted


def shortened(text: str) -> str:
    text = " / ".join(line.strip() for line in text.strip().splitlines() if line.strip())
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"


def table(files, measured: Callable[[Sequence[Row]], Rows | None], trained, held) -> list[str]:
    """Loss per token before and after, of trained and of held-out rows; of each file, and of short and long ones."""
    lines = [f"{'loss per trained token':<44}{'rows':>6}{'base':>9}{'tuned':>9}{'gained':>9}{'+-':>8}"]

    def add(label: str, rows: Sequence[Row]) -> None:
        if rows:
            found = measured(rows)
            (before, after), (gain, error) = found.losses, found.gain
            chance = f"{error:.3f}" if np.isfinite(error) else "-"
            lines.append(f"{label:<44}{len(rows):>6}{before:>9.3f}{after:>9.3f}{gain:>9.3f}{chance:>8}")

    for what, by_file, rows in (("trained", files[0], trained), ("held-out", files[1], held)):
        add(f"{what} rows", rows)
        for name, some in by_file.items() if len(by_file) > 1 else ():
            add(f"  of {name}", some)
        if len(rows) >= 2 * LEAST_ROWS:
            ordered = sorted(rows, key=lambda row: len(row.tokens))
            half = len(ordered) // 2
            border = len(ordered[half].tokens)
            add(f"  the shorter half (below {border} tokens)", ordered[:half])
            add("  the longer half", ordered[half:])
    return lines
