"""Checkpoint files: what is in one (without loading it), mapped reading, atomic writing, and rewriting record by record.

A .pth is a zip archive: NAME/data.pkl says which tensor lies in which record, NAME/data/K are the records. Reading the
pickle here executes nothing: only the few names that describe tensors are understood, anything else is refused. A
.safetensors file is read as well, whatever its name; what is written is a .pth. Models with the official names behind a prefix,
or with flattened vectors, are read as the official files are (native.py).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import itertools
import lzma
import math
import os
import pickle
import re
import struct
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from rwkv_peft.common.atomic_io import atomic_write, check_disk_space
from rwkv_peft.common.direct_io import DirectReader, DirectWriter
from rwkv_peft.common.direct_io import aligned as room_for
from rwkv_peft.common.errors import UserError, cause
from rwkv_peft.common.formatting import first_line, join_names
from rwkv_peft.common.hashing import crc32
from rwkv_peft.common.parallel_io import parallel_map, tensor_bytes
from rwkv_peft.common.paths import display_path, missing, models_in

from . import file_type, zip_records
from . import official_names as native

MOST_SIDES = 64  # of a tensor, as torch has it
COPY_BYTES = 1 << 22  # read, hash and copy in pieces of 4 MB
BLOCK = 1 << 19  # numbers of a tensor that are worked on at once: in float32 they fit a core's own cache
LOCAL_HEADER = 30  # bytes in front of a record's name in a zip file
ALIGNMENT = 64  # torch places every record at a multiple of this, so that it can be mapped
FULL32 = 0xFFFFFFFF  # in a zip file: the number has more than 32 bits and stands elsewhere
MOST_PICKLE = 32 << 20  # bytes of data.pkl: a tensor needs some 150
MOST_NUMBERS = 1 << 48  # of a tensor, and in each of its sizes

# what a damaged zip or pickle raises, one way or another
UNREADABLE = (
    pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError, RuntimeError, zlib.error,
    ArithmeticError, AssertionError, struct.error, zipfile.BadZipFile, lzma.LZMAError,
)  # fmt: skip

DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


SAFETENSORS = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "BOOL": torch.bool,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its file describes it: dtype, shape, and the record that holds it (whole: nothing else is in it).

    name: in the file, where that or the shape is not the official one, which this has. offset: where its bytes begin in a
    .safetensors file. reach: bytes that its record must have.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    record: str
    whole: bool
    name: str = field(default="", compare=False)
    offset: int | None = field(default=None, compare=False)
    reach: int = field(default=0, compare=False)

    @property
    def bytes(self) -> int:
        return functools.reduce(int.__mul__, self.shape, 1) * self.dtype.itemsize


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    size: int


class _Describe(pickle._Unpickler):
    """Reads data.pkl of a .pth as descriptions; refuses everything that is not a plain tensor.

    The unpickler in Python: the one in C makes room for what a pickle announces (a text of 1 TB, the 2,147,483,647th thing to be
    remembered: nine bytes take 32 GB) before it looks whether it is there. A model's list takes 0.1 s. An array of bytes, which
    no list of tensors holds, would be made in the size that is written before it.
    """

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

    def find_class(self, module: str, name: str):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return describe_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in ("torch", "torch.storage") and name in DTYPES:
            return DTYPES[name]
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}")

    def persistent_load(self, pid):
        kind, dtype, key, _device, size = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("it holds something other than plain tensors")
        return _Storage(dtype, str(key), int(size))


def are_sizes(numbers: Iterable) -> bool:
    return all(type(n) is int and 0 <= n <= MOST_NUMBERS for n in numbers)


def describe_tensor(storage: _Storage, offset: int, shape, stride, *_rest) -> TensorInfo:
    if not are_sizes((offset, storage.size, *shape, *stride)) or not can_be(shape):
        raise pickle.UnpicklingError("a tensor has a size that no tensor has")
    contiguous, expected = True, 1
    for n, s in zip(reversed(shape), reversed(stride), strict=True):
        contiguous &= n == 1 or s == expected
        expected *= n
    whole = offset == 0 and contiguous and expected == storage.size
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1 if expected else 0
    if max(last, 0) > storage.size:
        raise pickle.UnpicklingError("a tensor goes on behind the end of its numbers")
    reach = storage.size * storage.dtype.itemsize
    return TensorInfo(storage.dtype, tuple(shape), f"data/{storage.key}", whole, reach=reach)


def can_be(shape: Sequence[int]) -> bool:
    """Whether a tensor may have a shape: where one of its sides is 0, the others could be any number."""
    return len(shape) <= MOST_SIDES and are_sizes(shape) and math.prod(max(side, 1) for side in shape) <= MOST_NUMBERS


def read_header(path: str | os.PathLike) -> dict[str, TensorInfo]:
    """What a .pth or .safetensors file holds, name -> description, without reading a weight. UserError, with what it is instead,
    if it is no checkpoint of tensors."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{display_path(path)}: is a folder, not a .pth or .safetensors file.{inside(path)}")
    if not path.is_file():
        raise UserError(f"{display_path(path)}: {missing(path)}.{nearby(path)}")
    with open(path, "rb") as file:
        head = file.read(file_type.HEAD)
    if file_type.is_safetensors(head, path.stat().st_size):
        return official_names(describe_safetensors(path))
    if not has_zip_end(path):
        if head.startswith(b"PK\3\4"):
            raise UserError(f"{display_path(path)}: {file_type.cut_off(path.stat().st_size, size_by_list(path), True)}")
        raise UserError(f"{display_path(path)}: {file_type.what_it_is(path)}")
    if path.suffix == ".safetensors":  # torch.load goes by the name
        raise UserError(
            f"{display_path(path)}: is a .pth file by its content. Rename it to {path.with_suffix('.pth').name}"
        )
    records, folder = records_of(path)
    try:
        content = _Describe(io.BytesIO(small(path, records[f"{folder}data.pkl"], MOST_PICKLE))).load()
    except UNREADABLE as error:
        raise UserError(
            f"{display_path(path)}: holds more than plain tensors ({error}). It was not loaded, and nothing in it was run."
        ) from None
    if not isinstance(content, dict) or not all(isinstance(v, TensorInfo) for v in content.values()):
        raise UserError(
            f"{display_path(path)}: is not a dictionary of tensors, so it is no model and no adapter.{within(content)}"
        )
    must_have_plain_names(path, content)
    for name, stored in content.items():
        record = records.get(folder + stored.record)
        if record is None or record.file_size != stored.reach or stored.bytes > stored.reach:
            raise UserError(
                f"{display_path(path)}: the record of {name} is missing, too short or too long. Get the file again."
            )
    return official_names(dict(content))


