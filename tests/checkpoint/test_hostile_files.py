# ruff: noqa: E501 (a line for each file)
"""Checkpoint files of somebody who means harm: refused in the same words at every door, before they cost memory."""

import io
import json
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from helpers.chats import load
from helpers.kit import ROOT
from helpers.merging import merge
from helpers.training import config

from rwkv_peft.checkpoint import pth as checkpoint
from rwkv_peft.cli import train
from rwkv_peft.common.errors import SettingErrors, UserError


class Zip:
    """A zip file, byte by byte. Records: name, data, and what the list and the header in front of the bytes say of them."""

    def __init__(self, records, front=b"", behind=b"", zip64=None, **end):
        body, listed = front, b""
        for name, data, *reported in records:
            reported = {"flags": 0, "method": 0, "packed": data, "size": len(data), "at": len(body), "local": name} | (
                reported[0] if reported else {}
            )
            head = (45, reported["flags"], reported["method"], 0, 1, 0, len(reported["packed"]), reported["size"])
            body += (
                struct.pack("<4s5H3L2H", b"PK\3\4", *head, len(reported["local"]), 0)
                + reported["local"]
                + reported["packed"]
            )
            size = reported.get("listed", len(reported["packed"]))
            listed += b"PK\1\2" + struct.pack(
                "<6H3L5H2L",
                45,
                *head[:5],
                0,
                size,
                reported.get("listed", reported["size"]),
                len(name),
                0,
                0,
                0,
                0,
                0,
                reported["at"],
            )
            listed += name
        reported = {"count": len(records), "size": len(listed), "begin": len(body), "comment": b""} | end
        body += listed
        if zip64:
            hash64 = reported | zip64
            at = len(body)
            body += struct.pack(
                "<4sQ2H2L4Q",
                b"PK\6\6",
                44,
                45,
                45,
                0,
                0,
                hash64["count"],
                hash64["count"],
                hash64["size"],
                hash64["begin"],
            )
            body += struct.pack("<4sLQL", b"PK\6\7", 0, at, 1)
        body += struct.pack(
            "<4s4H2LH",
            b"PK\5\6",
            0,
            0,
            reported["count"],
            reported["count"],
            reported["size"],
            reported["begin"],
            len(reported["comment"]),
        )
        self.bytes = body + reported["comment"] + behind


def pth():
    """The records of a LoRA checkpoint as torch writes it: name in the file -> bytes."""
    out = io.BytesIO()
    torch.save({"blocks.0.att.key.lora_A": torch.ones(4, 32), "blocks.0.att.key.lora_B": torch.ones(32, 4)}, out)
    with zipfile.ZipFile(out) as archive:
        return {name.replace("archive/", "a/").encode(): archive.read(name) for name in archive.namelist()}


RECORDS = list(pth().items())
NUMBERS = next(data for name, data in RECORDS if name == b"a/data/0")


def changed(name, **reported):
    """The records, one of them with something said of it."""
    return Zip([(n, d, reported) if n == name else (n, d) for n, d in RECORDS]).bytes


def replaced(name, data):
    return Zip([(n, data if n == name else d) for n, d in RECORDS]).bytes


def deflated(data):
    import zlib

    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def pickled(text):
    """data.pkl with the bytes of one thing in place of another."""
    old, new = text
    data = dict(RECORDS)[b"a/data.pkl"]
    assert old in data
    return replaced(b"a/data.pkl", data.replace(old, new, 1))


def with_record(name, data=b"x", **reported):
    return Zip([*RECORDS, (name, data, reported)]).bytes


