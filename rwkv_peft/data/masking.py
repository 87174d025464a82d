"""Which tokens are trained: roles (facts, written when tokenizing) and LOSS_MASK (policy).

All arrays are numpy. A row of n tokens has n-1 targets: token t predicts token t+1, so weights[t] belongs to ids[t+1].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rwkv_peft.text.roles import Role, Span


def roles_of_tokens(lengths: np.ndarray, spans: Sequence[Span], end_of_doc: bool) -> np.ndarray:
    """Return the role of each token, uint8 [n].

    It is that of an answer if any of the token's bytes is in an answer, else that of its first byte.

    Args:
        lengths: bytes per token [n] (0 for the end-of-document token, which has the role of the last text).
        spans: consecutive spans that cover the text.
        end_of_doc: the last token is the end of the document.
    """
    ends = np.cumsum(lengths)
    starts = ends - lengths
    bounds = np.array([span.start for span in spans], dtype=np.int64)
    roles = np.array([span.role for span in spans], dtype=np.uint8)
    if not len(roles):
        return np.zeros(len(lengths), dtype=np.uint8)
    out = roles[np.maximum(np.searchsorted(bounds, starts, side="right") - 1, 0)]
    for role in (Role.UNTRAINED, Role.ASSISTANT):  # the first token of an answer may begin before it
        at = np.searchsorted(starts, bounds[roles == role], side="right") - 1
        out[at[out[at] != Role.ASSISTANT]] = role
    if end_of_doc:
        out[-1] = roles[-1]
    return out


def target_weights(roles: np.ndarray, mask: str, starts_document: np.ndarray | None = None) -> np.ndarray:
    """Return 1 where the target is trained, else 0: float32 [n-1] for roles [n].

    Args:
        roles: of the tokens.
        mask: none (every target), pad (every target inside its document), qa (what assistants said and is to be
            learnt, so not Role.UNTRAINED), last (only the last of these answers in each document).
        starts_document: bool [n], True at the first token of a document; only windows that cross documents need it.
    """
    starts = np.zeros(len(roles), dtype=bool) if starts_document is None else starts_document
    trained = is_trained(roles, mask)
    if mask == "last":
        trained &= in_last_answer(trained, starts)
    return (trained if mask == "none" else trained & ~starts)[1:].astype(np.float32)


def is_trained(roles: np.ndarray, mask: str) -> np.ndarray:
    """Return whether tokens inside a document count as targets by their role alone, bool like `roles`.

    For the mask last these are all answers: the caller selects the last one.
    """
    return roles == Role.ASSISTANT if needs_roles(mask) else np.ones(roles.shape, dtype=bool)


def needs_roles(mask: str) -> bool:
    """Return whether a mask (or LOSS_MASK) depends on roles."""
    return mask not in ("none", "pad")


def in_last_answer(answers: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return True inside the last run of answer tokens of every document, bool [n]."""
    document = np.cumsum(starts)
    # a new run begins where an answer follows a non-answer or a new document
    begins = answers & np.concatenate([[True], ~answers[:-1] | starts[1:]])
    run = np.cumsum(begins)
    newest = np.zeros(document[-1] + 1 if len(document) else 1, dtype=np.int64)
    np.maximum.at(newest, document[answers], run[answers])
    return answers & (run == newest[document])


class Markers:
    """LOSS_MASK=se: what is between a start marker and the next end marker is trained, and so is the end marker.

    Args:
        start: the start marker, not empty.
        end: the end marker, not empty.

    Attributes:
        starts: start markers found so far.
        ends: end markers found so far.
    """

    def __init__(self, start: bytes, end: bytes):
        self.start, self.end = start, end
        self.starts = self.ends = 0

    def spans(self, data: bytes) -> list[Span]:
        """Return consecutive spans that cover a document's text: ASSISTANT between the markers, TEXT elsewhere.

        The last one, which the end of the document belongs to, is ASSISTANT if its end marker is missing.
        """
        spans, at = [], 0
        while (marker := data.find(self.start, at)) >= 0:
            begin = marker + len(self.start)
            spans.append(Span(at, begin, Role.TEXT))
            stop = data.find(self.end, begin)
            self.starts, self.ends = self.starts + 1, self.ends + (stop >= 0)
            if stop < 0:
                return [*spans, Span(begin, len(data), Role.ASSISTANT)]
            at = stop + len(self.end)
            spans.append(Span(begin, at, Role.ASSISTANT))
        return [*spans, Span(at, len(data), Role.TEXT)]
