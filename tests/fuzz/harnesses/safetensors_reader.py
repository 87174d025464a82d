"""The reader of .safetensors files. Sound: every tensor is in the file, behind the header; where the format's own
library takes the file as well, it finds the same names, shapes and bytes."""

from __future__ import annotations

import contextlib
import random
import struct
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file

from fuzz import mutate
from fuzz.harness import Harness, sound
from fuzz.harnesses.pth_reader import same
from rwkv_peft.checkpoint import base_model, pth
from rwkv_peft.common.errors import UserError

NAMES = (
    "dtype", "shape", "data_offsets", "__metadata__", "F16", "BF16", "F32", "F64", "BOOL", "U8", "I64", "F8_E4M3",
    "emb.weight", "blocks.0.att.time_state", "format",
)  # fmt: skip


class It(Harness):
    places = ("model.safetensors", "copy.pth")
    cases = ("p01-model.safetensors",)

    def warm_up(self) -> None:
        torch.zeros(1)

    def mutate(self, data: bytes, random: random.Random, other: bytes) -> bytes:
        size = int.from_bytes(data[:8], "little")
        if random.random() < 0.2 or not 0 < size <= len(data):
            return mutate.of_bytes(data, random, other)
        header = mutate.of_json(data[8 : 8 + size], random, b"", NAMES)
        if random.random() < 0.5:
            header += b" " * (-len(header) % 8)
        length = len(header) if random.random() < 0.95 else random.choice(mutate.EDGES)
        return struct.pack("<Q", length) + header + data[8 + size :]

    def grown(self, data: bytes, random: random.Random, size: int) -> bytes:
        made = mutate.grown(data[8:], random, size)
        return struct.pack("<Q", len(made)) + made

    def read(self, data: bytes, folder: Path) -> str:
        path = folder / "model.safetensors"
        path.write_bytes(data)
        described = pth.read_header(path)
        behind = 8 + int.from_bytes(data[:8], "little")
        for name, stored in described.items():
            sound(stored.in_safetensors, "described as a .pth", stored)
            sound(
                behind <= stored.offset and stored.offset + stored.bytes <= len(data),
                "bytes outside the file",
                name,
                stored,
            )
        with contextlib.suppress(UserError):
            base_model.read_geometry(path)
        tensors = pth.load(path)
        with pth.PthReader(path) as archive:
            for name, stored in described.items():
                sound(tensors[name].shape == stored.shape, "another shape", name, stored)
                sound(same(archive.tensor(name), tensors[name]), "two readers read two things", name)
        try:
            theirs = load_file(path)
        except (safetensors.SafetensorError, ValueError, KeyError, AttributeError, OSError, RuntimeError):
            return f"{len(described)} tensors for us alone"
        old = {(stored.name or name): tensors[name] for name, stored in described.items()}
        sound(old.keys() == theirs.keys(), "other names than the library", old.keys(), theirs.keys())
        for name, tensor in old.items():
            sound(same(tensor.reshape(-1), theirs[name].reshape(-1)), "other numbers than the library", name)
        return f"{len(described)} tensors"
