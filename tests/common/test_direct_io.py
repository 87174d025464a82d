"""Past the system's memory or through it, what is written is what is read."""

import errno
import fcntl
import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.kit import ROOT

from rwkv_peft.common import direct_io, hashing
from rwkv_peft.common.direct_io import DirectReader, DirectWriter, allocate_aligned

WAYS = ["straight", "refused", "broken"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """How the file system takes it: as it can; it knows no such way; it says that it does, and cannot."""
    if request.param == "refused":
        monkeypatch.setattr(direct_io, "_open_direct", lambda *_: None)
    if request.param == "broken":
        for name in ("pwrite", "preadv"):
            plain = getattr(os, name)

            def broken(file, data, at, plain=plain):
                if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
                    raise OSError(errno.EINVAL, "Invalid argument")
                return plain(file, data, at)

            monkeypatch.setattr(os, name, broken)
    return request.param


def parts_of(rng, size: int) -> list[bytes]:
    """Bytes in pieces of all sizes, the empty one too."""
    data, cuts = rng.bytes(size), sorted(rng.integers(0, size + 1, 12))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, size], strict=True)]


def test_what_several_threads_write_side_by_side_is_what_is_read(way, tmp_path):
    rng = np.random.default_rng(0)
    sizes = [5, 70_000, 3 << 20, 64, 20 << 20, 4096, (8 << 20) + 1, 0, 2 << 20]
    records = [parts_of(rng, size) for size in sizes]
    begins = np.cumsum([77, *sizes])  # (nothing begins where a block does)
    with open(tmp_path / "x", "wb") as file, DirectWriter(file) as out, ThreadPoolExecutor(3) as pool:
        out.write(b"h" * 77, 0)
        ends = list(pool.map(out.pieces, records, begins.tolist()))
    assert ends == begins[1:].tolist()
    whole = (tmp_path / "x").read_bytes()
    assert whole == b"h" * 77 + b"".join(b"".join(parts) for parts in records)
    reader = DirectReader(tmp_path / "x")
    for size, at in [
        (0, 5),
        (10, 0),
        (4096, 4096),
        (3 << 20, 12_345),
        (100, len(whole) - 3),
        (9, len(whole) + 9),
        (4097, 1),
    ]:
        assert bytes(reader.read(allocate_aligned(size), size, at)) == whole[at : at + size], (size, at)
    reader.close()
    assert hashing.sha256(tmp_path / "x", on_disk=True) == hashlib.sha256(whole).hexdigest()


def test_what_fills_blocks_goes_straight_to_the_disk(tmp_path, monkeypatch):
    file = direct_io._open_direct(tmp_path, os.O_TMPFILE | os.O_WRONLY)
    if file is None:
        pytest.skip("this file system has no such way")
    os.close(file)
    sizes, plain = {True: 0, False: 0}, os.pwrite

    def seen(file, data, at):
        sizes[bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT)] += len(data)
        return plain(file, data, at)

    monkeypatch.setattr(os, "pwrite", seen)
    with open(tmp_path / "x", "wb") as file, DirectWriter(file) as out:
        out.pieces([bytes(33 << 20)], 100)
    assert sum(sizes.values()) == 33 << 20 and sizes[False] < 2 * direct_io.BLOCK


def test_a_full_disk_is_an_error_on_both_ways(way, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with open(tmp_path / "x", "wb") as file, DirectWriter(file) as out, pytest.raises(OSError, match="No space left"):
        out.pieces([bytes(3 << 20)], 0)


FAILING = """
import sys, torch
from pathlib import Path
from rwkv_peft.checkpoint import pth, pth_rewrite
from rwkv_peft.common import direct_io

folder = Path(sys.argv[1])
pth.save(folder / "base.pth", {name: torch.zeros(1000) for name in "abcd"})

def full(self, data, at):
    raise OSError(28, "No space left on device")

direct_io.DirectWriter.flush = direct_io.DirectWriter.write = full
try:
    pth_rewrite.rewrite(folder / "base.pth", folder / "new.pth", lambda name: lambda tensor: tensor + 1)
except OSError as error:
    print(error.errno)
"""


@pytest.mark.slow
def test_a_full_disk_ends_a_change_of_several_tensors_at_once(tmp_path):
    """And leaves no one waiting for a tensor's turn."""
    command = [sys.executable, "-c", FAILING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout == "28\n", done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["base.pth"]
