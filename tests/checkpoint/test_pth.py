"""Checkpoints: nothing is executed, nothing is torn, and a rewrite is the naive one bit for bit."""

import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from helpers.kit import EVERYTHING, ROOT

from rwkv_peft.checkpoint import base_model, pth, pth_rewrite, sidecars
from rwkv_peft.common import hashing
from rwkv_peft.common.atomic_io import atomic_write
from rwkv_peft.common.errors import UserError
from rwkv_peft.common.parallel_io import parallel_map

TENSORS = {
    "emb.weight": torch.randn(7, 5, dtype=torch.bfloat16),
    "a.b": torch.randn(3),
    "half": torch.randn(2, 2).half(),
    "ints": torch.arange(5),
    "scalar": torch.tensor(2.5),
}


class Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_describe_reports_names_shapes_and_formats_without_loading(tmp_path):
    pth.save(tmp_path / "x.pth", TENSORS)
    described = pth.read_header(tmp_path / "x.pth")
    assert {n: (s.shape, s.dtype) for n, s in described.items()} == {
        n: (tuple(t.shape), t.dtype) for n, t in TENSORS.items()
    }
    assert all(s.whole for s in described.values())
    loaded = pth.load(tmp_path / "x.pth")
    assert all(torch.equal(loaded[n], t) for n, t in TENSORS.items())


def evil_file(path: Path, kind: str, canary: Path) -> None:
    code = Evil(f"touch '{canary}'")
    if kind == "in a torch file":
        torch.save({"emb.weight": torch.zeros(2), "x": code}, path)
    elif kind == "as the whole file":
        torch.save(code, path)
    elif kind == "as a bare pickle":
        path.write_bytes(pickle.dumps(code))


@pytest.mark.parametrize("kind", ["in a torch file", "as the whole file", "as a bare pickle"])
def test_code_in_a_file_is_refused_and_never_run(tmp_path, kind, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # even where the environment would allow it
    canary = tmp_path / "canary"
    evil_file(tmp_path / "x.pth", kind, canary)
    for read in (pth.read_header, pth.load):
        with pytest.raises(UserError, match="holds more than plain tensors|is no .pth checkpoint"):
            read(tmp_path / "x.pth")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "there is no such file"),
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: p.write_text("hello"), "is no .pth checkpoint"),
        (lambda p: torch.save([torch.zeros(1)], p), "is not a dictionary of tensors"),
        (lambda p: torch.save({"x": "words"}, p), "is not a dictionary of tensors"),
        (lambda p: torch.save({"x": {"y": torch.zeros(1)}}, p), "is not a dictionary of tensors"),
        (lambda p: zipfile.ZipFile(p, "w").writestr("a.txt", "x"), "no data.pkl in it|is no .pth"),
    ],
)
def test_what_is_no_checkpoint_says_so(tmp_path, make, words):
    make(tmp_path / "x.pth")
    with pytest.raises(UserError, match=words):
        pth.read_header(tmp_path / "x.pth")


def test_a_truncated_checkpoint_is_refused(tmp_path):
    pth.save(tmp_path / "x.pth", TENSORS)
    whole = (tmp_path / "x.pth").read_bytes()
    for size in range(0, len(whole), 97):
        (tmp_path / "x.pth").write_bytes(whole[:size])
        with pytest.raises(UserError):
            pth.read_header(tmp_path / "x.pth")


def test_damaged_checkpoints_never_end_in_a_traceback(tmp_path):
    import random

    pth.save(tmp_path / "x.pth", TENSORS)
    whole, pick = (tmp_path / "x.pth").read_bytes(), random.Random(0)
    for _ in range(1000 if EVERYTHING else 300):
        raw = bytearray(whole)
        for _ in range(pick.choice([1, 1, 4])):
            raw[pick.randrange(len(raw))] ^= 1 << pick.randrange(8)
        (tmp_path / "y.pth").write_bytes(bytes(raw))
        with contextlib.suppress(UserError):  # refused in words; a flip in the numbers themselves shows in no header
            pth.load(tmp_path / "y.pth")


