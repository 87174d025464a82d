"""./chat.sh --diagnose RUN: compare the losses of the base model and the tuned model on trained and on held-out rows."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from rwkv_peft.adapters.specs import METHODS
from rwkv_peft.checkpoint import run_dir, sidecars, step_log
from rwkv_peft.checkpoint.prompt_format import PromptFormat, read_prompt_format
from rwkv_peft.common import hashing, json_reader, paths
from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.common.json_reader import Schema, is_bool, is_none_or, is_number, is_text, is_whole
from rwkv_peft.data.dataset import TokenDataset
from rwkv_peft.data.tokenized_files import data_files, effective_mask, missing_data, open_sources
from rwkv_peft.model.generate import advance, generate
from rwkv_peft.model.rwkv import RWKV
from rwkv_peft.text import tokenizer
from rwkv_peft.text.roles import Role
from rwkv_peft.train.callbacks import validation
from rwkv_peft.train.report import MAX_RATE, MAX_STATE_RATE

from . import load
from .verdict import BLANK, RowLosses, RunFacts, judge

MOST_ROWS, MOST_TOKENS, LEAST_ROWS = 64, 8192, 8  # of a file that are evaluated
QUESTIONS = 3  # of the rows that were trained, and of the held-out ones
ANSWER = 48  # tokens
# the settings that are needed of run.json, and their checks
WANTED: Schema = {
    **dict.fromkeys(("DATA_PATH", "VAL_DATA", "LOSS_MASK", "MASK_START", "MASK_END", "OVERLONG", "DATALOAD"), is_text),
    **dict.fromkeys(("CTX_LEN", "EPOCH_COUNT", "EPOCH_STEPS", "MINI_BSZ"), lambda value: is_whole(value, 1)),
    "STREAMING": is_bool, "PACK": is_text, "LR_INIT": is_number, "VAL_PATIENCE": is_whole,
}  # fmt: skip
# checks of a line of loss.jsonl
RECORD: Schema = {"step": is_whole, "loss": is_none_or(is_number), "targets": is_whole}
SHOWN = 160  # characters of a text
WIDTH = 125  # of the lines of a verdict
MOST_READ = 1 << 30  # bytes of a file whose content is compared
TARGETS = 256  # targets whose logits are in memory at once


@dataclass(frozen=True)
class Row:
    """A document as the run has it.

    Attributes:
        file: name of its file.
        number: of the row in it.
        tokens: int64 [n].
        weights: which targets are trained, [n - 1].
        asked: number of its first tokens that are the question.
        expected: tokens of the answer to it.
        losses: under the base and under the tuned model.
        answers: of the base and of the tuned model.
    """

    file: str
    number: int
    tokens: np.ndarray
    weights: np.ndarray
    asked: int
    expected: np.ndarray
    losses: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


def diagnose(name: str, base: str, precision: str, accept_edited: bool = False) -> None:
    """Diagnose a run and print what is found.

    Args:
        name: of a run, or of one of its checkpoints.
        base: path of the base, "" for the one in the sidecar.
        precision: PRECISION.
        accept_edited: accept a sidecar that was edited.

    Raises:
        UserError: the run cannot be diagnosed.
    """
    folder = paths.resolve_path(name, "output")
    if (
        not run_dir.is_epoch(name)
        and (folder / "run.json").is_file()
        and not run_dir.checkpoint_steps(folder)
        and not any(run_dir.list_checkpoints(folder))
    ):
        return diagnose_loss_curve(folder.resolve(), "has saved no checkpoint")
    adapter = load.find_adapter(name)
    chosen = load.choose_checkpoint(adapter, base, accept_edited)
    sidecars.read_sidecar(adapter, ("step",))
    settings, records, validations = read_run(adapter.parent)
    if settings["STREAMING"] and settings["VAL_DATA"] in ("auto", "none"):
        return diagnose_loss_curve(adapter.parent, "has learnt from a stream, and has no held-out rows")
    original = chosen.model if chosen.adapter else load.find_base(adapter, chosen.sidecar, base)
    model = load.build_model(original, precision)
    files, lines, targets = load_rows(settings, model.geometry.vocab_size)
    done = [r for r in records if r["step"] <= chosen.sidecar["step"]]
    changed = changed_files(settings, chosen.sidecar)
    all_seen = sum(r["targets"] for r in done) >= targets and not changed
    if changed:
        words = "not what the run learnt from (make_tokenize.sh has written it anew)"
        effect = "rows that stand below as trained may be new to it, and held-out ones may not be"
        lines.append(f"warning   {', '.join(changed)}: {words}; {effect}")
    elif files[0] and not all_seen:
        lines.append(
            "warning   it had not gone through all its rows by then: some of those below as trained are new to it"
        )
    trained, held_out = [[row for rows in by_file.values() for row in rows] for by_file in files]
    asked_as = read_prompt_format(chosen.sidecar, paths.display_path(adapter), original)
    print(
        f"{paths.display_path(adapter)} ({METHODS[chosen.setup.method].words}) beside its base {paths.display_path(original)}"
    )
    for line in lines:
        print(line, flush=True)

    asked = {"trained": pick_questions(trained), "held-out": pick_questions(held_out)}
    for which in ("base", "tuned"):
        if which == "tuned":
            model = load.build_model(chosen.model, precision)
            load.attach_adapter(model, chosen)
        model = load.prepare_model(model)
        for row in tqdm(trained + held_out, desc=which, disable=not sys.stderr.isatty(), leave=False, unit="row"):
            row.losses.append(row_loss(model, row))
        for rows in asked.values():
            for row in rows:
                row.answers.append(generate_answer(model, row, asked_as))

    print("\n" + "\n".join(loss_table(files, trained, held_out)))
    for what, rows in asked.items():
        for row in rows:
            print(f"\n{what} row {row.number} of {row.file}")
            texts = decode_text(row.tokens[: row.asked]), decode_text(row.expected), *row.answers
            for label, text in zip(("asked", "expected", "base", "tuned"), texts, strict=True):
                print(f"  {label:<9} {shorten(text)}")
    right = sum(is_expected(row.answers[1], row.expected) for row in asked["trained"])
    step = chosen.sidecar["step"]
    sources = [
        (name, own, measure(files[1].get(name, []))) for name, rows in files[0].items() if (own := measure(rows))
    ]
    run = RunFacts(
        measure(trained),
        measure(held_out),
        sources if len(sources) > 1 else [],
        *loss_curve(done),
        [(r["step"], r["loss"]) for r in validations if r["loss"] is not None and 0 < r["step"] <= step],
        settings["LR_INIT"],
        f"./merge.sh {run_dir.merge_arguments(adapter.parent, 'best')}"
        if (adapter.parent / run_dir.BEST).is_file()
        else "",
        all_seen,
        *remaining_steps(settings, records, validations, chosen.sidecar),
        (right, len(asked["trained"])),
        MAX_STATE_RATE if chosen.setup.method == "state" else MAX_RATE,
    )
    print()
    print_findings(run)


def diagnose_loss_curve(folder: Path, why: str) -> None:
    """Diagnose a run without its rows.

    Raises:
        UserError: it has not taken a step.
    """
    settings, records, validations = read_run(folder)
    if not records:
        raise UserError(f"{paths.display_path(folder)}: has taken no step yet.")
    print(f"{paths.display_path(folder)} {why}: this is what the course of its loss tells\n")
    seen = [(look["step"], look["loss"]) for look in validations if look["step"]]
    print_findings(RunFacts(None, None, [], *loss_curve(records), seen, settings["LR_INIT"]))


def loss_curve(records: list[dict]) -> tuple[np.ndarray, int]:
    """Return the losses of the steps, and how many steps were skipped."""
    losses = [record["loss"] for record in records if record["loss"] is not None and not record.get("skipped")]
    return np.array(losses), sum(bool(record.get("skipped")) for record in records)


def print_findings(run: RunFacts) -> None:
    """Print what the numbers of a run show."""
    for finding in judge(run):
        filled = textwrap.fill(f"verdict   {finding.words}.", WIDTH, subsequent_indent=" " * 10, break_on_hyphens=False)
        print(filled.replace(BLANK, " "))


def changed_files(settings: dict, sidecar: dict) -> list[str]:
    """Return a run's tokenized files whose content has changed since it was trained on them.

    Large files are not read: their index is checked as well, and shows nearly every change.
    """
    known = [tuple(one) for one in sidecar.get("data") or ()]  # several may have one name
    names = {name for name, _ in known}
    if settings["STREAMING"]:
        return []
    files = [
        Path(f"{prefix}{ending}") for prefix, _ in data_files(settings["DATA_PATH"])[0] for ending in (".bin", ".idx")
    ]
    present = [path for path in files if path.name in names and path.is_file() and path.stat().st_size <= MOST_READ]
    return [paths.display_path(path) for path in present if (path.name, hashing.sha256(path)) not in known]


def remaining_steps(settings: dict, records: list[dict], validations: list[dict], sidecar: dict) -> tuple[int, bool]:
    """Return how many steps a run still has to do, and whether VAL_PATIENCE has ended it.

    Only for its newest checkpoint: (0, False) for others.
    """
    done = records[-1]["step"] if records else 0
    if settings["STREAMING"] or sidecar["step"] < done:
        return 0, False
    planned = settings["EPOCH_COUNT"] * -(-settings["EPOCH_STEPS"] // settings["MINI_BSZ"])
    seen = [look for look in validations if look["loss"] is not None]
    ended = 0 < settings["VAL_PATIENCE"] <= validation.rounds_without_a_better(seen)
    return (0, ended) if ended else (max(0, planned - done), False)


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict], list[dict]]:
    """Read a run's settings, and the records of its steps and of its validations.

    Raises:
        UserError: it has no settings.
    """
    settings = json_reader.read_json(folder / "run.json", "record of a run's settings", WANTED, tuple(WANTED))
    validations = validation.read(folder)
    newest: Any = validations[-1].get("data") if validations else ""
    return settings, step_log.read_log(folder), validation.of_one_set(validations, newest)


def load_rows(
    settings: dict, vocab_size: int
) -> tuple[tuple[dict[str, list[Row]], dict[str, list[Row]]], list[str], int]:
    """Load trained rows and held-out rows of a run.

    Returns:
        Trained and held-out rows by file, under the same name; messages about them; and the loss tokens of all trained
            rows.

    Raises:
        UserError: there are no rows.
    """
    lines: list[str] = []
    trained: dict[str, list[Row]] = {}
    pairs, wrong = data_files(settings["DATA_PATH"]) if not settings["STREAMING"] else ([], [])
    if settings["STREAMING"]:
        lines.append("its rows were streamed: only held-out rows and the course of the loss can be looked at")
    lines += [f"warning   DATA_PATH: {words}" for words in wrong]
    targets = 0

    def put(by_file: dict[str, list[Row]], pair: tuple[Path, Fraction]) -> int:
        if missing_data(pair[0]):
            return 0
        try:
            rows, count = sample_rows(settings, pair, vocab_size, lines.append)
        except SettingErrors as problems:  # it has nothing to train
            lines.append(f"warning   {paths.display_path(pair[0])}: {problems.problems[0].message}")
            return 0
        by_file.setdefault(paths.display_path(pair[0]).removesuffix(".valid"), []).extend(rows)
        return count

    for pair in pairs:
        targets += put(trained, pair)
    held_out: dict[str, list[Row]] = {}
    if settings["VAL_DATA"] in ("auto", "none"):
        others = [(prefix.with_name(f"{prefix.name}.valid"), weight) for prefix, weight in pairs]
    else:
        others, wrong = data_files(settings["VAL_DATA"])
        lines += [f"warning   VAL_DATA: {words}" for words in wrong]
    for pair in others:
        put(held_out, pair)
    if trained and not held_out:
        words = "what was learnt by heart cannot be told; VALID_PERCENT=5 in make_tokenize.sh sets some aside"
        lines.append(f"warning   there are no held-out rows: {words}")
    if not trained and not held_out:
        raise UserError("\n".join([*lines, "There is no row to look at: see DATA_PATH and VAL_DATA in training.sh."]))
    return (trained, held_out), lines, targets


def sample_rows(
    settings: dict, pair: tuple[Path, Fraction], vocab_size: int, say: Callable[[str], None]
) -> tuple[list[Row], int]:
    """Sample rows from all over a tokenized file, as many as are quickly evaluated.

    Returns:
        The rows, and the loss tokens of the whole file.

    Raises:
        SettingErrors: it has nothing to train.
    """
    masks = settings["LOSS_MASK"], settings["MASK_START"], settings["MASK_END"]
    [source] = open_sources([pair], *masks, vocab_size, say)
    windows = settings["DATALOAD"] == "get" or settings["PACK"] == "concat"  # of which a long document has many
    overlong = "split" if windows else settings["OVERLONG"]
    data = TokenDataset([source], "only", effective_mask(masks[0]), settings["CTX_LEN"], overlong, 0, False)
    mean = max(1, int(data.parts[0].items.length.mean()))
    count = min(data.rows, MOST_ROWS, max(LEAST_ROWS, MOST_TOKENS // mean))
    rows, known = [], set()
    for number in np.linspace(0, data.rows - 1, count).round().astype(int).tolist():
        [piece], _, _ = data.parts_of(number)
        [(tokens, weights)] = data.row(number)
        if tokens.tobytes() in known:  # make_tokenize.sh can repeat rows
            continue
        known.add(tokens.tobytes())
        asked, expected = 0, tokens[:0]
        roles = source.roles[piece.start : piece.stop]
        answers = np.flatnonzero(roles == Role.ASSISTANT)
        if len(answers) and answers[0] > (tokens[0] == tokenizer.END_OF_DOC):  # a token 0 alone is not a question
            asked = int(answers[0])
            others = np.flatnonzero(roles[asked:] != Role.ASSISTANT)
            expected = tokens[asked : asked + int(others[0]) if len(others) else len(roles)]
        rows.append(Row(source.name, piece.document, tokens, weights, asked, expected))
    return rows, data.facts().targets


def pick_questions(rows: Sequence[Row]) -> list[Row]:
    """Return the rows whose questions are asked: one of the beginning, one of the middle, one of the end."""
    asking = [row for row in rows if row.asked]
    places = np.linspace(0, len(asking) - 1, min(QUESTIONS, len(asking))).round().astype(int).tolist()
    return [asking[i] for i in places]


def measure(rows: Sequence[Row]) -> RowLosses | None:
    """Return the losses of rows that went through both models, None for no rows."""
    if not rows:
        return None
    return RowLosses(np.array([row.weights.sum() for row in rows]), *np.array([row.losses for row in rows]).T)


@torch.no_grad()
def row_loss(model: RWKV, row: Row) -> float:
    """Return the sum of the cross entropies of a row's loss tokens."""
    device = model.ln_out.weight.device
    places = torch.from_numpy(np.flatnonzero(row.weights)).to(device)
    targets = torch.from_numpy(row.tokens[1:]).to(device)[places]
    x, _ = model.features(torch.from_numpy(row.tokens[None, :-1]).to(device), carry=False)
    total = 0.0
    for which, wanted in zip(places.split(TARGETS), targets.split(TARGETS), strict=True):
        logits = model.head(x[0, which]).float()
        total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
    return total


