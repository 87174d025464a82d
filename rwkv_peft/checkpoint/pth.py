"""Checkpoint files: describe one without loading it, map it, check it, read parts of it, and save one atomically.

A .pth is a zip archive: NAME/data.pkl says which tensor is in which record, NAME/data/K are the records. Reading the
pickle here executes nothing: only the few names that describe tensors are understood, anything else is refused. A
.safetensors file is read as well, whatever its name; what is written is a .pth. Models with the official names after a
prefix, or with flattened vectors, are read as the official files are (official_names.py).
"""

from __future__ import annotations

import errno
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
from typing import Any, BinaryIO

import torch
from torch import Tensor

from rwkv_peft.common.atomic_io import atomic_write, check_disk_space
from rwkv_peft.common.direct_io import DirectReader
from rwkv_peft.common.direct_io import allocate_aligned as room_for
from rwkv_peft.common.errors import UserError, find_system_error
from rwkv_peft.common.formatting import first_line, join_names
from rwkv_peft.common.hashing import crc32
from rwkv_peft.common.parallel_io import parallel_map
from rwkv_peft.common.paths import describe_missing, display_path, list_models

from . import file_type, official_names, safetensors_io, zip_records

MOST_SIDES = 64  # dimensions of a tensor, as in torch
COPY_BYTES = 1 << 22  # read, hash and copy in pieces of 4 MB
LOCAL_HEADER = 30  # bytes before a record's name in a zip file
MOST_PICKLE = 32 << 20  # bytes of data.pkl: a tensor needs about 150
MOST_NUMBERS = 1 << 48  # of a tensor, and in each of its sizes

# the errors that a damaged zip or pickle can raise
UNREADABLE = (
    pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError, RuntimeError, zlib.error,
    ArithmeticError, AssertionError, struct.error, zipfile.BadZipFile, lzma.LZMAError,
)  # fmt: skip

DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
SAFETENSORS = {code: dtype for dtype, code in safetensors_io.CODES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its file describes it.

    Attributes:
        dtype: of its numbers.
        shape: the official one.
        record: the record that holds it.
        whole: nothing else is in the record.
        name: the name in the file, where that or the shape is not the official one; else "".
        offset: where its bytes begin in a .safetensors file; -1 in a .pth.
        reach: bytes that its record must have.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    record: str
    whole: bool
    name: str = field(default="", compare=False)
    offset: int = field(default=-1, compare=False)
    reach: int = field(default=0, compare=False)

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def in_safetensors(self) -> bool:
        """Whether the file is a .safetensors file."""
        return self.offset >= 0


@dataclass(frozen=True)
class StorageInfo:
    """The storage of a tensor as data.pkl describes it."""

    dtype: torch.dtype
    key: str
    size: int


class _Describe(pickle._Unpickler):
    """Unpickler that reads data.pkl of a .pth as descriptions and refuses everything that is not a plain tensor.

    It is the unpickler written in Python: the one in C allocates what a pickle announces (a text of 1 TB, the
    2,147,483,647th memo entry: nine bytes take 32 GB) before it checks whether it is there. A model's list takes 0.1
    s. A bytearray, which no list of tensors holds, would be allocated in the size that is written before it.
    """

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

    def find_class(self, module: str, name: str) -> Any:
        """Return what describes a class that the pickle names; refuse all others."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return describe_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in ("torch", "torch.storage") and name in DTYPES:
            return DTYPES[name]
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}")

    def persistent_load(self, pid: Any) -> StorageInfo:
        """Describe a storage."""
        kind, dtype, key, _device, size = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("it holds something other than plain tensors")
        return StorageInfo(dtype, str(key), int(size))


def are_valid_sizes(numbers: Iterable) -> bool:
    """Return whether all numbers are whole and possible as sizes of a tensor."""
    return all(type(n) is int and 0 <= n <= MOST_NUMBERS for n in numbers)


def describe_tensor(
    storage: StorageInfo, offset: int, shape: Sequence[int], stride: Sequence[int], *_rest: object
) -> TensorInfo:
    """Describe a tensor from the arguments of `torch._utils._rebuild_tensor_v2`."""
    if not are_valid_sizes((offset, storage.size, *shape, *stride)) or not is_valid_shape(shape):
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


def is_valid_shape(shape: Sequence[int]) -> bool:
    """Return whether a tensor may have a shape. Where one side is 0, the others could be any number."""
    return (
        len(shape) <= MOST_SIDES
        and are_valid_sizes(shape)
        and math.prod(max(side, 1) for side in shape) <= MOST_NUMBERS
    )


def read_header(path: str | os.PathLike) -> dict[str, TensorInfo]:
    """Describe the tensors of a .pth or .safetensors file by name, without reading a weight.

    Raises:
        UserError: it is not a checkpoint of tensors; the message says what it is instead.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{display_path(path)}: is a folder, not a .pth or .safetensors file.{folder_hint(path)}")
    if not path.is_file():
        raise UserError(f"{display_path(path)}: {describe_missing(path)}.{nearby_files_hint(path)}")
    with open(path, "rb") as file:
        head = file.read(file_type.HEAD)
    if file_type.is_safetensors(head, path.stat().st_size):
        return to_official_names(read_safetensors(path))
    if not has_zip_end(path):
        if head.startswith(b"PK\3\4"):
            raise UserError(
                f"{display_path(path)}: {file_type.describe_incomplete(path.stat().st_size, expected_size(path), True)}"
            )
        raise UserError(f"{display_path(path)}: {file_type.describe_file(path)}")
    if path.suffix == ".safetensors":  # torch.load goes by the name
        raise UserError(
            f"{display_path(path)}: is a .pth file by its content. Rename it to {path.with_suffix('.pth').name}"
        )
    records, folder = read_records(path)
    try:
        content = _Describe(io.BytesIO(read_small_record(path, records[f"{folder}data.pkl"], MOST_PICKLE))).load()
    except UNREADABLE as error:
        raise UserError(
            f"{display_path(path)}: holds more than plain tensors ({error}). It was not loaded, and nothing in it was run."
        ) from None
    if not isinstance(content, dict) or not all(isinstance(v, TensorInfo) for v in content.values()):
        raise UserError(
            f"{display_path(path)}: is not a dictionary of tensors, so it is no model and no adapter.{nested_model_hint(content)}"
        )
    check_names(path, content)
    for name, stored in content.items():
        record = records.get(folder + stored.record)
        if record is None or record.file_size != stored.reach or stored.bytes > stored.reach:
            raise UserError(
                f"{display_path(path)}: the record of {name} is missing, too short or too long. Get the file again."
            )
    return to_official_names(dict(content))


def read_records(path: Path) -> tuple[dict[str, zipfile.ZipInfo], str]:
    """Return the records of a .pth by name, and the folder that they are in.

    Raises:
        UserError: it is not a .pth that torch would write; raised before anything of it is read.
    """
    try:
        names = record_names(path)
        pickles = [n for n in names if n.endswith("/data.pkl")]
        if len(pickles) != 1 or any("/code/" in n for n in names):
            if len(pickles) > 1:
                raise ValueError(f"it has {pickles[0]} and {pickles[1]}, and a checkpoint has one")
            raise UserError(f"{display_path(path)}: {file_type.describe_zip(names)}")
        records = zip_records.read_records(path)
    except (ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{display_path(path)}: is damaged, or no checkpoint: {error}. Get the file again; or, if you trust it, load it "
            "with torch and save it once more."
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
        order = read_small_record(path, records[f"{folder}byteorder"], 16)
        if order != b"little":
            raise UserError(
                f"{display_path(path)}: its numbers are in the byte order {order.decode('ascii', 'replace')!r}; this version "
                "reads little. Load and save it once with torch on a machine like this one."
            )
    return records, folder


def record_names(path: Path) -> list[str]:
    """Return the names of a zip file's records.

    Raises:
        ValueError: the list of records is too long.
    """
    with open(path, "rb") as file:
        zip_records.find_directory(file, path.stat().st_size, exact=False)
        with zipfile.ZipFile(file) as archive:
            return archive.namelist()


def read_small_record(path: Path, info: zipfile.ZipInfo, most: int) -> bytes:
    """Read a record of at most `most` bytes.

    Raises:
        UserError: the record is larger.
    """
    if info.file_size > most:
        raise UserError(
            f"{display_path(path)}: {info.filename} has {info.file_size:,} bytes, and {most:,} are the most that it can need. "
            "It was not read."
        )
    with open(path, "rb") as file:
        return zip_records.read_at(file, zip_records.record_start(file, info), info.file_size)


def check_names(path: Path, content: Mapping) -> None:
    """Check that tensor names are printable texts: they appear in messages and in other files.

    Raises:
        UserError: one is not.
    """
    for name in content:
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= zip_records.MOST_NAME:
            raise UserError(f"{display_path(path)}: holds a tensor of the name {str(name)[:80]!a}, which no model has.")


def has_zip_end(path: Path) -> bool:
    """Return whether a file has the end of a zip file, which lists its content."""
    try:
        return zipfile.is_zipfile(path)
    except (*UNREADABLE, OSError):
        return False


def to_official_names(content: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Convert descriptions to the official names and shapes."""
    if not all(isinstance(name, str) for name in content):
        return content
    official = official_names.map_to_official({name: stored.shape for name, stored in content.items()})
    return {
        name: content[old]
        if (name, shape) == (old, content[old].shape)
        else replace(content[old], shape=shape, name=old)
        for name, (old, shape) in official.items()
    }


def describe_differences(described: Mapping[str, TensorInfo]) -> str:
    """Return a sentence about how a model file differs from the official form; "" if it does not."""
    renamed = sum(stored.name not in ("", name) for name, stored in described.items())
    shaped = sum(stored.name == name for name, stored in described.items())
    if renamed:
        old = next(stored.name for name, stored in described.items() if stored.name not in ("", name))
        return f"The file has other names than the official ones ({old})."
    if shaped:
        return "The file has flattened vectors."
    return "The base is a .safetensors file." if any(s.in_safetensors for s in described.values()) else ""


def nested_model_hint(content: object) -> str:
    """Return a sentence about a model inside a dictionary of other things, as trainers save it."""
    outer = content if isinstance(content, dict) else {}
    for key in ("state_dict", "model", "module", "model_state_dict", "weights"):
        part = outer.get(key)
        if isinstance(part, dict) and part and all(isinstance(v, TensorInfo) for v in part.values()):
            return (
                f' Its "{key}" is one: take that out, with python -c "import torch; torch.save(torch.load(\'FILE\', '
                f"map_location='cpu', weights_only=True)['{key}'], 'model.pth')\"."
            )
    return ""


def read_safetensors(path: Path) -> dict[str, TensorInfo]:
    """Describe the tensors of a .safetensors file.

    Raises:
        UserError: its header is wrong, or the file is incomplete.
    """
    try:
        header, begin = file_type.read_safetensors_header(path)
        check_names(path, header)
        content: dict[str, TensorInfo] = {}
        size = path.stat().st_size
        for name, entry in header.items():
            dtype, shape, places = SAFETENSORS.get(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
            if dtype is None:
                raise ValueError(
                    f"holds {name} as {entry['dtype']}, which this version does not read: use an F16, BF16 or F32 copy."
                )
            sound = is_valid_shape(shape) and len(places) == 2 and are_valid_sizes((*shape, *places))
            stored = TensorInfo(dtype, shape, f"data/{len(content)}", True, offset=begin + places[0]) if sound else None
            if stored is None or stored.bytes != places[1] - places[0]:
                raise ValueError(f"is a .safetensors file whose header is damaged ({name}). {file_type.AGAIN}.")
            content[name] = stored
        check_contiguous(content, begin, size)
    except ValueError as error:
        raise UserError(f"{display_path(path)}: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{display_path(path)}: is a .safetensors file whose header is damaged. {file_type.AGAIN}."
        ) from None
    if content and all(name.endswith("time_state") for name in content):
        raise UserError(
            f"{display_path(path)}: is a learnt state for Ai00 and web-rwkv, whose matrices are transposed. Use the checkpoint "
            "of its run (output/RUN/rwkv-N.pth), or the .pth that ./merge.sh --export state writes."
        )
    return content


def check_contiguous(content: Mapping[str, TensorInfo], begin: int, size: int) -> None:
    """Check that the tensors of a .safetensors file fill its bytes without gaps or overlap, as its library requires.

    Args:
        content: the tensors.
        begin: where the header ends.
        size: bytes of the file.

    Raises:
        ValueError: they do not.
    """
    end = begin
    for name, stored in sorted(content.items(), key=lambda one: (one[1].offset, one[1].bytes)):
        if stored.offset != end:
            what = "shares bytes with another tensor" if stored.offset < end else "does not begin where another ends"
            raise ValueError(f"is a .safetensors file whose header is damaged ({name} {what}). {file_type.AGAIN}.")
        end += stored.bytes
    if end > size:
        raise ValueError(file_type.describe_incomplete(size, end))
    if end < size:
        raise ValueError(f"is a .safetensors file with {size - end:,} bytes behind its last tensor. {file_type.AGAIN}.")


def expected_size(path: Path) -> int | None:
    """Return the least size in bytes of an incomplete .pth, by the tensor list at its beginning; None if unknown."""
    storages: dict[str, int] = {}

    class Sizes(_Describe):
        def persistent_load(self, pid: Any) -> StorageInfo:
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


def nearby_files_hint(path: Path) -> str:
    """Return a sentence about the model files in the same folder."""
    there = list_models(path.parent)
    return f" In {display_path(path.parent)}/ there is: {join_names(there)}." if there else ""


def folder_hint(folder: Path) -> str:
    """Return a sentence about which file of a folder to name."""
    there = list_models(folder)
    shards = [name for name in there if re.search(r"-\d{5}-of-\d{5}\.safetensors$", name)]
    if len(shards) > 1:
        return (
            f" It holds a model in {len(shards)} .safetensors files; this version reads one file: join them, in their folder: "
            + file_type.join_command("*-of-*.safetensors")
        )
    return (
        f" Name the file in it: {display_path(folder / there[0])}"
        if len(there) == 1
        else nearby_files_hint(folder / "x")
    )


def load(path: str | os.PathLike) -> dict[str, Tensor]:
    """Map the tensors of a .pth or .safetensors file: nothing is read until it is used."""
    path, described = Path(path), read_header(path)
    if not described:
        return {}
    if any(stored.in_safetensors for stored in described.values()):
        try:
            # Any: the stub says it returns a base class
            whole: Any = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
        except RuntimeError as error:
            raise find_system_error(error) or error from None
        return {name: map_tensor(whole, stored) for name, stored in described.items()}
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name: tensors[s.name or name].detach().reshape(s.shape) for name, s in described.items()}
    except (*UNREADABLE, OSError) as error:
        refused = find_system_error(error)
        if refused and not (
            isinstance(refused, OSError) and refused.errno == errno.EINVAL
        ):  # (a place outside the file)
            raise refused from None
        raise UserError(f"{display_path(path)}: is damaged ({first_line(error)}). Get the file again.") from None


def map_tensor(whole: torch.UntypedStorage, stored: TensorInfo) -> Tensor:
    """Return a tensor of a mapped .safetensors file."""
    if not stored.bytes:
        return torch.empty(stored.shape, dtype=stored.dtype)
    if stored.offset % stored.dtype.itemsize:  # after tensors of single bytes
        data = bytes(whole[stored.offset : stored.offset + stored.bytes])
        return torch.frombuffer(bytearray(data), dtype=stored.dtype).view(stored.shape)
    at = stored.offset // stored.dtype.itemsize
    strides = torch.empty(stored.shape, device="meta").stride()
    return torch.empty(0, dtype=stored.dtype).set_(whole, at, stored.shape, strides)


def save(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint. It gets its name only when it is complete."""
    path = Path(path)
    check_disk_space(path.parent, sum(t.numel() * t.element_size() for t in tensors.values()))
    # clone: a view would drag its whole storage into the file
    plain = {name: t.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    with atomic_write(path) as file:
        watched = WatchedFile(file)
        try:
            torch.save(plain, watched)  # type: ignore[arg-type]  # write() and flush() are enough for torch
        except RuntimeError:  # torch raises it when a write fails
            if watched.refused:
                raise watched.refused from None
            raise


class WatchedFile:
    """A file to write to that keeps the error of the system: torch forgets it."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.refused: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Write data, and keep the error if that fails."""
        try:
            return self.file.write(data)
        except OSError as error:
            self.refused = error
            raise

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()


class CorruptCheckpoint(UserError):
    """A record of a checkpoint cannot be read as it was written."""


def check_checksums(path: str | os.PathLike) -> None:
    """Check every record of a .pth against its checksum.

    Mapped reading does not check them. A .safetensors file has none.

    Raises:
        CorruptCheckpoint: a record does not match.
    """
    with PthReader(path) as archive:
        if archive.zip is None:
            return

        def check(info: zipfile.ZipInfo) -> None:
            for _ in archive.read(info, []):
                pass

        parallel_map(check, archive.zip.infolist())


class PthReader:
    """A .pth or .safetensors file opened to read one tensor, or some rows of one, at a time.

    It keeps nothing else in memory. Unlike a mapped file it checks what it reads: every record of a .pth has a
    checksum. Threads may read from it concurrently.

    Args:
        path: the file.
        straight: read what is on the disk, not what the system may still have in memory.
    """

    def __init__(self, path: str | os.PathLike, straight: bool = False):
        self.path, self.described = Path(path), read_header(path)
        self.straight = straight
        self.zip: zipfile.ZipFile | None = None
        self.plain: BinaryIO | None = None
        self.reader: DirectReader | None = None
        self.has_checksums = False

    def __enter__(self) -> PthReader:
        self.reader = DirectReader(self.path) if self.straight else None
        is_zip = self.described and not any(stored.in_safetensors for stored in self.described.values())
        _, self.folder = read_records(self.path) if is_zip else ({}, "")
        self.plain = open(self.path, "rb")  # noqa: SIM115 closed by __exit__
        self.file = self.plain.fileno()
        if is_zip:
            self.zip = zipfile.ZipFile(self.plain)
            # none with torch.serialization.set_crc32_options(False)
            self.has_checksums = any(info.CRC for info in self.zip.infolist())
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
        """Whether it is a .pth with the official names and shapes, whose list of tensors can be copied."""
        return self.zip is not None and not any(stored.name for stored in self.described.values())

    def info(self, name: str) -> zipfile.ZipInfo:
        """Return the directory entry of the record that holds a tensor; for .safetensors a similar one."""
        stored = self.described[name]
        if self.zip is not None:
            return self.zip.getinfo(self.folder + stored.record)
        info = zipfile.ZipInfo(stored.record)
        info.compress_type, info.header_offset = zipfile.ZIP_STORED, stored.offset
        info.file_size = info.compress_size = stored.bytes
        return info

    def checksum(self, name: str) -> int:
        """Return the checksum of a tensor's record; computed where the file does not have it."""
        if self.has_checksums:
            return self.info(name).CRC
        crc = 0
        for piece in self.pieces(name):
            crc = crc32(piece, crc)
        return crc

    def begin(self, info: zipfile.ZipInfo) -> int:
        """Return where a record's bytes begin."""
        if self.zip is None:
            return info.header_offset
        header = os.pread(self.file, LOCAL_HEADER, info.header_offset)
        if header[:4] != b"PK\3\4":
            raise self.corrupt(info, "its position in the file is wrong")
        return info.header_offset + LOCAL_HEADER + sum(struct.unpack("<HH", header[-4:]))

    def tensor(self, name: str) -> Tensor:
        """Read a tensor."""
        stored = self.described[name]
        if not stored.whole:  # a view into a record that other tensors share
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
        """Read a tensor that has a record to itself in consecutive blocks of rows, which cover all of it.

        A block is valid until the next one is requested.
        """
        stored = self.described[name]
        row = stored.bytes // stored.shape[0]
        sizes = [(block.stop - block.start) * row for block in blocks]
        for block, piece in zip(blocks, self.read(self.info(name), sizes), strict=False):
            yield torch.frombuffer(piece, dtype=stored.dtype).view(block.stop - block.start, *stored.shape[1:])

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Read the bytes of a tensor's record, a few MB at a time. A piece is valid until the next one is requested."""
        return self.read(self.info(name), [])

    def read(self, info: zipfile.ZipInfo, sizes: Sequence[int], test: bool = True) -> Iterator[memoryview]:
        """Read the bytes of a record. A piece is valid until the next one is requested.

        Args:
            info: the record.
            sizes: bytes of the first pieces; the rest comes a few MB at a time.
            test: compare the checksum.

        Raises:
            CorruptCheckpoint: the checksum is wrong; raised in place of the last piece.
        """
        at, test = self.begin(info), test and self.has_checksums
        left, crc, sizes = info.file_size, 0, list(sizes)
        most = min(left, max([COPY_BYTES, *sizes]))
        buffer = room_for(most) if self.reader else memoryview(bytearray(most))
        while left:
            piece = self.read_at(buffer, size := min(left, sizes.pop(0) if sizes else COPY_BYTES), at)
            if len(piece) != size:
                raise self.corrupt(info, "it is cut off")
            crc, at, left = crc32(piece, crc) if test else 0, at + len(piece), left - len(piece)
            if test and not left and crc != info.CRC:
                raise self.corrupt(info, "its checksum is wrong")
            yield piece

    def read_at(self, buffer: memoryview, size: int, at: int) -> memoryview:
        """Read `size` bytes of the file from `at`, or as many as there are."""
        if self.reader:
            return self.reader.read(buffer, size, at)
        return buffer[: os.preadv(self.file, [buffer[:size]], at)]

    def corrupt(self, info: zipfile.ZipInfo, how: str) -> CorruptCheckpoint:
        """Return the error for a record."""
        record = info.filename.removeprefix(self.folder)
        name = next((n for n, stored in self.described.items() if stored.record == record), record)
        return CorruptCheckpoint(f"{display_path(self.path)}: {name} is damaged ({how}). Get the file again.")
