"""Checkpoint files: what is in one (without loading it), mapped reading, atomic writing, and rewriting record by record.

A .pth is a zip archive: NAME/data.pkl says which tensor lies in which record, NAME/data/K are the records. Reading the
pickle here executes nothing: only the few names that describe tensors are understood, anything else is refused.

Beside each checkpoint of a run lies a sidecar of the same name with .json: what made it, so that nothing is typed twice.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .atomic import need_space, writing
from .errors import UserError
from .project import shown
from .words import listed

COPY_BYTES = 1 << 22  # read, hash and copy in pieces of 4 MB
ALIGNMENT = 64  # torch places every record at a multiple of this, so that it can be mapped

# what a damaged zip or pickle raises, one way or another
UNREADABLE = (
    pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError, RuntimeError, zlib.error,
    ArithmeticError, AssertionError, struct.error, zipfile.BadZipFile,
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


@dataclass(frozen=True)
class Stored:
    """A tensor as its file describes it: dtype, shape, and the record that holds it (whole: nothing else is in it)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    record: str
    whole: bool

    @property
    def bytes(self) -> int:
        return functools.reduce(int.__mul__, self.shape, 1) * self.dtype.itemsize


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    size: int


class _Describe(pickle.Unpickler):
    """Reads data.pkl of a .pth as descriptions; refuses everything that is not a plain tensor."""

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


def describe_tensor(storage: _Storage, offset: int, shape, stride, *_rest) -> Stored:
    contiguous, expected = True, 1
    for n, s in zip(reversed(shape), reversed(stride), strict=True):
        contiguous &= n == 1 or s == expected
        expected *= n
    whole = offset == 0 and contiguous and expected == storage.size
    return Stored(storage.dtype, tuple(shape), f"data/{storage.key}", whole)


def describe(path: str | os.PathLike) -> dict[str, Stored]:
    """What a .pth holds, name -> description, without reading a weight. UserError if it is no checkpoint of tensors."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{shown(path)}: is a folder, not a .pth file.{nearby(path / 'x')}")
    if not path.is_file():
        raise UserError(f"{shown(path)}: there is no such file.{nearby(path)}")
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [n for n in archive.namelist() if n.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise UserError(f"{shown(path)}: is a zip file, but no torch checkpoint (no data.pkl in it).")
            content = _Describe(io.BytesIO(archive.read(pickles[0]))).load()
            sizes = {i.filename: i.file_size for i in archive.infolist() if i.compress_type == zipfile.ZIP_STORED}
    except zipfile.BadZipFile:
        with open(path, "rb") as file:
            legacy = file.read(2) == b"\x80\x02"
        old = "It may be a checkpoint of torch before 1.6; load and save it with a newer torch." if legacy else ""
        raise UserError(
            f"{shown(path)}: is no .pth checkpoint, or it was cut off (download it again). {old}".rstrip()
        ) from None
    except UNREADABLE as error:
        raise UserError(
            f"{shown(path)}: holds more than plain tensors ({error}). It was not loaded, and nothing in it was run."
        ) from None
    if not isinstance(content, dict) or not all(isinstance(v, Stored) for v in content.values()):
        raise UserError(f"{shown(path)}: is not a dictionary of tensors, so it is no model and no adapter.")
    folder = pickles[0].removesuffix("data.pkl")
    for name, stored in content.items():
        if sizes.get(folder + stored.record, -1) < stored.bytes or stored.bytes < 0:
            raise UserError(
                f"{shown(path)}: the record of {name} is missing, too short or compressed. Get the file again."
            )
    return dict(content)


def nearby(path: Path) -> str:
    """A sentence about what lies in the folder instead, for messages."""
    there = [p.name for p in path.parent.glob("*.pth")] if path.parent.is_dir() else []
    return f" In {shown(path.parent)}/ there is: {listed(there)}." if there else ""


def load(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a .pth, mapped: nothing is read until it is used."""
    described = describe(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name: tensors[name].detach() for name in described}
    except UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{shown(path)}: is damaged ({reason}). Get the file again.") from None