@pytest.mark.parametrize("kind", ["short", "missing", "compressed"])
def test_a_record_that_is_not_whole_is_named(tmp_path, kind):
    pth.save(tmp_path / "x.pth", {"a": torch.ones(50), "b": torch.ones(9)})
    with zipfile.ZipFile(tmp_path / "x.pth") as old, zipfile.ZipFile(tmp_path / "y.pth", "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("data/0"):
                if kind == "missing":
                    continue
                data = data[:20] if kind == "short" else data
            packed = zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED
            new.writestr(info.filename, data, packed)
    words = "is compressed" if kind == "compressed" else "the record of a is missing, too short or too long"
    with pytest.raises(UserError, match=words):
        pth.read_header(tmp_path / "y.pth")


def double(name):
    return (lambda tensor: tensor * 2) if name in ("emb.weight", "half", "scalar") else None


def doubled(name, tensor):
    return double(name)(tensor) if double(name) else tensor


def naive_rewrite(source, target, change):
    tensors = torch.load(source, weights_only=True)
    torch.save({n: change(n, t).to(t.dtype) for n, t in tensors.items()}, target)


def contents(path):
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # checksums are right
        return {i.filename.partition("/")[2]: archive.read(i) for i in archive.infolist()}


def test_a_rewrite_equals_the_naive_one_bit_for_bit(tmp_path):
    pth.save(tmp_path / "x.pth", TENSORS)
    pth_rewrite.rewrite(tmp_path / "x.pth", tmp_path / "ours.pth", double)
    naive_rewrite(tmp_path / "x.pth", tmp_path / "naive.pth", doubled)
    ours, naive = contents(tmp_path / "ours.pth"), contents(tmp_path / "naive.pth")
    skip = {".data/serialization_id", ".format_version"}
    assert {k: v for k, v in ours.items() if k not in skip} == {k: v for k, v in naive.items() if k not in skip}
    for mmap in (False, True):
        loaded = torch.load(tmp_path / "ours.pth", weights_only=True, mmap=mmap)
        assert all(torch.equal(loaded[n], doubled(n, t)) for n, t in TENSORS.items())


def test_records_lie_at_multiples_of_64_so_that_others_can_map_them(tmp_path):
    pth.save(tmp_path / "x.pth", TENSORS)
    pth_rewrite.rewrite(tmp_path / "x.pth", tmp_path / "y.pth", double)
    raw = (tmp_path / "y.pth").read_bytes()
    for info in zipfile.ZipFile(tmp_path / "y.pth").infolist():
        at = info.header_offset
        name, extra = (int.from_bytes(raw[at + o : at + o + 2], "little") for o in (26, 28))
        assert (at + 30 + name + extra) % 64 == 0, info.filename


@pytest.mark.parametrize("unit", [1, 3, 7])
def test_a_change_by_rows_is_the_change_of_the_whole_and_sees_a_few_rows_at_a_time(tmp_path, monkeypatch, unit):
    monkeypatch.setattr(pth_rewrite, "BLOCK", 40)
    tensors = {"even": torch.randn(24, 10), "odd": torch.randn(23, 10).bfloat16(), "empty": torch.empty(0, 4)}
    pth.save(tmp_path / "x.pth", tensors | {"other": torch.randn(5)})
    seen = []

    def rows(tensor, block):
        seen.append((len(tensor), block.start))
        return tensor * torch.arange(block.start, block.stop)[:, None]

    change = lambda name: pth_rewrite.RowwiseUpdate(rows, unit) if name in tensors else None  # noqa: E731
    pth_rewrite.rewrite(tmp_path / "x.pth", tmp_path / "y.pth", change)
    assert contents(tmp_path / "y.pth").keys() == contents(tmp_path / "x.pth").keys()
    loaded = torch.load(tmp_path / "y.pth", weights_only=True, mmap=True)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], (tensor * torch.arange(len(tensor))[:, None]).to(tensor.dtype))
    assert all(start % unit == 0 for _, start in seen) and len(seen) > 6
    assert all(unit <= size <= 2 * unit + 6 < 23 for size, _ in seen if size)


