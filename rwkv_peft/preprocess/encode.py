"""Rows -> token ids and the role of each token.

`encode_row` is the definition: the whole text of a row is encoded once, and a token belongs to an answer if any of its
bytes does. `encode_rows` does the same for many rows at once: they are joined by NUL, which no token of the vocabulary
has beside other bytes, so that no token can reach over a bound.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rwkv_peft.data.masking import roles_of_tokens
from rwkv_peft.text import tokenizer
from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import to_spans

from .foreign_headings import suspects
from .schemas import RowError

NUL = "\0"
HAS_NUL = "holds the character NUL (\\u0000), which no text has; it is left of binary data, or of UTF-16 that was read wrongly"
# bytes below which a text is small enough for every so-manyth to be looked at; primes, since characters have 1 to 4 bytes
SAMPLES = ((1 << 14, 1), (100_000, 7), (1 << 62, 31))
CONTINUATION_END = -64  # bytes 80..BF, which go on with a character, are below this as signed numbers


class Tokens(NamedTuple):
    """ids uint16 [n], roles uint8 [n]."""

    ids: np.ndarray
    roles: np.ndarray


class Pieces(NamedTuple):
    """The text of a row in pieces, and who says each."""

    texts: list[str]
    roles: list[Role]


def encode_row(pieces: Pieces, end_of_doc: bool, bos: bool = False) -> Tokens:
    """Encode one row.

    Args:
        pieces: Its text and roles.
        end_of_doc: Its last id is 0 and has the role of the last speaker.
        bos: Its first id is 0, which is never trained.
    """
    text = "".join(pieces.texts)
    if NUL in text:
        raise RowError("not text", HAS_NUL)
    tokens = encoded(text)
    if tokenizer.decode_bytes(tokens) != text.encode("utf-8"):
        raise RowError("tokenizer", "does not survive tokenizing (decoding gives another text); please report this row")
    if end_of_doc:
        tokens = [*tokens, tokenizer.END_OF_DOC]
    ids = np.array(tokens, dtype=np.uint16)
    row = Tokens(ids, roles_of_tokens(tokenizer.token_lengths()[ids], to_spans(*pieces), end_of_doc))
    return with_bos(row) if bos else row


def with_bos(row: Tokens) -> Tokens:
    """The row behind token 0, which belongs to the layout: no LOSS_MASK trains it."""
    zero, heading = np.uint16(tokenizer.END_OF_DOC), np.uint8(Role.HEADING)
    return Tokens(np.insert(row.ids, 0, zero), np.insert(row.roles, 0, heading))


def encoded(text: str) -> list[int]:
    """Return the ids of a text. Raises RowError for half of a surrogate pair."""
    try:
        return tokenizer.encode(text)
    except UnicodeEncodeError:
        raise RowError("surrogate", "holds half of a surrogate pair, which no file can store") from None


class Encoded(NamedTuple):
    """Many rows.

    Attributes:
        ids: uint16 [n], of all rows.
        roles: uint8 [n].
        first: [rows + 1], where each row begins.
        answered: bool [rows], whether the row has something to learn.
        pieces: How many tokens begin in each piece of text, over all rows.
        turns: How many answers there are.
        untrained: How many answers are not to be learnt.
        systems: How many system texts there are.
        scripts: See `scripts`.
        suspects: int64, rows that may have marks of another tool in them, see foreign_headings.
    """

    ids: np.ndarray
    roles: np.ndarray
    first: np.ndarray
    answered: np.ndarray
    pieces: np.ndarray
    turns: int
    untrained: int
    systems: int
    scripts: np.ndarray
    suspects: np.ndarray


def scripts(text: np.ndarray, said: np.ndarray) -> np.ndarray:
    """Return what shows the scripts of a text: counts of its bytes by value, int64 [256], and how many begin Japanese kana.

    The first byte of a character shows its script, and every character has one, so some of the bytes of a long text are
    a fair sample.

    Args:
        text: UTF-8, uint8.
        said: bool, whether a byte is content, not layout ("User: ").
    """
    step = next(step for size, step in SAMPLES if len(text) < size)
    sample, counted = text[::step], said[::step]
    by_byte = np.bincount(sample[counted], minlength=256)
    behind = text[1::step]
    kana = (sample == 0xE3)[: len(behind)] & counted[: len(behind)] & (behind >= 0x81) & (behind <= 0x83)
    return np.append(by_byte, kana.sum()) * step


NONE = np.zeros(0, np.int64)
NO_ROWS = Encoded(
    NONE.astype(np.uint16),
    NONE.astype(np.uint8),
    np.zeros(1, np.int64),
    NONE.astype(bool),
    NONE,
    0,
    0,
    0,
    np.zeros(257, np.int64),
    NONE,
)


WORD = 8  # bytes that are compared at once


@functools.cache
def words_of_tokens() -> np.ndarray:
    """The bytes of every token in words of eight, filled up with zeros, uint64 [16, 65536]."""
    table = tokenizer.token_bytes()
    longest = -(-max(map(len, table)) // WORD) * WORD
    rows = np.frombuffer(b"".join(b.ljust(longest, b"\0") for b in table), "<u8")
    return np.ascontiguousarray(rows.reshape(len(table), -1).T)


# a word with ones in its first n bytes, uint64 [256]
MASKS = np.array([(1 << (8 * min(n, WORD))) - 1 for n in range(256)], dtype=np.uint64)


@functools.cache
def lengths_of_tokens() -> np.ndarray:
    """Bytes per token, uint8 [65536]: small, so that it stays in the processor's cache."""
    return tokenizer.token_lengths().astype(np.uint8)


