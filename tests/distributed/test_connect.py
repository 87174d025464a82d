"""Who else may answer where the nodes of a training meet: each is named within the time limit, and no one waits for ever."""

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest
from helpers.kit import ROOT, few
from helpers.nodes import free_port, parties
from helpers.training import run

from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.distributed import connect, launch, rendezvous

SECOND = launch.ProcessInfo(1, 0, 1, 2)
HTTP = b"HTTP/1.0 400 Bad Request\r\n\r\n"


def greets_and_stops(line: socket.socket) -> None:
    """Answers the greeting of torch's store as it wants, and nothing behind it."""
    asked = b""
    while len(asked) < 10:  # VALIDATE and a number; PING and another one, which it wants back
        asked += line.recv(10 - len(asked))
    line.sendall(asked[6:])


STRANGERS = {
    "silent": (lambda line: None, "it accepts and says nothing"),
    "closes": (lambda line: line.close(), "it closes the connection at once"),
    "resets": (
        lambda line: (line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)), line.close()),
        "it closes the connection at once",
    ),
    "web server": (lambda line: (line.recv(4), line.sendall(HTTP), line.close()), "it says 'HTTP/1.0 400 Bad Request'"),
    "ssh": (lambda line: line.sendall(b"SSH-2.0-x\r\n"), "it says 'SSH-2.0-x'"),
    "tls": (lambda line: line.sendall(b"\x15\x03\x03\x00\x02\x02\x32"), r"it says '\\x15\\x03"),
    "random bytes": (lambda line: line.sendall(bytes(range(256)) * 40), "it says "),
    "a huge length": (lambda line: line.sendall(b"\xff" * 4000), "it says "),
}


@contextlib.contextmanager
def stranger(does, address: str = "127.0.0.1"):
    """A program that listens and does this with whoever comes. Yields the port."""
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as listening:
        lines = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    lines.append(listening.accept()[0])
                    with contextlib.suppress(OSError):
                        does(lines[-1])

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]
        for line in lines:
            line.close()


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(rendezvous, "REACH", 2.0)
    monkeypatch.setattr(connect, "HEARD", 1.0)


def join(port: int, address: str = "127.0.0.1", who: launch.ProcessInfo = SECOND, say=lambda _: None) -> None:
    with rendezvous.open_rendezvous(who, who.nodes, address, port, say):
        pass


@pytest.mark.parametrize("name", few(STRANGERS, ("web server",)))
def test_a_stranger_where_node_0_should_be_is_named(soon, name):
    does, words = STRANGERS[name]
    with stranger(does) as port, pytest.raises(SettingErrors, match="MASTER_PORT: another program than") as result:
        join(port)
    assert f"127.0.0.1, port {port}: {words}".replace("\\\\", "\\") in str(result.value)
    assert "take another number, on all nodes" in str(result.value)


@pytest.mark.slow
def test_a_first_node_that_stops_behind_the_greeting_is_named(soon):
    with stranger(greets_and_stops) as port, pytest.raises(UserError, match="has not answered for 2 seconds"):
        join(port)


@pytest.mark.slow
def test_a_name_of_no_machine_is_named(soon):
    with pytest.raises(
        SettingErrors, match=r"MASTER_ADDR: nobody answers at no.such.machine.invalid.*no machine of this name"
    ):
        join(free_port(), "no.such.machine.invalid")


@pytest.mark.parametrize(
    "name", few(["a..b", "x" * 70, "10.0.0", "a b", "127.0.0.1:29500", "http://127.0.0.1", "*", "::1%"])
)
def test_what_is_no_address_ends_in_words(soon, name):
    with pytest.raises(SettingErrors, match=r"MASTER_(ADDR|PORT): "):
        join(free_port(), name)


def test_a_node_that_waits_says_so_once(soon):
    said = []
    with pytest.raises(SettingErrors, match="nothing listens there"):
        join(port := free_port(), say=said.append)
    assert said == [f"waiting for node 0 at 127.0.0.1, port {port}"]


def test_the_store_of_another_torch_program_is_not_taken_for_node_0(soon):
    store = connect._connect("127.0.0.1", port := free_port(), 5, True)
    with pytest.raises(
        SettingErrors, match=r"MASTER_PORT: is used by another training at 127.0.0.1, port .*start them again"
    ):
        join(port)
    del store


@pytest.mark.slow
def test_a_node_0_whose_address_is_another_machines_is_reported(soon):
    port = free_port()
    with pytest.raises(SettingErrors, match="MASTER_ADDR: does not lead to this machine"):
        join(port, "no.such.machine.invalid", launch.ProcessInfo(0, 0, 0, 2))


def test_a_node_0_whose_address_leads_to_another_node_0_is_reported(soon, monkeypatch):
    """Another address of loopback stands for the other machine: only there does the other store listen."""
    other = connect._connect("127.0.0.1", there := free_port(), 5, True)
    other.set(connect.TOKEN, "another")
    real_connect = connect._connect

    def routed(address, port, limit, first=False):
        return real_connect(address, port if first else there, limit, first)

    monkeypatch.setattr(connect, "_connect", routed)
    with pytest.raises(SettingErrors, match="MASTER_ADDR: .* node 0 of another training answers at 127.0.0.1"):
        join(free_port(), who=launch.ProcessInfo(0, 0, 0, 2))


