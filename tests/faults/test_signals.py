"""F6: a signal to the training or to all that belongs to it ends it with its work saved, in time, and no one is left."""

import os
import signal
import subprocess
import time

import pytest
from helpers import tiny
from helpers.kit import EVERYTHING
from helpers.training import FAST

from rwkv_peft.checkpoint import train_state

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
ENOUGH = 30  # seconds, and a tiny state takes none


def members(group: int) -> list[str]:
    """Commands of the processes of a group."""
    return subprocess.run(["pgrep", "-a", "-g", str(group)], capture_output=True, text=True).stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"] if EVERYTHING else ["2"])
@pytest.mark.parametrize("whom", ["leader", "group"])
@pytest.mark.parametrize("number", SIGNALS if EVERYTHING else [signal.SIGTERM])
def test_a_signal_saves_and_leaves_no_one_behind(kit, number, whom, workers):
    tiny.save_model(kit.root / "model" / "tiny.pth")
    kit.data("chat.jsonl", *tiny.CHATS)
    kit.run("make_tokenize.sh", "chat.jsonl")
    kit.set(
        **FAST
        | {"EPOCH_COUNT": "9000", "EPOCH_SAVE": "9000", "MICRO_BSZ": "1", "KEEP_LAST": "2", "NUM_WORKERS": workers}
    )
    process = subprocess.Popen(
        [str(kit.root / "training.sh")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    log = kit.root / "output/run/loss.jsonl"
    deadline = time.monotonic() + 90
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    assert len(members(process.pid)) > int(workers)
    began = time.monotonic()
    (os.killpg if whom == "group" else os.kill)(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == SIGNALS[number] and time.monotonic() - began < ENOUGH
    assert "Stopped; what was learnt so far is saved" in said and "Traceback" not in said
    assert not members(process.pid)
    whole = train_state.latest_valid(kit.root / "output/run", print)
    assert whole and whole.step == log.read_text().count("\n")
