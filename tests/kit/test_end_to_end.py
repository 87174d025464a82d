"""The scripts, used as a user does: from another folder, with a space in every path, copied, stopped, run twice."""

import json
import os
import signal
import subprocess
import time

import pytest
from helpers import tiny

QUICK = {
    "MODEL_PATH": "tiny.pth",
    "PRECISION": "fp32",
    "EPOCH_COUNT": "2",
    "MICRO_BSZ": "4",
    "lora_r": "4",
    "lora_alpha": "8",
}


@pytest.mark.slow
def test_tokenize_train_merge_chat_by_script_with_spaces_everywhere(kit):
    tiny.save_model(kit.root / "model" / "my tiny.pth")
    kit.data("my chat.jsonl", *tiny.CHATS)
    made = kit.run("make_tokenize.sh", "my chat.jsonl", "4").stdout
    for label in (
        "### append_eof = True", "### max_length = ", "### max_length_power_of_two = ", "### data_line_count = 32",
        "### The first ten factors of the five numbers nearby (±5):", 'DATA_PATH="my chat"',
        "32: MICRO_BSZ=[1, 2, 4, 8, 16, 32] EPOCH_STEPS=[32, 16, 8, 4, 2, 1]",
    ):  # fmt: skip
        assert label in made
    settings = QUICK | {
        "MODEL_PATH": "my tiny.pth",
        "DATA_PATH": "my chat",
        "RUN_NAME": "a run",
        "LR_INIT": "3e-2",
        "WARMUP_STEPS": "0",
    }
    copy = kit.set(to="experiments/first try/my training.sh", **settings)
    dry = kit.run(copy, "--dry-run").stdout
    assert (
        "model/my tiny.pth: RWKV-7 (x070), 2 layers" in dry and "Assistant:[[ " in dry and "nothing was trained" in dry
    )
    assert not any((kit.root / "output").iterdir())
    said = kit.run(copy).stdout
    assert "saved output/a run/rwkv-1.pth (epoch 2 of 2)" in said and "tokens/s" in said
    again = kit.run(copy, ok=False)
    assert (
        "RUN_NAME=a run  output/a run is finished (8 steps, 2 epochs). A larger EPOCH_COUNT trains it further"
        in again.stderr
    )
    merged = kit.run("merge.sh", "1").stdout
    assert "wrote     merge/my tiny-a run-1.pth" in merged and "answers as base + adapter" in merged
    (kit.root / "output/empty").mkdir()
    (kit.root / "output/latest").unlink()
    (kit.root / "output/latest").symlink_to("empty")  # a run that was ended before it had anything to save
    assert "run       output/a run/rwkv-1.pth" in kit.run("merge.sh").stdout
    assert "RUN=no such: there is no such run" in kit.run("merge.sh", "1", ok=False, RUN="no such").stderr
    assert "has no rwkv-7.pth; it has the epochs 0, 1" in kit.run("merge.sh", "7", ok=False, RUN="a run").stderr
    ask = ["--prompt", "Sea?", "--max-tokens", "8", "--temperature", "0"]
    kit.set("chat.sh", PRECISION="fp32")  # in bf16 the two differ by roundings, and so may their words
    tuned = kit.run("chat.sh", "--adapter", "output/a run/rwkv-1.pth", *ask).stdout
    wrong = kit.run("chat.sh", "--model", "nothing.pth", "--adapter", "output/a run/rwkv-1.pth", *ask, ok=False)
    assert "model/nothing.pth: there is no such file" in wrong.stderr
    assert kit.run("chat.sh", "--adapter", "a run", *ask).stdout == tuned
    for mistaken, words in (
        (["--model", "output/a run/rwkv-1.pth"], "is an adapter (what a run learnt), not a model"),
        (["--adapter", "merge/my tiny-a run-1.pth"], "is a whole model, not an adapter. Use it with --model"),
        (["--adapter", "model/my tiny.pth"], "is a whole model, not an adapter. Use it with --model"),
        (
            ["--model", "my tinny.pth"],
            "there is no such model; did you mean my tiny.pth? In model/ and merge/ there is:",
        ),
    ):
        assert words in kit.run("chat.sh", *mistaken, *ask, ok=False).stderr
    whole = kit.run("chat.sh", "--model", "my tiny-a run-1.pth", *ask).stdout
    base = kit.run("chat.sh", "--model", "my tiny.pth", *ask).stdout
    assert tuned == whole != base
    sampled = ["--prompt", "Sea?", "--max-tokens", "8", "--temperature", "1", "--top-p", "1", "--model", "my tiny.pth"]
    assert kit.run("chat.sh", *sampled, "--seed", "1").stdout == kit.run("chat.sh", *sampled, "--seed", "1").stdout


