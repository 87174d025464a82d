"""One tokenized file: its tokens, their roles, and which of them a LOSS_MASK trains."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rwkv_peft.common.errors import UserError
from rwkv_peft.common.paths import display_path
from rwkv_peft.text.roles import Role

from .binidx import Reader
from .masking import is_trained, needs_roles
from .sampling import TokenSpan

BLOCK = 1 << 22  # tokens that are processed together
ZERO = np.zeros(1, dtype=np.uint16)  # separates documents where the file has no token 0


class Chunk(NamedTuple):
    """Documents that are in memory, with the attributes of a Reader that TokenSource uses."""

    path: Path
    sizes: np.ndarray
    tokens: np.ndarray


class TokenSource:
    """A tokenized file.

    Args:
        reader: its tokens.
        roles: NAME.roles, the roles of all tokens, or a function from the tokens of a document to its roles for files
            that have none (it is called once for every document), or None if the mask needs no roles.
        vocab_size: of the model.
        weight: its share in a mixture.

    Attributes:
        name: of the file.
        starts: first token of every document, and the end, int64 [N + 1].
    """

    def __init__(
        self,
        reader: Reader | Chunk,
        roles: Reader | np.ndarray | Callable[[np.ndarray], np.ndarray] | None,
        vocab_size: int,
        weight: Fraction = Fraction(1),
    ):
        self.path, self.name, self.weight = reader.path, reader.path.stem, weight
        self.sizes = reader.sizes
        # the same mapped bytes; a plain array is sliced much faster than a np.memmap
        self.tokens = np.asarray(reader.tokens)
        if self.tokens.dtype.kind == "f":
            kind = self.tokens.dtype.name
            raise UserError(
                f"{display_path(self.path)}: holds {kind} numbers, which are no tokens. Tokenize the data again."
            )
        self.starts = np.zeros(len(self.sizes) + 1, dtype=np.int64)
        np.cumsum(self.sizes, out=self.starts[1:])
        if self.starts[-1] < 2:
            raise UserError(f"{display_path(self.path)}: holds no text to train on.")
        self.check_vocabulary(vocab_size)
        if isinstance(roles, Reader):
            if not np.array_equal(roles.sizes, self.sizes):
                raise UserError(f"{roles.path}: describes other rows than {self.path}. Tokenize the data again.")
            if roles.dtype != np.uint8:
                raise UserError(
                    f"{display_path(roles.path)}: holds {roles.dtype.name} numbers, not roles. Tokenize the data again."
                )
            roles = np.asarray(roles.tokens)
        if roles is None:  # no token has a role; the zeros take no memory
            roles = np.broadcast_to(np.uint8(Role.TEXT), self.tokens.shape)
        self.roles: np.ndarray = self.find_roles(roles) if callable(roles) else roles
        self.last_answer: np.ndarray | None = None  # set by find_last_answers

    def __len__(self) -> int:
        return len(self.sizes)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield begin and end of blocks of tokens."""
        for begin in range(0, int(self.starts[-1]), BLOCK):
            yield begin, min(begin + BLOCK, int(self.starts[-1]))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check that all tokens are in the model's vocabulary.

        Raises:
            UserError: one is not.
        """
        if self.tokens.dtype.kind == "u" and np.iinfo(self.tokens.dtype).max < vocab_size:
            return
        for begin, end in self.blocks():
            tokens = self.tokens[begin:end]
            if tokens.max() >= vocab_size or tokens.min() < 0:
                bad = int(np.flatnonzero((tokens >= vocab_size) | (tokens < 0))[0])
                row = int(np.searchsorted(self.starts, begin + bad, side="right")) - 1
                raise UserError(
                    f"{display_path(self.path)}: row {row} holds token {int(tokens[bad])}, but the model's vocabulary ends at "
                    f"{vocab_size - 1}. The data were made with another vocabulary."
                )

    def find_roles(self, find: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Compute the roles of every document once, in a file without a name, which vanishes with the run."""
        with tempfile.TemporaryFile(prefix="rwkv-roles-") as file:
            for begin, end in zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True):
                file.write(find(self.tokens[begin:end]).astype(np.uint8, copy=False).tobytes())
            file.flush()
            return np.asarray(np.memmap(file, dtype=np.uint8, mode="r"))

    def find_last_answers(self) -> None:
        """Find where the last answer of every document begins, int64 [N]; the end of the file if it has none."""
        # a document without an answer has no token at or after the end of the file
        last = np.full(len(self), self.starts[-1], dtype=np.int64)
        before = False
        for begin, end in self.blocks():
            answers = is_trained(self.roles[begin:end], "last")
            begins = answers.copy()
            begins[1:] &= ~answers[:-1]
            begins[0] &= not before
            inside = self.starts[np.searchsorted(self.starts, begin) : np.searchsorted(self.starts, end)] - begin
            begins[inside] |= answers[inside]
            before = bool(answers[-1])
            places = np.flatnonzero(begins) + begin
            # of several in one document, the assignment that comes last stays
            last[np.searchsorted(self.starts, places, side="right") - 1] = places
        self.last_answer = last

    def is_trained(self, tokens: np.ndarray, documents: np.ndarray, mask: str) -> np.ndarray:
        """Return whether these tokens (positions in the .bin, inside documents) count as targets, bool."""
        trained = is_trained(self.roles[tokens], mask)
        return trained if self.last_answer is None else trained & (tokens >= self.last_answer[documents])

    def count_trained(self, begins: np.ndarray, ends: np.ndarray, documents: np.ndarray, mask: str) -> np.ndarray:
        """Return how many tokens of runs begins..ends inside documents count as targets, int64. Both rise."""
        if not needs_roles(mask):
            return ends - begins
        if self.last_answer is not None:
            begins = np.minimum(np.maximum(begins, self.last_answer[documents]), ends)
        counts, i, at = np.zeros(len(begins), dtype=np.int64), 0, 0
        while i < len(begins):
            begin = max(at, int(begins[i]))
            at = begin + BLOCK
            answers = is_trained(self.roles[begin:at], mask)
            sums = np.zeros(len(answers) + 1, dtype=np.int32)
            np.cumsum(answers, out=sums[1:])
            past = int(np.searchsorted(begins, at))
            low, high = np.clip(begins[i:past], begin, at), np.clip(ends[i:past], begin, at)
            counts[i:past] += sums[high - begin] - sums[low - begin]
            i += int(np.searchsorted(ends[i:past], at, side="right"))
        return counts

    def begins_with_zero(self, document: int, start: int) -> bool:
        """Return whether a token 0 at this position is the document's BOS: it comes first, and more follows."""
        return start == self.starts[document] and self.sizes[document] > 1

    def text(self, pieces: Sequence[TokenSpan]) -> list[np.ndarray]:
        """Return the tokens of spans, in parts to concatenate."""
        parts = []
        for _, start, stop, ended, _ in pieces:
            parts.append(self.tokens[start:stop])
            if ended:
                parts.append(ZERO)
        return parts

    def trained(self, pieces: Sequence[TokenSpan], mask: str) -> list[np.ndarray]:
        """Return whether each token of the spans is trained where it is a target, bool, in parts like `text`.

        A document's first token is not a target for the end of another, unless the mask is none and it is not a BOS. A
        token 0 that is put after a span only separates documents: no mask trains it, or truncated texts would teach to
        stop in mid-sentence.
        """
        parts = []
        for document, start, stop, ended, joined in pieces:
            flags = is_trained(self.roles[start:stop], mask)
            if self.last_answer is not None:
                flags[: max(0, int(self.last_answer[document]) - start)] = False
            if ended:
                flags = np.append(flags, False)
            if joined and (mask != "none" or (self.tokens[start] == 0 and self.begins_with_zero(document, start))):
                flags[0] = False
            parts.append(flags)
        return parts
