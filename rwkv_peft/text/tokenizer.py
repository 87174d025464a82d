"""The RWKV World vocabulary: text -> ids and back, greedy longest match over UTF-8 bytes.

Ids 1..65529 are in the vocabulary file that the `rwkv` package carries; 0 ends a document and has no bytes;
65530..65535 are reserved. Encoding is done by pyrwkv-tokenizer where it is installed, else by the Python trie below;
both give the same ids (tests/text/test_tokenizer.py).
"""

from __future__ import annotations

import ast
import codecs
import contextlib
import ctypes
import functools
import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rwkv_peft.common.errors import UserError, pip_command

VOCABULARY = "rwkv_vocab_v20230424"  # its name in reports
END_OF_DOC = 0
LITERALS = 512  # of the vocabulary that are read at once: one by one takes twice the time, all together 90 MB
VOCAB_SIZE = 65536  # rows of emb and head: the vocabulary and the reserved ids


def vocabulary_file() -> Path:
    """The file rwkv_vocab_v20230424.txt, found without importing the package that carries it."""
    for package, name in (("rwkv", "rwkv_vocab_v20230424.txt"), ("pyrwkv_tokenizer", "rwkv_vocab_v20230424.txt")):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (path := Path(folder) / name).is_file():
                return path
    raise UserError(f"The World vocabulary is missing. Install it: {pip_command('rwkv==0.8.32')}")


@functools.cache
def token_bytes() -> tuple[bytes, ...]:
    """The bytes of every id, [65536]; b'' for 0 and for the reserved ids."""
    table = [b""] * VOCAB_SIZE
    lines = vocabulary_file().read_text(encoding="utf-8").split("\n")  # a token may be a line break of another kind
    # each line: id, Python literal of the token (str or bytes), length in bytes
    parts = [(line.partition(" ")[0], *line.partition(" ")[2].rstrip().rpartition(" ")[::2]) for line in lines if line]
    tokens: list[str | bytes] = []
    for begin in range(0, len(parts), LITERALS):
        tokens += ast.literal_eval("[" + ",".join(literal for _, literal, _ in parts[begin : begin + LITERALS]) + "]")
    for (number, _, length), token in zip(parts, tokens, strict=True):
        token = token.encode("utf-8") if isinstance(token, str) else token
        if len(token) != int(length):
            raise UserError(f"{vocabulary_file()}: the entry of id {number} is damaged; install rwkv again.")
        table[int(number)] = token
    return tuple(table)


@functools.cache
def token_lengths() -> np.ndarray:
    """Bytes per id, int64 [65536]."""
    return np.array([len(b) for b in token_bytes()], dtype=np.int64)


def decode(ids) -> str:
    """Ids -> text; bytes that are no UTF-8 become U+FFFD. Ids outside the vocabulary have no bytes."""
    return decode_bytes(ids).decode("utf-8", "replace")


def decode_bytes(ids) -> bytes:
    table = token_bytes()
    return b"".join(table[i] for i in ids)


def marked(ids: Sequence[int], trained: Sequence[bool], begin: str = "[[", end: str = "]]", border: str = "") -> str:
    """The text of ids with marks around every run of trained ones; <end> is token 0, <bos> where the text begins with it.
    Nothing in it can steer a terminal.

    ids, trained: [n]. border: what stands between tokens; with one, bytes that are half a character show as \\xe4.
    """
    table, out, begun = token_bytes(), [], len(ids) > 1 and ids[0] == END_OF_DOC
    for is_trained, group in itertools.groupby(zip(trained, ids, strict=True), key=lambda pair: bool(pair[0])):
        tokens = [table[i] or (b"<end>" if i == END_OF_DOC else b"<%d>" % i) for _, i in group]
        if begun:
            tokens[0], begun = b"<bos>", False
        if border:
            words = border.join(visible(token.decode("utf-8", "backslashreplace"), border) for token in tokens)
        else:
            words = visible(b"".join(tokens).decode("utf-8", "replace"), border)
        out.append(f"{begin}{words}{end}" if is_trained else words)
    return border.join(out)


def visible(text: str, border: str) -> str:
    """Control characters as their numbers; where tokens are told apart, line breaks as \\n as well."""
    if border:
        text = text.replace("\n", "\\n")
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


class PythonEncoder:
    """The definition: at every byte take the longest token that starts there."""

    def __init__(self):
        # first byte -> {token: id}, and the lengths that occur with that byte, longest first
        self.tokens: list[dict[bytes, int]] = [{} for _ in range(256)]
        for i, token in enumerate(token_bytes()):
            if token:
                self.tokens[token[0]][token] = i
        self.lengths = [sorted({len(t) for t in tokens}, reverse=True) for tokens in self.tokens]

    def encode(self, text: str) -> list[int]:
        data, ids, at = text.encode("utf-8"), [], 0
        while at < len(data):
            tokens = self.tokens[data[at]]
            for length in self.lengths[data[at]]:
                found = tokens.get(data[at : at + length])
                if found is not None and at + length <= len(data):
                    ids.append(found)
                    at += length
                    break
        return ids


@functools.cache
def encoder():
    """An object with .encode(str) -> list of ids: the fast library, or the Python one where it has no wheel."""
    try:
        import pyrwkv_tokenizer
    except ImportError:
        return PythonEncoder()
    return pyrwkv_tokenizer.RWKVTokenizer()


def unload() -> None:
    """Give the library's memory back (about 230 MB); the next encoding loads it again."""
    encoder.cache_clear()
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps freed pages unless it is asked
        ctypes.CDLL(None).malloc_trim(0)


def encode(text: str) -> list[int]:
    """Text -> ids. Raises UnicodeEncodeError for half surrogates, which no file can hold."""
    return encoder().encode(text)


class Utf8Stream:
    """Turns ids that arrive one by one into text; half a character waits for its rest, and is dropped if none comes."""

    def __init__(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self.decoder.decode(token_bytes()[token])
