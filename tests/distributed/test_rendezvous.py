"""Several machines: each process knows its place, all have the same before a step is taken, and the result is that of one."""

import os
import shutil
import subprocess
import time
from typing import NamedTuple

import pytest
from helpers import tiny
from helpers.kit import Kit
from helpers.nodes import free_port, parties
from helpers.resuming import records, same
from helpers.settings import problems
from helpers.training import FAST, config

from rwkv_peft.checkpoint import train_state
from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.distributed import launch, rendezvous

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "9", "LOCAL_RANK": "1", "GROUP_RANK": "1"}
TORCHRUN |= {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
SRUN = {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "3", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
SRUN |= {"SLURM_NODEID": "2", "SLURM_NTASKS": "6"}


@pytest.mark.parametrize(
    ("environment", "settings", "found"),
    [
        ({}, {}, launch.ProcessInfo(0, 0, 0, 1)),
        ({"LOCAL_RANK": "3"}, {"GPU_COUNT": "4"}, launch.ProcessInfo(3, 3, 0, 1, "", True)),
        ({}, {"GPU_COUNT": "4", "NNODES": "2", "NODE_RANK": "1"}, launch.ProcessInfo(4, 0, 1, 2)),
        (
            {"LOCAL_RANK": "3"},
            {"GPU_COUNT": "4", "NNODES": "2", "NODE_RANK": "1"},
            launch.ProcessInfo(7, 3, 1, 2, "", True),
        ),
        (TORCHRUN, {"GPU_COUNT": "8", "NNODES": "2"}, launch.ProcessInfo(9, 1, 1, 2, "torchrun")),
        (SRUN, {"GPU_COUNT": "2", "NNODES": "3"}, launch.ProcessInfo(5, 1, 2, 3, "srun")),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, {}, launch.ProcessInfo(0, 0, 0, 1)),  # sbatch alone starts one
    ],
)
def test_a_process_knows_its_place(environment, settings, found):
    assert launch.detect_launcher(config(**settings), environment) == found


@pytest.mark.parametrize(("environment", "starter"), [(TORCHRUN, "torchrun"), (SRUN, "srun")])
def test_a_script_that_says_something_else_than_who_started_it_is_refused(environment, starter):
    with pytest.raises(SettingErrors) as error:
        launch.detect_launcher(config(), environment)
    assert [p.name for p in error.value.problems] == ["GPU_COUNT", "NNODES"]
    assert f"is 1, but {starter} has started" in error.value.problems[0].message


def test_nodes_are_counted_from_0():
    assert "must be less than NNODES=2" in problems(NNODES="2", NODE_RANK="2")["NODE_RANK"]


def test_a_machine_alone_takes_any_free_port_and_several_take_one_they_know():
    environment = {"MASTER_ADDR": "", "MASTER_PORT": "auto"}
    launch.set_master_address(config(), launch.ProcessInfo(0, 0, 0, 1), environment)
    assert environment == {}
    two = {"NNODES": "2", "MASTER_ADDR": "10.0.0.1"}
    environment = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "auto"}
    launch.set_master_address(config(**two), launch.ProcessInfo(0, 0, 0, 2), environment)
    assert environment == {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def test_nodes_that_have_the_same_begin_and_hear_what_the_first_has_decided():
    def decide(met):
        met.publish("found", ["run", "step-000003"])
        met.compare({"LR_INIT": 1e-4})
        return "begun"

    def hear(met):
        heard = met.wait_for("found")
        met.compare({"LR_INIT": 1e-4})
        return heard

    assert parties(decide, hear, hear) == ["begun", ["run", "step-000003"], ["run", "step-000003"]]


def test_what_differs_is_told_on_all_nodes():
    mine, other = {"LR_INIT": 1e-4, "DATA_PATH": "a", "SEED": 1}, {"LR_INIT": 2e-4, "DATA_PATH": "b", "SEED": 1}
    words = "DATA_PATH: is b on node 1, and a on node 0; all need the same"
    said = parties(lambda met: met.compare(mine), lambda met: met.compare(other), lambda met: met.compare(mine))
    assert all(words in one and "LR_INIT: is 0.0002 on node 1, and 0.0001 on node 0" in one for one in said)
    assert not any("SEED" in one for one in said)


def test_a_node_that_cannot_begin_tells_the_others():
    def fails(_met):
        raise UserError("There is no such file.")

    said = parties(lambda met: met.wait_for("facts/1", 1), fails)
    assert said == ["Another process could not begin: There is no such file.", "There is no such file."]


def test_a_first_node_that_cannot_be_reached_and_a_number_given_twice_are_told(monkeypatch):
    monkeypatch.setattr(rendezvous, "REACH", 1.0)
    with (
        pytest.raises(
            SettingErrors, match="MASTER_ADDR: nobody answers at 127.0.0.1, port .* Is ./training.sh running on node 0"
        ),
        rendezvous.open_rendezvous(launch.ProcessInfo(1, 0, 1, 2), 2, "127.0.0.1", free_port(), print),
    ):
        pass
    port, first = free_port(), launch.ProcessInfo(0, 0, 0, 2)
    with (
        rendezvous.open_rendezvous(first, 2, "127.0.0.1", port, print),
        pytest.raises(SettingErrors, match="MASTER_PORT: is in use on this machine"),
        rendezvous.open_rendezvous(first, 2, "127.0.0.1", port, print),
    ):
        pass


class Wire(NamedTuple):
    """How node N is entered (a command in front of others), and the settings that say where it is."""

    enter: list[str]
    settings: dict[str, str]


@pytest.fixture
def wires():
    """Two machines with a cable between them: network namespaces, where they may be made; else loopback."""
    names = [f"rwkv{os.getpid()}-{number}" for number in range(2)]
    address = "10.213.7.{}"
    steps = [f"netns add {name}" for name in names]
    steps += ["link add left netns {} type veth peer right netns {}".format(*names)]
    for number, (name, end) in enumerate(zip(names, ("left", "right"), strict=True), 1):
        steps += [f"-n {name} addr add {address.format(number)}/24 dev {end}"]
        steps += [f"-n {name} link set {one} up" for one in (end, "lo")]
    made = shutil.which("ip") and all(
        subprocess.run(["ip", *step.split()], capture_output=True).returncode == 0 for step in steps
    )
    where = {"NNODES": "2", "MASTER_ADDR": address.format(1) if made else "127.0.0.1"}
    where |= {"MASTER_PORT": "29500" if made else str(free_port())}
    yield [
        Wire(["ip", "netns", "exec", name], where | {"GLOO_SOCKET_IFNAME": end}) if made else Wire([], where)
        for name, end in zip(names, ("left", "right"), strict=True)
    ]
    for name in names if shutil.which("ip") else ():
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def started(kits: list[Kit], wires: list[Wire], script: str) -> list[subprocess.Popen]:
    """A script of each kit, on the node of its number."""
    return [
        subprocess.Popen(
            [*wire.enter, str(kit.root / script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for kit, wire in zip(kits, wires, strict=True)
    ]  # fmt: skip


@pytest.mark.slow
def test_two_nodes_are_two_processes_of_one_machine_and_go_on(tmp_path, wires):
    """Each in a folder of its own; the second sees what the first has written only where it is put there, and that may be older
    or newer than what counts. One machine by ddp, two by fsdp."""
    kits = [Kit(tmp_path / f"node {number}") for number in range(2)]
    common = FAST | {"EPOCH_COUNT": "2", "MICRO_BSZ": "1", "SAVE_STEPS": "1", "KEEP_LAST": "99", "lora_dropout": "0.1"}
    common |= {"VAL_DATA": "chat", "VAL_STEPS": "1", "SAMPLE_PROMPTS": "hi", "SAMPLE_STEPS": "1", "SAMPLE_TOKENS": "5"}
    for number, kit in enumerate(kits):
        tiny.save_model(kit.root / "model" / "tiny.pth")
        kit.data("chat.jsonl", *tiny.CHATS)
        kit.run("make_tokenize.sh", "chat.jsonl")
        of_node = wires[number].settings | {"NODE_RANK": str(number)}
        kit.set(to="two.sh", **common | of_node | {"RUN_NAME": "two", "STRATEGY": "fsdp"})
    kits[0].set(to="one.sh", **common | {"RUN_NAME": "one", "GPU_COUNT": "2"})
    kits[0].run("one.sh")

    def both():
        ends = started(kits, wires, "two.sh")
        said = [end.communicate(timeout=180)[0] for end in ends]
        return [end.returncode for end in ends], said

    def equal():
        same(kits[0].root, "one", "two", tuple(records(kits[0].root, name) for name in ("one", "two")))

    codes, said = both()
    assert codes == [0, 0], said
    assert "node 1 of 2 trains with node 0" in said[1] and "x NNODES=2" in said[0] and "saved" not in said[1]
    equal()
    output = kits[0].root / "output" / "two"
    for later in train_state.state_names(output)[1:]:
        shutil.rmtree(output / "state" / later)
    codes, said = both()
    assert codes == [2, 2] and all("output/ has to be the same folder on all nodes" in one for one in said)
    shutil.copytree(output, kits[1].root / "output" / "two")
    codes, said = both()
    assert codes == [0, 0] and "goes on   output/two at step 1 of 4" in said[0], said
    equal()
    kits[1].set(script="two.sh", LR_INIT="3e-2", RUN_NAME="other")
    kits[0].set(script="two.sh", RUN_NAME="other")
    codes, said = both()
    assert codes == [2, 2] and all("LR_INIT=" in one and "is 0.03 on node 1, and 0.01 on node 0" in one for one in said)
    # the same two, started by torchrun, and as srun would start them
    kits[0].set(to="three.sh", **common | {"RUN_NAME": "two", "GPU_COUNT": "2"})
    shutil.rmtree(output)
    done = subprocess.run(
        [kits[0].root / ".venv/bin/python", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", "./three.sh"],
        cwd=kits[0].root,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    equal()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model/tiny.pth", "data/chat.bin"])
def test_a_file_that_changes_on_one_node_stops_both_and_is_named(tmp_path, wires, name):
    kits = [Kit(tmp_path / f"node {number}") for number in range(2)]
    for number, kit in enumerate(kits):
        tiny.save_model(kit.root / "model" / "tiny.pth")
        kit.data("chat.jsonl", *tiny.CHATS)
        kit.run("make_tokenize.sh", "chat.jsonl")
        of_node = wires[number].settings | {"NODE_RANK": str(number)}
        kit.set(**FAST | of_node | {"EPOCH_COUNT": "9000", "EPOCH_SAVE": "9000", "SAVE_STEPS": "5", "KEEP_LAST": "3"})
    ends = started(kits, wires, "training.sh")
    state = kits[0].root / "output/run/state"
    deadline = time.monotonic() + 120
    while (
        len(list(state.glob("step-*"))) < 2 and all(end.poll() is None for end in ends) and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    with open(kits[1].root / name, "r+b") as file:
        file.write(b"other")
    when = time.time_ns()
    deadline = time.monotonic() + 60
    while any(end.poll() is None for end in ends) and time.monotonic() < deadline:
        time.sleep(0.05)
    for end in ends:
        end.kill()
    said = [end.communicate()[0] for end in ends]
    assert [end.returncode for end in ends] == [2, 2], said
    assert all(name in one.splitlines()[-1] and "Traceback" not in one for one in said), said
    assert not [path for path in state.glob("step-*") if path.stat().st_mtime_ns > when], said
