"""The data of a run: tokenized files, alone or mixed, or a stream of rows, and how they become batches."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_peft.common import hashing, paths
from rwkv_peft.common.errors import SettingError, SettingErrors, UserError
from rwkv_peft.common.file_watch import FileWatch
from rwkv_peft.config.shell import MOST, Script, parse_assignments
from rwkv_peft.config.strategies import STRATEGIES
from rwkv_peft.config.train import TrainConfig
from rwkv_peft.data import tokenized_files, vocabulary_check
from rwkv_peft.data.buckets import Buckets, make_buckets
from rwkv_peft.data.dataset import ITEM_MODES, Batch, Batches, TokenDataset
from rwkv_peft.data.masking import Markers
from rwkv_peft.data.sampling import AUTO_CTX_LIMIT, Plan
from rwkv_peft.data.streaming import Stream
from rwkv_peft.data.token_source import TokenSource
from rwkv_peft.data.tokenized_files import Form, data_files, effective_mask, read_form
from rwkv_peft.preprocess import files as row_files
from rwkv_peft.preprocess import reader
from rwkv_peft.preprocess.config import TokenizeConfig, recipe, settled
from rwkv_peft.preprocess.row_stream import RowStream
from rwkv_peft.text import tokenizer

from . import report

TOKENIZE = Path(__file__).resolve().parent.parent.parent / "make_tokenize.sh"  # settings that encode a stream
AUTO_BATCH_TOKENS = 4096  # MICRO_BSZ=auto: about this many tokens in a micro-batch ...
AUTO_LEAST_STEPS = 16  # ... but an epoch has at least this many optimizer steps, if the data allow it

Log = Callable[[str], None]
Tokenized = Sequence[tuple[Path, Fraction]]  # prefixes of tokenized files and their weights


@dataclass(frozen=True)
class TrainData:
    """What a run trains on, and how it is cut into epochs and steps.

    Attributes:
        plan: how rows become optimizer steps.
        ctx_len: most loss tokens of a row.
        buckets: those of DATALOAD=bucket.
        most_tokens: inputs of the largest micro-batch.
        most_sequences: sequences in it, as far as is known.
        lines: from the settings to the lines about the data in the plan that the user sees.
        batches: from a rank, and for a stream its first micro-batch, to its micro-batches.
        sequences: yields tokens [n] and weights [n-1] of one sequence after another, to inspect them.
        forms: formats that the data were made with, as far as their reports have them.
        content: identifies the data. Its argument is what it was earlier, or None; files that have not changed since are not
            read again.
        bos: the different BOS of the files.
        blank_lines: answers may hold blank lines that the template does not know of.
    """

    plan: Plan
    ctx_len: int
    buckets: Buckets | None
    most_tokens: int
    most_sequences: int
    lines: Callable[[Mapping[str, Any]], list[tuple[str, str]]]
    batches: Callable[[int, int], Batches | Stream]
    sequences: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]
    forms: tuple[Form, ...]
    content: Callable[[dict | None], dict]
    bos: tuple[int, ...]
    blank_lines: bool


def plan_run(
    config: TrainConfig, files: Tokenized, vocab_size: int, log: Log, watch: FileWatch | None = None
) -> TrainData:
    """Open tokenized files and plan their batches.

    Args:
        config: settings of the run.
        files: the training data.
        vocab_size: of the model.
        log: prints a message.
        watch: watches the files.

    Raises:
        SettingErrors: the files have nothing to train, or do not fit the settings.
    """
    mode = "concat" if config.pack == "concat" else "magic" if config.magic_prime else config.dataload
    ctx_len, limit = config.ctx_len if isinstance(config.ctx_len, int) else None, "CTX_LEN"
    if config.lengths and not ctx_len:
        ctx_len, limit = config.lengths[-1], "TRAIN_LENGTHS"
    budget = config.token_budget if isinstance(config.token_budget, int) else None
    if watch:
        watch.add(_paths_of(files))

    def choose_buckets(lengths: np.ndarray) -> Buckets:
        return make_buckets(lengths, config.lengths, config.batch_sizes, budget, config.mini_bsz, config.processes)

    data = TokenDataset(
        _open_sources(config, files, vocab_size, log),
        mode,
        effective_mask(config.loss_mask),
        ctx_len,
        config.overlong,
        config.seed,
        config.data_shuffle,
        choose_buckets if mode == "bucket" else None,
        limit,
        # infctx has memory for any row; windows are cut anywhere anyway
        MOST if config.train_type == "infctx" and mode in ITEM_MODES else AUTO_CTX_LIMIT,
    )
    if isinstance(config.micro_bsz, int):
        micro_bsz = config.micro_bsz
    else:
        most_rows = data.rows // (AUTO_LEAST_STEPS * config.mini_bsz * config.processes)
        micro_bsz = max(1, min(AUTO_BATCH_TOKENS // data.ctx_len, most_rows))
    epoch_steps = config.epoch_steps if isinstance(config.epoch_steps, int) else None
    plan = data.make_plan(epoch_steps, micro_bsz, config.mini_bsz, config.processes)
    forms = tuple(dict.fromkeys(form for prefix, _ in files if (form := read_form(prefix))))
    bos_by_file = {prefix: tokenized_files.detect_bos(prefix) for prefix, _ in files}
    facts = data.facts()
    most_tokens = min(plan.most_tokens(data.ctx_len), facts.tokens)
    in_pack = most_tokens * facts.documents // max(facts.tokens, 1)
    sequences = in_pack if mode == "pack" else plan.micro_bsz_of_step(0, 0)
    return TrainData(
        plan,
        data.ctx_len,
        data.buckets,
        most_tokens,
        max(1, sequences),
        lambda settings: (
            report.data_lines(data, plan, settings) + report.template_lines(forms) + report.bos_lines(bos_by_file, mode)
        ),
        # (DeepSpeed counts micro-batches by itself)
        lambda rank, _first: Batches(data, plan, rank, STRATEGIES[config.strategy_name].stage > 0),
        lambda: itertools.chain.from_iterable(map(data.row, range(data.rows))),
        forms,
        functools.partial(_content_of_files, files, watch=watch),
        tuple(sorted({bos for bos, _ in bos_by_file.values()})),
        any(tokenized_files.has_blank_lines(prefix) for prefix, _ in files),
    )


@dataclass(frozen=True)
class ValData:
    """Held-out data.

    Attributes:
        names: of the files.
        prefixes: of the files.
        missing: names of trained files that have no held-out file.
        rows: packs of the context's length.
        targets: loss tokens.
        untrained: documents without loss tokens.
        data: identifies the held-out set.
        batches: from a rank and the world size to the micro-batches of that rank.
    """

    names: tuple[str, ...]
    prefixes: tuple[Path, ...]
    missing: tuple[str, ...]
    rows: int
    targets: int
    untrained: int
    data: str
    batches: Callable[[int, int], Iterator[Batch]]


def plan_validation(
    config: TrainConfig, trained: Tokenized, ctx_len: int, vocab_size: int, log: Log, watch: FileWatch
) -> ValData | None:
    """Open the held-out data of VAL_DATA, in packs, with the mask of the run.

    Args:
        config: settings of the run.
        trained: training data, for VAL_DATA=auto.
        ctx_len: most loss tokens of a row.
        vocab_size: of the model.
        log: prints a message.
        watch: watches the files.

    Returns:
        None for no held-out data.

    Raises:
        SettingErrors: data are missing or have no loss tokens.
    """

    def open_data(files: Tokenized) -> TokenDataset:
        watch.add(_paths_of(files))
        sources = _open_sources(config, files, vocab_size, log)
        return TokenDataset(sources, "pack", effective_mask(config.loss_mask), ctx_len, "truncate", 0, False)

    missing: list[str] = []
    files: list[tuple[Path, Fraction]] = []
    if config.val_data == "none":
        return None
    if config.val_data == "auto":
        for prefix in [Path(f"{prefix}.valid") for prefix, _ in trained]:
            if tokenized_files.missing_data(prefix):
                missing.append(prefix.stem)
                continue
            file = (prefix, Fraction(1))
            try:
                open_data([file])
                files.append(file)
            except SettingErrors as errors:  # (the user has not named this file)
                watch.release(_paths_of([file]))
                log(f"warning   {prefix.name} is not looked at: {errors.problems[0].message}")
        needed = {"VAL_PATIENCE": config.val_patience, "KEEP_BEST": config.keep_best}
        if not files and any(needed.values()):
            words = (
                "has nothing to look at: VAL_DATA=auto finds no NAME.valid (VALID_PERCENT in make_tokenize.sh makes it)"
            )
            raise SettingErrors(*(SettingError(name, words) for name, value in needed.items() if value))
        if not files:
            return None
    else:
        files, wrong = data_files(config.val_data, [prefix.name for prefix, _ in trained])
        if wrong:
            raise SettingErrors(*(SettingError("VAL_DATA", message) for message in wrong))
    try:
        data = open_data(files)
    except SettingErrors as errors:
        raise SettingErrors(*(SettingError("VAL_DATA", f"{p.message} ({p.name})") for p in errors.problems)) from None
    hashes = [file["sha256"] for file in _content_of_files(files, None, watch)["files"]]

    def batches(rank: int, world_size: int) -> Iterator[Batch]:
        # all ranks have equally many: with sharded weights, they compute each at the same time
        for first in range(0, data.rows, world_size):
            row = first + rank
            yield data.batch([row], 1) if row < data.rows else data.filling(first, 1)

    facts = data.facts()
    return ValData(
        tuple(prefix.name for prefix, _ in files),
        tuple(prefix for prefix, _ in files),
        tuple(missing),
        data.rows,
        facts.targets,
        facts.untrained,
        hashlib.sha256(repr(hashes).encode()).hexdigest()[:12],
        batches,
    )


def _paths_of(files: Tokenized) -> list[Path]:
    """All files that tokenized data may consist of."""
    return [Path(f"{prefix}{ending}") for prefix, _ in files for ending in (".bin", ".idx", ".roles.bin", ".roles.idx")]


def _content_of_files(files: Tokenized, before: dict | None, watch: FileWatch | None = None) -> dict[str, Any]:
    """The content of tokenized files and their weights. before: the same at an earlier time."""
    known, contents = {file["name"]: file for file in (before or {}).get("files", [])}, []
    for path in _paths_of(files):
        if path.is_file():
            content = hashing.fingerprint(path, known.get(path.name))
            contents.append({"name": path.name, **content})
            if watch:
                watch.know(path, content["sha256"])
    return {"files": contents, "weights": [str(weight) for _, weight in files]}


def plan_stream(config: TrainConfig, source: Path, vocab_size: int, log: Log, watch: FileWatch) -> TrainData:
    """Plan batches of a file or folder of rows, encoded during the training with the settings of make_tokenize.sh.

    Args:
        config: settings of the run.
        source: the file or folder.
        vocab_size: of the model.
        log: prints a message.
        watch: watches the files.

    Raises:
        UserError: the settings of make_tokenize.sh are wrong, or a file cannot be read.
    """
    script = Script(TOKENIZE, parse_assignments(TOKENIZE))
    try:
        tokenizing = script.read(TokenizeConfig)
    except SettingErrors as errors:  # of another script than the one that runs
        raise UserError(script.report(errors)) from None
    tokenizing = settled(tokenizing, paths.resolve_model(config.model_path))[0]
    if not isinstance(config.ctx_len, int):
        raise AssertionError("the settings refuse CTX_LEN=auto with STREAMING=1")
    ctx_len = config.ctx_len
    micro_bsz = config.micro_bsz if isinstance(config.micro_bsz, int) else max(1, AUTO_BATCH_TOKENS // ctx_len)
    rows = config.max_steps * micro_bsz * config.mini_bsz * config.processes
    plan = Plan(rows, None, micro_bsz, config.mini_bsz, config.processes)
    markers = Markers(
        tokenized_files.unescape_marker(config.mask_start), tokenized_files.unescape_marker(config.mask_end)
    )
    chosen = row_files.chosen(source, tokenizing.valid_split)
    watch.add(chosen.train)
    for note in chosen.notes:
        log(f"{note.level:<9} {note.file}: {note.words}")
    reader.settle(chosen.train, tokenizing.encoding)  # refuses what cannot be read before a model is loaded
    buffer = config.stream_buffer if config.data_shuffle else 1
    encoding = recipe(tokenizing, True)
    text = tokenizing.txt_mode, config.seed, buffer, log, tokenizing.encoding, tokenizing.valid_split
    stream = RowStream(chosen.train, encoding, *text)

    def make_data(part: TokenSource, number: int) -> TokenDataset:
        return TokenDataset(
            [part],
            config.dataload,
            effective_mask(config.loss_mask),
            ctx_len,
            config.overlong,
            (config.seed, number),
            config.data_shuffle,
        )

    def batches(rank: int, first: int) -> Stream:
        find = (
            functools.partial(tokenized_files.roles_in_text, find_spans=markers.spans)
            if config.loss_mask == "se"
            else None
        )
        return Stream(source, stream.documents, make_data, find, vocab_size, ctx_len, plan, rank, first)

    return TrainData(
        plan,
        ctx_len,
        None,
        plan.most_tokens(ctx_len),
        plan.micro_bsz,
        lambda settings: report.stream_lines(chosen.train, tokenizing, buffer, plan, settings),
        batches,
        lambda: batches(0, 0).sequences(),
        (Form(tokenizing.prompt_type, tokenizing.eot, encoding.template),),
        lambda _before: {
            # (a stream may be too long to be read twice)
            "files": [
                {"name": p.name, "sample": hashing.sample_hash(p) if p.is_file() else None} for p in chosen.train
            ],
            "tokenizing": dataclasses.asdict(tokenizing),
        },
        (int(encoding.bos),),
        True,  # not known: the stream was not read to its end
    )


def stream_source(name: str) -> tuple[Path, list[str]]:
    """Return the file, pipe or folder of rows that DATA_PATH names with STREAMING=1, and what is wrong with it."""
    try:
        return row_files.named(name), []
    except UserError as error:
        is_mixture = re.search(r":[\d.]+(\s|$)", name)
        words = "mixes files, which STREAMING=1 cannot; tokenize them, or put them into one folder"
        return Path(name), [words if is_mixture else str(error)]


def _open_sources(config: TrainConfig, files: Tokenized, vocab_size: int, log: Log) -> list[TokenSource]:
    if config.vocabulary == "world" and vocab_size == tokenizer.VOCAB_SIZE:
        advice = "make it again from the text with ./make_tokenize.sh, or set VOCABULARY=own if the model has that vocabulary"
        wrong = [words for prefix, _ in files if (words := vocabulary_check.describe_vocabulary_problem(Path(prefix)))]
        if wrong:
            raise SettingErrors(*(SettingError("DATA_PATH", f"{words}; {advice}") for words in wrong))
    return tokenized_files.open_sources(files, config.loss_mask, config.mask_start, config.mask_end, vocab_size, log)