def records_of(path: Path) -> tuple[dict[str, zipfile.ZipInfo], str]:
    """The records of a .pth by their names, and the folder that they are in. UserError for what is no .pth that torch would
    write, before anything of it is read."""
    try:
        names = list_of(path)
        pickles = [n for n in names if n.endswith("/data.pkl")]
        if len(pickles) != 1 or any("/code/" in n for n in names):
            if len(pickles) > 1:
                raise ValueError(f"it has {pickles[0]} and {pickles[1]}, and a checkpoint has one")
            raise UserError(f"{display_path(path)}: {file_type.what_zip_it_is(names)}")
        records = zip_records.checked(path)
    except (ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{display_path(path)}: is damaged, or no checkpoint: {error}. Get the file again; or, if "
            f"you trust it, load it with torch "
            "and save it once more."
        ) from None
    except UNREADABLE as error:
        raise UserError(f"{display_path(path)}: is damaged ({error}). Get the file again.") from None
    folder = pickles[0].removesuffix("data.pkl")
    if folder.count("/") != 1:
        raise UserError(
            f"{display_path(path)}: its data.pkl is in {folder}, where torch does not look. Get the file again."
        )
    if stranger := next((name for name in records if not name.startswith(folder)), ""):
        raise UserError(
            f"{display_path(path)}: holds {stranger} beside the checkpoint in {folder}. Get the file again."
        )
    if f"{folder}byteorder" in records:
        order = small(path, records[f"{folder}byteorder"], 16)
        if order != b"little":
            raise UserError(
                f"{display_path(path)}: its numbers are in the byte order {order.decode('ascii', 'replace')!r}; "
                f"this version reads "
                "little. Load and save it once with torch on a machine like this one."
            )
    return records, folder