def test_a_source_that_torch_saved_without_checksums_is_sound_and_its_copy_has_them(tmp_path):
    tensors = {"a": torch.randn(4000, 3), "b": torch.ones(9)}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    pth.check_checksums(tmp_path / "x.pth")
    pth_rewrite.rewrite(tmp_path / "x.pth", tmp_path / "y.pth", lambda name: (lambda t: t + 1) if name == "a" else None)
    assert zipfile.ZipFile(tmp_path / "y.pth").testzip() is None
    result = pth.load(tmp_path / "y.pth")
    assert torch.equal(result["a"], tensors["a"] + 1) and torch.equal(result["b"], tensors["b"])


@pytest.mark.parametrize("where", ["a tensor that changes", "a tensor that stays"])
def test_a_damaged_source_is_named_and_leaves_no_file(tmp_path, where):
    pth.save(tmp_path / "x.pth", {"a": torch.full((50,), 7.0), "b": torch.ones(9)})
    raw = bytearray((tmp_path / "x.pth").read_bytes())
    raw[raw.find(torch.full((50,), 7.0).numpy().tobytes())] ^= 1
    (tmp_path / "x.pth").write_bytes(bytes(raw))
    changes = "a" if where == "a tensor that changes" else "b"
    change = lambda name: (lambda tensor: tensor + 1) if name == changes else None  # noqa: E731
    with pytest.raises(UserError, match=r"a is damaged \(its checksum is wrong\). Get the file again"):
        pth_rewrite.rewrite(tmp_path / "x.pth", tmp_path / "y.pth", change)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


@pytest.mark.parametrize("size", [10, 5_000_000_000])
def test_the_directory_of_an_archive_is_read_by_python_however_large_the_records_are(tmp_path, size):
    """Above 4 GB, places and sizes stand in fields of their own. (The records themselves are a hole here.)"""
    large = [zipfile.ZipInfo(f"ü/{k}") for k in range(3)]
    for k, one in enumerate(large):
        one.file_size = one.compress_size = size
        one.header_offset, one.CRC = k * one.file_size, 7 + k
    begin = 3 * size
    (tmp_path / "z").touch()
    with open(tmp_path / "z", "r+b") as file:
        os.pwrite(file.fileno(), pth_rewrite.central_directory(large, begin), begin)  # a hole in front of it
    read = zipfile.ZipFile(tmp_path / "z").infolist()
    fields = [(i.filename, i.file_size, i.compress_size, i.header_offset, i.CRC) for i in large]
    assert [(i.filename, i.file_size, i.compress_size, i.header_offset, i.CRC) for i in read] == fields


