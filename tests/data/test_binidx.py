"""The .bin/.idx pair: the bytes of the format, round trips, and refusal of every pair that does not fit."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.common.errors import UserError
from rwkv_peft.data.binidx import Reader, Writer

ROWS = [[1, 2, 3], [65529], [7, 0]]


def write(prefix, rows=ROWS):
    with Writer(prefix, {"": np.uint16, ".roles": np.uint8}) as writer:
        for row in rows:
            writer.add({"": np.array(row, np.uint16), ".roles": np.zeros(len(row), np.uint8)})
        writer.commit()


def test_the_files_are_the_bytes_that_the_format_describes(tmp_path):
    write(tmp_path / "x")
    golden = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4)
    golden += struct.pack("<3i", 3, 1, 2) + struct.pack("<3q", 0, 6, 8) + struct.pack("<4q", 0, 1, 2, 3)
    assert (tmp_path / "x.idx").read_bytes() == golden
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<6H", 1, 2, 3, 65529, 7, 0)
    assert (tmp_path / "x.roles.idx").read_bytes()[17] == 1  # uint8


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 65535), max_size=9), min_size=1, max_size=9))
def test_what_was_written_is_read(tmp_path_factory, rows):
    prefix = tmp_path_factory.mktemp("rows") / "x"
    write(prefix, rows)
    reader = Reader(prefix)
    assert [reader.row(i).tolist() for i in range(len(reader))] == rows


def damage(folder, kind: str) -> None:
    bin_path, idx = folder / "x.bin", folder / "x.idx"
    if kind == "bin cut":
        bin_path.write_bytes(bin_path.read_bytes()[:6])
    if kind == "bin longer":
        bin_path.write_bytes(bin_path.read_bytes() + b"xx")
    if kind == "idx cut":
        idx.write_bytes(idx.read_bytes()[:-4])
    if kind == "idx of other data":
        write(folder / "y", [[1, 2], [3, 4, 5]])
        idx.write_bytes((folder / "y.idx").read_bytes())
    if kind == "not an idx":
        idx.write_bytes(b"hello" * 20)
    if kind == "empty idx":
        idx.write_bytes(b"")
    if kind == "version":
        idx.write_bytes(idx.read_bytes()[:9] + struct.pack("<Q", 2) + idx.read_bytes()[17:])
    if kind == "dtype":
        idx.write_bytes(idx.read_bytes()[:17] + b"\x63" + idx.read_bytes()[18:])
    if kind == "pointer":
        raw = bytearray(idx.read_bytes())
        raw[34 + 12 + 8] ^= 4
        idx.write_bytes(bytes(raw))
    if kind == "no idx":
        idx.unlink()
    if kind == "no bin":
        bin_path.unlink()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bin cut", "has 6 bytes, but x.idx describes 12"),
        ("bin longer", "has 14 bytes, but x.idx describes 12"),
        ("idx cut", "was cut off or damaged"),
        ("idx of other data", "belongs to other data"),
        ("not an idx", "does not begin with MMIDIDX"),
        ("empty idx", "does not begin with MMIDIDX"),
        ("version", "has version 2"),
        ("dtype", "dtype code 99"),
        ("pointer", "row 1 points to the wrong place"),
        ("no idx", "there is no such file"),
        ("no bin", "there is no such file"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused_with_its_reason(tmp_path, kind, words):
    write(tmp_path / "x")
    damage(tmp_path, kind)
    with pytest.raises(UserError, match=words):
        Reader(tmp_path / "x")


def test_without_commit_earlier_files_stay_and_nothing_else_is_left(tmp_path):
    write(tmp_path / "x")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "x", {"": np.uint16}) as writer:
        writer.add({"": np.array([5], np.uint16)})
        raise KeyboardInterrupt
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_full_disk_is_not_left_fuller(tmp_path):
    """The last flush fails again when the file is closed; /dev/full is such a disk."""
    with pytest.raises(OSError, match="No space left"), Writer(tmp_path / "x", {"": np.uint16}) as writer:
        writer.files[""].close()
        writer.files[""] = open("/dev/full", "wb")  # noqa: SIM115
        writer.add({"": np.zeros(10, np.uint16)})
        writer.commit()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_cleared_by_the_next(tmp_path):
    (tmp_path / "x.bin.tmp-999999999").write_bytes(b"half")
    write(tmp_path / "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.roles.bin", "x.roles.idx"]