def list_of(path: Path) -> list[str]:
    """The names of a zip file's records, where their list is not too long. ValueError."""
    with open(path, "rb") as file:
        zip_records.find_list(file, path.stat().st_size, exact=False)
        with zipfile.ZipFile(file) as archive:
            return archive.namelist()


def small(path: Path, info: zipfile.ZipInfo, most: int) -> bytes:
    """The bytes of a record that is short. UserError if it is not."""
    if info.file_size > most:
        raise UserError(
            f"{display_path(path)}: {info.filename} has {info.file_size:,} bytes, and {most:,} are the "
            f"most that it can need. It was "
            "not read."
        )
    with open(path, "rb") as file:
        return zip_records.read_at(file, zip_records.begin_of(file, info), info.file_size)


def must_have_plain_names(path: Path, content: Mapping) -> None:
    """UserError for a tensor whose name is no text that can be shown: names stand in messages, and in other files."""
    for name in content:
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= zip_records.MOST_NAME:
            raise UserError(f"{display_path(path)}: holds a tensor of the name {str(name)[:80]!a}, which no model has.")


def has_zip_end(path: Path) -> bool:
    """Whether a file has the end of a zip file, which says what is in it."""
    try:
        return zipfile.is_zipfile(path)
    except (*UNREADABLE, OSError):
        return False


