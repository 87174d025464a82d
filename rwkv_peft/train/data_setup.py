"""DATA_PATH and what belongs to it, opened and planned: tokenized files, alone or mixed, and how they become batches."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_peft.common import hashing, paths
from rwkv_peft.common.errors import SettingError, SettingErrors, UserError
from rwkv_peft.common.file_watch import FileWatch
from rwkv_peft.config.shell import MOST, Script, parse_assignments
from rwkv_peft.config.strategies import STRATEGIES
from rwkv_peft.config.train import TrainConfig

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from rwkv_peft.data.buckets import Buckets
    from rwkv_peft.data.sampling import Plan
    from rwkv_peft.data.tokenized_files import Form

TOKENIZE = Path(__file__).resolve().parent.parent.parent / "make_tokenize.sh"  # how a stream becomes tokens
AUTO_BATCH_TOKENS = 4096  # MICRO_BSZ=auto: about this many tokens at once ...
AUTO_LEAST_STEPS = 16  # ... but an epoch has at least this many optimizer steps, if the data allow it


@dataclass(frozen=True)
class TrainData:
    """What a run trains on, and how it is cut into epochs and steps.

    ctx_len: the longest sequence. buckets: those of DATALOAD=bucket. most_tokens: inputs of the largest micro-batch;
    most_sequences: how many lie in it, as far as is known.
    lines: from the settings to the rows of the plan that the user sees. batches: from a rank, and for a stream the micro-batch
    that it begins with, to its micro-batches.
    sequences: what is trained, to look at: tokens [n] and weights [n-1] of one after another. forms: what the data
    were written in, as far as they tell. content: what tells these data from others; from what it was at
    an earlier time, or None, which saves reading files that have not changed since. bos: the different BOS of the files.
    blank_lines: whether answers may hold blank lines that the template does not tell of.
    """

    plan: Plan
    ctx_len: int
    buckets: Buckets | None
    most_tokens: int
    most_sequences: int
    lines: Callable[[dict], list[tuple[str, str]]]
    batches: Callable[[int, int], Dataset]
    sequences: Callable[[], Iterator]
    forms: tuple[Form, ...]
    content: Callable[[dict | None], dict]
    bos: tuple[int, ...] = (0,)
    blank_lines: bool = False


def plan_run(config: TrainConfig, files, vocab_size: int, say, in_use: FileWatch | None = None) -> TrainData:
    """The data as batches will be made of them. files: prefixes and weights, as data_files gives them. in_use: watches them."""
    from rwkv_peft.data import buckets
    from rwkv_peft.data.dataset import ITEM_MODES, Batches, TokenDataset
    from rwkv_peft.data.sampling import AUTO_CTX_LIMIT
    from rwkv_peft.data.tokenized_files import detect_bos, effective_mask, has_blank_lines, read_form

    from . import report

    mode = "concat" if config.pack == "concat" else "magic" if config.magic_prime else config.dataload
    ctx_len, limit = config.ctx_len if config.ctx_len != "auto" else None, "CTX_LEN"
    if config.lengths and not ctx_len:
        ctx_len, limit = config.lengths[-1], "TRAIN_LENGTHS"
    budget = config.token_budget if config.token_budget != "auto" else None
    if in_use:
        in_use.add(paths_of(files))

    def choose(lengths):
        return buckets.make_buckets(
            lengths, config.lengths, config.batch_sizes, budget, config.mini_bsz, config.processes
        )

    data = TokenDataset(
        open_masked(config, files, vocab_size, say),
        mode,
        effective_mask(config.loss_mask),
        ctx_len,
        config.overlong,
        config.seed,
        config.data_shuffle,
        choose if mode == "bucket" else None,
        limit,
        # infctx has memory for any row; windows are cut anywhere anyway
        MOST if config.train_type == "infctx" and mode in ITEM_MODES else AUTO_CTX_LIMIT,
    )
    micro_bsz = config.micro_bsz
    if micro_bsz == "auto":
        several = data.rows // (AUTO_LEAST_STEPS * config.mini_bsz * config.processes)
        micro_bsz = max(1, min(AUTO_BATCH_TOKENS // data.ctx_len, several))
    epoch_steps = None if config.epoch_steps == "auto" else config.epoch_steps
    plan = data.make_plan(epoch_steps, micro_bsz, config.mini_bsz, config.processes)
    forms = tuple(dict.fromkeys(form for prefix, _ in files if (form := read_form(prefix))))
    begun = {prefix: detect_bos(prefix) for prefix, _ in files}
    facts = data.facts()
    most_tokens = min(plan.most_tokens(data.ctx_len), facts.tokens)
    sequences = (
        plan.micro_bsz_of_step(0, 0) if mode != "pack" else most_tokens * facts.documents // max(facts.tokens, 1)
    )
    return TrainData(
        plan,
        data.ctx_len,
        data.buckets,
        most_tokens,
        max(1, sequences),
        lambda settings: (
            report.data_lines(data, plan, settings) + report.form_lines(forms) + report.bos_lines(begun, mode)
        ),
        # (DeepSpeed counts micro-batches by itself)
        lambda rank, _first: Batches(data, plan, rank, STRATEGIES[config.strategy_name].stage > 0),
        lambda: itertools.chain.from_iterable(map(data.row, range(data.rows))),
        forms,
        functools.partial(content_of_files, files, in_use=in_use),
        tuple(sorted({bos for bos, _ in begun.values()})),
        any(has_blank_lines(prefix) for prefix, _ in files),
    )


@dataclass(frozen=True)
class ValData:
    """Held-out data. names, prefixes: of the files; missing: of those that are trained and have none. rows: places of the
    context's length. untrained: documents that have nothing to learn from. data: tells these from others. batches: from a
    process's number and their count to its share.
    """

    names: tuple[str, ...]
    prefixes: tuple[Path, ...]
    missing: tuple[str, ...]
    rows: int
    targets: int
    untrained: int
    data: str
    batches: Callable[[int, int], Iterator]


def held_out(
    config: TrainConfig, files, ctx_len: int, vocab_size: int, say, in_use: FileWatch | None = None
) -> ValData | None:
    """What VAL_DATA names, in packs, with the mask of the run; None for none. files: those that are trained, for auto. in_use:
    watches what is held out. Problems for what is not there or has nothing to learn.
    """
    from rwkv_peft.data.dataset import TokenDataset
    from rwkv_peft.data.tokenized_files import data_files, effective_mask, missing_data

    def opened(pairs) -> TokenDataset:
        if in_use:
            in_use.add(paths_of(pairs))
        sources = open_masked(config, pairs, vocab_size, say)
        return TokenDataset(sources, "pack", effective_mask(config.loss_mask), ctx_len, "truncate", 0, False)

    missing: list[str] = []
    if config.val_data == "none":
        return None
    if config.val_data == "auto":
        pairs = []
        for prefix in [] if config.streaming else [Path(f"{prefix}.valid") for prefix, _ in files]:
            if missing_data(prefix):
                missing.append(prefix.stem)
                continue
            try:
                opened([(prefix, Fraction(1))])
                pairs.append((prefix, Fraction(1)))
            except SettingErrors as problems:  # (nobody has asked for it by name)
                if in_use:
                    in_use.release(paths_of([(prefix, Fraction(1))]))
                say(f"warning   {prefix.name} is not looked at: {problems.problems[0].message}")
        wanted = [
            name for name, value in (("VAL_PATIENCE", config.val_patience), ("KEEP_BEST", config.keep_best)) if value
        ]
        if not pairs and wanted:
            words = (
                "has nothing to look at: VAL_DATA=auto finds no NAME.valid (VALID_PERCENT in make_tokenize.sh makes it)"
            )
            raise SettingErrors(*(SettingError(name, words) for name in wanted))
        if not pairs:
            return None
    else:
        trained = [] if config.streaming else [prefix.name for prefix, _ in files]
        pairs, wrong = data_files(config.val_data, trained)
        if wrong:
            raise SettingErrors(*(SettingError("VAL_DATA", message) for message in wrong))
    try:
        data = opened(pairs)
    except SettingErrors as problems:
        raise SettingErrors(*(SettingError("VAL_DATA", f"{p.message} ({p.name})") for p in problems.problems)) from None
    mark = hashlib.sha256(
        repr([f["sha256"] for f in content_of_files(pairs, None, in_use)["files"]]).encode()
    ).hexdigest()[:12]

    def batches(rank: int, world: int) -> Iterator:
        for first in range(
            0, data.rows, world
        ):  # as many for each: where weights are in pieces, all go through them at once
            row = first + rank
            yield data.batch([row], 1) if row < data.rows else data.filling(first, 1)

    names = tuple(prefix.name for prefix, _ in pairs)
    facts = data.facts()
    prefixes = tuple(prefix for prefix, _ in pairs)
    return ValData(names, prefixes, tuple(missing), data.rows, facts.targets, facts.untrained, mark, batches)


def paths_of(files) -> list[Path]:
    """All that tokenized files may consist of. files: prefixes and weights."""
    return [Path(f"{prefix}{ending}") for prefix, _ in files for ending in (".bin", ".idx", ".roles.bin", ".roles.idx")]


def content_of_files(files, before: dict | None, in_use: FileWatch | None = None) -> dict:
    """The contents of tokenized files and their weights. before: the same at an earlier time. in_use: gets to know them."""
    known, found = {file["name"]: file for file in (before or {}).get("files", [])}, []
    for path in paths_of(files):
        if path.is_file():
            content = hashing.fingerprint(path, known.get(path.name))
            found.append({"name": path.name, **content})
            if in_use:
                in_use.know(path, content["sha256"])
    return {"files": found, "weights": [str(weight) for _, weight in files]}


def plan_stream(config: TrainConfig, source: Path, vocab_size: int, say, in_use: FileWatch | None = None) -> TrainData:
    """Batches straight from a file or folder of rows, encoded on the way as make_tokenize.sh says. in_use: watches them."""
    from rwkv_peft.data.dataset import TokenDataset
    from rwkv_peft.data.masking import Markers
    from rwkv_peft.data.sampling import Plan
    from rwkv_peft.data.streaming import Stream
    from rwkv_peft.data.tokenized_files import Form, effective_mask, roles_in_text, unescape_marker
    from rwkv_peft.preprocess import files, reader
    from rwkv_peft.preprocess.config import TokenizeConfig, recipe, settled
    from rwkv_peft.preprocess.row_stream import RowStream

    from . import report

    script = Script(TOKENIZE, parse_assignments(TOKENIZE))
    try:
        tokenizing = script.read(TokenizeConfig)
    except SettingErrors as problems:  # of another script than the one that runs
        raise UserError(script.report(problems)) from None
    tokenizing = settled(tokenizing, paths.model_file(config.model_path))[0]
    micro_bsz = max(1, AUTO_BATCH_TOKENS // config.ctx_len) if config.micro_bsz == "auto" else config.micro_bsz
    rows = config.max_steps * micro_bsz * config.mini_bsz * config.processes
    plan = Plan(rows, None, micro_bsz, config.mini_bsz, config.processes)
    markers = Markers(unescape_marker(config.mask_start), unescape_marker(config.mask_end))
    chosen = files.chosen(source, tokenizing.valid_split)
    found = chosen.train
    if in_use:
        in_use.add(found)
    for note in chosen.notes:
        say(f"{note.level:<9} {note.file}: {note.words}")
    reader.settle(found, tokenizing.encoding)  # refuses what cannot be read before a model is loaded
    buffer = config.stream_buffer if config.data_shuffle else 1
    made_from = recipe(tokenizing, True)
    text = tokenizing.txt_mode, config.seed, buffer, say, tokenizing.encoding, tokenizing.valid_split
    stream = RowStream(found, made_from, *text)

    def make_data(part, number: int) -> TokenDataset:
        return TokenDataset(
            [part],
            config.dataload,
            effective_mask(config.loss_mask),
            config.ctx_len,
            config.overlong,
            (config.seed, number),
            config.data_shuffle,
        )

    def batches(rank: int, first: int) -> Stream:
        find = functools.partial(roles_in_text, find_spans=markers.spans) if config.loss_mask == "se" else None
        return Stream(source, stream.documents, make_data, find, vocab_size, config.ctx_len, plan, rank, first)

    return TrainData(
        plan,
        config.ctx_len,
        None,
        plan.most_tokens(config.ctx_len),
        plan.micro_bsz,
        lambda settings: report.stream_lines(found, tokenizing, buffer, plan, settings),
        batches,
        lambda: batches(0, 0).sequences(),
        (Form(tokenizing.prompt_type, tokenizing.eot, made_from.template),),
        lambda _before: {
            # (a stream may be too long to be read twice)
            "files": [{"name": p.name, "sample": hashing.sample(p) if p.is_file() else None} for p in found],
            "tokenizing": dataclasses.asdict(tokenizing),
        },
        (int(made_from.bos),),
        True,  # nobody has looked at all of the stream
    )


def stream_source(name: str) -> tuple[Path, list[str]]:
    """DATA_PATH with STREAMING=1: a file, a pipe or a folder of rows; and what is wrong with it."""
    from rwkv_peft.preprocess import files

    try:
        return files.named(name), []
    except UserError as error:
        mixed = re.search(r":[\d.]+(\s|$)", name)
        wrong = (
            "mixes files, which STREAMING=1 cannot; tokenize them, or put them into one folder" if mixed else str(error)
        )
        return Path(name), [wrong]


def open_masked(config: TrainConfig, files, vocab_size: int, say) -> list:
    from rwkv_peft.data import vocabulary_check
    from rwkv_peft.data.tokenized_files import open_sources
    from rwkv_peft.text import tokenizer

    if config.vocabulary == "world" and vocab_size == tokenizer.VOCAB_SIZE:
        cure = "make it again from the text with ./make_tokenize.sh, or set VOCABULARY=own if the model has that vocabulary"
        found = [wrong for prefix, _ in files if (wrong := vocabulary_check.describe_vocabulary_problem(Path(prefix)))]
        if found:
            raise SettingErrors(*(SettingError("DATA_PATH", f"{wrong}; {cure}") for wrong in found))
    return open_sources(files, config.loss_mask, config.mask_start, config.mask_end, vocab_size, say)