def test_a_port_that_another_program_has_is_reported_on_node_0(soon):
    with (
        stranger(lambda line: None, "0.0.0.0") as port,
        pytest.raises(SettingErrors, match="MASTER_PORT: is in use on this"),
    ):
        join(port, who=launch.ProcessInfo(0, 0, 0, 2))


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_nodes_meet_over_ipv6(monkeypatch):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on loopback")
    does = [lambda met: met.publish("x", 7), lambda met: met.wait_for("x")]
    assert parties(*does, address="::1") == [None, 7]


def test_strangers_at_the_door_of_node_0_do_not_disturb_the_meeting():
    """As the scanners of a network do: they speak another language, and one of them claims a message of 4 GB."""
    come = threading.Event()

    def knock(port: int) -> None:
        for words in (b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"\xff" * 64, b"", bytes(range(256))):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as line:
                line.sendall(words)
        come.set()

    ports = []

    def first(met):
        knock(ports[0])
        met.publish("x", 7)
        return met.wait_for("y", 1)

    def second(met):
        assert come.wait(30)
        met.publish("y", met.wait_for("x"))

    assert parties(first, second, ports=ports) == [7, None]


def test_a_node_of_a_training_with_more_nodes_is_reported_and_the_others_begin():
    def waits(met):
        met.publish("x", 1)
        return met.wait_for("x")

    def late(where, port):
        time.sleep(1)
        with pytest.raises(SettingErrors, match="NNODES: makes 3 nodes here, and 2 on node 0"):
            join(port, who=launch.ProcessInfo(2, 0, 2, 3))

    ports = []
    said = parties(lambda met: (late(None, ports[0]), waits(met))[1], waits, ports=ports)
    assert said == [1, 1]


def test_nodes_of_runs_with_other_names_are_reported_and_one_without_a_name_is_not():
    facts = [{"RUN_NAME": name} for name in ("a", "", "b")]
    said = parties(*[lambda met, mine=mine: met.compare(mine) for mine in facts])
    assert all("RUN_NAME: is b on node 2, and a on node 0" in one and "node 1" not in one for one in said)


def test_a_node_that_is_stopped_by_hand_reports_the_others():
    def stopped(_met):
        raise KeyboardInterrupt

    said = parties(lambda met: met.wait_for("x", 1), stopped, also=KeyboardInterrupt)
    assert said[0] == "Another process could not begin: it was stopped by Ctrl-C"


@pytest.mark.slow
def test_a_training_whose_node_0_is_a_silent_stranger_ends_in_words_and_leaves_no_one():
    """The whole command, in a process of its own, which ends although a thread of torch's still waits."""
    code = (
        "import sys\nsys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests']\nfrom helpers.training import config\n"
        "from rwkv_peft.cli import train\nfrom rwkv_peft.common.errors import handle_errors\nfrom "
        "rwkv_peft.distributed import connect, rendezvous\n"
        "rendezvous.REACH, connect.HEARD = 2.0, 1.0\n"
        "with handle_errors():\n    train.command(config(NNODES='2', NODE_RANK='1', MASTER_ADDR='127.0.0.1', "
        "MASTER_PORT='1'), [])\n"
    )
    with stranger(lambda line: None) as port:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        done = subprocess.run(
            [sys.executable, "-c", code.replace("'1'), [])", f"'{port}'), [])"), str(ROOT)],
            capture_output=True, text=True, timeout=60, env=os.environ | {"OMP_NUM_THREADS": "1"} | where,
        )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("MASTER_PORT: another program") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_a_silent_stranger_that_speaks_as_the_command_ends_does_not_change_its_exit_code(tmp_path):
    """torch aborts where its call returns while Python ends."""
    code = (
        "import os, sys, time\nsys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests']\nfrom helpers.training import FAST\n"
        "from helpers.kit import ROOT\nfrom helpers.scripts import shell_values\nfrom rwkv_peft.cli import train\n"
        "from rwkv_peft.distributed import connect, rendezvous\nrendezvous.REACH, connect.HEARD = 2.0, 1.0\n"
        "os.environ.update(shell_values(ROOT / 'training.sh') | FAST | {'NNODES': '2', 'NODE_RANK': '1'} | "
        "{'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': sys.argv[2]})\ntrain.main([str(ROOT / 'training.sh')])\n"
    )

    def drip(line):
        with contextlib.suppress(OSError):
            while True:
                line.sendall(b"\0")
                time.sleep(0.3)

    with stranger(drip) as port:
        done = subprocess.run(
            [sys.executable, "-c", code, str(ROOT), str(port)], capture_output=True, text=True, timeout=60, cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert done.returncode == 2 and "another program" in done.stderr and "terminate" not in done.stderr, done.stderr


def test_processes_that_do_not_find_one_another_to_train_end_in_words(ready, monkeypatch, capsys):
    import pytorch_lightning as pl
    import torch

    def never_met(*_):
        raise torch.distributed.DistStoreError(
            "Timed out after 1801 seconds waiting for clients. 1/2 clients joined.\nat frame"
        )

    monkeypatch.setattr(pl.Trainer, "fit", never_met)
    with pytest.raises(SystemExit) as left:
        run(ready, "one")
    said = capsys.readouterr().err
    assert (
        left.value.code == 5
        and "cannot reach one another (Timed out after 1801 seconds" in said
        and "frame" not in said
    )
