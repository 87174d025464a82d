"""The records of a zip file (a .pth is one), checked before any is read. Floor 0.

The directory of a zip file says how large records are and where they begin, and a hostile one can be wrong. Two
programs must never read two contents from one file. So what the format allows and torch never writes is refused:
compressed or encrypted records, duplicate names, records that share bytes, bytes before the archive, and directories
that disagree. (Bytes after it, or a comment, cannot hide a second archive: its end is the last one.) (The format:
https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT)
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

END, END64, LOCATOR64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
LOCAL = struct.Struct("<4s5H3L2H")  # the header before a record
MOST_RECORDS = 1 << 17  # a model of 100 layers has about 4,000
MOST_LIST = 32 << 20  # bytes of the directory
MOST_NAME = 512  # characters
ENCRYPTED, SIZES_BEHIND = 1, 8  # flags
FULL = 0xFFFFFFFF  # the number has more than 32 bits and is stored elsewhere
ODD_NAME = re.compile(r"[\x00-\x1f\x7f-\x9f\\]|^/|(^|/)\.\.?(/|$)|^$|[\ud800-\udfff]")


class Directory(NamedTuple):
    """The directory of a zip file, from its end.

    Attributes:
        records: how many there are.
        size: bytes of the directory.
        begin: where it begins.
    """

    records: int
    size: int
    begin: int


def find_directory(file: BinaryIO, whole: int, exact: bool = True) -> Directory:
    """Find the directory of a zip file.

    Args:
        file: the open file.
        whole: bytes of the file.
        exact: refuse bytes before the archive.

    Raises:
        ValueError: the file cannot be right; the message is for the user.
    """
    end = find_end(file, whole)
    kind, disk, list_disk, here, count, size, begin, _ = END.unpack(read_at(file, end, END.size))
    at, short_form = end, Directory(count, size, begin)
    if end >= LOCATOR64.size and (locator := read_at(file, end - LOCATOR64.size, LOCATOR64.size))[:4] == b"PK\6\7":
        at = LOCATOR64.unpack(locator)[2]
        if at + END64.size > end - LOCATOR64.size or (more := read_at(file, at, END64.size))[:4] != b"PK\6\6":
            raise ValueError("its end does not say where the list of its records is")
        disk, list_disk, here, count, size, begin = END64.unpack(more)[4:]
        short = zip(short_form, (0xFFFF, FULL, FULL), (count, size, begin), strict=True)
        if any(old not in (most, new) for old, most, new in short):
            raise ValueError("it has two lists of its records, which disagree")
    if disk or list_disk or here != count:
        raise ValueError("it is a part of an archive in several files")
    if count > MOST_RECORDS or size > MOST_LIST:
        raise ValueError(f"its list tells of {count:,} records in {size:,} bytes, which no checkpoint has")
    if begin + size > at or exact and begin + size != at or count * 46 > size:
        raise ValueError("the list of its records is not where its end says, or bytes stand in front of it")
    return Directory(count, size, begin)


def find_end(file: BinaryIO, whole: int) -> int:
    """Return where the last part of a zip file begins."""
    tail = read_at(file, max(0, whole - END.size - 0xFFFF), END.size + 0xFFFF)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < END.size:
        raise ValueError("its end is missing")
    return whole - len(tail) + at


def read_at(file: BinaryIO, begin: int, size: int) -> bytes:
    """Read `size` bytes from `begin`."""
    file.seek(begin)
    return file.read(size)


def read_records(path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return the records of a zip file by name, without reading their content.

    Raises:
        ValueError: it has something that torch never writes; the message is for the user.
        OSError: it cannot be read.
    """
    whole = path.stat().st_size
    with open(path, "rb") as file:
        place = find_directory(file, whole)
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
        if len(infos) != place.records:
            raise ValueError(f"its list has {len(infos):,} records, and its end says {place.records:,}")
        records: dict[str, zipfile.ZipInfo] = {}
        folded: set[str] = set()  # torch ignores the case of record names
        for info in infos:
            check_record(info)
            if info.filename.casefold() in folded:
                raise ValueError(f"it has the record {info.filename} twice")
            folded.add(info.filename.casefold())
            records[info.filename] = info
        end = 0
        for info in sorted(infos, key=lambda one: one.header_offset):
            if info.header_offset < end:
                raise ValueError(f"the record {info.filename} shares bytes with another one")
            end = record_start(file, info) + info.file_size
            if end > place.begin:
                raise ValueError(f"the record {info.filename} would end behind the list of the records")
    return records


def check_record(info: zipfile.ZipInfo) -> None:
    """Check that a record is not compressed or encrypted and has a plain name.

    Raises:
        ValueError: it is not.
    """
    name = info.orig_filename  # info.filename ends at a NUL
    if ODD_NAME.search(name) or len(name) > MOST_NAME:
        raise ValueError(f"it has a record of the name {name[:MOST_NAME]!r}")
    if info.flag_bits & ENCRYPTED:
        raise ValueError(f"the record {name} is encrypted")
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(
            f"the record {name} is compressed ({info.compress_size:,} bytes for {info.file_size:,}), which torch never does"
        )
    if info.compress_size != info.file_size:
        raise ValueError(f"the record {name} has two sizes")


def record_start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Return where a record's bytes begin.

    Raises:
        ValueError: the header before them does not agree with the directory.
    """
    head = os.pread(file.fileno(), LOCAL.size, info.header_offset)
    if len(head) < LOCAL.size or head[:4] != b"PK\3\4":
        raise ValueError(f"the record {info.filename} is not where the list says")
    _, _, flags, method, _, _, _, packed, size, name, extra = LOCAL.unpack(head)
    stored_name = os.pread(file.fileno(), name, info.header_offset + LOCAL.size)
    wanted = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
    sizes = {size, packed} <= {info.file_size, FULL} or flags & SIZES_BEHIND and not size and not packed
    if stored_name != wanted or method != zipfile.ZIP_STORED or flags & ENCRYPTED or not sizes:
        raise ValueError(f"the record {info.filename} is called otherwise, or has another size, in front of its bytes")
    return info.header_offset + LOCAL.size + name + extra
