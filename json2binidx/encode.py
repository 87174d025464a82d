"""Text with spans -> token ids and who said each; encoded once as a whole, checked by decoding."""

from __future__ import annotations

import numpy as np

from rwkv_peft import tokenizer
from rwkv_peft.data.masking import roles_of_tokens
from rwkv_peft.roles import Span

from .records import RowError


def encode(text: str, spans: list[Span], end_of_doc: bool) -> tuple[np.ndarray, np.ndarray]:
    """ids uint16 [n] and roles uint8 [n]; with end_of_doc the last id is 0 and belongs to the last speaker."""
    try:
        tokens = tokenizer.encode(text)
    except UnicodeEncodeError:
        raise RowError("holds half of a surrogate pair, which no file can store") from None
    if tokenizer.decode_bytes(tokens) != text.encode("utf-8"):
        raise RowError("does not survive tokenizing (decoding gives another text); please report this row")
    if end_of_doc:
        tokens = [*tokens, tokenizer.END_OF_DOC]
    ids = np.array(tokens, dtype=np.uint16)
    return ids, roles_of_tokens(tokenizer.token_lengths()[ids], spans, end_of_doc)
