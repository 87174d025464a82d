"""Tokenized files: found by the names in DATA_PATH, and opened with who said what in them."""

from __future__ import annotations

import functools
import os
import re
import shlex
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rwkv_peft.common import paths
from rwkv_peft.common.errors import SettingError, SettingErrors, UserError
from rwkv_peft.common.formatting import did_you_mean, join_names
from rwkv_peft.text import preset_names, tokenizer
from rwkv_peft.text.roles import Role, Span
from rwkv_peft.text.template import ENDINGS, Template
from rwkv_peft.text.turns import spans_of_text

from . import mixture, report_file
from .binidx import Reader
from .masking import Markers, roles_of_tokens
from .token_source import Source


def data_files(text: str, other_than: Sequence[str] = ()) -> tuple[list[tuple[Path, Fraction]], list[str]]:
    """DATA_PATH -> prefixes and weights of the tokenized files, and what is wrong with them. other_than: names that cannot be
    meant, such as the data for training where held-out data are wanted."""
    if not missing_data(paths.data_prefix(text)):  # a file whose very name looks like a mixture
        return [(paths.data_prefix(text), Fraction(1))], []
    try:
        names = mixture.parse(text)
    except ValueError as error:
        return [], [str(error)]
    files = [(paths.data_prefix(name), weight) for name, weight in names]
    wrong = [
        paths.foreign_path(name) or missing
        for (name, _), (prefix, _) in zip(names, files, strict=True)
        if (missing := missing_data(prefix, other_than))
    ]
    prefixes = [os.path.abspath(prefix) for prefix, _ in files]
    wrong += [
        f"names {paths.display_path(prefix)} more than once; give each file one weight"
        for prefix in sorted({p for p in prefixes if prefixes.count(p) > 1})
    ]
    return files, wrong


def missing_data(prefix: Path, other_than: Sequence[str] = ()) -> str:
    """What to say if a tokenized file is not there, else "". other_than: names that are not proposed."""
    missing = [ending for ending in (".bin", ".idx") if not Path(f"{prefix}{ending}").is_file()]
    if not missing:
        return ""
    for link in (Path(f"{prefix}{ending}") for ending in missing):
        if link.is_symlink():
            return f"{paths.display_path(link)} {paths.missing(link)}"
    source = Path(f"{prefix}.jsonl")
    there = [name for name in paths.data_names() if name not in other_than]
    hint = f"{did_you_mean(prefix.name, there) or '.'} Tokenized data in data/: {join_names(there)}"
    if source.is_file():
        hint = f"; make it: ./make_tokenize.sh {shlex.quote(source.name)}"
    return f"{paths.display_path(prefix)}{' and '.join(missing)}: there is no such file{hint}"


class Form(NamedTuple):
    """What dialogues were written in: PROMPT_TYPE, EOT, and the template itself (None: its file is gone)."""

    prompt_type: str
    eot: str
    template: Template | None


def form_of(prefix: Path) -> Form | None:
    """What tokenized data were written in, as NAME.report.json tells; None where there is none. UserError if it holds a template
    that cannot be read."""
    report = report_file.read(prefix)
    settings, path = report.get("settings", {}), report_file.path_of(prefix)
    if not {"PROMPT_TYPE", "EOT"} <= {*settings}:
        return None
    name, eot = settings["PROMPT_TYPE"], settings["EOT"]
    if eot not in ENDINGS:
        raise UserError(f"{paths.display_path(path)}: EOT cannot be {eot!r}. Was the file edited?")
    told = {"template": report.get("template"), "prompt_type": name}
    name = preset_names.recorded_name(told)
    try:
        return Form(name, eot, preset_names.recorded(told, paths.display_path(path)))
    except (SettingErrors, UserError):
        if told["template"] is not None:
            raise
        return Form(name, eot, None)  # an older version has kept the name alone, and the user's file is not there now


def common(forms: Sequence[Form]) -> Form | None:
    """The one form of several files, None where they differ."""
    first = forms[0] if forms else None
    return first if first and all(one == first for one in forms) else None


LOOKED_AT = 1000  # rows of a file, from all over it, that tell whether it begins rows with token 0