def safetensors(header, data=bytes(8), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


# a hostile file -> what is said of it
FILES = {
    "data.pkl is deflated": (changed(b"a/data.pkl", method=8, packed=deflated(dict(RECORDS)[b"a/data.pkl"])), "a/data.pkl is compressed"),
    "data.pkl of 1 GB in 1 MB": (Zip([(b"a/data.pkl", b"", {"method": 8, "packed": deflated(bytes(1 << 20)), "size": 1 << 30})]).bytes, "a/data.pkl is compressed"),
    "numbers are deflated": (changed(b"a/data/0", method=8, packed=deflated(NUMBERS)), "a/data/0 is compressed"),
    "something small is deflated": (changed(b"a/version", method=8, packed=deflated(b"3\n")), "a/version is compressed"),
    "an unknown method": (changed(b"a/data/0", method=99), "a/data/0 is compressed"),
    "encrypted": (changed(b"a/data/0", flags=1), "a/data/0 is encrypted"),
    "a large data.pkl": (replaced(b"a/data.pkl", bytes((32 << 20) + 1)), "a/data.pkl has 33,554,433 bytes"),
    "sizes in list and record": (changed(b"a/data/0", listed=len(NUMBERS) - 4), "has another size, in front of its bytes"),
    "a size beyond the file": (changed(b"a/data/0", size=1 << 30, listed=1 << 30), "would end behind the list|has another size"),
    "records share bytes": (Zip([*RECORDS, (b"a/data/9", NUMBERS, {"at": 0, "local": b"a/data/9"})]).bytes, "called otherwise|shares bytes"),
    "another name in front": (changed(b"a/data/0", local=b"a/data/7"), "a/data/0 is called otherwise"),
    "a position beyond the file": (changed(b"a/data/0", at=1 << 30), "a/data/0 is not where the list says"),
    "a position inside": (changed(b"a/data/0", at=3), "shares bytes with another one"),
    "a record twice": (with_record(b"a/data/0", bytes(len(NUMBERS))), "the record a/data/0 twice"),
    "twice but for case": (with_record(b"a/DATA/0", bytes(len(NUMBERS))), "the record a/DATA/0 twice"),
    "data.pkl twice": (with_record(b"a/data.pkl", b"x"), "it has a/data.pkl and a/data.pkl"),
    "another data.pkl": (with_record(b"b/data.pkl", b"x"), "it has a/data.pkl and b/data.pkl"),
    "data.pkl deep inside": (Zip([(b"z/" + n, d) for n, d in RECORDS]).bytes, "where torch does not look"),
    "a name with ..": (with_record(b"a/../../x"), "a record of the name 'a/../../x'"),
    "an absolute name": (with_record(b"/etc/x"), "a record of the name '/etc/x'"),
    "a name with NUL": (with_record(b"a/data/1\0.txt"), "a record of the name 'a/data/1"),
    "a name with a backslash": (with_record(b"a\\data\\0"), "a record of the name 'a"),
    "a name that clears the screen": (with_record(b"a/\x1b[2J"), "a record of the name 'a/"),
    "an empty name": (with_record(b""), "a record of the name ''"),
    "a long name": (with_record(b"a/" + b"n" * 600), "a record of the name 'a/nnn"),
    "a stranger": (with_record(b"b/x"), "holds b/x beside the checkpoint in a/"),
    "big": (replaced(b"a/byteorder", b"big"), "byte order 'big'"),
    "middle": (replaced(b"a/byteorder", b"\x1b[2J"), "byte order '"),
    "a long byteorder": (replaced(b"a/byteorder", b"little" * 9), "a/byteorder has 54 bytes"),
    "bytes in front": (Zip(RECORDS, front=b"#!/bin/sh\n").bytes[10:] and b"#!/bin/sh\n" + Zip(RECORDS).bytes, "bytes stand in front of it"),
    "one archive behind another": (Zip(RECORDS).bytes + Zip([(b"b/data.pkl", b"x")]).bytes, "bytes stand in front of it"),
    "lists that disagree": (Zip(RECORDS, zip64={"count": 1}).bytes, "two lists of its records, which disagree"),
    "a list of too many": (Zip(RECORDS, count=0xFFFF, zip64={"count": 1 << 40}).bytes, "tells of 1,099,511,627,776 records"),
    "more in the list than told": (Zip(RECORDS, count=2).bytes, "its end says 2"),
    "the list elsewhere": (Zip(RECORDS, begin=4).bytes, "not where its end says"),
    "several files": (Zip(RECORDS).bytes[:-18] + struct.pack("<4H", 1, 1, len(RECORDS), len(RECORDS)) + Zip(RECORDS).bytes[-10:], "an archive in several files"),
    "a tensor too large for its numbers": (pickled((b"K\x80", b"K\xff")), "missing, too short or too long|behind the end|more than plain"),
    "1 TB that is announced": (replaced(b"a/data.pkl", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x."), "holds more than plain tensors"),
    "a name of a tensor that clears the screen": (pickled((b"blocks.0.att.key.lora_A", b"blocks.0.att\x1b[2J.lora_A")), "holds a tensor of the name"),
    "code": (replaced(b"a/data.pkl", b"cposix\nsystem\n(S'touch PWN'\ntR."), "it wants to load posix.system"),
    "header longer than the file": (safetensors({"a": one()}, length=1 << 40), "is not complete"),
    "header of 17 MB": (safetensors(b'{"a":' + b" " * (17 << 20) + b"1}"), "header of 17,8"),
    "header nested deep": (safetensors(b'{"a":' + b"[" * 100_000), "nested deeper than 64 levels"),
    "header not UTF-8": (safetensors(b'{"\xff":1}'), "is not UTF-8"),
    "a name twice": (safetensors(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), 'has the key "a" twice'),
    "a tensor's name with NUL": (safetensors({"a\0": one()}), "holds a tensor of the name"),
    "a tensor without a name": (safetensors({"": one()}), "holds a tensor of the name ''"),
    "tensors share bytes": (safetensors({"a": one(), "b": one(data_offsets=[4, 12])}, bytes(12)), "b shares bytes"),
    "the same bytes": (safetensors({"a": one(), "b": one()}), "b shares bytes"),
    "a gap": (safetensors({"a": one(), "b": one(data_offsets=[12, 20])}, bytes(20)), "b does not begin where"),
    "bytes behind the tensors": (safetensors({"a": one()}, bytes(9)), "with 1 bytes behind its last tensor"),
    "offsets beyond the file": (safetensors({"a": one(shape=[1 << 40], data_offsets=[0, 4 << 40])}), "is not complete"),
    "negative offsets": (safetensors({"a": one(data_offsets=[-8, 0])}), r"header is damaged \(a\)"),
    "three offsets": (safetensors({"a": one(data_offsets=[0, 8, 9])}), r"header is damaged \(a\)"),
    "offsets of truth": (safetensors({"a": one(shape=[], data_offsets=[False, 4])}), r"header is damaged \(a\)"),
    "a shape of another size": (safetensors({"a": one(shape=[3])}), r"header is damaged \(a\)"),
    "a negative shape": (safetensors({"a": one(shape=[-1, -2])}), r"header is damaged \(a\)"),
    "a shape of 100,000 sizes": (safetensors({"a": one(shape=[1 << 47] * 100_000)}), r"header is damaged \(a\)"),
    "a number of 5,000 digits": (safetensors(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}'), "whole number of 5,000 digits"),
    "a dtype that is none": (safetensors({"a": one(dtype="\x1b[2J")}), "which this version does not read"),
    "a dtype that is a list": (safetensors({"a": one(dtype=[])}), "header is damaged"),
    "an entry that is a number": (safetensors({"a": 5}), "header is damaged"),
    "metadata that is none": (safetensors({"__metadata__": {"x": 5}, "a": one()}), "__metadata__"),
    "no object": (safetensors(b'{"a" 5}'), "header is damaged"),
}  # fmt: skip


def model_path(path):
    train.command(config(MODEL_PATH=str(path)), ["--dry-run"])


def lora_load(path):
    train.command(config(lora_load=str(path)), ["--dry-run"])


def state_load(path):
    train.command(config(FINETUNE_MODE="state", state_load=str(path)), ["--dry-run"])


def adapter(path):
    load(ADAPTER=str(path), MODEL_PATH="tiny.pth")


def merged(path):
    merge(path, MODEL_PATH="tiny.pth", METHOD="lora")


DOORS = [model_path, lora_load, state_load, adapter, merged]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The hostile files, written once."""
    folder = tmp_path_factory.mktemp("hostile")
    for number, (content, _) in enumerate(FILES.values()):
        (folder / f"{number}.pth").write_bytes(content)
    return folder


def test_the_builder_of_hostile_files_builds_sound_ones(tmp_path):
    more = Zip(RECORDS, behind=b"\n").bytes, Zip(RECORDS, comment=b"hello").bytes  # which hide no second archive
    for content in (Zip(RECORDS).bytes, Zip(RECORDS, zip64={}).bytes, *more):
        (tmp_path / "x.pth").write_bytes(content)
        assert torch.load(tmp_path / "x.pth", weights_only=True, mmap=True)
        assert len(checkpoint.load(tmp_path / "x.pth")) == 2
    (tmp_path / "x.safetensors").write_bytes(safetensors({"a": one(), "b": one(data_offsets=[8, 16])}, bytes(16)))
    assert [*checkpoint.load(tmp_path / "x.safetensors")] == ["a", "b"]


@pytest.mark.smoke(8)
@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_gets_the_same_words_at_every_door(ready, files, name):
    path = files / f"{[*FILES].index(name)}.pth"
    said = []
    for door in DOORS:
        with pytest.raises((UserError, SettingErrors), match=f"{path.name}: .*({FILES[name][1]})") as refused:
            door(path)
        said.append(str(refused.value).partition(f"{path.name}: ")[2].splitlines()[0])
    assert len({*said}) == 1


@pytest.mark.smoke(1)
@pytest.mark.parametrize("name", ["data.pkl of 1 GB in 1 MB", "1 TB that is announced", "header nested deep"])
def test_a_hostile_file_costs_no_memory(files, name):
    must_cost_no_memory(files / f"{[*FILES].index(name)}.pth")


@pytest.mark.slow
def test_what_a_pickle_announces_to_remember_costs_no_memory(tmp_path):
    (tmp_path / "x.pth").write_bytes(replaced(b"a/data.pkl", b"\x80\x02}r\xff\xff\xff\x7f."))
    must_cost_no_memory(tmp_path / "x.pth")


def must_cost_no_memory(path):
    code = (
        "import sys; from rwkv_peft.checkpoint import pth; from rwkv_peft.common.errors import UserError\n"
        "from pathlib import Path\n"
        "most = lambda: int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])\n"
        "before = most()\n"
        "try: pth.read_header(sys.argv[1])\nexcept UserError: pass\n"
        "assert most() - before < 100_000"
    )
    subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, check=True)
