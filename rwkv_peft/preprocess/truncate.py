"""Rows that are too long: what OVERLONG does with them, in tokens.

A cut adds nothing that is learnt: every pair of neighbouring tokens that a cut row trains is in the whole row as well. So a
row whose end is cut off just stops, without a terminator: a model that is trained on an invented one learns to stop in
mid-sentence.

MAX_TOKENS limits the row, and TARGET_LENGTH with OVERLONG=truncate ends it inside the first answer that is too long:
the row's tokens are cut where a character ends (any run of tokens is what its own text encodes to, because the
vocabulary is matched greedily from the left). Else, SOURCE_LENGTH and TARGET_LENGTH cut the turn's text, and the row is
rendered again.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rwkv_peft.text import tokenizer
from rwkv_peft.text.roles import Role
from rwkv_peft.text.template import END_OF_THINK, THINK, Dialogue, Ending, Message, Template

from .encode import Pieces, Tokens, encode_row, encoded

LONGEST_WORD = 40  # characters; what is longer is no word
# Thai, Lao, Tibetan, Burmese, Khmer, and kana and Han: scripts without blanks between words
UNPARTED = re.compile("[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
ANSWERS = (Role.ASSISTANT, Role.UNTRAINED)


@dataclass(frozen=True)
class Limits:
    """Lengths in tokens; 0 is no limit.

    Attributes:
        max_tokens: Of a row, its terminator included.
        target: Of an answer, its terminator included.
        source: Of any other turn.
    """

    max_tokens: int = 0
    source: int = 0
    target: int = 0
    policy: str = "drop"

    def of_turn(self, role: Role) -> int:
        """Return the limit of a turn."""
        return self.target if role in ANSWERS else self.source

    def name(self, role: Role) -> str:
        """Return the variable of a turn's limit."""
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


class Cut(NamedTuple):
    """What a cut has made of a row. end: whether it lost its end. turns: how many turns behind the cut went with it."""

    tokens: Tokens
    end: bool = False
    turns: int = 0


def cut_turns(template: Template, dialogue: Dialogue, ending: Ending, limits: Limits) -> Cut:
    """The dialogue with every turn within its limit. TooLong if the policy is to drop, or nothing would be left."""
    end_of_doc = ending.token
    messages = list(template.add_system(dialogue))
    whole = Pieces(*template.render(Dialogue(tuple(messages)), ending))
    while True:
        pieces = Pieces(*template.render(Dialogue(tuple(messages)), ending))
        counts = tokens_of_pieces(pieces)
        said = [(n, role) for n, role in zip(counts, pieces.roles, strict=True) if role is not Role.HEADING]
        if len(said) != len(messages):  # a template without headings shows nothing of an empty turn
            raise TooLong(limits.name(Role.ASSISTANT if limits.target else Role.USER))
        said[-1] = (said[-1][0] + end_of_doc, said[-1][1])
        over = [(i, n - limits.of_turn(role)) for i, (n, role) in enumerate(said) if 0 < limits.of_turn(role) < n]
        if limits.policy == "truncate":  # the row will end in the first answer that is too long: see cut_answer
            ends = next((i for i, _ in over if said[i][1] is Role.ASSISTANT), len(said))
            over = [(i, excess) for i, excess in over if i < ends]
        if not over:
            break
        for i, excess in over:
            if limits.policy == "drop" or not (shorter := shortened(messages[i], excess, limits.policy)):
                raise TooLong(limits.name(messages[i].role))
            messages[i] = shorter
    tokens = encode_row(pieces, end_of_doc)
    if limits.policy == "truncate-left":
        unlearn_what_is_new(tokens, pieces, encode_row(whole, end_of_doc), whole)
        return Cut(tokens)
    places = [i for i, role in enumerate(pieces.roles) if role is not Role.HEADING]
    for turn, ((n, role), place) in enumerate(zip(said, places, strict=True)):
        if role is Role.ASSISTANT and 0 < limits.target < n:
            if messages[turn].call:  # half a call is none
                raise TooLong(limits.name(role))
            return Cut(cut_answer(tokens, pieces, place, limits), True, len(said) - turn - 1)
    return Cut(tokens)


def runs_of_pieces(tokens: Tokens, pieces: Pieces) -> list[tuple[int, int]]:
    """The tokens that hold bytes of each piece: the first, and behind the last."""
    ends = np.cumsum(tokenizer.token_lengths()[tokens.ids])
    bounds = np.cumsum([0, *(len(text.encode("utf-8")) for text in pieces.texts)])
    first = np.searchsorted(ends, bounds[:-1], side="right")
    behind = np.searchsorted(ends, bounds[1:], side="left") + 1
    return list(zip(first.tolist(), behind.tolist(), strict=True))


def cut_answer(tokens: Tokens, pieces: Pieces, place: int, limits: Limits) -> Tokens:
    """The row up to as much of the answer in this piece as its limit allows. TooLong if that says nothing."""
    begin, _ = runs_of_pieces(tokens, pieces)[place]
    end = character_bound(tokens.ids, begin + limits.target, -1)
    words = text_of(tokens.ids[begin : max(begin, end)].tolist()).strip()
    if not words.strip("<>/") or f"{THINK}\n{END_OF_THINK}".startswith(words):
        raise TooLong(limits.name(Role.ASSISTANT))
    return Tokens(tokens.ids[:end], tokens.roles[:end])