def test_work_side_by_side_keeps_its_order_passes_errors_on_and_leaves_torch_as_it_was():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert parallel_map(lambda n: (n * n, torch.get_num_threads()), range(9)) == [(n * n, 1) for n in range(9)]
        with pytest.raises(ZeroDivisionError):
            parallel_map(lambda n: 1 // n, [1, 0, 2])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_tensors_that_share_a_record_are_rewritten_as_well(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    torch.save({"whole": whole, "row": whole[1], "turned": whole.T}, tmp_path / "x.pth")
    pth_rewrite.rewrite(tmp_path / "x.pth", tmp_path / "y.pth", lambda n: (lambda t: t + 1) if n == "row" else None)
    loaded = pth.load(tmp_path / "y.pth")
    assert torch.equal(loaded["whole"], whole) and torch.equal(loaded["row"], whole[1] + 1)
    assert torch.equal(loaded["turned"], whole.T)


def test_a_change_of_shape_is_a_bug_and_leaves_no_file(tmp_path):
    pth.save(tmp_path / "x.pth", TENSORS)
    with pytest.raises(ValueError, match="a.b would change its shape"):
        pth_rewrite.rewrite(tmp_path / "x.pth", tmp_path / "y.pth", lambda n: (lambda t: t[:1]) if n == "a.b" else None)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "x", "w") as file:
        file.write("new")
        raise RuntimeError
    assert (tmp_path / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


KILLED = """
import sys, torch
from pathlib import Path
from rwkv_peft.checkpoint import pth
folder, i = Path(sys.argv[1]), 0
while True:
    i += 1
    pth.save(folder / "x.pth", {"i": torch.full((500_000,), float(i))})
    print(i, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_instant_the_last_finished_checkpoint_loads(tmp_path):
    for kill in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        finished = int(process.stdout.readline())
        time.sleep(0.003 * kill)
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        process.wait()
        values = pth.load(tmp_path / "x.pth")["i"]
        assert values.min() == values.max() and values[0] >= max([finished, *map(int, rest)])
    pth.save(tmp_path / "x.pth", {"i": torch.zeros(1)})
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]  # what the killed ones left is cleared


FULL = """
import resource, sys
from pathlib import Path
import torch
from rwkv_peft.checkpoint import pth, pth_rewrite
from rwkv_peft.common.errors import handle_errors
base, target = map(Path, sys.argv[1:3])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with handle_errors():
    if sys.argv[3] == "save":
        pth.save(target, {"x": torch.zeros(200_000)})
    else:
        pth_rewrite.rewrite(base, target, lambda n: lambda t: t + 1)
"""


@pytest.mark.smoke(1)
@pytest.mark.parametrize("way", ["save", "rewrite"])
def test_a_file_that_may_not_be_as_large_leaves_the_old_one_whole_and_says_so(tmp_path, way):
    pth.save(tmp_path / "base.pth", {"x": torch.ones(200_000)})
    (tmp_path / "target.pth").write_text("old")
    arguments = [sys.executable, "-c", FULL, str(tmp_path / "base.pth"), str(tmp_path / "target.pth"), way]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert (
        "target.pth: is larger than this shell lets a file be: 100 kB (ulimit -f)" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert (tmp_path / "target.pth").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.pth", "target.pth"]


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(UserError, match="1 kB are free, 9.2 MB are needed. Nothing was written"):
        pth.save(tmp_path / "x.pth", {"x": torch.zeros(2_000_000)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "is missing"), ("{", "not readable as JSON"), ("[1]", "holds no JSON object"), ("{}", "does not say")],
)
def test_a_sidecar_that_cannot_be_used_says_why(tmp_path, content, words):
    if content:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=words):
        sidecars.read_sidecar(tmp_path / "x.pth", ("method", "rank"))


@pytest.mark.parametrize("right", [True, False])
def test_a_base_may_be_used_before_its_content_is_known_and_the_doubt_is_settled_later(project_folder, right):
    base = project_folder / "model" / "base.pth"
    pth.save(base, TENSORS)
    sidecar = {"base": "base.pth", "base_sha256": hashing.sha256(base) if right else "0" * 64, "base_path": str(base)}
    doubts = []
    assert base_model.find_base_model(sidecar, Path("rwkv-0.pth"), "", doubts) == base
    settle = doubts.pop()
    with contextlib.nullcontext() if right else pytest.raises(UserError, match="is not the file that rwkv-0.pth"):
        settle()
    if not right:  # where several files can be meant, it is said at once which one it is, or that it is none
        shutil.copy(base, base.with_name("other.pth"))
        sidecar["base_path"] = str(base.with_name("other.pth"))
        with pytest.raises(UserError, match="is not the file that rwkv-0.pth"):
            base_model.find_base_model(sidecar, Path("rwkv-0.pth"), "", doubts)
        assert not doubts


def test_a_base_that_no_one_has_written_to_is_not_read_again_and_one_that_was_is(project_folder, monkeypatch):
    base = project_folder / "model" / "base.pth"
    pth.save(base, TENSORS)
    assert hashing.file_stamp(base) is None  # written a moment ago
    monkeypatch.setattr(hashing, "SETTLED", 0.0)
    known = hashing.fingerprint(base)
    sidecar = {"base": "base.pth", "base_sha256": known["sha256"], "base_mark": known["mark"]}
    doubts = []
    with monkeypatch.context() as patched:
        patched.setattr(hashing, "sha256", None)
        assert base_model.find_base_model(sidecar, Path("rwkv-0.pth"), "", doubts) == base and not doubts
    pth.save(base, {**TENSORS, next(iter(TENSORS)): next(iter(TENSORS.values())) + 1})
    assert base_model.find_base_model(sidecar, Path("rwkv-0.pth"), "", doubts) == base
    with pytest.raises(UserError, match="is not the file that rwkv-0.pth"):
        doubts.pop()()


def test_checksums_are_those_of_zlib():
    data = bytes(range(256)) * 5
    assert hashing.crc32(data) == zlib.crc32(data) and hashing.crc32(data[7:], 99) == zlib.crc32(data[7:], 99)
