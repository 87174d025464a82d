"""python -m json2binidx.inspect: what a .bin/.idx pair holds, and every place where it is damaged.

usage: python -m json2binidx.inspect NAME [--rows N] [--own-vocabulary]

  NAME        as in DATA_PATH: a name in data/, or any path, with or without .bin or .idx. Files of json2binidx_tool,
              RWKV-LM and Megatron are understood as well (all of them are MMIDIDX)
  --rows N    show the first N rows as text (2). What LOSS_MASK=qa trains is [[like this]], <end> is the end of a document
  --own-vocabulary    the ids are those of another vocabulary than World's (VOCABULARY=own in training.sh): no text is looked for
  --help      this text

Changes nothing. Answers 0 when the files are sound, and 2 when they are not, with the place of every fault.
"""

from __future__ import annotations

import io
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from rwkv_peft.common import paths
from rwkv_peft.common.errors import UserError, exit_with, handle_errors
from rwkv_peft.common.formatting import did_you_mean, join_names, plural
from rwkv_peft.config.shell import whole_number
from rwkv_peft.data.binidx import HEADER
from rwkv_peft.data.check_index import Faults, IndexedPair, read_pair
from rwkv_peft.data.check_tokens import LAST_WORLD_ID, TokenFacts, find_roles, read_roles, read_tokens, to_integers
from rwkv_peft.data.masking import target_weights
from rwkv_peft.data.tokenized_files import roles_in_text
from rwkv_peft.data.vocabulary_check import describe_vocabulary_problem
from rwkv_peft.text import tokenizer
from rwkv_peft.text.roles import Role
from rwkv_peft.text.turns import spans_of_text

SHOWN_TOKENS = 400  # of a row
SHOWN_CHARACTERS = 1200
OWN = "--own-vocabulary"


def main(arguments: list[str]) -> None:
    """Run the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # (tests have others)
            stream.reconfigure(errors="replace")
    with handle_errors():
        if {"-h", "--help"} & set(arguments):
            print(__doc__)
            return
        inspect(*command_line(arguments))


def command_line(arguments: list[str]) -> tuple[Path, int, bool]:
    """The path without ending, the number of rows to show, and whether the vocabulary is another one than World's."""
    own = OWN in arguments
    words, rows, rest = [], 2, [word for word in arguments if word != OWN]
    while rest:
        word = rest.pop(0)
        if word == "--rows" or word.startswith("--rows="):
            given = word.partition("=")[2] if "=" in word else (rest.pop(0) if rest else "")
            rows = whole_number("--rows", given, 0)
        elif word.startswith("--"):
            meant = did_you_mean(word, ["--rows", OWN, "--help"])
            raise UserError(f"{word}: is not an option{meant or '.'} There are --rows N, {OWN} and --help.")
        else:
            words.append(word)
    if len(words) != 1 or not words[0]:
        exit_with(__doc__, 2)
    return find_pair(words[0]), rows, own


def find_pair(name: str) -> Path:
    """Return the path of a pair without its endings."""
    prefix = paths.resolve_data(name)
    base = Path(str(prefix).removesuffix(".roles"))
    if base != prefix and Path(f"{base}.idx").is_file():  # the roles are shown with their tokens
        prefix = base
    index = Path(f"{prefix}.idx")
    if index.is_file():
        return prefix
    there = paths.list_data()
    is_alone = Path(f"{prefix}.bin").is_file()
    alone = f" {prefix.name}.bin is there, but nothing can be read without its .idx." if is_alone else ""
    raise UserError(
        f"{paths.display_path(index)}: there is no such file{did_you_mean(prefix.name, there) or '.'}{alone} "
        f"In data/ there is: {join_names(there)}."
    )


def inspect(prefix: Path, rows: int, own: bool = False) -> None:
    """Print what a pair has, and its faults."""
    faults, warnings = Faults(), Faults()
    pair = read_pair(prefix, faults)
    if pair:
        show_header(pair)
    facts = read_tokens(pair, faults, warnings) if pair and pair.dtype and pair.tokens else TokenFacts()
    roles = find_roles(prefix, faults)
    if pair and pair.sound:
        show_lengths(pair, facts)
        if roles and roles.sound:
            tallies = read_roles(roles, pair, faults)
            show_roles(tallies)
        elif not Path(f"{prefix}.roles.idx").exists():
            print("roles     no .roles file: qa finds turns by the headings User: and Assistant: in the text")
    if facts.outside:
        print(
            f"text      the ids ({facts.lowest:,} to {facts.highest:,}) do not belong to the World vocabulary "
            f"(0 to {LAST_WORLD_ID}): these data were made with another tokenizer"
        )
    if (
        pair
        and pair.sound
        and pair.tokens
        and not facts.outside
        and not own
        and (wrong := describe_vocabulary_problem(prefix))
    ):
        faults.add("vocabulary", f"{wrong}.")
    for line in warnings.lines():
        print(f"warning   {line}")
    if pair and pair.sound and not facts.outside:
        show_rows(pair, roles if roles and roles.sound and not faults else None, rows)
    if faults:
        sys.stdout.flush()
        many = plural(sum(faults.counts.values()), "fault")
        lines = "\n".join(f"  {line}" for line in faults.lines())
        raise UserError(
            f"{paths.display_path(prefix)} has {many}:\n{lines}\nMake it again with ./make_tokenize.sh, or copy it again from "
            "where it came from."
        )
    print(f"sound     {paths.display_path(prefix)}: nothing is wrong with it")


