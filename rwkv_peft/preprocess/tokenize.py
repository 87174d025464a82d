"""Files of rows -> NAME.bin/.idx and NAME.roles.bin/.idx, NAME.report.json, NAME.rejects.jsonl, NAME.lengths.png.

Rows are encoded once, into files without a name that vanish with us; repeats and the held-out part only copy. Final names
are given when everything has been written; until then earlier files stay as they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from rwkv_peft.common import bus_error, json_reader, paths
from rwkv_peft.common.atomic_io import (
    check_disk_space,
    check_not_folder,
    create_file,
    name_refused_write,
    remove_path,
    remove_stale_temps,
    temp_path,
    write_json,
)
from rwkv_peft.common.errors import UserError
from rwkv_peft.common.file_watch import FileChanged, FileWatch
from rwkv_peft.common.formatting import join_names, plural
from rwkv_peft.data.binidx import Writer
from rwkv_peft.text import tokenizer

from . import cache, files, report
from . import reader as reading
from .config import TokenizeConfig, recipe, settled
from .length_plot import draw_lengths
from .pipeline import EncodeConfig, EncodedBlock
from .reader import Block, Note
from .stats import CorpusStats
from .worker_pool import encoded_blocks, number_of_workers

FORMS = """A line of .jsonl must be one whole JSON object, with no comma behind it and no [ ] around the file, like one of these:
  {"text": "User: Hi\\n\\nAssistant: Hello!"}
  {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
  {"instruction": "Say hello", "output": "Hello!"}
Other columns are named with MAP_KEYS; ./make_tokenize.sh --help tells the rest."""
COLUMNS = """Columns are known by their names: text; instruction and output; prompt and completion; question and answer; messages.
Other names are told like this:  --map-keys '{"prompt": "ask", "response": "reply"}'      (MAP_KEYS in the script)"""
UNCHANGED = "Nothing was written, earlier files are untouched. Run it again when nothing writes to the file any more."
# what is written at the end, and is looked at before the rows are read
WRITTEN = (".report.json", ".rejects.jsonl", ".lengths.png", *(f"{e}.{kind}" for e in ("", ".roles", ".valid", ".valid.roles")
           for kind in ("bin", "idx")))  # fmt: skip
ROWS = 4096  # that are copied at once
MANY = 500_000  # rows from which on their own sizes and places take memory that the vocabulary must make room for
IN_MEMORY = 64 << 20  # bytes of tokens up to which copying reads from memory


def tokenize(source: Path, config: TokenizeConfig, epochs: int, end_of_doc: bool) -> dict:
    """Make the files that training wants of a file or folder of rows. Returns what NAME.report.json holds.

    UserError if nothing can be used, or STRICT=1 and anything cannot.
    """
    in_use = FileWatch("it was read first", UNCHANGED)
    with bus_error.handle_bus_error(in_use.exit_if_truncated), in_use.explaining():
        return tokenized(source, config, epochs, end_of_doc, in_use)


def tokenized(source: Path, config: TokenizeConfig, epochs: int, end_of_doc: bool, in_use: FileWatch) -> dict:
    """Write the tokens of a file or folder, and return the report's content."""
    prefix = files.stem_of(source) if source.is_file() else source.resolve()
    in_use.add(every := files.find(source)[0])
    config, template = settled(config)
    chosen = files.chosen(source, config.valid_split)
    inputs, other = [*chosen.train, *chosen.held_out], chosen.left_out
    in_use.release({*every} - {*inputs})
    made_from = recipe(config, end_of_doc)
    settings = {
        "EPOCHS": epochs, "EOF": end_of_doc, "EOT": config.eot, "HANDLER": config.handler, "MAP_KEYS": config.map_keys,
        "ROLE_MAP": config.role_map, "TXT_MODE": config.txt_mode, "ENCODING": config.encoding, "REPAIR": config.repair,
        "EXPAND": config.expand,
        "MASK_HISTORY": config.mask_history, "MAX_TOKENS": config.max_tokens, "SOURCE_LENGTH": config.source_length,
        "TARGET_LENGTH": config.target_length, "OVERLONG": config.overlong, "VALID_PERCENT": config.valid_percent,
        "VALID_SPLIT": config.valid_split, "SEED": config.seed, "PROMPT_TYPE": config.prompt_type,
        "BOS": int(made_from.bos), "CONVERT_HEADINGS": config.convert_headings,
    }  # fmt: skip
    key = cache.key({path: in_use.content(path) for path in inputs}, settings, repr(made_from.template))
    report_file = Path(f"{prefix}.report.json")
    known = None if config.overwrite_cache else cache.fresh(report_file, key)
    in_use.must_be_unchanged()
    if known and not (config.strict and known["rows"]["rejected"]):
        print(
            f"unchanged {paths.display_path(prefix)}: made from the same data with the same settings; nothing to encode"
        )
        report.say(known, prefix, template, made=False)
        return known
    replaced = made_from_other(report_file, paths.display_path(source))
    for ending in WRITTEN:
        check_not_folder(Path(f"{prefix}{ending}"))
    others = reading.settle(inputs, config.encoding)
    tally = CorpusStats(keep_documents=config.valid_percent > 0)
    rejects = Path(f"{prefix}.rejects.jsonl")
    with contextlib.ExitStack() as open_files, name_refused_write(f"{prefix}.bin"):
        stored = Stored(*(open_files.enter_context(tempfile.TemporaryFile(dir=prefix.parent)) for _ in range(2)))
        rejected = open_files.enter_context(Rejects(rejects))
        for one in progress(chosen, made_from, config):
            in_use.check_now_and_then()
            if one.rejects and config.strict:
                stop(one, source)
            stored.add(one)
            tally.add(one)
            rejected.add(one)
        if len(tally.sizes) > MANY:
            tokenizer.unload()
        check(tally, made_from, source)
        held_out = held_out_rows(tally, config, source)
        earlier = Path(f"{prefix}.valid.idx").exists() and not held_out.any()

        def last_look() -> None:
            in_use.must_be_unchanged()
            must_be_all(source, config.valid_split, inputs)

        names = write(prefix, stored, tally, epochs, held_out, config.seed, last_look)
        rejected.keep()
    # drawn before the report, whose presence says that all is there
    content = report.make(tally, source, inputs, other, settings, stored.held_out, chosen.notes) | {"encodings": others}
    advice = content["advice"]
    sizes, median = np.frombuffer(tally.sizes, np.int32), content["lengths"]["median"]
    picture = draw_lengths(prefix, sizes, median, advice["CTX_LEN"], advice["TRAIN_LENGTHS"])
    content = {
        "key": key,
        "vocabulary": tokenizer.VOCABULARY,
        **content,
        "template": made_from.template.to_dict(),
        "files": cache.describe([*names, *([rejects] if rejects.is_file() else []), picture]),
    }
    write_json(report_file, content)
    if replaced:
        print(f"replaced  {paths.display_path(prefix)}.bin/.idx, which had been made from {replaced}")
    if earlier:
        none = "VALID_PERCENT=0 and an empty VALID_SPLIT hold out no rows"
        print(f"removed   {paths.display_path(prefix)}.valid.bin/.idx, the held-out rows of an earlier call: {none}")
    report.say(content, prefix, template)
    return content


def must_be_all(source: Path, valid_split: str, inputs: list[Path]) -> None:
    """FileChanged where a folder holds other files than those that were read."""
    now = files.chosen(source, valid_split)
    if other := sorted({*now.train, *now.held_out} ^ {*inputs}):
        raise FileChanged(f"{paths.display_path(other[0])}: came into the folder since it was read first. {UNCHANGED}")


def made_from_other(report_file: Path, source: str) -> str:
    """The file that earlier tokens of this name were made from, if it was another one."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        earlier = json_reader.load_json(report_file)["source"]
        return earlier if earlier != source else ""
    return ""


def progress(chosen: files.Source, made_from: EncodeConfig, config: TokenizeConfig) -> Iterator[EncodedBlock]:
    """Yield every encoded block, with a bar that shows how far reading is."""
    inputs = [*chosen.train, *chosen.held_out]
    total = sum(path.stat().st_size for path in inputs)
    workers = number_of_workers(config.workers, total)

    held_out = set(chosen.held_out)

    def blocks() -> Iterator[Block]:
        for path in inputs:
            # (a folder has its parts in files; what a file holds is then all of one part)
            wanted = "" if chosen.held_out else config.valid_split
            yield from files.blocks(path, config.txt_mode, wanted, path in held_out, made_from.columns)

    before, at, name = 0, 0, ""
    sizes = {paths.display_path(path): path.stat().st_size for path in inputs}
    tqdm.monitor_interval = 0  # a thread of its own, which processes that are forked must not meet
    label = inputs[0].name if len(inputs) == 1 else f"{len(inputs)} files"
    with tqdm(total=total, unit="B", unit_scale=True, desc=label, disable=not sys.stderr.isatty()) as bar:
        for one in encoded_blocks(blocks(), made_from, workers):
            if one.file != name:
                before, name, at = before + sizes.get(name, 0), one.file, 0
            at = max(at, one.read)
            bar.update(before + at - bar.n)
            yield one


def stop(one: EncodedBlock, source: Path) -> None:
    """Raise the error of the first row that cannot be used (STRICT=1)."""
    first = one.rejects[0]
    raise UserError(
        f"{first.file}:{first.line}: {first.message}\nSTRICT=1 stops at the first row that cannot be used; nothing was "
        f"written.\n{FORMS}"
    )


def check(tally: CorpusStats, made_from: EncodeConfig, source: Path) -> None:
    """UserError if there is nothing to write, or a column that MAP_KEYS names is nowhere."""
    shown = paths.display_path(source)
    nowhere = [name for name in made_from.columns.named if name not in tally.seen]
    absent = f"MAP_KEYS names the column {nowhere[0]!r}, but no row of {shown} has it" if nowhere else ""
    if not tally.counts["read"]:
        raise UserError(f"{shown}: it has no rows; nothing was written, earlier files are untouched.")
    if absent and (tally.sizes or not tally.rejects):
        raise UserError(f"{absent}; nothing was written.")
    if tally.sizes:
        return
    if not tally.rejects:
        why = join_names(tally.group("dropped: "))
        raise UserError(f"{shown}: every row was dropped ({why}); nothing was written, earlier files are untouched.")
    lines = list(report.distinct_rejects([(r.file, r.line, r.message) for r in tally.rejects]))
    others = sum(tally.group("rejected: ").values()) - len(tally.rejects)
    more = f"\n... and {others:,} more" if others else ""
    forms = FORMS if any(r.file.endswith((".jsonl", ".json", ".gz", ".zst")) for r in tally.rejects) else COLUMNS
    first = "\n".join(lines)
    raise UserError(f"{first}{more}\n{absent or f'{shown} has no row that can be used'}; nothing was written.\n{forms}")


class Rejects:
    """NAME.rejects.jsonl, written as rows are rejected; it gets its name with `keep`, and there is none without rejects."""

    def __init__(self, path: Path):
        self.path = path
        self.file: IO[str] | None = None

    def __enter__(self) -> Rejects:
        remove_stale_temps(self.path)
        return self

    def add(self, one: EncodedBlock) -> None:
        """Write the rejects of a block."""
        if one.rejects and not self.file:
            self.file = create_file(temp_path(self.path), "w", encoding="utf-8")  # closed on leaving
        for reject in one.rejects:
            assert self.file
            self.file.write(json.dumps(reject._asdict(), ensure_ascii=False).encode("utf-8", "replace").decode() + "\n")

    def keep(self) -> None:
        """Put the file in place, or remove an old one if there are no rejects."""
        if self.file:
            self.file.close()
            os.replace(temp_path(self.path), self.path)
        else:
            self.path.unlink(missing_ok=True)

    def __exit__(self, *_exception) -> None:
        if self.file:
            with contextlib.suppress(OSError):  # a full disk refuses what is still to be flushed: it is to go anyway
                self.file.close()
            remove_path(temp_path(self.path))


class Stored:
    """The encoded rows, one after another, in two files without a name."""

    def __init__(self, ids: IO[bytes], roles: IO[bytes]):
        self.ids, self.roles, self.held_out = ids, roles, np.zeros(0, bool)

    def add(self, one: EncodedBlock) -> None:
        """Write the tokens of a block."""
        self.ids.write(one.ids.astype("<u2", copy=False).tobytes())
        self.roles.write(one.roles.tobytes())

    def readers(self):
        """Functions (first byte, behind the last) -> bytes, for ids and roles."""
        for file in (self.ids, self.roles):
            file.flush()
            if os.fstat(file.fileno()).st_size <= IN_MEMORY:
                file.seek(0)
                content = memoryview(file.read())
                yield content.__getitem__
            else:  # not mapped: touching all of it in random order would count as memory of this process
                yield file.fileno()


def held_out_rows(tally: CorpusStats, config: TokenizeConfig, source: Path) -> np.ndarray:
    """Return which rows become NAME.valid, bool [rows]: those of VALID_SPLIT, or VALID_PERCENT of all.

    Raises:
        UserError: VALID_SPLIT names nothing that is there, or everything.
    """
    if not config.valid_split:
        documents = np.frombuffer(tally.documents, np.uint64)
        return valid_rows(documents, len(tally.sizes), config.valid_percent, config.seed)
    held_out = np.frombuffer(tally.held_out, bool)
    if not held_out.any() or held_out.all():
        wrong = (
            "would hold out all rows" if held_out.any() else "names no part of it that holds a row which can be used"
        )
        raise UserError(f"{paths.display_path(source)}: VALID_SPLIT={config.valid_split} {wrong}; nothing was written.")
    hashes = np.frombuffer(tally.hashes, np.uint64)
    if again := int(np.isin(hashes[held_out], hashes[~held_out]).sum()):
        words = (
            f"{plural(again, 'held-out row')} are also among the rows for training: their loss says less than it seems"
        )
        tally.notes.append(Note("warning", paths.display_path(source), words))
    return held_out


def write(
    prefix: Path,
    stored: Stored,
    tally: CorpusStats,
    epochs: int,
    held_out: np.ndarray,
    seed: int,
    last_look: Callable[[], None] = lambda: None,
) -> list[Path]:
    """Write NAME.bin/.idx with roles, every row `epochs` times in a new order each; and NAME.valid with held-out rows, once.

    last_look: raises where the files must not get their names.
    """
    sizes = np.frombuffer(tally.sizes, np.int32)
    starts = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=starts[1:])
    stored.held_out = held_out
    check_disk_space(prefix.parent, epochs * (3 * int(starts[-1]) + 2 * 20 * len(sizes)))
    streams: dict[str, np.dtype] = {"": np.dtype(np.uint16), ".roles": np.dtype(np.uint8)}
    held_out_files: dict[str, np.dtype] = {}
    if held_out.any():
        held_out_files = {".valid": np.dtype(np.uint16), ".valid.roles": np.dtype(np.uint8)}
    ids, roles = stored.readers()
    random = np.random.default_rng(seed)
    repeats = tqdm(range(epochs), desc="repeats", disable=epochs == 1 or not sys.stderr.isatty())
    train = np.flatnonzero(~held_out).astype(np.int32)  # there may be many millions of rows
    with Writer(prefix, streams | held_out_files) as writer:

        def copy(which: np.ndarray, ending: str) -> None:
            for begin in range(0, len(which), ROWS):
                some = which[begin : begin + ROWS]
                for width, end, reader in ((2, ending, ids), (1, f"{ending}.roles", roles)):
                    writer.extend(
                        end, gathered(reader, width * starts[some], width * starts[some + 1]), sizes[some].tolist()
                    )

        for _ in repeats:
            copy(random.permutation(train), "")
        if held_out_files:
            copy(np.flatnonzero(held_out), ".valid")
        every = [writer.final(e, kind) for e in (".valid", ".valid.roles") for kind in ("bin", "idx")]
        writer.commit(remove=[] if held_out_files else every, last_look=last_look)
        return [writer.final(e, kind) for e in writer.streams for kind in ("bin", "idx")]


def gathered(reader, begins: np.ndarray, ends: np.ndarray) -> bytes:
    """The bytes of rows behind one another. reader: a slicing function, or the number of an open file."""
    pairs = zip(begins.tolist(), ends.tolist(), strict=True)
    if isinstance(reader, int):
        return b"".join([os.pread(reader, end - begin, begin) for begin, end in pairs])
    return b"".join([reader(slice(begin, end)) for begin, end in pairs])


def valid_rows(hashes: np.ndarray, rows: int, percent: float, seed: int) -> np.ndarray:
    """Return which rows are held out, bool [rows]: that share of the different contents, at least one.

    Equal rows go together, and so does all that was made of one row.

    Raises:
        UserError: nothing would be left to train.
    """
    if not percent:
        return np.zeros(rows, dtype=bool)
    contents = np.unique(hashes)
    many = max(1, round(len(contents) * percent / 100))
    if many >= len(contents):
        raise UserError(
            f"VALID_PERCENT={percent:g} would hold out all of {len(contents)} different rows; nothing was written. "
            "Set it to 0, or give more rows."
        )
    chosen = np.random.default_rng([seed, 1]).permutation(contents)[:many]
    return np.isin(hashes, chosen)
