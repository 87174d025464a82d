"""Rewrite a checkpoint record by record: some tensors change, the bytes of all others stay."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import math
import os
import pickle
import struct
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.common.atomic_io import atomic_write, check_disk_space
from rwkv_peft.common.direct_io import DirectWriter
from rwkv_peft.common.hashing import crc32
from rwkv_peft.common.parallel_io import parallel_map, tensor_bytes

from .pth import DTYPES, LOCAL_HEADER, PthReader, StorageInfo, TensorInfo, load, save
from .zip_records import FULL

BLOCK = 1 << 19  # numbers of a tensor that are processed at once: in float32 they fit a core's own cache
ALIGNMENT = 64  # torch places every record at a multiple of this, so that it can be mapped


class WrongChecksum(Exception):
    """The bytes read for a record, which is the argument, do not match the checksum in the file."""


# a tensor's name -> None to copy it, else a function from the source's tensor to the new one
TensorUpdate = Callable[[str], Callable[[Tensor], Tensor] | None]


@dataclass(frozen=True)
class RowwiseUpdate:
    """An update of a tensor that can be computed for some rows without the others.

    Attributes:
        rows: takes some rows of the source's tensor and their slice, returns the new rows.
        unit: rows that must stay together; blocks begin at multiples of it.
        block: numbers that are processed at once (0: BLOCK).
    """

    rows: Callable[[Tensor, slice], Tensor]
    unit: int = 1
    block: int = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """Update a whole tensor."""
        return self.rows(tensor, slice(0, len(tensor)) if tensor.dim() else slice(None))

    def blocks(self, shape: Sequence[int]) -> list[slice]:
        """Split the rows of a tensor of this shape into nearly equal blocks of about `block` numbers."""
        units = shape[0] // self.unit
        number = max(1, units * self.unit * math.prod(shape[1:]) // (self.block or BLOCK))
        number = min(number, max(units, 1))
        ends = [units * i // number * self.unit for i in range(number)] + [shape[0]]
        return [slice(begin, end) for begin, end in itertools.pairwise(ends)]


def rewrite(
    source: str | os.PathLike | PthReader,
    target: str | os.PathLike,
    change: TensorUpdate,
    added: Mapping[str, Tensor] | None = None,
) -> None:
    """Copy a checkpoint with some tensors changed, several records at a time.

    Of a changed tensor, memory holds some rows if the update is a RowwiseUpdate, else one whole tensor. It is written
    in the dtype and shape of the source. Key set, shapes, dtypes and (without `added`) pickle stay the source's, and
    so do the bytes of all that does not change. The target is a .pth, with the official names and shapes where the
    source has others.

    Args:
        source: a path, or an open reader (it then does not matter what has become of its path).
        target: the file to write.
        change: returns the update of a tensor by its name, None to copy it.
        added: tensors by name that the source does not have, or that replace those it has.

    Raises:
        CorruptCheckpoint: a record of the source does not match its checksum.
    """
    added = added or {}
    with contextlib.nullcontext(source) if isinstance(source, PthReader) else PthReader(source) as old:
        more = sum(t.numel() * t.element_size() for t in added.values())
        check_disk_space(Path(target).parent, old.size + more)
        owners: dict[str, list[str]] = {}
        for name, stored in old.described.items():
            owners.setdefault(old.folder + stored.record, []).append(name)
        if any(len(names) > 1 or not old.described[names[0]].whole for names in owners.values()):
            # tensors that share a record cannot be changed one by one: such files are rare, and small enough to load
            changed = {
                n: match_original(n, make(t), t) if (make := change(n)) else t for n, t in load(old.path).items()
            }
            save(target, {**changed, **added})
            return
        places = {name: stored for name, stored in old.described.items() if name not in added}
        contents: dict[str, Content] = {}
        one_at_a_time = threading.Lock()
        folder, infos = (old.folder, old.zip.infolist()) if old.zip else ("archive/", [])
        new_list = bool(added) or not old.is_official
        if old.zip is None:
            contents |= {f"{folder}data.pkl": bytes_content(b""), f"{folder}byteorder": bytes_content(b"little")}
            for name in places:
                make, info = change(name), old.info(name)
                pieces = functools.partial(old.read, info, [])
                copied = Content(info.file_size, pieces)
                contents[folder + info.filename] = changed_content(old, name, make, one_at_a_time) if make else copied
            contents[f"{folder}version"] = bytes_content(b"3\n")
        for info in infos:
            name = owners.get(info.filename, [""])[0]
            if name in added:
                continue
            if new_list and info.filename == f"{old.folder}data.pkl":
                contents[info.filename] = bytes_content(b"")  # written when all positions are known
            elif name and (make := change(name)):
                contents[info.filename] = changed_content(old, name, make, one_at_a_time)
            else:
                # what is written has the checksum of what was read: it is computed once
                pieces = functools.partial(old.read, info, [], False)
                contents[info.filename] = Content(info.file_size, pieces, info.CRC if old.has_checksums else None)
        for number, (name, tensor) in enumerate(added.items()):
            places[name] = TensorInfo(tensor.dtype, tuple(tensor.shape), f"data/added{number}", True)
            contents[folder + places[name].record] = bytes_content(tensor_bytes(tensor.detach().cpu()))
        if new_list:
            contents[f"{folder}data.pkl"] = bytes_content(pickle_header(places))
        with atomic_write(target) as file, DirectWriter(file) as out:
            try:
                write_zip(out, contents)
            except WrongChecksum as wrong:
                raise old.corrupt(wrong.args[0], "its checksum is wrong") from None


def changed_content(
    old: PthReader, name: str, make: Callable[[Tensor], Tensor], one_at_a_time: threading.Lock
) -> Content:
    """Return the content of the record of a tensor that changes."""
    stored = old.described[name]

    def whole() -> Iterator[memoryview]:
        with one_at_a_time:  # memory has room for one whole tensor and what its change takes
            tensor = old.tensor(name)
            yield tensor_bytes(match_original(name, make(tensor), tensor))

    if not (isinstance(make, RowwiseUpdate) and stored.bytes and stored.shape):
        return Content(stored.bytes, whole)
    rowwise = make

    def by_rows() -> Iterator[memoryview]:
        blocks = rowwise.blocks(stored.shape)
        for block, tensor in zip(blocks, old.rows(name, blocks), strict=True):
            yield tensor_bytes(match_original(name, rowwise.rows(tensor, block), tensor))

    return Content(stored.bytes, by_rows)


def match_original(name: str, changed: Tensor, original: Tensor) -> Tensor:
    """Convert an updated tensor to the dtype of the original; its shape must be the same."""
    if changed.shape != original.shape:
        raise ValueError(f"{name} would change its shape from {list(original.shape)} to {list(changed.shape)}")
    return changed.to(original.dtype)


@dataclass(frozen=True)
class Content:
    """The content of a record to write.

    Attributes:
        size: bytes.
        pieces: returns them in order.
        checksum: None if not known beforehand.
    """

    size: int
    pieces: Callable[[], Iterable[memoryview]]
    checksum: int | None = None


def bytes_content(data: bytes | memoryview) -> Content:
    """Return a record content that is in memory."""
    return Content(len(data), lambda: [memoryview(data)])


def write_zip(out: DirectWriter, contents: Mapping[str, Content]) -> None:
    """Write a zip archive of uncompressed records, by name, to an empty file.

    Where a record begins follows from the sizes of those before it, so several are written at a time. (The format:
    https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT; the numbers in brackets are its chapters.)
    """
    records, end = [], 0
    for name, content in contents.items():
        info = record_entry(name, end)
        info.file_size, info.compress_size, info.CRC = content.size, content.size, 0
        records.append(info)
        end += len(info.FileHeader(zip64=True)) + content.size

    def write(info: zipfile.ZipInfo) -> None:
        def counted() -> Generator[memoryview, None, None]:
            for piece in contents[info.filename].pieces():
                info.CRC = crc32(piece, info.CRC)
                yield piece

        begin = info.header_offset + len(info.FileHeader(zip64=True))
        # closed at once if writing fails: the generator may hold a lock, and an error would keep it alive
        with contextlib.closing(counted()) as pieces:
            at = out.pieces(pieces, begin)
        if at - begin != info.file_size:
            raise ValueError(f"{info.filename} has {at - begin:,} bytes instead of {info.file_size:,}")
        if contents[info.filename].checksum not in (None, info.CRC):
            raise WrongChecksum(info)
        out.write(info.FileHeader(zip64=True), info.header_offset)

    parallel_map(write, records)
    out.write(central_directory(records, end), end)


def record_entry(name: str, begin: int) -> zipfile.ZipInfo:
    """Return the entry of a record whose header is at `begin`.

    Its content is at a multiple of 64 bytes, as torch writes it.
    """
    info = zipfile.ZipInfo(name)
    info.compress_type, info.header_offset = zipfile.ZIP_STORED, begin
    # after the name: 20 bytes that zip64 adds, then the padding field (4 bytes head)
    padding = -(begin + LOCAL_HEADER + len(name.encode()) + 20 + 4) % ALIGNMENT
    info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding  # "FB": torch's own mark of padding
    return info


def central_directory(records: Sequence[zipfile.ZipInfo], begin: int) -> bytes:
    """Return the end of a zip archive, from `begin` on: where each record is, and where this list is."""
    out = b""
    for info in records:
        name, flags = info.filename.encode(), 0 if info.filename.isascii() else 0x800  # UTF-8
        large = [n for n in (info.file_size, info.compress_size, info.header_offset) if n >= FULL]
        extra = struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""  # [4.5.3]
        size, offset = min(info.file_size, FULL), min(info.header_offset, FULL)
        date = 1 << 5 | 1  # 1 January 1980, as in torch
        out += b"PK\1\2" + struct.pack(  # [4.3.12]
            "<6H3L5H2L", 45, 45, flags, 0, 0, date, info.CRC, size, size, len(name), len(extra), 0, 0, 0, 0, offset
        )  # fmt: skip
        out += name + extra
    size, count, tail = len(out), len(records), b""
    if count >= 0xFFFF or begin + size >= FULL:
        tail = b"PK\6\6" + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, count, count, size, begin)  # [4.3.14]
        tail += b"PK\6\7" + struct.pack("<LQL", 0, begin + size, 1)  # [4.3.15]
    few = min(count, 0xFFFF)
    tail += b"PK\5\6" + struct.pack("<4H2LH", 0, 0, few, few, min(size, FULL), min(begin, FULL), 0)  # [4.3.16]
    return out + tail


def pickle_header(places: Mapping[str, TensorInfo]) -> bytes:
    """Return data.pkl for tensors in records of their own: what torch.save would write about them."""

    class Writer(pickle.Pickler):
        def persistent_id(self, thing: object) -> tuple | None:
            if not isinstance(thing, StorageInfo):
                return None
            kind = next(name for name, dtype in DTYPES.items() if dtype == thing.dtype)
            return ("storage", getattr(torch, kind), thing.key, "cpu", thing.size)

        def reducer_override(self, thing: Any) -> Any:
            if not isinstance(thing, TensorInfo):
                return NotImplemented
            strides: list[int] = []
            size = 1
            for n in reversed(thing.shape):
                strides.insert(0, size)
                size *= n
            storage = StorageInfo(thing.dtype, thing.record.removeprefix("data/"), size)
            hooks: OrderedDict[str, object] = OrderedDict()
            return torch._utils._rebuild_tensor_v2, (storage, 0, thing.shape, tuple(strides), False, hooks)

    out = io.BytesIO()
    Writer(out, protocol=2).dump(dict(places))
    return out.getvalue()