def show_header(pair: IndexedPair) -> None:
    """Print what the header says."""
    header = pair.header
    kind = pair.dtype.name if pair.dtype else "unknown"
    print(
        f"file      {paths.display_path(pair.prefix)}.bin/.idx, version {header.version}, dtype code {header.code} ({kind})"
    )
    per = "each row is one" if header.documents == header.rows + 1 else f"over {plural(header.rows, 'row')}"
    print(f"holds     {plural(header.rows, 'row')}, {plural(max(header.documents - 1, 0), 'document')} ({per})")


def show_lengths(pair: IndexedPair, facts: TokenFacts) -> None:
    """Print the lengths of documents."""
    histogram: Counter[int] = Counter()  # few keys: n different lengths need n * n / 2 tokens
    for _, sizes in pair.sizes():
        histogram.update(dict(zip(*(a.tolist() for a in np.unique(sizes, return_counts=True)), strict=True)))
    n, lengths = pair.header.rows, sorted(histogram)
    if not n:
        print("tokens    none")
        return
    empty = f"; {plural(histogram[0], 'row')} empty" if histogram[0] else ""
    below = np.cumsum([histogram[length] for length in lengths])

    def at(share: float) -> int:
        """The length that `share` of the rows do not exceed."""
        return lengths[int(np.searchsorted(below, share * n))]

    print(
        f"tokens    {pair.tokens:,}; per row min {lengths[0]:,}, median {at(0.5):,}, mean {pair.tokens / n:,.1f}, "
        f"95 % {at(0.95):,}, max {lengths[-1]:,}{empty}"
    )
    print(f"ends      {facts.ended:,} of {plural(n, 'row')} with token 0, the end of a document")
    if facts.outside:
        return
    if not facts.not_text:
        print("text      valid UTF-8 in every row")
        return
    print(
        f"text      no valid UTF-8 in {facts.not_text:,} of {plural(n, 'row')}, the first is row {facts.first_not_text:,}"
    )
    if facts.not_text > n / 2:
        print("warning   most rows are no whole UTF-8: they may be pieces cut at fixed lengths")


def show_roles(tallies: np.ndarray) -> None:
    """Print how many tokens each role has."""
    whole = max(int(tallies.sum()), 1)
    shares = [f"{role.name.lower()} {100 * tallies[role] / whole:.1f} %" for role in Role if tallies[role]]
    print(f"roles     {', '.join(shares) or 'none'}")


def show_rows(pair: IndexedPair, roles: IndexedPair | None, number: int) -> None:
    """Print the first rows."""
    assert pair.dtype is not None, "a pair whose dtype is unknown is refused before"
    for row in range(min(number, pair.header.rows)):
        size = int(np.fromfile(pair.idx, "<i4", 1, offset=HEADER + 4 * row)[0])
        at = int(np.fromfile(pair.idx, "<i8", 1, offset=pair.header.offsets_at + 8 * row)[0])
        shown = min(size, SHOWN_TOKENS)
        ids = to_integers(np.fromfile(pair.bin, pair.dtype, shown, offset=at))
        place = at // pair.dtype.itemsize  # a role is one byte
        said = np.fromfile(roles.bin, np.uint8, shown, offset=place) if roles else roles_in_text(ids, spans_of_text)
        print(f"\nrow {row:,}: {plural(size, 'token')}{f', the first {shown:,}' if shown < size else ''}")
        trained = np.concatenate([[False], target_weights(said, "qa") > 0]) if len(ids) else said
        text = tokenizer.mark_trained(ids.tolist(), trained.tolist())
        if len(text) > SHOWN_CHARACTERS:
            text = f"{text[:SHOWN_CHARACTERS]} ... ({plural(len(text) - SHOWN_CHARACTERS, 'character')} more)"
        print("\n".join(f"  {line}" for line in text.split("\n")))
    print()