def is_the_text(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, data: bytes) -> bool:
    """Whether decoding gives the text back: every token's bytes are those of the text in its place."""
    if not len(ids) or starts[-1] + lengths[-1] != len(data):
        return not len(ids) and not data
    # the word that begins at each byte
    text = np.ndarray(len(data) + 1, "<u8", buffer=data + bytes(WORD), strides=(1,))
    for words in words_of_tokens():
        differ = text[starts]
        differ ^= words.take(ids)
        differ &= MASKS.take(lengths)
        if differ.any():
            return False
        longer = np.flatnonzero(lengths > WORD)
        if not len(longer):
            return True
        ids, starts, lengths = ids[longer], starts[longer] + WORD, lengths[longer] - WORD
    return True


def encode_rows(rows: Sequence[Pieces], end_of_doc: bool, bos: bool = False) -> Encoded:
    """Encode all rows at once; bos: token 0 comes before every row.

    Raises:
        RowError: one cannot be encoded; encoding them one by one shows which.
    """
    # a NUL behind every row is a piece of its own and belongs to the last speaker; it becomes the end of the document
    texts: list[str] = []
    spoken_by: list[Role] = []
    nuls: list[int] = []  # which pieces these are
    for some, roles_of_row in rows:
        texts += some
        spoken_by += roles_of_row
        nuls.append(len(texts))
        texts.append(NUL)
        spoken_by.append(roles_of_row[-1])
    joined = "".join(texts)
    if joined.count(NUL) > len(rows):
        raise RowError("not text", HAS_NUL)
    tokens = encoded(joined)
    ids = np.fromiter(tokens, np.intp, len(tokens))  # as wide as indices are: it is used as one several times
    del tokens
    data = joined.encode("utf-8")
    piece_ends = np.cumsum(np.fromiter(map(len, texts), np.intp, len(texts)))
    if len(data) != len(joined):  # from characters to bytes
        begins = np.flatnonzero(np.frombuffer(data, np.int8) >= CONTINUATION_END)
        piece_ends = np.append(begins, len(data))[piece_ends]
    speakers = np.frombuffer(bytes(spoken_by), np.uint8)
    lengths = lengths_of_tokens().take(ids)
    starts = np.cumsum(lengths, dtype=np.int32) - lengths
    if not is_the_text(ids, starts, lengths, data):
        raise RowError("tokenizer", "does not survive tokenizing")
    piece_tokens = np.searchsorted(starts, piece_ends)  # tokens that begin before the end of each piece
    counts = np.diff(piece_tokens, prepend=0)
    roles = np.repeat(speakers, counts)
    # the token that an answer begins in may have begun before it
    into = np.flatnonzero(starts[piece_tokens[:-1]] != piece_ends[:-1]) + 1  # pieces that begin inside a token
    for kind in (Role.UNTRAINED, Role.ASSISTANT):
        at = piece_tokens[into[speakers[into] == kind] - 1] - 1
        roles[at[roles[at] != Role.ASSISTANT]] = kind
    of_row = np.array(nuls)
    separators = piece_tokens[of_row] - 1
    marked = np.unique(np.searchsorted(separators, suspects(ids, roles)))
    ids = ids.astype(np.uint16)
    if end_of_doc:
        ids[separators] = tokenizer.END_OF_DOC
        first = np.concatenate([[0], separators + 1])
    else:
        keep = np.ones(len(ids), dtype=bool)
        keep[separators] = False
        ids, roles = ids[keep], roles[keep]
        first = np.concatenate([[0], separators - np.arange(len(rows))])
    if bos:
        ids = np.insert(ids, first[:-1], np.uint16(tokenizer.END_OF_DOC))
        roles = np.insert(roles, first[:-1], np.uint8(Role.HEADING))
        first = first + np.arange(len(first))
    spoken = np.ones(len(texts), dtype=bool)
    spoken[of_row] = False
    begins = np.concatenate([[0], of_row[:-1] + 1])
    learnt = speakers == Role.ASSISTANT
    answered = np.add.reduceat(learnt, begins, dtype=np.int64) > 0
    said = np.repeat(speakers != Role.HEADING, np.diff(piece_ends, prepend=0))
    untrained = int((speakers == Role.UNTRAINED)[spoken].sum())
    turns = int(learnt[spoken].sum()) + untrained
    systems = int((speakers[spoken] == Role.SYSTEM).sum())
    return Encoded(
        ids, roles, first, answered, counts[spoken], turns, untrained, systems,
        scripts(np.frombuffer(data, np.uint8), said), marked,
    )  # fmt: skip
