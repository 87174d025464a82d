"""What the harnesses of row files share: a file is read as make_tokenize.sh reads it, with settings that follow from
its bytes.

Sound: every row is kept, dropped or rejected with its place; the ids of a kept row decode to its text; its roles cover
the bytes of its answers and nothing else; no row is longer than its limit; the short way for plain conversations gives
what the long one gives."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np

from fuzz import mutate
from fuzz.harness import Harness, sound
from rwkv_peft.preprocess import files, reader
from rwkv_peft.preprocess.encode import encode_row
from rwkv_peft.preprocess.foreign_headings import tables
from rwkv_peft.preprocess.keys import HARMLESS, ROLE_NAMES, TABLES, columns
from rwkv_peft.preprocess.pipeline import EncodeConfig, RowEncoder
from rwkv_peft.preprocess.truncate import Limits
from rwkv_peft.text import tokenizer
from rwkv_peft.text.presets import PRESETS
from rwkv_peft.text.roles import Role

NAMES = (
    *{n for names in TABLES.values() for n in names},
    *ROLE_NAMES,
    *HARMLESS[:40],
    "split",
    "message_id",
    "parent_id",
    "turn",
)
LONGEST_ID = 65529


def recipes() -> list[EncodeConfig]:
    """Settings that differ in every way."""
    plain = EncodeConfig(PRESETS["rwkv-world"])
    change = dataclasses.replace
    result = [
        plain,
        plain,
        plain,
        change(plain, expand=True),
        change(plain, mask_history=True),
        change(plain, convert=True, bos=True),
    ]
    result += [change(plain, template=form, bos=i % 2 == 0) for i, form in enumerate(PRESETS.values())]
    result += [change(plain, eot=eot) for eot in ("blank", "both", "x17")]
    result += [
        change(plain, limits=Limits(40, 0, 0, policy)) for policy in ("drop", "truncate", "truncate-left", "split")
    ]
    result += [
        change(plain, limits=Limits(60, 12, 15, policy), bos=True) for policy in ("drop", "truncate", "truncate-left")
    ]
    result += [
        change(plain, convert=True, expand=True, limits=Limits(30, 0, 9, "truncate")),
        change(plain, repair=False, end_of_doc=False),
    ]
    mapped = columns(
        '{"prompt": "input", "response": "text"}', '{"customer": "user", "agent": "assistant", "note": ""}'
    )
    return [*result, change(plain, columns=mapped), change(plain, handler="sharegpt"), change(plain, handler="alpaca")]


class Watched(RowEncoder):
    """Keeps what the rows were rendered to."""

    def encoded(self, drafts, *others):
        self.rendered = drafts
        return super().encoded(drafts, *others)


class Rows(Harness):
    """ending: of the file. A row file is written under its name, whatever its content."""

    ending = ".jsonl"
    longest = 1 << 14

    def __init__(self):
        self.places = (f"rows{self.ending}",)

    def warm_up(self) -> None:
        tokenizer.encode("a")
        tokenizer.token_bytes()
        tables()
        self.recipes = recipes()
        for recipe in self.recipes:
            RowEncoder(recipe)

    def name_of(self, data: bytes) -> str:
        return f"rows{self.ending}"

    def read(self, data: bytes, folder: Path) -> str:
        path = folder / self.name_of(data)
        path.write_bytes(data)
        chosen = self.choice(data)
        recipe = self.recipes[chosen % len(self.recipes)]
        mode, split = (
            ("file", "line", "paragraph")[chosen >> 8 & 1 or chosen >> 9 & 2],
            ("", "", "", "test")[chosen >> 12 & 3],
        )
        reader.settle([path])
        encoder, outcomes = Watched(recipe), set()
        for block in files.blocks(path, mode, split):
            outcomes |= check_block(encoder, block, bool(chosen >> 16 & 1))
        return " ".join(sorted(outcomes)) or "no rows"


def check_block(encoder: Watched, block, both_ways: bool) -> set[str]:
    """Encode a block and look at all of it."""
    encoder.rendered = []
    made, counts = (encoded := encoder.block(block)), encoded.counts
    ids, roles, sizes = made.ids, made.roles, made.sizes
    sound(len(ids) == len(roles) == sizes.sum(), "lengths that differ", len(ids), len(roles), sizes)
    sound(
        len(sizes) == len(made.lines) == len(made.hashes) == len(made.documents),
        "rows without a line",
        sizes,
        made.lines,
    )
    sound(not len(ids) or ids.max() <= LONGEST_ID, "ids outside the vocabulary", ids)
    sound(not len(roles) or roles.max() <= max(Role), "roles that are none", roles)
    left = sum(n for name, n in counts.items() if name.startswith(("dropped: ", "rejected: ")))
    sound(counts["read"] == counts["kept"] + left, "rows that are lost", counts)
    for one in made.rejects:
        sound(one.message.strip() and one.reason and one.line >= 1, "a reject without a place or a reason", one)
    limits = encoder.recipe.limits
    sound(not limits.max_tokens or not len(sizes) or sizes.max() <= limits.max_tokens, "a row above its limit", sizes)
    ends = np.cumsum(sizes)
    rows = [(ids[e - n : e], roles[e - n : e]) for e, n in zip(ends.tolist(), sizes.tolist(), strict=True)]
    if not (limits.max_tokens or limits.source or limits.target):
        bad = {(one.line, one.reason) for one in made.rejects if one.reason in ("not text", "tokenizer", "surrogate")}
        drafts = [d for d in encoder.rendered if (d.source is None or Role.ASSISTANT in d.pieces.roles)]
        if not bad:
            sound(len(drafts) == len(rows), "rows that are lost on the way", len(drafts), len(rows))
            for draft, (its_ids, its_roles) in zip(drafts, rows, strict=True):
                check_row(draft.pieces, its_ids, its_roles, encoder.ending.token, encoder.recipe.bos)
    else:
        for its_ids, _ in rows:
            sound("\ufffd" not in tokenizer.decode(its_ids) or b"\xef\xbf\xbd" in tokenizer.decode_bytes(its_ids),
                  "a row that is cut inside a character", its_ids)  # fmt: skip
    if both_ways and encoder.quick.columns:
        slow = Watched(encoder.recipe)
        slow.quick.columns = ()
        other = slow.block(block)
        same = (
            np.array_equal(other.ids, ids)
            and np.array_equal(other.roles, roles)
            and np.array_equal(other.lines, made.lines)
        )
        sound(same, "the short way gives something else", tokenizer.decode(ids), tokenizer.decode(other.ids))
    return {name for name in counts if counts[name] and name.startswith(("schema", "dropped", "rejected", "fault"))}


def check_row(pieces, ids: np.ndarray, roles: np.ndarray, end: bool, bos: bool) -> None:
    """Whether tokens are those of a text in pieces, and their roles those of its bytes."""
    defined = encode_row(pieces, end, bos)
    sound(
        np.array_equal(defined.ids, ids) and np.array_equal(defined.roles, roles),
        "not as it is defined",
        pieces,
        ids,
        roles,
    )
    data = [text.encode("utf-8") for text in pieces.texts]
    body = ids[bos : len(ids) - end].tolist()
    sound(tokenizer.decode_bytes(body) == b"".join(data), "the ids are another text", pieces, ids)
    speaks = np.repeat(np.array(pieces.roles, np.uint8), [len(one) for one in data]) == Role.ASSISTANT
    before = np.append(0, np.cumsum(speaks))  # bytes of answers in front of each byte
    ends = np.cumsum(tokenizer.token_lengths()[body]) if body else np.zeros(0, np.int64)
    starts = np.append(0, ends[:-1]) if body else ends
    answers = before[ends] > before[starts]
    its_roles = roles[bos : len(roles) - end] == Role.ASSISTANT
    sound(np.array_equal(answers, its_roles), "an answer whose bytes are not all learnt", pieces, roles)


def json_rows(data: bytes, random: random.Random, other: bytes) -> bytes:
    return mutate.of_json_lines(data, random, other, NAMES)
