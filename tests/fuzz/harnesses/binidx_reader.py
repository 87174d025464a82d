"""Tokenized files. Input: lengths of the .idx, the .bin and the roles' .idx (uint32), then these and the roles' .bin.
Sound: rows lie behind one another and cover the .bin; what training.sh refuses, the inspector refuses too, and what it
calls sound can be opened."""

from __future__ import annotations

import random
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np

from fuzz import mutate
from fuzz.harness import Harness, quiet, sound
from rwkv_peft.cli.inspect import inspect
from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.data import tokenized_files
from rwkv_peft.data.binidx import HEADER, Reader
from rwkv_peft.text import tokenizer

HEAD = struct.Struct("<III")
FILES = ("data.idx", "data.bin", "data.roles.idx", "data.roles.bin")


def parts_of(data: bytes) -> list[bytes]:
    sizes = HEAD.unpack(data[: HEAD.size].ljust(HEAD.size, b"\0"))
    result, at = [], HEAD.size
    for size in sizes:
        result.append(data[at : at + size])
        at += size
    return [*result, data[at:]]


def joined(parts: list[bytes]) -> bytes:
    return HEAD.pack(*map(len, parts[:3])) + b"".join(parts)


class It(Harness):
    longest = 1 << 13
    places = ("data.idx", "data.bin", "data.roles", "fuzz-", "MASK_")

    def warm_up(self) -> None:
        tokenizer.token_bytes()
        tokenizer.encode("a")

    def mutate(self, data: bytes, random: random.Random, other: bytes) -> bytes:
        if random.random() < 0.1:
            return mutate.of_bytes(data, random, other)
        parts, others = parts_of(data), parts_of(other)
        at = random.choice((0, 0, 0, 1, 2, 3))
        if at in (0, 2) and random.random() < 0.6 and len(parts[at]) >= HEADER:  # a number of the index
            made = bytearray(parts[at])
            rows = int.from_bytes(made[18:26], "little")
            pointers, documents = HEADER + 4 * rows, HEADER + 12 * rows
            header = ((9, "<Q"), (17, "<B"), (18, "<Q"), (26, "<Q"))
            lists = ((HEADER, "<i"), (HEADER + 4, "<i"), (pointers, "<q"), (pointers + 8, "<q"), (documents, "<q"))
            place, form = random.choice(header + lists)
            size = struct.calcsize(form)
            if place + size <= len(made):
                [old] = struct.unpack_from(form, made, place)
                number = random.choice((old + 1, old - 1, old * 2, *mutate.EDGES)) & ((1 << 8 * size) - 1)
                made[place : place + size] = number.to_bytes(size, "little")
            parts[at] = bytes(made)
        elif random.random() < 0.1:
            parts[at] = random.choice(others)
        else:
            parts[at] = mutate.of_bytes(parts[at], random, others[at])
        return joined(parts)

    def read(self, data: bytes, folder: Path) -> str:
        prefix = folder / "data"
        for name, content in zip(FILES, parts_of(data), strict=True):
            if content or name in FILES[:2]:
                (folder / name).write_bytes(content)
            else:
                (folder / name).unlink(missing_ok=True)
        refused = faulty = None
        try:
            reader = Reader(prefix)
        except UserError as error:
            refused = error
            self.say_where(error)
        else:
            sound(
                sum(map(len, map(reader.row, range(len(reader))))) == len(reader.tokens),
                "rows that do not cover the file",
                reader.sizes,
            )
            share = tokenized_files.bos_share(reader)
            sound(0 <= share <= 1, "a share that is none", share)
        with quiet() as out:
            try:
                inspect(prefix, 2)
            except UserError as error:
                faulty = error
                self.say_where(error)
        shown = out.getvalue()
        sound(all(c.isprintable() or c == "\n" for c in shown), "steers a terminal", shown)
        sound(refused is None or faulty is not None, "training refuses what the inspector calls sound", refused, shown)
        if refused is None:
            for mask in ("none", "qa", "se"):
                try:
                    [source] = tokenized_files.open_sources(
                        [(prefix, Fraction(1))], mask, "User:", "\\n", 65536, lambda words: None
                    )
                    sound(len(source) == len(reader), "rows that are lost", len(source))
                    sound(
                        source.roles is None or len(source.roles) == len(source.tokens),
                        "roles without tokens",
                        source.roles,
                    )
                    sound(source.tokens.max() < 65536, "ids outside the vocabulary", source.tokens)
                    np.asarray(source.tokens[:10]).astype(np.int64)
                except (UserError, SettingErrors) as error:
                    sound(any(p in str(error) for p in self.places), "a message without a place", error)
        if faulty:
            raise faulty
        return "sound"

    def say_where(self, error: UserError) -> None:
        sound(any(p in str(error) for p in FILES) or "data has" in str(error), "a message without a file", error)
