"""Check that the ids of a tokenized file are those of the World vocabulary.

Ids of another vocabulary are numbers too, and would train garbage. Encoding a sample again and comparing ids does not
work: of ids of other vocabularies 94 to 99 % come out as they were, because tokens that follow one another by chance
seldom make up a longer one, and of World files that were encoded piece by piece only 50 to 90 %. The text shows it. Of
100 tokens of another vocabulary, 1 to 25 yield bytes that are not UTF-8, or control characters; World files have
hardly any, whatever their language (byte-level BPE, SentencePiece BPE and WordPiece of 8,000 to 50,000 ids, on
English, Chinese and code). Form feeds (pages) and token 24 (EOT=x17) are no evidence. Single letters of an alphabet
that has hardly any words in the text, inside words of another, and rare Han characters beside Latin letters that are
not words, reveal small files as well.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rwkv_peft.common.formatting import plural
from rwkv_peft.common.paths import display_path
from rwkv_peft.text import tokenizer

from . import report_file
from .binidx import Reader

STRETCHES, STRETCH = 64, 1024  # of a sample: number of places, and tokens at each
LEAST = 3  # places: fewer may be damage
BROKEN = 0.01  # share of tokens that yield bytes which are not UTF-8, control characters or reserved ids
MIXED = 0.04  # ... that join alphabets which never meet in a word, as "TY\u0454"
BOTH = (0.003, 0.005)  # ... of the two together
# share of tokens that yield rare Han characters, and of these among all, in a text mostly of Latin letters
RARE, OF_HAN = 0.03, 0.2
WORD = re.compile("[A-Za-z]{6,}")
LAST = 65529  # ids above are reserved
SHOWN = 60  # characters of a sample in a message
CONTROL = {chr(n) for n in range(1, 32)} - set("\t\n\f\r\x17\x1b") | {"\x7f"}
# the common Han characters: the first levels of the mainland's, Taiwan's and Japan's standards
LEVELS = (("gb2312", 0xB0A1, 0xD7F9), ("big5", 0xA440, 0xC67E), ("shift_jis", 0x889F, 0x9872))
# alphabets, by their first and last character. Han, kana and Latin letters meet in any text of East Asia
ALPHABETS = (
    ("latin", "A", "Z"), ("latin", "a", "z"), ("latin", "\xc0", "\u024f"), ("greek", "\u0370", "\u03ff"),
    ("cyrillic", "\u0400", "\u052f"), ("armenian", "\u0530", "\u058f"), ("hebrew", "\u0590", "\u05ff"),
    ("arabic", "\u0600", "\u06ff"), ("devanagari", "\u0900", "\u097f"), ("indic", "\u0980", "\u0dff"),
    ("thai", "\u0e00", "\u0e7f"), ("georgian", "\u10a0", "\u10ff"), ("cjk", "\u3040", "\u9fff"), ("hangul", "\uac00", "\ud7af"),
)  # fmt: skip
# these occur beside letters of any other: Han, kana and hangul are written without blanks, Greek letters are signs of mathematics
ANYWHERE = {"cjk", "hangul", "greek"}
# and these beside Latin ones: Thai is written without blanks, Arabic and Hebrew articles come before any word
BESIDE_LATIN = {"latin", "thai", "arabic", "hebrew"}


@dataclass
class SampleCounts:
    """Counts of a sample.

    Attributes:
        tokens: of the sample.
        broken: bytes that are not UTF-8, control characters and reserved ids.
        lone: by alphabet, single letters beside another alphabet's.
        words: by alphabet, runs of two letters and more.
        rare: rare Han characters beside letters.
        han: Han characters.
        latin: Latin letters.
        text: a part of it that is not text.
    """

    tokens: int = 0
    broken: int = 0
    lone: Counter[str] = field(default_factory=Counter)
    words: Counter[str] = field(default_factory=Counter)
    rare: int = 0
    han: int = 0
    latin: int = 0
    text: str = ""

    @property
    def mixed(self) -> int:
        r"""Single letters of alphabets that are not those of the text: "TY\u0454", but not "PDF\u044b" in Russian."""
        return sum(n for name, n in self.lone.items() if n > 2 * self.words[name])

    def is_text(self) -> bool:
        """Return whether the ids are those of the World vocabulary."""
        broken, mixed, rare = (
            n / max(self.tokens, 1) if n >= LEAST else 0.0 for n in (self.broken, self.mixed, self.rare)
        )
        foreign = rare >= RARE and self.rare >= OF_HAN * self.han and self.latin > self.han
        return not (broken >= BROKEN or mixed >= MIXED or (broken >= BOTH[0] and mixed >= BOTH[1]) or foreign)


def describe_vocabulary_problem(prefix: Path, reader: Reader | None = None) -> str:
    """Return why a tokenized file is not of the World vocabulary; "" if it is.

    The same check serves training.sh and the inspector.

    Args:
        prefix: its path without ending.
        reader: the file, if it is already open.
    """
    reported = (
        prefix if Path(f"{prefix}.report.json").is_file() else prefix.with_name(prefix.name.removesuffix(".valid"))
    )
    report = report_file.read(reported)
    written = report.get("files", {}).get(f"{prefix.name}.bin")
    if written and "vocabulary" in report:
        if (named := report["vocabulary"]) != tokenizer.VOCABULARY:
            made = f"{prefix.name} was made with the vocabulary {named}, not World's"
            return f"{display_path(reported)}.report.json says that {made}"
        if written.get("bytes") == Path(f"{prefix}.bin").stat().st_size:
            return ""  # make_tokenize.sh has written it
    reader, seen = reader or Reader(prefix), SampleCounts()
    for ids in sample(np.asarray(reader.tokens), np.asarray(reader.sizes)):
        count_text(ids, seen)
    if seen.is_text():
        return ""
    begins = " ".join("".join(c if c.isprintable() else " " for c in seen.text).split())[:SHOWN]
    return (
        f"{display_path(prefix)}.bin holds no text of the World vocabulary: a sample of {plural(seen.tokens, 'token')} decodes "
        f"to {seen.broken:,} bytes that are no text and to {seen.mixed + seen.rare:,} letters that do not belong together, like "
        f'"{begins}". Its ids are those of another vocabulary (20B, GPT-2, Llama ...)'
    )


def sample(tokens: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """Return tokens from all over a file, split where documents end."""
    ends = np.cumsum(sizes, dtype=np.int64)
    begins = np.unique(np.linspace(0, max(0, len(tokens) - STRETCH), STRETCHES).astype(np.int64))
    if len(tokens) <= STRETCHES * STRETCH:
        begins = np.arange(0, len(tokens), STRETCH)
    parts = []
    for begin in begins.tolist():
        ids = tokens[begin : begin + STRETCH]
        ids = np.clip(np.nan_to_num(ids), 0, tokenizer.VOCAB_SIZE - 1).astype(np.int64)
        inside = ends[np.searchsorted(ends, begin, "right") : np.searchsorted(ends, begin + len(ids))] - begin
        parts += np.split(ids, np.union1d(inside, np.flatnonzero(ids == tokenizer.END_OF_DOC)))
    return [part for part in parts if len(part)]


def count_text(ids: np.ndarray, seen: SampleCounts) -> None:
    """Add the counts of a part of the text. A character that is incomplete at an end is not a fault."""
    data = tokenizer.decode_bytes(ids.tolist())
    cut = next((i for i, byte in enumerate(data[:3]) if byte & 0xC0 != 0x80), min(3, len(data)))
    data, mark = data[cut:], "\ufffd"
    text = data.decode("utf-8", "replace")
    tail = text.endswith(mark) and not data.endswith(mark.encode())
    broken = text.count(mark) - data.count(mark.encode()) - tail
    broken += sum(c in CONTROL for c in text) + int((ids > LAST).sum())
    letters = [alphabet(c) for c in text]
    runs = [(name, len(list(same))) for name, same in itertools.groupby(letters)]
    mixed = Counter(
        name
        for (before, _), (name, many), (after, _) in zip([("", 0), *runs], runs, [*runs[1:], ("", 0)], strict=False)
        if many == 1 and not (can_be_adjacent(before, name) and can_be_adjacent(name, after))
    )
    han = [c for c in text if "\u4e00" <= c <= "\u9fff"]
    beside = zip(["", *letters], [*letters[1:], ""], text, strict=False)
    rare = sum("\u4e00" <= c <= "\u9fff" and bool(before or after) and not is_common(c) for before, after, c in beside)
    if rare and rare <= sum(len(tokenizer.encode(f" {word}")) == 1 for word in WORD.findall(text)):
        rare = 0  # a list of rare characters that words explain
    seen.tokens, seen.broken = seen.tokens + len(ids), seen.broken + broken
    seen.lone += mixed
    seen.words += Counter(name for name, many in runs if name and many > 1)
    seen.rare, seen.han, seen.latin = seen.rare + rare, seen.han + len(han), seen.latin + letters.count("latin")
    if not seen.text and (broken or mixed or rare):
        seen.text = text


def can_be_adjacent(one: str, other: str) -> bool:
    """Return whether letters of two alphabets occur beside one another in texts; "" for what is not a letter."""
    both = {one, other}
    return len(both) == 1 or "" in both or bool(both & ANYWHERE) or both <= BESIDE_LATIN


@functools.cache
def is_common(character: str) -> bool:
    """Return whether a Han character is among the common ones of any standard."""
    for encoding, first, last in LEVELS:
        with contextlib.suppress(UnicodeEncodeError):
            if first <= int.from_bytes(character.encode(encoding), "big") <= last:
                return True
    return False


@functools.cache
def alphabet(character: str) -> str:
    """Return the alphabet of a character; "" for what is not a letter."""
    return next((name for name, first, last in ALPHABETS if first <= character <= last), "")
