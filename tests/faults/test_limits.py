"""What the shell and the system limit, in processes of their own: the words report the cause, and what was there stays."""

import errno
import os
import resource
import subprocess
import sys

import pytest
from helpers import tiny
from helpers.kit import ROOT

from rwkv_peft.common import errors
from rwkv_peft.common.errors import describe_error, describe_os_error

LIMITED = """
import os, resource, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from rwkv_peft.common.errors import handle_errors
from rwkv_peft.common import atomic_io
limit = lambda kind, most: resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (most, most))
with handle_errors(lean="CTX_LEN"):
{body}
"""


def limited(body: str, *arguments) -> subprocess.CompletedProcess:
    """Run lines of Python behind a door, in a process of its own."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return subprocess.run(
        [sys.executable, "-c", LIMITED.format(root=str(ROOT), body=lines), *map(str, arguments)],
        capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


WRITES = {
    "json": "atomic_io.write_json(sys.argv[1], {'x': 'y' * 10**6})",
    "bytes": "with atomic_io.atomic_write(sys.argv[1]) as file:\n    file.write(bytes(10**6))",
    "torch": "import torch\nfrom rwkv_peft.checkpoint import pth\npth.save(sys.argv[1], {'x': torch.ones(10**6)})",
    "tokens": (
        "import numpy as np\nfrom rwkv_peft.data.binidx import Writer\n"
        "with Writer(sys.argv[1], {'': np.dtype(np.uint16)}) as writer:\n"
        "    writer.extend('', bytes(2 * 10**6), [10**6])\n    writer.commit()"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("body", WRITES.values(), ids=WRITES)
def test_a_file_larger_than_the_shell_allows_is_named_with_the_limit(tmp_path, body):
    (tmp_path / "x").write_text("old")
    done = limited(f"limit('FSIZE', 20_000)\n{body}", tmp_path / "x")
    assert done.returncode == 3, done.stderr
    assert "larger than this shell lets a file be: 20 kB (ulimit -f)" in done.stderr and "No space" not in done.stderr
    assert "x" in done.stderr.partition(":")[0] and ".tmp-" not in done.stderr
    assert (tmp_path / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_too_many_open_files_are_reported_with_the_limit():
    done = limited("limit('NOFILE', 20)\nkept = [open('/dev/null') for _ in range(30)]")
    assert done.returncode == 2
    assert "/dev/null: 20 files may be open at once in this shell. Start it in another shell" in done.stderr


def test_memory_that_the_shell_does_not_give_is_reported_with_the_limit_and_what_takes_less():
    done = limited("limit('AS', 400 << 20)\nx = bytearray(1 << 30)")
    assert done.returncode == 4
    assert done.stderr == (
        "Out of memory: this shell lets a program have 419.4 MB (ulimit -v). To mend it, lower CTX_LEN, or start it in a "
        "shell without that limit.\n"
    )


def test_a_thread_that_gets_no_stack_is_a_matter_of_memory_too():
    body = "import threading, time\nlimit('AS', 400 << 20)\nthreading.stack_size(1 << 30)\nthreading.Thread(target=print).start()"
    done = limited(body)
    assert done.returncode == 4 and "419.4 MB (ulimit -v)" in done.stderr, done.stderr


MAPS = "import resource, torch\nfrom rwkv_peft.checkpoint import pth\n"
MAPS += (
    "held = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\nlimit('AS', held + (4 << 20))\n"
)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_sound_file_that_cannot_be_mapped_is_not_called_damaged(tmp_path, ending):
    import torch
    from safetensors.torch import save_file

    tensors = {"x": torch.ones(10**7)}
    path = tmp_path / f"x.{ending}"
    torch.save(tensors, path) if ending == "pth" else save_file(tensors, path)
    done = limited(f"{MAPS}pth.load(sys.argv[1])", path)
    assert done.returncode == 4, done.stderr
    assert "ulimit -v" in done.stderr and "damaged" not in done.stderr and "Get the file again" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", ["training.sh", "make_tokenize.sh", "merge.sh", "chat.sh"])
def test_a_library_that_gets_no_memory_to_load_is_reported_in_words(kit, script):
    """Every command under ulimit -v; whatever a library does that gets none, the limit was named before."""
    kit.data("x.jsonl", tiny.CHATS[0])
    tiny.save_model(kit.root / "model" / "tiny.pth", shape=tiny.geometry(vocab=512))
    arguments = {"make_tokenize.sh": ["x.jsonl"], "chat.sh": ["--model", "tiny.pth", "--prompt", "x"]}.get(script, [])
    done = subprocess.run(
        ["bash", "-c", 'ulimit -v 300000; exec "$@"', "-", str(kit.root / script), *arguments],
        capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "warning   this shell lets a program have 307.2 MB of memory (ulimit -v)" in done.stderr
    assert "Traceback" not in done.stderr and "damaged" not in done.stderr
    if script != "make_tokenize.sh":  # which ends in a library's abort, or not at all
        assert done.returncode in (2, 4), done.stderr  # (2: of merge.sh, which looks for a run first)


def test_a_run_under_a_limit_of_files_warns_with_the_cause_and_ends_with_it(ready, monkeypatch, capsys):
    """States and step checkpoints are left out, the last checkpoint ends it."""
    from helpers.training import run

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError) as refused:
            run(ready, "one", SAVE_STEPS="1", KEEP_LAST="2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert refused.value.errno == errno.EFBIG
    said = capsys.readouterr().out
    assert said.count("is larger than this shell lets a file be") >= 2 and "[Errno" not in said


NUMBERS = {
    "EDQUOT": (3, "Your quota on the disk is used up while writing /a/b (quota -s tells)"),
    "ENOSPC": (3, "No space left on the disk while writing /a/b"),
    "EFBIG": (3, "/a/b: is larger than its file system takes"),
    "EROFS": (3, "/a/b: Read-only file system. Nothing can be written there"),
    "EACCES": (3, "/a/b: Permission denied. The folder or file cannot be used with your rights."),
    "EIO": (3, "/a/b: the disk or the share could not read or write it. Look at dmesg"),
    "ESTALE": (3, "/a/b: the share that it is on has gone, or has another file there now. Mount the share again"),
    "EMLINK": (3, "/a/b: its folder cannot hold more"),
    "ELOOP": (2, "/a/b: is a link that leads to itself"),
    "ENAMETOOLONG": (2, "/a/b...: this name is too long"),
    "ENFILE": (2, "/a/b: the whole system has as many files open as it can"),
    "EMFILE": (2, "/a/b: "),
    "EISDIR": (2, "/a/b: is a folder, where a file is wanted"),
    "ENOTDIR": (2, "/a/b: a part of this path is a file"),
    "ENOENT": (2, "/a/b: there is no such file."),
    "ENOMEM": (4, "Out of memory: "),
    "EAGAIN": (2, "No further process or thread can be started"),
}


@pytest.mark.parametrize(("name", "code", "words"), [(n, *reported) for n, reported in NUMBERS.items()])
def test_each_refusal_of_the_system_has_words_of_its_own(name, code, words):
    number = getattr(errno, name)
    reported, left = describe_error(OSError(number, os.strerror(number), "/a/b"))
    assert left == code and reported.startswith(words) and reported.endswith("."), reported


@pytest.mark.parametrize(
    ("says", "number", "file"),
    [
        ("unable to mmap 40 bytes from file </a/b>: Cannot allocate memory (12)", errno.ENOMEM, "/a/b"),
        (
            "unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)",
            errno.EMFILE,
            "/torch_1",
        ),
        ("unable to write to file </torch_1>: No space left on device (28)", errno.ENOSPC, "/torch_1"),
        ("can't start new thread", errno.EAGAIN, None),
    ],
)
def test_what_torch_reports_of_a_refusal_is_understood(says, number, file):
    result = errors.find_system_error(RuntimeError(says))
    assert (result.errno, result.filename) == (number, file)


@pytest.mark.parametrize(
    "says", ["shape '[2]' is invalid for input of size 3", "CUDA error: can't allocate memory", "a: b (12)", ""]
)
def test_a_bug_is_none_of_that(says):
    assert errors.find_system_error(RuntimeError(says)) is None and describe_error(RuntimeError(says)) is None


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "memory ran out"),
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers",
            "/dev/shm is full (",
        ),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "memory ran out"),
        (
            "DataLoader worker (pid 7) is killed by signal: Segmentation fault. ",
            "ended by a signal (Segmentation fault)",
        ),
    ],
)
def test_a_process_that_prepares_batches_and_dies_is_reported(says, words):
    reported, code = describe_error(RuntimeError(says))
    assert code == 5 and words in reported and "NUM_WORKERS=0" in reported


def test_a_disk_without_inodes_is_not_called_full(tmp_path):
    """A file system of 5 inodes where one may be mounted, else what the system would say of one."""
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=5", "tmpfs", tmp_path], capture_output=True
    ).returncode
    if made:
        pytest.skip("no file system may be mounted here")
    try:
        with pytest.raises(OSError) as refused:
            for number in range(9):
                (tmp_path / f"{number}").write_text("x")
        reported, code = describe_os_error(refused.value)
        assert code == 3 and "its inodes are used up, though" in reported and "df -i" in reported
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize(
    ("free", "needed", "words"),
    [
        (300_000, 0, "300 kB are free, 1.0 MB are needed"),
        (5, 10, "5 bytes are free, 1.0 MB are needed"),
        (1_060_000, 20_000, "1,060,000 bytes are free, 1,068,976 are needed"),
        (10**9, 10**12, "1.00 GB are free, 1,020.00 GB are needed"),
    ],
)
def test_what_is_free_and_what_is_needed_are_different_numbers(tmp_path, monkeypatch, free, needed, words):
    import shutil

    from rwkv_peft.common import atomic_io

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
    with pytest.raises(errors.UserError, match=words):
        atomic_io.check_disk_space(tmp_path, needed)


def test_what_the_system_refused_is_reported_where_another_error_hides_it():
    """As Lightning's does, while it tidies up; an error that was fixed and says nothing of resources hides nothing."""

    def raised(first: Exception, then: Exception) -> Exception:
        try:
            try:
                raise first
            finally:
                raise then
        except type(then) as error:
            return error

    full = OSError(errno.ENOSPC, "No space left on device", "/a/b")
    assert describe_error(raised(full, RuntimeError("Please call iter first")))[1] == 3
    assert describe_error(raised(MemoryError(), RuntimeError("x")))[1] == 4
    assert describe_error(raised(FileNotFoundError(errno.ENOENT, "no", "/a"), RuntimeError("a bug"))) is None
    assert errors.describe_nonfatal(raised(full, errors.UserError("It is so."))) == "It is so."