def official_names(content: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """What a file holds by the official names and in the official shapes."""
    if not all(isinstance(name, str) for name in content):
        return content
    official = native.native({name: stored.shape for name, stored in content.items()})
    return {
        name: content[old]
        if (name, shape) == (old, content[old].shape)
        else replace(content[old], shape=shape, name=old)
        for name, (old, shape) in official.items()
    }


def differences(described: Mapping[str, TensorInfo]) -> str:
    """A sentence about how a model's file differs from the official form; "" where it does not."""
    renamed = sum(stored.name not in ("", name) for name, stored in described.items())
    shaped = sum(stored.name == name for name, stored in described.items())
    if renamed:
        old = next(stored.name for name, stored in described.items() if stored.name not in ("", name))
        return f"The file has other names than the official ones ({old})."
    if shaped:
        return "The file has flattened vectors."
    return "The base is a .safetensors file." if any(s.offset is not None for s in described.values()) else ""


def within(content) -> str:
    """A sentence about a model that lies in a dictionary of other things, as trainers save it."""
    for key in ("state_dict", "model", "module", "model_state_dict", "weights") if isinstance(content, dict) else ():
        part = content.get(key)
        if isinstance(part, dict) and part and all(isinstance(v, TensorInfo) for v in part.values()):
            return (
                f' Its "{key}" is one: take that out, with python -c "import torch; torch.save(torch.load(\'FILE\', '
                f"map_location='cpu', weights_only=True)['{key}'], 'model.pth')\"."
            )
    return ""


def describe_safetensors(path: Path) -> dict[str, TensorInfo]:
    """What a .safetensors file holds. UserError if its header is not right, or the file is cut off."""
    try:
        header, begin = file_type.safetensors_header(path)
        must_have_plain_names(path, header)
        content, size = {}, path.stat().st_size
        for name, entry in header.items():
            dtype, shape, places = SAFETENSORS.get(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
            if dtype is None:
                raise ValueError(
                    f"holds {name} as {entry['dtype']}, which this version does not read: use an F16, BF16 or F32 copy."
                )
            sound = can_be(shape) and len(places) == 2 and are_sizes((*shape, *places))
            stored = TensorInfo(dtype, shape, f"data/{len(content)}", True, offset=begin + places[0]) if sound else None
            if stored is None or stored.bytes != places[1] - places[0]:
                raise ValueError(f"is a .safetensors file whose header is damaged ({name}). {file_type.AGAIN}.")
            content[name] = stored
        must_follow_one_another(content, begin, size)
    except ValueError as error:
        raise UserError(f"{display_path(path)}: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{display_path(path)}: is a .safetensors file whose header is damaged. {file_type.AGAIN}."
        ) from None
    if content and all(name.endswith("time_state") for name in content):
        raise UserError(
            f"{display_path(path)}: is a learnt state for Ai00 and web-rwkv, whose matrices are "
            f"transposed. Use the checkpoint of "
            "its run (output/RUN/rwkv-N.pth), or the .pth that ./merge.sh --export state writes."
        )
    return content


def must_follow_one_another(content: Mapping[str, TensorInfo], begin: int, size: int) -> None:
    """ValueError unless the tensors of a .safetensors file, whose header ends at `begin`, fill its bytes without gaps and without
    sharing any: as its library wants it."""
    end = begin
    for name, stored in sorted(content.items(), key=lambda one: (one[1].offset, one[1].bytes)):
        if stored.offset != end:
            what = "shares bytes with another tensor" if stored.offset < end else "does not begin where another ends"
            raise ValueError(f"is a .safetensors file whose header is damaged ({name} {what}). {file_type.AGAIN}.")
        end += stored.bytes
    if end > size:
        raise ValueError(file_type.cut_off(size, end))
    if end < size:
        raise ValueError(f"is a .safetensors file with {size - end:,} bytes behind its last tensor. {file_type.AGAIN}.")


def size_by_list(path: Path) -> int | None:
    """How many bytes a .pth that was cut off should have at least, by the list of tensors at its beginning."""
    storages: dict[str, int] = {}

    class Sizes(_Describe):
        def persistent_load(self, pid):
            storage = super().persistent_load(pid)
            storages[storage.key] = storage.size * storage.dtype.itemsize
            return storage

    try:
        with open(path, "rb") as file:
            header = file.read(LOCAL_HEADER)
            name, extra = struct.unpack("<HH", header[-4:])
            if not file.read(name).endswith(b"/data.pkl"):
                return None
            file.seek(extra, os.SEEK_CUR)
            Sizes(io.BytesIO(file.read(MOST_PICKLE))).load()
    except (*UNREADABLE, OSError):
        return None
    return sum(storages.values())


def nearby(path: Path) -> str:
    """A sentence about what lies in the folder instead, for messages."""
    there = models_in(path.parent)
    return f" In {display_path(path.parent)}/ there is: {join_names(there)}." if there else ""


def inside(folder: Path) -> str:
    """A sentence about which file of a folder to name."""
    there = models_in(folder)
    shards = [name for name in there if re.search(r"-\d{5}-of-\d{5}\.safetensors$", name)]
    if len(shards) > 1:
        return (
            f" It holds a model in {len(shards)} .safetensors files; this version reads one file: join them, in their folder: "
            + file_type.join_command("*-of-*.safetensors")
        )
    return f" Name the file in it: {display_path(folder / there[0])}" if len(there) == 1 else nearby(folder / "x")


def load(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file, mapped: nothing is read until it is used."""
    path, described = Path(path), read_header(path)
    if not described:
        return {}
    if any(stored.offset is not None for stored in described.values()):
        try:
            whole = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
        except RuntimeError as error:
            raise cause(error) or error from None
        return {name: mapped(whole, stored) for name, stored in described.items()}
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name: tensors[s.name or name].detach().reshape(s.shape) for name, s in described.items()}
    except (*UNREADABLE, OSError) as error:
        refused = cause(error)
        if refused and not (
            isinstance(refused, OSError) and refused.errno == errno.EINVAL
        ):  # (a place outside the file)
            raise refused from None
        raise UserError(f"{display_path(path)}: is damaged ({first_line(error)}). Get the file again.") from None


def mapped(whole: torch.UntypedStorage, stored: TensorInfo) -> Tensor:
    """A tensor in a mapped .safetensors file."""
    if not stored.bytes:
        return torch.empty(stored.shape, dtype=stored.dtype)
    if stored.offset % stored.dtype.itemsize:  # behind tensors of single bytes
        data = bytes(whole[stored.offset : stored.offset + stored.bytes])
        return torch.frombuffer(bytearray(data), dtype=stored.dtype).view(stored.shape)
    at = stored.offset // stored.dtype.itemsize
    strides = torch.empty(stored.shape, device="meta").stride()
    return torch.empty(0, dtype=stored.dtype).set_(whole, at, stored.shape, strides)


def save(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint; it has its name only when it is whole."""
    path = Path(path)
    check_disk_space(path.parent, sum(t.numel() * t.element_size() for t in tensors.values()))
    # clone: a view would drag its whole storage into the file
    plain = {name: t.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    with atomic_write(path) as file:
        watched = WatchedFile(file)
        try:
            torch.save(plain, watched)
        except RuntimeError:  # torch's way to say that a write failed
            if watched.refused:
                raise watched.refused from None
            raise


class WatchedFile:
    """A file to write to, which keeps what the system has refused: torch forgets it."""

    def __init__(self, file: BinaryIO):
        self.file, self.refused = file, None

    def write(self, data) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.refused = error
            raise

    def flush(self) -> None:
        self.file.flush()


class CorruptCheckpoint(UserError):
    """A record of a checkpoint cannot be read as it was written."""


def check_checksums(path: str | os.PathLike) -> None:
    """Damaged if a record of a .pth has another checksum than the file says: mapped reading does not look at them. (A
    .safetensors file has none.)"""
    with PthReader(path) as archive:
        if archive.zip is None:
            return

        def look(info: zipfile.ZipInfo) -> None:
            for _ in archive.read(info, []):
                pass

        parallel_map(look, archive.zip.infolist())


class WrongChecksum(Exception):
    """What was read for a record, whose name this is, is not what its file says."""


class PthReader:
    """A .pth or .safetensors file opened for reading one tensor, or some rows of one, at a time. Memory holds nothing else.

    Unlike a mapped file it checks what it reads: every record of a .pth carries a checksum. Threads may read from it side by
    side.
    straight: read what is on the disk, not what the system may still have in memory.
    """

    def __init__(self, path: str | os.PathLike, straight: bool = False):
        self.path, self.described = Path(path), read_header(path)
        self.straight = straight

    def __enter__(self) -> PthReader:
        self.zip, self.plain, self.folder = None, None, ""
        self.reader = DirectReader(self.path) if self.straight else None
        if not self.described or any(stored.offset is not None for stored in self.described.values()):
            self.plain = open(self.path, "rb")  # noqa: SIM115 (closed by __exit__)
            self.file = self.plain.fileno()
            return self
        _, self.folder = records_of(self.path)
        self.zip = zipfile.ZipFile(self.path)
        if not any(info.CRC for info in self.zip.infolist()):  # torch.serialization.set_crc32_options(False)
            for info in self.zip.infolist():
                info.CRC = None
        self.file = self.zip.fp.fileno()
        return self

    def __exit__(self, *_exception) -> None:
        if self.reader:
            self.reader.close()
        for file in (self.zip, self.plain):
            if file:
                file.close()

    @property
    def size(self) -> int:
        """Bytes of all records."""
        if self.zip is None:
            return sum(stored.bytes for stored in self.described.values())
        return sum(info.file_size for info in self.zip.infolist())

    @property
    def is_official(self) -> bool:
        """Whether it is a .pth with the official names and shapes, of which the list of tensors can be copied."""
        return self.zip is not None and not any(stored.name for stored in self.described.values())

    def info(self, name: str) -> zipfile.ZipInfo:
        """The directory's entry of the record that holds a tensor; for .safetensors one like it, without a checksum."""
        stored = self.described[name]
        if self.zip is not None:
            return self.zip.getinfo(self.folder + stored.record)
        info = zipfile.ZipInfo(stored.record)
        info.compress_type, info.header_offset = zipfile.ZIP_STORED, stored.offset
        info.file_size = info.compress_size = stored.bytes
        info.CRC = None
        return info

    def checksum(self, name: str) -> int:
        """The checksum of a tensor's record, read for it where the file does not have it."""
        crc = self.info(name).CRC
        if crc is None:
            crc = 0
            for piece in self.pieces(name):
                crc = crc32(piece, crc)
        return crc

    def begin(self, info: zipfile.ZipInfo) -> int:
        """Where a record's bytes begin."""
        if self.zip is None:
            return info.header_offset
        header = os.pread(self.file, LOCAL_HEADER, info.header_offset)
        if header[:4] != b"PK\3\4":
            raise self.damaged(info, "its position in the file is wrong")
        return info.header_offset + LOCAL_HEADER + sum(struct.unpack("<HH", header[-4:]))

    def tensor(self, name: str) -> Tensor:
        stored = self.described[name]
        if not stored.whole:  # a view into a record that others use as well
            return load(self.path)[name]
        data, at = bytearray(stored.bytes), 0
        for piece in self.pieces(name):
            piece = piece[: stored.bytes - at]
            data[at : at + len(piece)] = piece
            at += len(piece)
        return (
            torch.frombuffer(data, dtype=stored.dtype).view(stored.shape)
            if data
            else torch.empty(stored.shape, dtype=stored.dtype)
        )

    def rows(self, name: str, blocks: Sequence[slice]) -> Iterator[Tensor]:
        """Rows of a tensor that has a record to itself: all of them, in blocks that follow one another. A block is valid
        until the next one is asked for."""
        stored = self.described[name]
        row = stored.bytes // stored.shape[0]
        sizes = [(block.stop - block.start) * row for block in blocks]
        for block, piece in zip(blocks, self.read(self.info(name), sizes), strict=False):
            yield torch.frombuffer(piece, dtype=stored.dtype).view(block.stop - block.start, *stored.shape[1:])

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor's record, a few MB at a time. A piece is valid until the next one is asked for."""
        return self.read(self.info(name), [])

    def read(self, info: zipfile.ZipInfo, sizes: Sequence[int], test: bool = True) -> Iterator[memoryview]:
        """The bytes of a record: pieces of these sizes, and what is left a few MB at a time. A piece is valid until the
        next one is asked for. Damaged instead of the last one if the checksum is wrong."""
        at, test = self.begin(info), test and info.CRC is not None
        left, crc, sizes = info.file_size, 0, list(sizes)
        most = min(left, max([COPY_BYTES, *sizes]))
        buffer = room_for(most) if self.reader else memoryview(bytearray(most))
        while left:
            piece = self.some(buffer, size := min(left, sizes.pop(0) if sizes else COPY_BYTES), at)
            if len(piece) != size:
                raise self.damaged(info, "it is cut off")
            crc, at, left = crc32(piece, crc) if test else info.CRC, at + len(piece), left - len(piece)
            if not left and crc != info.CRC:
                raise self.damaged(info, "its checksum is wrong")
            yield piece

    def some(self, buffer: memoryview, size: int, at: int) -> memoryview:
        """So many bytes of the file, or what there is of them."""
        if self.reader:
            return self.reader.read(buffer, size, at)
        return buffer[: os.preadv(self.file, [buffer[:size]], at)]

    def damaged(self, info: zipfile.ZipInfo, how: str) -> CorruptCheckpoint:
        record = info.filename.removeprefix(self.folder)
        name = next((n for n, stored in self.described.items() if stored.record == record), record)
        return CorruptCheckpoint(f"{display_path(self.path)}: {name} is damaged ({how}). Get the file again.")


# what becomes of a tensor: None for "as it is", else a function from the source's tensor to the new one
Change = Callable[[str], Callable[[Tensor], Tensor] | None]


@dataclass(frozen=True)
class RowwiseUpdate:
    """A change of which some rows can be made without the others.

    rows: some rows of the source's tensor, and which they are -> what becomes of them. unit: rows that must stay together:
    blocks begin at multiples of it. block: numbers that are worked on at once (0: BLOCK).
    """

    rows: Callable[[Tensor, slice], Tensor]
    unit: int = 1
    block: int = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.rows(tensor, slice(0, len(tensor)) if tensor.dim() else slice(None))

    def blocks(self, shape: Sequence[int]) -> list[slice]:
        """The rows of a tensor of this shape in blocks of about so many numbers, all nearly equally large."""
        units = shape[0] // self.unit
        number = max(1, units * self.unit * math.prod(shape[1:]) // (self.block or BLOCK))
        number = min(number, max(units, 1))
        ends = [units * i // number * self.unit for i in range(number)] + [shape[0]]
        return [slice(begin, end) for begin, end in itertools.pairwise(ends)]


def rewrite(
    source: str | os.PathLike | PthReader,
    target: str | os.PathLike,
    change: Change,
    added: Mapping[str, Tensor] | None = None,
) -> None:
    """Copy a checkpoint with some tensors changed, several records at a time: of those that change, memory holds some rows
    if the change is ByRows, else one whole tensor.

    source: a path, or an archive that is open already (it then does not matter what has become of its path). added: tensors
    that the source has not got, by name, or that take the place of what it has.
    A changed tensor is written in the dtype and shape of the source; key set, shapes, dtypes and (without added) pickle
    stay the source's, and so do the bytes of all that does not change. The target is a .pth, with the official names and shapes
    where the source has others.
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
            changed = {n: fitted(n, make(t), t) if (make := change(n)) else t for n, t in load(old.path).items()}
            save(target, {**changed, **added})
            return
        places = {name: stored for name, stored in old.described.items() if name not in added}
        contents: dict[str, Content] = {}
        one_at_a_time = threading.Lock()
        folder, infos = (old.folder, old.zip.infolist()) if old.zip else ("archive/", [])
        listed_anew = bool(added) or not old.is_official
        if old.zip is None:
            contents |= {f"{folder}data.pkl": whole_bytes(b""), f"{folder}byteorder": whole_bytes(b"little")}
            for name in places:
                make, info = change(name), old.info(name)
                pieces = functools.partial(old.read, info, [])
                copied = Content(info.file_size, pieces)
                contents[folder + info.filename] = changed_rows(old, name, make, one_at_a_time) if make else copied
            contents[f"{folder}version"] = whole_bytes(b"3\n")
        for info in infos:
            name = owners.get(info.filename, [""])[0]
            if name in added:
                continue
            if listed_anew and info.filename == f"{old.folder}data.pkl":
                contents[info.filename] = whole_bytes(b"")  # its turn comes when all places are known
            elif name and (make := change(name)):
                contents[info.filename] = changed_rows(old, name, make, one_at_a_time)
            else:
                # what is written has the checksum of what was read: no need to take it twice
                pieces = functools.partial(old.read, info, [], False)
                contents[info.filename] = Content(info.file_size, pieces, info.CRC)
        for number, (name, tensor) in enumerate(added.items()):
            places[name] = TensorInfo(tensor.dtype, tuple(tensor.shape), f"data/added{number}", True)
            contents[folder + places[name].record] = whole_bytes(tensor_bytes(tensor.detach().cpu()))
        if listed_anew:
            contents[f"{folder}data.pkl"] = whole_bytes(pickled(places))
        with atomic_write(target) as file, DirectWriter(file) as out:
            try:
                write_zip(out, contents)
            except WrongChecksum as wrong:
                raise old.damaged(old.zip.getinfo(str(wrong)), "its checksum is wrong") from None


def changed_rows(old: PthReader, name: str, make: Callable[[Tensor], Tensor], one_at_a_time: threading.Lock) -> Content:
    """The record of a tensor that changes."""
    stored = old.described[name]

    def by_rows() -> Iterator[memoryview]:
        blocks = make.blocks(stored.shape)
        for block, tensor in zip(blocks, old.rows(name, blocks), strict=True):
            yield tensor_bytes(fitted(name, make.rows(tensor, block), tensor))

    def whole() -> Iterator[memoryview]:
        with one_at_a_time:  # memory has room for one whole tensor and what its change takes
            tensor = old.tensor(name)
            yield tensor_bytes(fitted(name, make(tensor), tensor))

    return Content(
        stored.bytes, by_rows if isinstance(make, RowwiseUpdate) and stored.bytes and stored.shape else whole
    )


def fitted(name: str, changed: Tensor, original: Tensor) -> Tensor:
    if changed.shape != original.shape:
        raise ValueError(f"{name} would change its shape from {list(original.shape)} to {list(changed.shape)}")
    return changed.to(original.dtype)


@dataclass(frozen=True)
class Content:
    """What a record will hold: so many bytes, which come in pieces, and if it is known beforehand, their checksum."""

    size: int
    pieces: Callable[[], Iterable[memoryview]]
    checksum: int | None = None


def whole_bytes(data: bytes | memoryview) -> Content:
    return Content(len(data), lambda: [memoryview(data)])


def write_zip(out: DirectWriter, contents: Mapping[str, Content]) -> None:
    """Write a zip archive of uncompressed records, by their names, to an empty file.

    Where a record lies follows from the sizes of those in front of it, so several are written at a time. (The format:
    https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT; the numbers in brackets are its chapters.)
    """
    records, end = [], 0
    for name, content in contents.items():
        info = aligned(name, end)
        info.file_size, info.compress_size, info.CRC = content.size, content.size, 0
        records.append(info)
        end += len(info.FileHeader(zip64=True)) + content.size

    def write(info: zipfile.ZipInfo) -> None:
        def counted() -> Iterator[memoryview]:
            for piece in contents[info.filename].pieces():
                info.CRC = crc32(piece, info.CRC)
                yield piece

        begin = info.header_offset + len(info.FileHeader(zip64=True))
        # closed at once where writing fails: what comes in pieces may hold a lock, and an error would keep it alive
        with contextlib.closing(counted()) as pieces:
            at = out.pieces(pieces, begin)
        if at - begin != info.file_size:
            raise ValueError(f"{info.filename} has {at - begin:,} bytes instead of {info.file_size:,}")
        if contents[info.filename].checksum not in (None, info.CRC):
            raise WrongChecksum(info.filename)
        out.write(info.FileHeader(zip64=True), info.header_offset)

    parallel_map(write, records)
    out.write(directory(records, end), end)


def aligned(name: str, begin: int) -> zipfile.ZipInfo:
    """The entry of a record whose header lies at begin and whose content at a multiple of 64 bytes, as torch writes them."""
    info = zipfile.ZipInfo(name)
    info.compress_type, info.header_offset = zipfile.ZIP_STORED, begin
    # behind the name: 20 bytes that zip64 adds, then our padding field (4 bytes head)
    padding = -(begin + LOCAL_HEADER + len(name.encode()) + 20 + 4) % ALIGNMENT
    info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding  # "FB": torch's own mark for it
    return info


def directory(records: Sequence[zipfile.ZipInfo], begin: int) -> bytes:
    """What stands at the end of a zip archive, from begin on: where each record is, and where this list is."""
    out = b""
    for info in records:
        name, flags = info.filename.encode(), 0 if info.filename.isascii() else 0x800  # UTF-8
        large = [n for n in (info.file_size, info.compress_size, info.header_offset) if n >= FULL32]
        extra = struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""  # [4.5.3]
        size, offset = min(info.file_size, FULL32), min(info.header_offset, FULL32)
        date = 1 << 5 | 1  # 1 January 1980, as torch has it
        out += b"PK\1\2" + struct.pack(  # [4.3.12]
            "<6H3L5H2L", 45, 45, flags, 0, 0, date, info.CRC, size, size, len(name), len(extra), 0, 0, 0, 0, offset
        )  # fmt: skip
        out += name + extra
    size, count, tail = len(out), len(records), b""
    if count >= 0xFFFF or begin + size >= FULL32:
        tail = b"PK\6\6" + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, count, count, size, begin)  # [4.3.14]
        tail += b"PK\6\7" + struct.pack("<LQL", 0, begin + size, 1)  # [4.3.15]
    few = min(count, 0xFFFF)
    tail += b"PK\5\6" + struct.pack("<4H2LH", 0, 0, few, few, min(size, FULL32), min(begin, FULL32), 0)  # [4.3.16]
    return out + tail


def pickled(places: Mapping[str, TensorInfo]) -> bytes:
    """data.pkl for tensors that lie in records of their own: what torch.save would write about them."""

    class Writer(pickle.Pickler):
        def persistent_id(self, thing):
            if not isinstance(thing, _Storage):
                return None
            kind = next(name for name, dtype in DTYPES.items() if dtype == thing.dtype)
            return ("storage", getattr(torch, kind), thing.key, "cpu", thing.size)

        def reducer_override(self, thing):
            if not isinstance(thing, TensorInfo):
                return NotImplemented
            strides, size = [], 1
            for n in reversed(thing.shape):
                strides.insert(0, size)
                size *= n
            storage = _Storage(thing.dtype, thing.record.removeprefix("data/"), size)
            shape = 0, thing.shape, tuple(strides), False, OrderedDict()
            return torch._utils._rebuild_tensor_v2, (storage, *shape)

    out = io.BytesIO()
    Writer(out, protocol=2).dump(dict(places))
    return out.getvalue()
