"""Write safetensors files some tensors at a time: the library's own writer needs all of them in memory at once.

The file: length of the header (uint64, little-endian); the header, JSON, name -> dtype, shape and position of the
bytes after the header; the bytes. Spaces fill the header up to a multiple of 8, so that tensors can be used where they
are. (https://huggingface.co/docs/safetensors)
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.common.atomic_io import atomic_write, check_disk_space
from rwkv_peft.common.direct_io import DirectWriter
from rwkv_peft.common.errors import UserError, pip_command
from rwkv_peft.common.parallel_io import parallel_map, tensor_bytes
from rwkv_peft.common.paths import display_path

CODES = {
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.bool: "BOOL",
    torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip


def write_safetensors(
    target: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: torch.dtype | Mapping[str, torch.dtype],
    pieces: Callable[[str], Iterable[Tensor]],
    digest: Any = None,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write a file. It gets its name only when it is complete.

    Args:
        target: the file.
        shapes: name -> shape, in the order of the file.
        dtypes: of all tensors, or name -> dtype.
        pieces: name -> the tensor's numbers in order, in its dtype; called by several threads.
        digest: object of hashlib that gets all bytes; tensors are then written one after another.
        metadata: texts by name, for the header.

    Returns:
        The size of the file in bytes.

    Raises:
        UserError: safetensors is not installed, or cannot read the result.
    """
    safetensors = import_safetensors()
    header: dict[str, dict] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, shape in shapes.items():
        dtype = dtypes if isinstance(dtypes, torch.dtype) else dtypes[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    size = 8 + len(text) + end
    check_disk_space(target.parent, size)
    with atomic_write(target) as file, DirectWriter(file) as out:

        def write_tensor(name: str) -> None:
            at, end = (8 + len(text) + offset for offset in header[name]["data_offsets"])
            if out.pieces(hashed(map(tensor_bytes, pieces(name))), at) != end:
                raise ValueError(f"{name} has another size than its shape {shapes[name]} says")

        def hashed(data: Iterable[memoryview]) -> Iterator[memoryview]:
            if digest is None:
                yield from data
                return
            for piece in data:
                done = hasher.submit(digest.update, piece)
                yield piece  # it is written to the disk meanwhile
                done.result()

        first = struct.pack("<Q", len(text)) + text
        out.write(first, 0)
        if digest is None:
            parallel_map(write_tensor, shapes)
        else:
            digest.update(first)
            with ThreadPoolExecutor(1) as hasher:
                for name in shapes:
                    write_tensor(name)
        check_readable(safetensors, Path(file.name), set(shapes), target)
    return size


def import_safetensors() -> ModuleType:
    """Import the safetensors library, before anything is written.

    Raises:
        UserError: it is not installed.
    """
    try:
        import safetensors  # here: an optional package
    except ModuleNotFoundError:
        raise UserError(
            f"Writing safetensors files needs a package that is missing: {pip_command('safetensors')}"
        ) from None
    return safetensors


def check_readable(safetensors: ModuleType, path: Path, names: set[str], target: Path) -> None:
    """Read the header with the library that clients use: it checks every position in it.

    Raises:
        UserError: it cannot be read, or tensors are missing.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            names_read = set(file.keys())
    except safetensors.SafetensorError as error:
        raise UserError(f"{display_path(target)}: was not written right ({error}). Is the disk sound?") from None
    if names_read != names:
        raise UserError(f"{display_path(target)}: was not written right (tensors are missing). Is the disk sound?")
