"""The reader of .pth checkpoints. Sound: every tensor that is described is in a record of the file; mapped reading,
reading record by record and a copy of the file all give the same bytes."""

from __future__ import annotations

import contextlib
import io
import pickle
import pickletools
import random
from pathlib import Path

import torch

from fuzz import mutate
from fuzz.harness import Harness, sound
from rwkv_peft.checkpoint import base_model, pth, pth_rewrite
from rwkv_peft.common.errors import UserError

NUMBERS = (
    pickle.BININT1 + b"\0", pickle.BININT1 + b"\xff", pickle.BININT + b"\xff\xff\xff\xff",
    pickle.BININT + b"\xff\xff\xff\x7f", pickle.LONG1 + b"\x09" + b"\xff" * 8 + b"\x7f", pickle.BININT2 + b"\0\1",
    pickle.NONE, pickle.NEWTRUE, pickle.EMPTY_TUPLE, pickle.EMPTY_DICT, pickle.EMPTY_LIST,
    pickle.BINFLOAT + b"\x7f\xf0" + b"\0" * 6, b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n",
    b"cposix\nsystem\n", b"ctorch._utils\n_rebuild_tensor_v2\n", pickle.BINUNICODE + b"\1\0\0\0x", pickle.MARK,
    pickle.TUPLE, pickle.REDUCE, pickle.BINPERSID, pickle.SETITEM, pickle.DUP, pickle.POP, pickle.STOP,
)  # fmt: skip


def of_pickle(data: bytes, random: random.Random) -> bytes:
    """A pickle with some of its instructions changed."""
    try:
        ends = [at for _, _, at in pickletools.genops(data)] + [len(data)]
    except Exception:  # it is no pickle any more
        return mutate.of_bytes(data, random, b"", NUMBERS)
    parts = [data[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
    for _ in range(random.choice((1, 1, 2, 4))):
        at, what = random.randrange(len(parts)), random.randrange(6)
        if what < 2:
            parts[at] = random.choice(NUMBERS)
        elif what == 2:
            parts[at] = mutate.of_bytes(parts[at], random)
        elif what == 3 and len(parts) > 1:
            del parts[at]
        elif what == 4:
            parts[at:at] = parts[at : at + random.choice((1, 3, 10))]
        else:
            parts[at] = random.choice(parts)
    return b"".join(parts)


class It(Harness):
    places = ("model.pth", "copy.pth")
    cases = ("p0[1-3]*.pth",)

    def warm_up(self) -> None:
        out = io.BytesIO()
        torch.save({"a": torch.zeros(2)}, out)

    def mutate(self, data: bytes, random: random.Random, other: bytes) -> bytes:
        def inner(name: str, content: bytes, random: random.Random) -> bytes:
            return of_pickle(content, random) if name.endswith(".pkl") else mutate.of_bytes(content, random)

        return mutate.of_zip(data, random, other, inner)

    def grown(self, data: bytes, random: random.Random, size: int) -> bytes:
        result = mutate.members(data)
        at = next((i for i, one in enumerate(result or ()) if one[0].endswith("data.pkl")), None)
        if at is None:
            return super().grown(data, random, size)
        result[at] = result[at][0], mutate.grown(result[at][1], random, size), result[at][2]
        return mutate.zipped(result)

    def read(self, data: bytes, folder: Path) -> str:
        path = folder / "model.pth"
        path.write_bytes(data)
        described = pth.read_header(path)
        for name, stored in described.items():
            sound(isinstance(name, str), "a name that is no text", name)
            sound(all(isinstance(n, int) and n >= 0 for n in stored.shape), "a shape that is none", name, stored)
            sound(0 <= stored.bytes <= len(data), "more bytes than the file has", name, stored)
        with contextlib.suppress(UserError):
            base_model.read_geometry(path)
        tensors = pth.load(path)
        sound(tensors.keys() == described.keys(), "other names", tensors.keys(), described.keys())
        with contextlib.suppress(pth.CorruptCheckpoint):
            pth.check_checksums(path)
        with pth.PthReader(path) as archive:
            for name, stored in described.items():
                mapped = tensors[name]
                sound(
                    mapped.shape == stored.shape and mapped.dtype == stored.dtype,
                    "another shape",
                    name,
                    stored,
                    mapped.shape,
                )
                with contextlib.suppress(pth.CorruptCheckpoint):
                    sound(same(archive.tensor(name), mapped), "two readers read two things", name, stored)
        if self.choice(data) % 4 == 0:
            pth_rewrite.rewrite(path, folder / "copy.pth", lambda name: None)
            again = pth.load(folder / "copy.pth")
            sound(again.keys() == tensors.keys(), "a copy with other names", again.keys())
            sound(all(same(again[name], tensors[name]) for name in again), "a copy with other numbers", again.keys())
        return f"{len(described)} tensors"


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal, NaN and all."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return (
        one.contiguous().view(-1).view(torch.uint8).equal(other.contiguous().view(-1).view(torch.uint8))
        if one.numel()
        else True
    )
