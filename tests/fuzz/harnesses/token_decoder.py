"""Tokens and texts. Input: uint16 ids, or a text behind the byte "t". Sound: decode(encode(text)) is the text, both
encoders agree, and greedy; what is shown of ids cannot steer a terminal; a stream of ids gives the text that all of
them give."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fuzz.harness import Harness, sound
from rwkv_peft.data import vocabulary_check
from rwkv_peft.data.masking import Markers, roles_of_tokens, target_weights
from rwkv_peft.data.tokenized_files import roles_in_text, unescape_marker
from rwkv_peft.preprocess.foreign_headings import suspects, tables
from rwkv_peft.text import tokenizer
from rwkv_peft.text.roles import Role
from rwkv_peft.text.turns import spans_of_text


class It(Harness):
    longest = 1 << 12
    words = (
        b"User: ",
        b"\n\nAssistant: ",
        "\u4f60\u597d".encode(),
        "\U0001f600".encode(),
        b"\xff\xff",
        b"\x00\x00",
        b"\n\n",
        b"  \n",
    )

    def warm_up(self) -> None:
        tokenizer.encode("a")
        self.python = tokenizer.PythonEncoder()
        tables()

    def read(self, data: bytes, folder: Path) -> str:
        return self.text(data[1:].decode("utf-8", "replace")) if data[:1] == b"t" else self.ids(data)

    def text(self, text: str) -> str:
        ids = tokenizer.encode(text)
        sound(tokenizer.decode(ids) == text, "decoding gives another text", text, ids)
        sound(self.python.encode(text) == ids, "the encoders differ", text, ids)
        stream = tokenizer.Utf8Stream()
        sound("".join(map(stream.push, ids)) == text, "a stream gives another text", text)
        mark = unescape_marker(text[:4])
        if mark and text:
            markers = Markers(mark, b"\n")
            spans = markers.spans(text.encode())
            lengths = tokenizer.token_lengths()[np.array(ids, np.int64)]
            roles = roles_of_tokens(lengths, spans, False)
            sound(len(roles) == len(ids), "roles without tokens", roles)
            for mask in ("none", "pad", "qa", "last"):
                sound(len(target_weights(roles, mask)) == len(ids) - 1, "weights without targets", mask)
        return "text"

    def ids(self, data: bytes) -> str:
        ids = np.frombuffer(data[: len(data) // 2 * 2], "<u2")
        text = tokenizer.decode(ids.tolist())
        stream = tokenizer.Utf8Stream()
        streamed = "".join(map(stream.push, ids.tolist()))
        sound(text.startswith(streamed), "a stream gives another text", text, streamed)
        for bound in ("", "|"):
            shown = tokenizer.mark_trained(ids.tolist(), (ids % 3 == 0).tolist(), separator=bound)
            sound(all(c.isprintable() or c == "\n" for c in shown), "steers a terminal", shown)
        roles = roles_in_text(ids, spans_of_text)
        sound(len(roles) == len(ids) and (not len(roles) or roles.max() <= max(Role)), "roles that are none", roles)
        suspects(ids.astype(np.intp), roles)
        seen = vocabulary_check.SampleCounts()
        vocabulary_check.count_text(ids.astype(np.int64), seen)
        sound(seen.tokens == len(ids), "tokens that are not counted", seen)
        return f"ids {seen.is_text()}"