@pytest.mark.slow
def test_a_v6_state_by_script_trained_on_a_compressed_base_in_chunks_gone_on_from_exported_and_talked_to(kit):
    tiny.save_model(kit.root / "model" / "my v6.pth", shape=tiny.geometry(version="x060"))
    kit.data("my chat.jsonl", *tiny.CHATS)
    kit.run("make_tokenize.sh", "my chat.jsonl")
    settings = QUICK | {
        "MODEL_PATH": "my v6.pth", "DATA_PATH": "my chat", "RUN_NAME": "a state", "FINETUNE_MODE": "state_tuning",
        "LR_INIT": "1", "LR_FINAL": "1e-2", "WARMUP_STEPS": "0", "QUANT": "4bit", "TRAIN_TYPE": "infctx", "CHUNK_CTX": "16",
        "EPOCH_COUNT": "4",
    }  # fmt: skip
    copy = kit.set(to="state training.sh", **settings)
    said = kit.run(copy).stdout
    assert "RWKV-6 (x060)" in said and "state tuning: 1,024 trained values" in said
    assert "frozen weights of att,ffn in nf4 (4bit is nf4); merge.sh folds into the original ones" in said
    assert "infctx: 16 tokens at once, states are carried on, gradients end at a chunk's border" in said
    assert "next: ./merge.sh 'a state' 3" in said
    records = [json.loads(line) for line in (kit.root / "output/a state/loss.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] < records[0]["loss"] - 0.05
    again = kit.set(to="again.sh", **(settings | {"RUN_NAME": "on", "state_load": "a state", "EPOCH_COUNT": "1"}))
    assert "starts from output/a state/rwkv-3.pth (what it has learnt" in kit.run(again).stdout
    more = [json.loads(line) for line in (kit.root / "output/on/loss.jsonl").read_text().splitlines()]
    assert more[0]["loss"] < records[0]["loss"] - 0.05
    merged = kit.run("merge.sh", "--export", "safetensors", RUN="a state").stdout
    assert "read back: 0 changed" in merged and "wrote     merge/my v6-a state-3.st" in merged
    alone = kit.run("merge.sh", "a state", "--export", "state").stdout
    assert "wrote     merge/my v6-a state-3-alone.pth" in alone and "merge/my v6-a state-3-alone.state" in alone
    ask = ["--prompt", "Sea?", "--max-tokens", "6", "--temperature", "0"]
    answers = {
        kit.run("chat.sh", *words, *ask).stdout
        for words in (
            ["--adapter", "a state"],
            ["--model", "my v6-a state-3.pth"],
            ["--model", "my v6.pth", "--adapter", "merge/my v6-a state-3-alone.pth"],
        )
    }
    assert len(answers) == 1
    help_text = kit.run("merge.sh", "--help").stdout
    assert all(word in help_text for word in ("safetensors", "gguf", "peft", "state", "rwkvcpp", "--average"))


@pytest.mark.slow
def test_a_run_without_a_name_gets_one_of_its_own(shared_kit):
    """Also when two start in the same second: both are started at once here, from a shell like a notebook's."""
    script = str(shared_kit.root / "training.sh")
    env = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "module://matplotlib_inline", "LOCAL_RANK": "x"}
    both = [subprocess.Popen([script], stdout=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    names = [p.communicate(timeout=120)[0].split("output    output/")[1].split("/")[0] for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert names[0] != names[1] and all(name.startswith("chat-lora-2") for name in names)
    for name in names:
        steps = [
            json.loads(line)["step"]
            for line in (shared_kit.root / f"output/{name}/loss.jsonl").read_text().splitlines()
        ]
        assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_signal_saves_and_says_how_to_go_on(kit, number, code):
    tiny.save_model(kit.root / "model" / "tiny.pth")
    kit.data("chat.jsonl", *tiny.CHATS)
    kit.run("make_tokenize.sh", "chat.jsonl")
    settings = {"DATA_PATH": "chat", "RUN_NAME": "r", "EPOCH_COUNT": "100000", "EPOCH_SAVE": "100000", "MICRO_BSZ": "2"}
    kit.set(**(QUICK | settings))
    process = subprocess.Popen(
        [str(kit.root / "training.sh")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    log = kit.root / "output/r/loss.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.1)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    [saved] = (kit.root / "output/r").glob("rwkv-*.pth")
    assert f"saved (output/r/{saved.name}). Run the script again, as it is, and it goes on" in err
    sidecar = json.loads(saved.with_suffix(".json").read_text())
    whole = sidecar["step"] % 2 == 0  # an epoch has two steps
    assert sidecar["epoch_finished"] is whole and sidecar["step"] == log.read_text().count("\n")
    kit.set(to="on.sh", lora_load=f"output/r/{saved.name}", RUN_NAME="on", EPOCH_COUNT="1")
    assert f"starts from output/r/{saved.name}" in kit.run("on.sh").stdout
    assert ("(stopped early)" in kit.run("merge.sh", RUN="r").stdout) is not whole
    steps = sidecar["step"] + 6  # and it continues
    kit.set(EPOCH_COUNT=steps, EPOCH_STEPS="1", RUN_NAME="r")
    refused = kit.run("training.sh", ok=False).stderr
    assert "EPOCH_STEPS" in refused and "was begun with 2, which would be 1 now: set it back" in refused
    kit.set(EPOCH_COUNT=steps, EPOCH_STEPS="auto")
    assert f"goes on   output/r at step {sidecar['step']} of" in kit.run("training.sh").stdout
    numbers = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= steps


def started(kit, settings, **options) -> subprocess.Popen:
    """training.sh with these settings, as soon as it has taken some steps."""
    tiny.save_model(kit.root / "model" / "tiny.pth")
    kit.data("chat.jsonl", *tiny.CHATS)
    kit.run("make_tokenize.sh", "chat.jsonl")
    kit.set(**(QUICK | {"DATA_PATH": "chat", "RUN_NAME": "r", "EPOCH_SAVE": "100000"} | settings))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([str(kit.root / "training.sh")], env=env, start_new_session=True, **options)
    log, deadline = kit.root / "output/r/loss.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.1)
    return process


@pytest.mark.slow
def test_a_terminal_that_is_closed_ends_the_run_with_its_work_saved(kit):
    import pty

    ours, theirs = pty.openpty()
    process = started(kit, {"EPOCH_COUNT": "100000"}, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.close(ours)
    os.killpg(process.pid, signal.SIGHUP)
    os.killpg(process.pid, signal.SIGHUP)  # the kernel says it, and the shell does
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert len(list((kit.root / "output/r").glob("rwkv-*.pth"))) == 1


@pytest.mark.slow
def test_a_reader_that_leaves_does_not_end_the_run_and_nohup_is_respected(kit):
    process = started(
        kit, {"EPOCH_COUNT": "40"}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    process.stdout.close()
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(timeout=100) == 0
    assert (kit.root / "output/r/rwkv-39.pth").is_file()


def test_the_kit_beside_the_script_is_used_not_one_in_the_current_folder(kit, tmp_path):
    """Two copies of the project on one machine must not mix."""
    (tmp_path / "rwkv_peft").mkdir()
    (tmp_path / "rwkv_peft/__init__.py").write_text("raise SystemExit('the wrong kit')")
    done = subprocess.run([kit.root / "training.sh", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "the wrong kit" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "split", "settings"),
    [
        (
            "3",
            ("4", "1"),
            {"FINETUNE_MODE": "pissa", "pissa_r": "4", "QUANT": "nf4", "TRAIN_TYPE": "infctx", "CHUNK_CTX": "16"},
        ),
        ("1", ("3", "2"), {}),
    ],
    ids=["even, in chunks on a compressed base", "uneven"],
)
def test_two_ranks_of_4_are_one_of_8(kit, rows, split, settings):
    """Law 5 across processes, on CPU with gloo; also where the last step leaves a rank without rows."""
    import torch

    from rwkv_peft.checkpoint import pth

    tiny.save_model(kit.root / "model" / "tiny.pth")
    kit.data("chat.jsonl", *tiny.CHATS)
    kit.run("make_tokenize.sh", "chat.jsonl", rows)
    common = (
        QUICK
        | {
            "DATA_PATH": "chat",
            "lora_dropout": "0",
            "DATALOAD": "only",
            "WARMUP_STEPS": "0",
            "LR_INIT": "1e-2",
        }
        | settings
    )
    micro, mini = split
    whole = str(2 * int(micro) * int(mini))
    kit.set(to="one.sh", **(common | {"RUN_NAME": "one", "MICRO_BSZ": whole}))
    kit.set(to="two.sh", **(common | {"RUN_NAME": "two", "MICRO_BSZ": micro, "MINI_BSZ": mini, "GPU_COUNT": "2"}))
    kit.run("one.sh")
    said = kit.run("two.sh")
    assert said.stdout.count("done in") == 1  # only one process speaks
    one, two = (pth.load(kit.root / f"output/{name}/rwkv-1.pth") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    records = [
        [json.loads(line) for line in (kit.root / f"output/{name}/loss.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for a, b in zip(*records, strict=True):
        assert a["targets"] == b["targets"] and a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
