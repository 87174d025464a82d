"""The tokenizer of the RWKV World vocabulary: greedy longest match over UTF-8 bytes.

Ids 1..65529 are in the vocabulary file of the `rwkv` package; 0 ends a document and has no bytes; 65530..65535 are reserved.
Text is encoded by pyrwkv-tokenizer if it is installed, else by the Python encoder below; both return the same ids
(tests/text/test_tokenizer.py).
"""

from __future__ import annotations

import ast
import codecs
import contextlib
import ctypes
import functools
import importlib.util
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from rwkv_peft.common.errors import UserError, pip_command

VOCABULARY = "rwkv_vocab_v20230424"  # its name in reports, and that of its file
END_OF_DOC = 0
_LITERALS = 512  # of the vocabulary that are parsed at once: one by one takes twice the time, all together 90 MB
VOCAB_SIZE = 65536  # rows of emb and head: the vocabulary and the reserved ids


def vocabulary_file() -> Path:
    """Return the vocabulary file, found without importing the package that has it.

    Raises:
        UserError: no package has it.
    """
    for package in ("rwkv", "pyrwkv_tokenizer"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (path := Path(folder) / f"{VOCABULARY}.txt").is_file():
                return path
    raise UserError(f"The World vocabulary is missing. Install it: {pip_command('rwkv==0.8.32')}")


@functools.cache
def token_bytes() -> tuple[bytes, ...]:
    """Return the bytes of every id, [65536]; b'' for 0 and for the reserved ids."""
    table = [b""] * VOCAB_SIZE
    lines = vocabulary_file().read_text(encoding="utf-8").split("\n")  # a token may be a line break of another kind
    # each line: id, Python literal of the token (str or bytes), length in bytes
    parts = [(line.partition(" ")[0], *line.partition(" ")[2].rstrip().rpartition(" ")[::2]) for line in lines if line]
    tokens: list[str | bytes] = []
    for begin in range(0, len(parts), _LITERALS):
        tokens += ast.literal_eval("[" + ",".join(literal for _, literal, _ in parts[begin : begin + _LITERALS]) + "]")
    for (number, _, length), token in zip(parts, tokens, strict=True):
        token = token.encode("utf-8") if isinstance(token, str) else token
        if len(token) != int(length):
            raise UserError(f"{vocabulary_file()}: the entry of id {number} is damaged; install rwkv again.")
        table[int(number)] = token
    return tuple(table)


@functools.cache
def token_lengths() -> np.ndarray:
    """Return the number of bytes per id, int64 [65536]."""
    return np.array([len(b) for b in token_bytes()], dtype=np.int64)


def decode(ids: Iterable[int]) -> str:
    """Decode ids; bytes that are not UTF-8 become U+FFFD."""
    return decode_bytes(ids).decode("utf-8", "replace")


def decode_bytes(ids: Iterable[int]) -> bytes:
    """Return the bytes of ids; those outside the vocabulary have none."""
    table = token_bytes()
    return b"".join(table[i] for i in ids)


def mark_trained(
    ids: Sequence[int], trained: Sequence[bool], begin: str = "[[", end: str = "]]", separator: str = ""
) -> str:
    r"""Decode ids for display, with marks around every run of trained ones. The text cannot control a terminal.

    Args:
        ids: [n]; token 0 is shown as <end>, or as <bos> at the beginning.
        trained: [n], whether each id is trained.
        begin: the mark before a run.
        end: the mark after it.
        separator: goes between tokens; if there is one, line breaks are shown as \n, and incomplete characters as \xe4.
    """
    table, out, has_bos = token_bytes(), [], len(ids) > 1 and ids[0] == END_OF_DOC
    for is_trained, group in itertools.groupby(zip(trained, ids, strict=True), key=lambda pair: bool(pair[0])):
        tokens = [table[i] or (b"<end>" if i == END_OF_DOC else b"<%d>" % i) for _, i in group]
        if has_bos:
            tokens[0], has_bos = b"<bos>", False
        if separator:
            parts = (token.decode("utf-8", "backslashreplace").replace("\n", "\\n") for token in tokens)
            words = separator.join(map(_escape_controls, parts))
        else:
            words = _escape_controls(b"".join(tokens).decode("utf-8", "replace"))
        out.append(f"{begin}{words}{end}" if is_trained else words)
    return separator.join(out)


def _escape_controls(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


class Encoder(Protocol):
    """What encodes text."""

    def encode(self, text: str) -> list[int]:
        """Encode text."""
        ...


class PythonEncoder:
    """The reference encoder: at every byte it takes the longest token that starts there."""

    def __init__(self) -> None:
        # by first byte: {token: id}, and the lengths that occur, longest first
        self.tokens: list[dict[bytes, int]] = [{} for _ in range(256)]
        for i, token in enumerate(token_bytes()):
            if token:
                self.tokens[token[0]][token] = i
        self.lengths = [sorted({len(t) for t in tokens}, reverse=True) for tokens in self.tokens]

    def encode(self, text: str) -> list[int]:
        """Encode text."""
        data, ids, at = text.encode("utf-8"), [], 0
        while at < len(data):
            tokens = self.tokens[data[at]]
            for length in self.lengths[data[at]]:
                token = tokens.get(data[at : at + length])
                if token is not None and at + length <= len(data):
                    ids.append(token)
                    at += length
                    break
        return ids


@functools.cache
def encoder() -> Encoder:
    """Return the fast library's encoder, or the Python one if the library is not installed (it lacks a wheel for the system)."""
    try:
        import pyrwkv_tokenizer  # (optional, and loaded only to encode)
    except ImportError:
        return PythonEncoder()
    return pyrwkv_tokenizer.RWKVTokenizer()


def unload() -> None:
    """Free the library's memory (about 230 MB); the next call of `encode` loads it again."""
    encoder.cache_clear()
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps freed pages unless it is asked to return them
        ctypes.CDLL(None).malloc_trim(0)


def encode(text: str) -> list[int]:
    """Encode text.

    Raises:
        UnicodeEncodeError: it has lone surrogates, which no file can hold.
    """
    return encoder().encode(text)


class Utf8Stream:
    """Decodes ids one by one; an incomplete character waits for its rest, and is dropped if none comes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Return the text that is complete with this token."""
        return self._decoder.decode(token_bytes()[token])