def bos_share(reader: Reader) -> float:
    """The share of a file's rows that begin with token 0. Rows of one token tell nothing."""
    rows = np.flatnonzero(reader.sizes > 1)
    if not len(rows):
        return 0.0
    some = rows[np.linspace(0, len(rows) - 1, min(LOOKED_AT, len(rows))).astype(np.int64)]
    starts = np.cumsum(reader.sizes, dtype=np.int64) - reader.sizes
    return float(np.mean(np.asarray(reader.tokens)[starts[some]] == tokenizer.END_OF_DOC))


def bos_of(prefix: Path) -> tuple[int, str]:
    """Whether the rows of tokenized data begin with token 0: 1 or 0, and a warning ("" for none). NAME.report.json tells; for
    files without it, the rows do."""
    share = bos_share(Reader(prefix))
    told = report_file.read(prefix).get("settings", {}).get("BOS")
    found = int(share >= 0.5)
    if told is not None and told != found:
        return found, (
            f"{paths.display_path(prefix)}.report.json says BOS={told}, but {share:.0%} of the rows begin with token 0: the "
            "report belongs to other tokens. BOS is taken from the rows"
        )
    if 0 < share < 1:
        return found, (
            f"{share:.0%} of the rows of {paths.display_path(prefix)} begin with token 0, the others do not; it counts as "
            f"BOS={found}. Tokenize the rows again with one BOS"
        )
    return found, ""


def blank_lines_of(prefix: Path) -> bool:
    """Whether answers of ready texts hold blank lines, as NAME.report.json tells: then a blank line does not end a turn."""
    return bool(report_file.read(prefix).get("places", {}).get("blank lines"))


def mask_of(loss_mask: str) -> str:
    """LOSS_MASK=se is qa with roles that the markers tell."""
    return "qa" if loss_mask == "se" else loss_mask


def open_sources(
    files, loss_mask: str, mask_start: str, mask_end: str, vocab_size: int, say: Callable[[str], None]
) -> list[Source]:
    """Tokenized files with the roles that LOSS_MASK asks for: those written down, or found in the text. files: prefixes and
    weights. mask_start, mask_end: MASK_START and MASK_END, as the script has them. Problems for markers that are nowhere."""
    sources, missing = [], []
    for prefix, weight in files:
        reader, roles = Reader(prefix), None
        markers = Markers(unescaped(mask_start), unescaped(mask_end))
        if loss_mask == "se":
            roles = functools.partial(roles_in_text, find_spans=markers.spans)
        elif loss_mask in ("qa", "last"):
            if any(os.path.lexists(f"{prefix}.roles{ending}") for ending in (".bin", ".idx")):
                roles = Reader(f"{prefix}.roles")
            else:
                roles = functools.partial(roles_in_text, find_spans=spans_of_text)
                say(
                    f"{prefix.name} has no .roles file: who said what is found by the headings User: and Assistant: in the text."
                )
        sources.append(Source(reader, roles, vocab_size, weight))
        if loss_mask == "se" and not markers.starts:
            missing.append(SettingError("MASK_START", f"is nowhere in {prefix.name}.bin"))
        elif loss_mask == "se" and not markers.ends:
            missing.append(SettingError("MASK_END", f"is nowhere behind a MASK_START in {prefix.name}.bin"))
    if missing:
        raise SettingErrors(*missing)
    return sources


def roles_in_text(ids: np.ndarray, find_spans: Callable[[bytes], Sequence[Span]]) -> np.ndarray:
    """Who said each token of a document whose file does not tell, uint8 [n]. find_spans: from its bytes to spans of them."""
    ids = np.where(ids < tokenizer.VOCAB_SIZE, ids, tokenizer.END_OF_DOC)  # others have no bytes
    spans = find_spans(tokenizer.decode_bytes(ids.tolist()))
    roles = roles_of_tokens(tokenizer.token_lengths()[ids], spans, end_of_doc=len(ids) > 0 and ids[-1] == 0)
    if len(ids) > 1 and ids[0] == tokenizer.END_OF_DOC:  # BOS
        roles[0] = Role.HEADING
    return roles


def unescaped(text: str) -> bytes:
    """The bytes that MASK_START and MASK_END mean."""
    marks = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}
    return re.sub(r"\\[nt\\]", lambda found: marks[found[0]], text).encode()
