"""Rows that are too long: what OVERLONG does with them, in tokens.

SOURCE_LENGTH and TARGET_LENGTH limit single turns: the turn's words are cut and the row is rendered anew. MAX_TOKENS limits
the row: its tokens are cut where a character ends (any run of tokens is what its own text encodes to, because the
vocabulary is matched greedily from the left). The terminator of the row survives every cut at its end.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .. import tokenizer
from ..roles import Role
from ..templates.template import Dialogue, Ending, Message, Template
from .encode import Pieces, Tokens, encode_row, encoded

ANSWERS = (Role.ASSISTANT, Role.UNTRAINED)


@dataclass(frozen=True)
class Limits:
    """0 is no limit. max_tokens: of a row, its terminator included. target: of an answer, its terminator included.
    source: of any other turn."""

    max_tokens: int = 0
    source: int = 0
    target: int = 0
    policy: str = "drop"

    def of_turn(self, role: Role) -> int:
        return self.target if role in ANSWERS else self.source

    def name(self, role: Role) -> str:
        return "TARGET_LENGTH" if role in ANSWERS else "SOURCE_LENGTH"


class TooLong(Exception):
    """Why a row is left out: the name of the limit that it breaks."""


def within_turns(pieces: Pieces, counts: Sequence[int], end_of_doc: bool, limits: Limits) -> bool:
    """Whether every turn keeps its limit. counts: tokens that begin in each piece."""
    last = len(pieces.roles) - 1
    return not any(
        0 < limits.of_turn(role) < n + (end_of_doc and i == last)
        for i, (role, n) in enumerate(zip(pieces.roles, counts, strict=True))
        if role is not Role.HEADING
    )


def cut_turns(template: Template, dialogue: Dialogue, ending: Ending, end_of_doc: bool, limits: Limits) -> Pieces:
    """The dialogue with every turn within its limit, rendered. TooLong if the policy is to drop, or nothing would be left."""
    messages = list(template.with_system(dialogue))
    while True:
        pieces = Pieces(*template.render(Dialogue(tuple(messages)), ending))
        counts = tokens_of_pieces(pieces)
        said = [(n, role) for n, role in zip(counts, pieces.roles, strict=True) if role is not Role.HEADING]
        if len(said) != len(messages):  # a template without headings shows nothing of an empty turn
            raise TooLong(limits.name(Role.ASSISTANT if limits.target else Role.USER))
        said[-1] = (said[-1][0] + end_of_doc, said[-1][1])
        over = [(i, n - limits.of_turn(role)) for i, (n, role) in enumerate(said) if 0 < limits.of_turn(role) < n]
        if not over:
            return pieces
        for i, excess in over:
            if limits.policy == "drop" or not (shorter := shortened(messages[i], excess, limits.policy)):
                raise TooLong(limits.name(messages[i].role))
            messages[i] = shorter


def tokens_of_pieces(pieces: Pieces) -> list[int]:
    """How many tokens begin in each piece, encoded as a whole."""
    starts = np.concatenate([[0], np.cumsum(tokenizer.token_lengths()[encoded("".join(pieces.texts))])])[:-1]
    ends = np.cumsum([len(t.encode("utf-8")) for t in pieces.texts])
    return np.diff(np.searchsorted(starts, ends), prepend=0).tolist()


def shortened(message: Message, excess: int, policy: str) -> Message | None:
    """The message without `excess` tokens of its words, or of its second text or thought where those are not enough."""
    for part in ("content", "material", "think"):
        words = getattr(message, part)
        if not words or words.isspace():
            continue
        size = len(encoded(words))
        left = shortened_text(words, excess, policy) if excess < size else ""
        message = message._replace(**{part: left})
        excess -= size
        if left or excess <= 0:
            break
    # an answer may be a thought alone; a turn of nothing at all is none
    return message if any(getattr(message, part).strip() for part in ("content", "material", "think")) else None


def shortened_text(text: str, excess: int, policy: str) -> str:
    ids = encoded(text)
    if policy == "truncate-left":
        return text_of(ids[border(ids, excess, +1) :]).lstrip()
    return text_of(ids[: border(ids, len(ids) - excess, -1)]).rstrip()


@functools.cache
def continues() -> np.ndarray:
    """Tokens that begin inside a character, bool [65536]."""
    return np.array([len(b) > 0 and 0x80 <= b[0] < 0xC0 for b in tokenizer.token_bytes()])


def border(ids: Sequence[int], at: int, step: int) -> int:
    """The nearest place from `at` on, going by `step`, where no character is cut. 0..len(ids)."""
    at = min(max(at, 0), len(ids))
    while 0 < at < len(ids) and continues()[ids[at]]:
        at += step
    return at


def text_of(ids: Sequence[int]) -> str:
    return tokenizer.decode_bytes(ids).decode("utf-8")


def cut_row(tokens: Tokens, tails: Mapping[int, str], end_of_doc: bool, limits: Limits) -> list[Tokens]:
    """A row above max_tokens as the policy wants it: one row, or several with split. TooLong if it is to be dropped.

    tails: what ends a row by who speaks last.
    """
    ids, roles = tokens
    most = limits.max_tokens
    if len(ids) <= most:
        return [tokens]
    if limits.policy == "drop":
        raise TooLong("MAX_TOKENS")
    if limits.policy == "truncate":
        return [truncated(tokens, tails, end_of_doc, most)]
    if limits.policy == "truncate-left":
        begin = border(ids, len(ids) - most, +1)
        return [Tokens(ids[begin:], roles[begin:])]
    found, begin = [], 0
    while begin < len(ids):
        end = border(ids, begin + most, -1) if begin + most < len(ids) else len(ids)
        if end <= begin:
            raise TooLong("MAX_TOKENS")  # not even one character fits
        found.append(Tokens(ids[begin:end], roles[begin:end]))
        begin = end
    return found


def truncated(tokens: Tokens, tails: Mapping[int, str], end_of_doc: bool, most: int) -> Tokens:
    """The first tokens of a row, and its terminator, at most `most` together."""
    ids, roles = tokens
    keep = most - end_of_doc
    while keep := border(ids, keep, -1):
        tail = tails.get(int(roles[keep - 1]), "")
        if not tail:
            kept = Tokens(ids[:keep], roles[:keep])
            if not end_of_doc:
                return kept
            return Tokens(np.append(kept.ids, np.uint16(tokenizer.END_OF_DOC)), np.append(kept.roles, kept.roles[-1]))
        borders = [0, *(np.flatnonzero(np.diff(roles[:keep])) + 1).tolist(), keep]
        texts = [text_of(ids[a:b].tolist()) for a, b in zip(borders, borders[1:], strict=False)]
        said = [Role(roles[a]) for a in borders[:-1]]
        found = encode_row(Pieces([*texts, tail], [*said, said[-1]]), end_of_doc)
        if len(found.ids) <= most:
            return found
        keep -= 1
    raise TooLong("MAX_TOKENS")
