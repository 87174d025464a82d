"""Tokenized files: found by the names in DATA_PATH, and opened with their roles."""

from __future__ import annotations

import functools
import os
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
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
from .token_source import TokenSource


def data_files(text: str, other_than: Sequence[str] = ()) -> tuple[list[tuple[Path, Fraction]], list[str]]:
    """Return prefixes and weights of the tokenized files in DATA_PATH, and what is wrong with them.

    Args:
        text: DATA_PATH.
        other_than: names that cannot be meant, such as the training data where held-out data are wanted.
    """
    if not missing_data(paths.resolve_data(text)):  # a file whose name looks like a mixture
        return [(paths.resolve_data(text), Fraction(1))], []
    try:
        names = mixture.parse_mixture(text)
    except ValueError as error:
        return [], [str(error)]
    files = [(paths.resolve_data(name), weight) for name, weight in names]
    wrong = [
        paths.explain_foreign_path(name) or missing
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
    """Return the message for a tokenized file that is missing, else "".

    Args:
        prefix: path without ending.
        other_than: names that are not proposed.
    """
    missing = [ending for ending in (".bin", ".idx") if not Path(f"{prefix}{ending}").is_file()]
    if not missing:
        return ""
    for link in (Path(f"{prefix}{ending}") for ending in missing):
        if link.is_symlink():
            return f"{paths.display_path(link)} {paths.describe_missing(link)}"
    source = Path(f"{prefix}.jsonl")
    there = [name for name in paths.list_data() if name not in other_than]
    hint = f"{did_you_mean(prefix.name, there) or '.'} Tokenized data in data/: {join_names(there)}"
    if source.is_file():
        hint = f"; make it: ./make_tokenize.sh {shlex.quote(source.name)}"
    return f"{paths.display_path(prefix)}{' and '.join(missing)}: there is no such file{hint}"


class Form(NamedTuple):
    """The format of dialogues.

    Attributes:
        prompt_type: PROMPT_TYPE.
        eot: EOT.
        template: None if its file is missing.
    """

    prompt_type: str
    eot: str
    template: Template | None


def read_form(prefix: Path) -> Form | None:
    """Return the format of tokenized data from NAME.report.json; None if there is none.

    Raises:
        UserError: it holds a template that cannot be read.
    """
    report = report_file.read(prefix)
    settings, path = report.get("settings", {}), report_file.path_of(prefix)
    if not {"PROMPT_TYPE", "EOT"} <= {*settings}:
        return None
    name, eot = settings["PROMPT_TYPE"], settings["EOT"]
    if eot not in ENDINGS:
        raise UserError(f"{paths.display_path(path)}: EOT cannot be {eot!r}. Was the file edited?")
    recorded = {"template": report.get("template"), "prompt_type": name}
    name = preset_names.recorded_name(recorded)
    try:
        return Form(name, eot, preset_names.recorded_template(recorded, paths.display_path(path)))
    except (SettingErrors, UserError):
        if recorded["template"] is not None:
            raise
        return Form(name, eot, None)  # an older version kept only the name, and the user's file is missing


def common_form(forms: Sequence[Form]) -> Form | None:
    """Return the common format of several files, None if they differ."""
    first = forms[0] if forms else None
    return first if first and all(one == first for one in forms) else None


SAMPLED_ROWS = 1000  # rows from all over a file that show whether it begins rows with token 0


def bos_share(reader: Reader) -> float:
    """Return the share of a file's rows that begin with token 0. Rows of one token do not count."""
    rows = np.flatnonzero(reader.sizes > 1)
    if not len(rows):
        return 0.0
    some = rows[np.linspace(0, len(rows) - 1, min(SAMPLED_ROWS, len(rows))).astype(np.int64)]
    starts = np.cumsum(reader.sizes, dtype=np.int64) - reader.sizes
    return float(np.mean(np.asarray(reader.tokens)[starts[some]] == tokenizer.END_OF_DOC))


def detect_bos(prefix: Path) -> tuple[int, str]:
    """Return whether the rows of tokenized data begin with token 0, 1 or 0, and a warning ("" for none).

    By NAME.report.json; for files without it, by the rows.
    """
    share = bos_share(Reader(prefix))
    recorded = report_file.read(prefix).get("settings", {}).get("BOS")
    bos = int(share >= 0.5)
    if recorded is not None and recorded != bos:
        return bos, (
            f"{paths.display_path(prefix)}.report.json says BOS={recorded}, but {share:.0%} of the rows begin with token 0: the "
            "report belongs to other tokens. BOS is taken from the rows"
        )
    if 0 < share < 1:
        return bos, (
            f"{share:.0%} of the rows of {paths.display_path(prefix)} begin with token 0, the others do not; it counts as "
            f"BOS={bos}. Tokenize the rows again with one BOS"
        )
    return bos, ""


def has_blank_lines(prefix: Path) -> bool:
    """Return whether answers of formatted texts hold blank lines, by NAME.report.json.

    A blank line then does not end a turn.
    """
    return bool(report_file.read(prefix).get("places", {}).get("blank lines"))


def effective_mask(loss_mask: str) -> str:
    """Return the mask of LOSS_MASK: se is qa with roles from the markers."""
    return "qa" if loss_mask == "se" else loss_mask


def open_sources(
    files: Iterable[tuple[Path, Fraction]],
    loss_mask: str,
    mask_start: str,
    mask_end: str,
    vocab_size: int,
    say: Callable[[str], None],
) -> list[TokenSource]:
    """Open tokenized files with the roles that LOSS_MASK needs: those recorded, or found in the text.

    Args:
        files: prefixes and weights.
        loss_mask: LOSS_MASK.
        mask_start: MASK_START, as in the script.
        mask_end: MASK_END, as in the script.
        vocab_size: of the model.
        say: called with notes for the user.

    Raises:
        SettingErrors: a marker does not occur.
    """
    sources, missing = [], []
    for prefix, weight in files:
        reader = Reader(prefix)
        roles: Reader | Callable[[np.ndarray], np.ndarray] | None = None
        markers = Markers(unescape_marker(mask_start), unescape_marker(mask_end))
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
        sources.append(TokenSource(reader, roles, vocab_size, weight))
        if loss_mask == "se" and not markers.starts:
            missing.append(SettingError("MASK_START", f"is nowhere in {prefix.name}.bin"))
        elif loss_mask == "se" and not markers.ends:
            missing.append(SettingError("MASK_END", f"is nowhere behind a MASK_START in {prefix.name}.bin"))
    if missing:
        raise SettingErrors(*missing)
    return sources


def roles_in_text(ids: np.ndarray, find_spans: Callable[[bytes], Sequence[Span]]) -> np.ndarray:
    """Return the role of each token of a document without recorded roles, uint8 [n].

    Args:
        ids: the tokens.
        find_spans: from the bytes of the document to its spans.
    """
    ids = np.where(ids < tokenizer.VOCAB_SIZE, ids, tokenizer.END_OF_DOC)  # other ids have no bytes
    spans = find_spans(tokenizer.decode_bytes(ids.tolist()))
    roles = roles_of_tokens(tokenizer.token_lengths()[ids], spans, end_of_doc=len(ids) > 0 and ids[-1] == 0)
    if len(ids) > 1 and ids[0] == tokenizer.END_OF_DOC:  # BOS
        roles[0] = Role.HEADING
    return roles


def unescape_marker(text: str) -> bytes:
    """Return the bytes that MASK_START and MASK_END mean."""
    marks = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}
    return re.sub(r"\\[nt\\]", lambda match: marks[match[0]], text).encode()