def unlearn_what_is_new(tokens: Tokens, pieces: Pieces, before: Tokens, whole: Pieces) -> None:
    """Untrain the first word of an answer that lost its beginning: no answer begins so.

    The role of the first word that is left (of its first token, if the tokens are the same as before the cut) becomes
    UNTRAINED; what follows it, the end of the turn as well, is learnt.
    """
    pairs = zip(runs_of_pieces(tokens, pieces), runs_of_pieces(before, whole), pieces.roles, strict=True)
    for (a, b), (c, d), role in pairs:
        if role is not Role.ASSISTANT:
            continue
        new, old = tokens.ids[a:b], before.ids[c:d]
        same = min(len(new), len(old))
        head = int(np.append(np.flatnonzero(new[:same] != old[:same]), same)[0])
        tail = int(np.append(np.flatnonzero(new[::-1][:same] != old[::-1][:same]), same)[0])
        first = len(new) - tail  # from here on, the tokens are those of the whole answer
        word = tokenizer.decode_bytes(new[head : max(head, first)].tolist()).strip()
        tokens.roles[a + head : a + max(head, first if word else first + 1)] = Role.UNTRAINED


def tokens_of_pieces(pieces: Pieces) -> list[int]:
    """How many tokens begin in each piece, encoded as a whole."""
    starts = np.concatenate([[0], np.cumsum(tokenizer.token_lengths()[encoded("".join(pieces.texts))])])[:-1]
    ends = np.cumsum([len(t.encode("utf-8")) for t in pieces.texts])
    return np.diff(np.searchsorted(starts, ends), prepend=0).tolist()


def shortened(message: Message, excess: int, policy: str) -> Message | None:
    """Return the message without `excess` tokens of the part that is cut first, or without that part; None if that is all it has.

    A thought is before the text, and a second text after it.
    """
    order = ("think", "content", "material") if policy == "truncate-left" else ("material", "content", "think")
    said = [part for part in order if getattr(message, part).strip()]
    if not said:
        return None  # a tool call
    words = getattr(message, said[0])
    left = shortened_text(words, excess, policy) if excess < len(encoded(words)) else ""
    if not left and not said[1:]:
        return None
    parts: dict[str, Any] = {said[0]: left}
    return message._replace(**parts)


def shortened_text(text: str, excess: int, policy: str) -> str:
    """Return a text without `excess` tokens."""
    ids = encoded(text)
    if policy == "truncate-left":
        at = len(text_of(ids[: character_bound(ids, excess, +1)]))
        return text[word_begin(text, at, len(ids) - excess) :].lstrip()
    return text_of(ids[: character_bound(ids, len(ids) - excess, -1)]).rstrip()


def word_begin(text: str, at: int, most: int) -> int:
    """Return where a text begins that is cut at a character and may have so many tokens.

    It begins with the word that the cut goes through, if that fits, else with the next one, else at the cut.
    """
    begin = end = at
    while inside_word(text, begin):
        begin -= 1
    if begin < at and len(encoded(text[begin:].lstrip())) <= most:
        return begin
    while inside_word(text, end) and end < at + LONGEST_WORD:
        end += 1
    return at if inside_word(text, end) or not any(c.isalnum() for c in text[end:]) else end


def inside_word(text: str, at: int) -> bool:
    """Whether letters of one word are on both sides of a place. Of scripts that part words by blanks."""
    return 0 < at < len(text) and all(c.isalnum() and not UNPARTED.match(c) for c in text[at - 1 : at + 1])


@functools.cache
def continues() -> np.ndarray:
    """Tokens that begin inside a character, bool [65536]."""
    return np.array([len(b) > 0 and 0x80 <= b[0] < 0xC0 for b in tokenizer.token_bytes()])


def character_bound(ids: Sequence[int] | np.ndarray, at: int, step: int) -> int:
    """The nearest place from `at` on, going by `step`, where no character is cut. 0..len(ids)."""
    at = min(max(at, 0), len(ids))
    while 0 < at < len(ids) and continues()[ids[at]]:
        at += step
    return at


def text_of(ids: Sequence[int]) -> str:
    """Decode ids."""
    return tokenizer.decode_bytes(ids).decode("utf-8")


def cut_row(tokens: Tokens, limits: Limits) -> list[Cut]:
    """A row above max_tokens as the policy wants it: one row, or several with split. TooLong if it is to be dropped."""
    ids, roles = tokens
    most = limits.max_tokens
    if len(ids) <= most:
        return [Cut(tokens)]
    if limits.policy == "drop":
        raise TooLong("MAX_TOKENS")
    if limits.policy == "truncate-left":
        begin = character_bound(ids, len(ids) - most, +1)
        return [Cut(Tokens(ids[begin:], roles[begin:]))]
    rows, begin = [], 0
    while begin < len(ids):
        end = character_bound(ids, begin + most, -1) if begin + most < len(ids) else len(ids)
        if end <= begin:
            raise TooLong("MAX_TOKENS")  # not even one character fits
        rows.append(Cut(Tokens(ids[begin:end], roles[begin:end]), end < len(ids)))
        begin = end
    return rows[:1] if limits.policy == "truncate" else rows