def generate_answer(model: RWKV, row: Row, asked_as: PromptFormat) -> str:
    """Generate the model's answer to a row's question."""
    ids = row.tokens[: row.asked].tolist()
    try:
        logits, state = advance(model, ids)
        stops = asked_as.template.stops()
        return "".join(generate(model, logits, state, ANSWER, 0.0, 1.0, 0, stops, asked_as.stop_tokens))
    except UserError:  # the model computes no numbers, which the losses show
        return "(no number)"


def decode_text(tokens: np.ndarray) -> str:
    """Return the text of tokens."""
    return tokenizer.decode(tokens[tokens != tokenizer.END_OF_DOC].tolist())


def is_expected(said: str, expected: np.ndarray) -> bool:
    """Return whether an answer is the expected one, up to ANSWER tokens and without an incomplete character."""
    wanted = decode_text(expected[:ANSWER]).rstrip("\ufffd").strip()
    return bool(wanted) and said.rstrip("\ufffd").strip() == wanted


def shorten(text: str) -> str:
    """Shorten a text to one line."""
    text = " / ".join(line.strip() for line in text.strip().splitlines() if line.strip())
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"


def loss_table(files: tuple[dict[str, list[Row]], ...], trained: list[Row], held_out: list[Row]) -> list[str]:
    """Return a table of the loss per token of both models: trained and held-out rows, each file, short and long rows."""
    lines = [f"{'loss per trained token':<44}{'rows':>6}{'base':>9}{'tuned':>9}{'gained':>9}{'+-':>8}"]

    def add(label: str, rows: Sequence[Row]) -> None:
        if losses := measure(rows):
            (before, after), (gain, error) = losses.losses, losses.gain
            chance = f"{error:.3f}" if np.isfinite(error) else "-"
            lines.append(f"{label:<44}{len(rows):>6}{before:>9.3f}{after:>9.3f}{gain:>9.3f}{chance:>8}")

    for what, by_file, rows in (("trained", files[0], trained), ("held-out", files[1], held_out)):
        add(f"{what} rows", rows)
        for name, some in by_file.items() if len(by_file) > 1 else ():
            add(f"  of {name}", some)
        if len(rows) >= 2 * LEAST_ROWS:
            ordered = sorted(rows, key=lambda row: len(row.tokens))
            half = len(ordered) // 2
            limit = len(ordered[half].tokens)
            add(f"  the shorter half (below {limit} tokens)", ordered[:half])
            add("  the longer half", ordered[half:])
    return lines
