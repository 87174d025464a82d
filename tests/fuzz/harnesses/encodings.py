"""Encodings of text files. Sound: what is decided is the same for the same bytes; UTF-8 is read as it is but for line
ends; what comes out has no \\r, and is the same whatever the size of the pieces that are read; every byte that is no
text is marked."""

from __future__ import annotations

import io
import random
from pathlib import Path

from fuzz import mutate
from fuzz.harness import Harness, sound
from rwkv_peft.common.errors import UserError
from rwkv_peft.preprocess import encodings, reader

CODECS = (
    "gb18030", "big5", "cp932", "euc_jp", "cp949", "cp1252", "cp1251", "koi8_r", "cp1253", "cp1254", "cp1255",
    "cp1256", "cp874", "iso8859_2", "utf-16", "utf-16-le", "utf-32", "utf-8-sig", "iso2022_jp", "mac_roman", "utf-8",
)  # fmt: skip


TEXTS = ("你好，世界", "été üß", "Привет", "こんに", "안녕", "“x”—…")


def is_packed(data: bytes) -> bool:
    return reader.packing(data[:4]) != ""


class It(Harness):
    places = ("rows.txt",)
    cases = ("k06*", "p04-utf16*", "m07*")
    words = tuple(text.encode(codec, "replace") for text in TEXTS for codec in CODECS[::3])

    def warm_up(self) -> None:
        for codec in CODECS:
            encodings.decide(io.BytesIO("Gr\u00fc\u00dfe \u4f60 \u043f\u0440\n".encode(codec, "replace")))

    def mutate(self, data: bytes, random: random.Random, other: bytes) -> bytes:
        if random.random() < 0.3:  # the same text in another encoding
            return data.decode(random.choice(CODECS), "replace").encode(random.choice(CODECS), "replace")
        return mutate.of_lines(data, random, other, self.words)

    def read(self, data: bytes, folder: Path) -> str:
        path = folder / "rows.txt"
        path.write_bytes(data)
        reader.settle([path])
        result = encodings.decide(io.BytesIO(data))
        try:
            with reader.unpacked(path) as (file, _):
                text = file.read()
        except UserError:
            sound(
                is_packed(data) or not isinstance(result, encodings.Encoding),
                "refused though its encoding is known",
                result,
            )
            raise
        sound(b"\r" not in text, "line ends of Windows", text)
        if is_packed(data):
            return "packed"
        sound(isinstance(result, encodings.Encoding), "read though its encoding is not known", result)
        for size in (7,) if len(data) > 300 else (1, 64):
            sound(in_pieces(data, result, size) == text, f"other text in pieces of {size}", result, text)
        if not result.codec:
            plain = data[result.skip :].replace(b"\r\r\n", b"\n").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            sound(text == plain, "UTF-8 that is changed", text, plain)
        else:
            encodings.MARK.sub(b"", text).decode("utf-8")
        return result.shown


def in_pieces(data: bytes, result: encodings.Encoding, size: int) -> bytes:
    source = io.BufferedReader(io.BytesIO(data[result.skip :]), size)
    stream, out = encodings.AsUtf8(source, result), b""
    while piece := stream.read(max(size, 4)):
        out += piece
    return out