def save(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint; it has its name only when it is whole."""
    path = Path(path)
    need_space(path.parent, sum(t.numel() * t.element_size() for t in tensors.values()))
    # clone: a view would drag its whole storage into the file
    plain = {name: t.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    try:
        with writing(path) as file:
            torch.save(plain, file)
    except RuntimeError as error:  # torch's way to say that a write failed
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(errno.ENOSPC, "No space left on device", str(path)) from None


class Archive:
    """A .pth opened for reading one tensor at a time: memory holds that tensor and nothing of the rest.

    Unlike a mapped file it checks what it reads: every record carries a checksum.
    """

    def __init__(self, path: str | os.PathLike):
        self.path, self.described = Path(path), describe(path)

    def __enter__(self) -> Archive:
        self.zip = zipfile.ZipFile(self.path)
        self.folder = next(n for n in self.zip.namelist() if n.endswith("/data.pkl")).removesuffix("data.pkl")
        return self

    def __exit__(self, *_exception) -> None:
        self.zip.close()

    def tensor(self, name: str) -> Tensor:
        stored = self.described[name]
        if not stored.whole:  # a view into a record that others use as well
            return load(self.path)[name]
        data = bytearray(stored.bytes)
        with self.checked(name), self.zip.open(self.folder + stored.record) as record:
            record.readinto(data)
        return torch.frombuffer(data, dtype=stored.dtype).view(stored.shape) if data else torch.empty(stored.shape)

    def pieces(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor's record, a few MB at a time."""
        with self.checked(name), self.zip.open(self.folder + self.described[name].record) as record:
            while piece := record.read(COPY_BYTES):
                yield piece

    @contextlib.contextmanager
    def checked(self, name: str) -> Iterator[None]:
        try:
            yield
        except zipfile.BadZipFile:
            raise UserError(
                f"{shown(self.path)}: {name} is damaged (its checksum is wrong). Get the file again."
            ) from None


# what becomes of a tensor: None for "as it is", else a function from the source's tensor to the new one
Change = Callable[[str], Callable[[Tensor], Tensor] | None]


def rewrite(
    source: str | os.PathLike | Archive,
    target: str | os.PathLike,
    change: Change,
    added: Mapping[str, Tensor] | None = None,
) -> None:
    """Copy a checkpoint with some tensors changed, record by record: memory holds the one that changes.

    source: a path, or an archive that is open already (it then does not matter what has become of its path). added: tensors
    that the source has not got, by name, or that take the place of what it has.
    A changed tensor is written in the dtype and shape of the source; key set, shapes, dtypes and (without added) pickle
    stay the source's, and so do the bytes of all that does not change.
    """
    added = added or {}
    with contextlib.nullcontext(source) if isinstance(source, Archive) else Archive(source) as old:
        more = sum(t.numel() * t.element_size() for t in added.values())
        need_space(Path(target).parent, sum(info.file_size for info in old.zip.infolist()) + more)
        owners: dict[str, list[str]] = {}
        for name, stored in old.described.items():
            owners.setdefault(stored.record, []).append(name)
        if any(len(names) > 1 or not old.described[names[0]].whole for names in owners.values()):
            # tensors that share a record cannot be changed one by one: such files are rare, and small enough to load
            changed = {n: fitted(n, make(t), t) if (make := change(n)) else t for n, t in load(old.path).items()}
            save(target, {**changed, **added})
            return
        places = {name: stored for name, stored in old.described.items() if name not in added}
        dropped = {old.described[name].record for name in added if name in old.described}
        for number, (name, tensor) in enumerate(added.items()):
            places[name] = Stored(tensor.dtype, tuple(tensor.shape), f"data/added{number}", True)
        with writing(target) as file, zipfile.ZipFile(file, "w") as new:
            for info in old.zip.infolist():
                record = info.filename.removeprefix(old.folder)
                names = owners.get(record)
                make = change(names[0]) if names else None
                if record in dropped:
                    continue
                if added and record == "data.pkl":
                    write_bytes(new, info.filename, pickled(places))
                elif make is None:
                    copy_record(old.zip, info, new)
                else:
                    tensor = old.tensor(names[0])
                    write_record(new, info.filename, fitted(names[0], make(tensor), tensor))
            for name, tensor in added.items():
                write_record(new, old.folder + places[name].record, tensor.detach().cpu())


def fitted(name: str, changed: Tensor, original: Tensor) -> Tensor:
    if changed.shape != original.shape:
        raise ValueError(f"{name} would change its shape from {list(original.shape)} to {list(changed.shape)}")
    return changed.to(original.dtype)


def aligned(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """An entry whose content will begin at a multiple of 64 bytes, as torch writes them."""
    info = zipfile.ZipInfo(name)
    info.compress_type = zipfile.ZIP_STORED
    # local header: 30 bytes, name, 20 bytes that zip64 adds, then our padding field (4 bytes head)
    begin = archive.fp.tell() + 30 + len(name.encode()) + 20 + 4
    padding = -begin % ALIGNMENT
    info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding  # "FB": torch's own mark for it
    return info


def copy_record(old: zipfile.ZipFile, info: zipfile.ZipInfo, new: zipfile.ZipFile) -> None:
    with old.open(info) as source, new.open(aligned(new, info.filename), "w", force_zip64=True) as target:
        shutil.copyfileobj(source, target, COPY_BYTES)


def write_record(new: zipfile.ZipFile, name: str, tensor: Tensor) -> None:
    write_bytes(new, name, tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def write_bytes(new: zipfile.ZipFile, name: str, data) -> None:
    with new.open(aligned(new, name), "w", force_zip64=True) as target:
        for begin in range(0, len(data), COPY_BYTES):
            target.write(memoryview(data)[begin : begin + COPY_BYTES])


def pickled(places: Mapping[str, Stored]) -> bytes:
    """data.pkl for tensors that lie in records of their own: what torch.save would write about them."""

    class Writer(pickle.Pickler):
        def persistent_id(self, thing):
            if not isinstance(thing, _Storage):
                return None
            kind = next(name for name, dtype in DTYPES.items() if dtype == thing.dtype)
            return ("storage", getattr(torch, kind), thing.key, "cpu", thing.size)

        def reducer_override(self, thing):
            if not isinstance(thing, Stored):
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


def sidecar_path(path: str | os.PathLike) -> Path:
    return Path(path).with_suffix(".json")


def read_sidecar(path: str | os.PathLike, wanted: tuple[str, ...]) -> dict[str, Any]:
    """The sidecar of a checkpoint, with at least the wanted keys. UserError if it is missing or unreadable."""
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        raise UserError(
            f"{shown(sidecar)}: is missing. It is written with every checkpoint and says how {shown(path)} was made."
        )
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{shown(sidecar)}: is not readable as JSON ({error}).") from None
    missing = [key for key in wanted if not isinstance(content, dict) or key not in content]
    if missing:
        raise UserError(f"{shown(sidecar)}: does not say {', '.join(missing)}; it is not a sidecar of this kit.")
    wrong = [key for key in content if key in SIDECAR and not SIDECAR[key](content[key])]
    if wrong:
        raise UserError(f"{shown(sidecar)}: {wrong[0]} cannot be {content[wrong[0]]!r}. Was the file edited?")
    return content


def whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1e9


# what a sidecar's values must be
SIDECAR: dict[str, Callable[[Any], bool]] = {
    "method": lambda value: isinstance(value, str),
    "rank": lambda value: whole(value, 1),
    "alpha": number,
    "rslora": lambda value: isinstance(value, bool),
    "niter": lambda value: whole(value, 0),
    "shifts": lambda value: isinstance(value, bool),
    "layers": lambda value: whole(value, 1),
    "every": lambda value: whole(value, 1),
    "config": lambda value: isinstance(value, dict),
    "base": lambda value: isinstance(value, str) and value == Path(value).name != "",
    "base_path": lambda value: isinstance(value, str),
    "base_sha256": lambda value: isinstance(value, str),
    "geometry": lambda value: isinstance(value, dict),
    "quant": lambda value: isinstance(value, str),
    "quant_parts": lambda value: isinstance(value, list) and all(isinstance(part, str) for part in value),
    "epoch": lambda value: whole(value, 0),
    "step": lambda value: whole(value, 0),
    "prompt_type": lambda value: value is None or isinstance(value, str),
    "eot": lambda value: value is None or isinstance(value, str),
}
