"""F15: a process that has died or is still ends the training, within its time, with its name; no one is left behind."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import tiny
from helpers.kit import EVERYTHING
from helpers.training import FAST

from rwkv_peft.checkpoint import train_state
from rwkv_peft.common.errors import EXIT_PROCESS
from rwkv_peft.distributed import watchdog

STILL = 6  # instead of watchdog.STALLED


@pytest.fixture
def ready(kit):
    """A kit whose runs take hours, with states every few steps; its processes lose patience soon."""
    file = kit.root / "rwkv_peft/distributed/watchdog.py"
    text = file.read_text()
    assert f"STALLED = {watchdog.STALLED} " in text
    file.write_text(text.replace(f"STALLED = {watchdog.STALLED} ", f"STALLED = {STILL} "))
    tiny.save_model(kit.root / "model" / "tiny.pth")
    kit.data("chat.jsonl", *tiny.CHATS)
    kit.run("make_tokenize.sh", "chat.jsonl")
    long = {"EPOCH_COUNT": "9000", "EPOCH_SAVE": "9000", "SAVE_STEPS": "5", "KEEP_LAST": "2", "MICRO_BSZ": "1"}
    kit.set(**FAST | long | {"GPU_COUNT": "2"})
    return kit


def started(kit, in_steps: bool = True) -> tuple[subprocess.Popen, int]:
    """A training in its steps, or while it loads, and the process that it has started."""
    first = subprocess.Popen(
        [str(kit.root / "training.sh")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while True:
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        second = process_1(first.pid)
        if second and (not in_steps or train_state.state_names(kit.root / "output/run")):
            return first, second
        time.sleep(0.1)


def process_1(parent: int) -> int | None:
    """The child that trains; while it loads, a training asks other programs short questions, too."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        try:
            if b"LOCAL_RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
        except OSError:
            pass  # it has answered and is gone
    return None


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"] if EVERYTHING else ["ddp"])
@pytest.mark.parametrize(
    ("which", "how", "code", "words"),
    [
        (1, signal.SIGKILL, EXIT_PROCESS, "process 1 (GPU 1) was killed"),
        (1, signal.SIGSTOP, EXIT_PROCESS, f"process 1 (GPU 1) has not answered for {STILL} seconds"),
        (0, signal.SIGKILL, -signal.SIGKILL, "process 0 (GPU 0) has not answered"),
        (0, signal.SIGSTOP, -signal.SIGKILL, f"process 0 (GPU 0) has not answered for {STILL} seconds"),
    ],
)
def test_a_process_that_is_gone_or_is_still_ends_the_training_with_its_name(ready, which, how, code, words, strategy):
    ready.set(STRATEGY=strategy)
    first, second = started(ready)
    os.kill((first.pid, second)[which], how)
    _, said = first.communicate(timeout=60)
    assert first.returncode == code, said
    assert words in said and "Traceback" not in said
    deadline = time.monotonic() + 10
    while alive(second) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(second)
    whole = train_state.latest_valid(ready.root / "output/run", print)
    assert whole and whole.step >= 5


@pytest.mark.slow
def test_processes_that_were_stopped_together_go_on(ready):
    """Ctrl-Z and fg."""
    first, second = started(ready)
    os.killpg(first.pid, signal.SIGSTOP)
    time.sleep(STILL + 4)
    os.killpg(first.pid, signal.SIGCONT)
    before = (
        len(train_state.state_names(ready.root / "output/run"))
        and train_state.state_names(ready.root / "output/run")[-1]
    )
    deadline = time.monotonic() + 60
    while train_state.state_names(ready.root / "output/run")[-1:] == [before] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert first.poll() is None and train_state.state_names(ready.root / "output/run")[-1] != before
    os.killpg(first.pid, signal.SIGINT)
    said = first.communicate(timeout=60)
    assert first.returncode == 130, said
    assert not alive(second)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, EXIT_PROCESS), (signal.SIGINT, 130)])
def test_before_the_first_step_as_well(ready, how, code):
    """One is killed while it loads; Ctrl-C then. No folder is left of a run that never took a step."""
    first, second = started(ready, in_steps=False)
    time.sleep(1)
    if how == signal.SIGINT:
        os.killpg(first.pid, how)
    else:
        os.kill(second, how)
    _, said = first.communicate(timeout=60)
    assert first.returncode == code and "Traceback" not in said, said
    assert ("process 1 (GPU 1) was killed" in said) == (how == signal.SIGKILL)
    assert not alive(second) and not (ready.root / "output/run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_to_any_process_is_one_to_all(ready, how, code):
    ready.set(STRATEGY="fsdp")
    first, second = started(ready)
    os.kill(second, how)
    said = first.communicate(timeout=60)
    assert first.returncode == code and "Stopped; what was learnt so far is saved" in said[1], said
    assert not alive(second) and train_state.latest_valid(ready.root / "output/run", print)
