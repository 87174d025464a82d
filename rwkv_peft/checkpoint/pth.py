"""Checkpoint files: what is in one (without loading it), mapped reading, atomic writing, and rewriting record by record.

A .pth is a zip archive: NAME/data.pkl says which tensor lies in which record, NAME/data/K are the records. Reading the
pickle here executes nothing: only the few names that describe tensors are understood, anything else is refused. A
.safetensors file is read as well, whatever its name; what is written is a .pth. Models with the official names behind a prefix,
or with flattened vectors, are read as the official files are (native.py).
"""

from __future__ import annotations

import errno
import functools
import io
import lzma
import math
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from rwkv_peft.common.atomic_io import atomic_write, check_disk_space
from rwkv_peft.common.direct_io import DirectReader
from rwkv_peft.common.direct_io import aligned as room_for
from rwkv_peft.common.errors import UserError, cause
from rwkv_peft.common.formatting import first_line, join_names
from rwkv_peft.common.hashing import crc32
from rwkv_peft.common.parallel_io import parallel_map
from rwkv_peft.common.paths import display_path, missing, models_in

from . import file_type, zip_records
from . import official_names as native

MOST_SIDES = 64  # of a tensor, as torch has it
COPY_BYTES = 1 << 22  # read, hash and copy in pieces of 4 MB
LOCAL_HEADER = 30  # bytes in front of a record's name in a zip file
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
class StorageInfo:
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
        return StorageInfo(dtype, str(key), int(size))


def are_sizes(numbers: Iterable) -> bool:
    return all(type(n) is int and 0 <= n <= MOST_NUMBERS for n in numbers)


def describe_tensor(storage: StorageInfo, offset: int, shape, stride, *_rest) -> TensorInfo:
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
