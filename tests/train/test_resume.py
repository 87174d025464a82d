"""Law 6: a run that was stopped at any step, or killed, and continues is one that was never stopped, to the last bit."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
from helpers import tiny
from helpers.kit import EVERYTHING, few
from helpers.resuming import BASE, Killed, interrupted, records, same, saved
from helpers.training import config, run

from rwkv_peft.checkpoint import pth, run_dir, train_state
from rwkv_peft.cli import train
from rwkv_peft.common.errors import SettingErrors, UserError

CASES = {
    "lora": {},
    "accumulated, and a short last step": {"MICRO_BSZ": "1", "MINI_BSZ": "3", "EPOCH_STEPS": "8"},
    "bucket": {"DATALOAD": "bucket", "MICRO_BSZ": "auto", "TOKEN_BUDGET": "128"},
    "windows": {"DATALOAD": "get", "CTX_LEN": "24"},
    "workers": {"NUM_WORKERS": "2"},
    "infctx": {"TRAIN_TYPE": "infctx", "CHUNK_CTX": "16", "DATALOAD": "only", "INFCTX_GRAD": "full"},
    "stream": {
        "STREAMING": "1", "MAX_STEPS": "12", "CTX_LEN": "64", "EPOCH_COUNT": "1", "EPOCH_STEPS": "auto",
        "DATA_PATH": "chat.jsonl",
    },
    "pissa on nf4": {"FINETUNE_MODE": "pissa", "pissa_r": "4", "QUANT": "nf4"},
    "dora": {"use_dora": "1"},
    "miss": {"FINETUNE_MODE": "miss", "disha_r": "4"},
    "bat": {"FINETUNE_MODE": "bat", "disha_r": "4"},
    "state": {"FINETUNE_MODE": "state_tuning", "LR_INIT": "1", "state_shifts": "1"},
    "lisa": {"FINETUNE_MODE": "lisa", "lisa_r": "1", "lisa_k": "2", "PRECISION": "bf16"},
    "full": {"FINETUNE_MODE": "full", "LR_INIT": "1e-3"},
    "bf16": {"PRECISION": "bf16"},
    "fp16": {"PRECISION": "fp16"},
    "adamw8bit": {"OPTIM": "adamw8bit", "FINETUNE_MODE": "full", "LR_INIT": "1e-3"},
    "lion8bit": {"OPTIM": "lion8bit", "LR_INIT": "1e-3"},
    "adafactor": {"OPTIM": "adafactor"},
    "lora+ and whole tensors": {"loraplus_lr_ratio": "4", "lora_parts": "att,ffn,ln,time", "EMB_FINETUNE": "1"},
}  # fmt: skip


@pytest.mark.smoke(1)
@pytest.mark.parametrize("case", few(CASES, ["accumulated, and a short last step", "pissa on nf4"]))
def test_a_run_that_was_stopped_and_killed_is_one_that_went_through(ready, monkeypatch, case):
    """Stopped in the first epoch, and killed two steps after a state was saved."""
    settings = BASE | {"SAVE_STEPS": "5"} | CASES[case]
    _, whole = run(ready, "whole", **settings)
    interrupted(monkeypatch, ready, 2, "stopped", **settings)
    interrupted(monkeypatch, ready, min(7, len(whole) - 1), "killed", **settings)
    _, parts = run(ready, "again", **settings)
    same(ready, "whole", "again", (whole, parts))


@pytest.mark.slow
def test_what_was_saved_in_the_middle_of_an_epoch_goes_when_the_epoch_has_ended(ready, monkeypatch, capsys):
    """It is written where a run is stopped, and would be no epoch's checkpoint later."""
    settings = BASE | {"EPOCH_SAVE": "9"}
    _, whole = run(ready, "whole", **settings)
    interrupted(monkeypatch, ready, 6, "stopped", **settings)
    assert (ready / "output/again/rwkv-1.pth").is_file()
    _, parts = run(ready, "again", **settings)
    assert "removed output/again/rwkv-1.pth: of the middle of an epoch" in capsys.readouterr().out
    same(ready, "whole", "again", (whole, parts))
    assert not (ready / "output/again/rwkv-1.json").exists()


@pytest.mark.parametrize("sidecar", ['{"epoch_finished": true}', '{"epoch": 1}', "[]", "{", None])
def test_a_checkpoint_that_is_not_said_to_be_of_the_middle_of_an_epoch_stays(tmp_path, sidecar):
    for name in ("rwkv-1.pth", "rwkv-2.pth", "rwkv-2.json"):
        (tmp_path / name).write_text('{"epoch_finished": false}')
    if sidecar is not None:
        (tmp_path / "rwkv-1.json").write_text(sidecar)
    before = sorted(tmp_path.iterdir())
    assert run_dir.remove_unfinished(tmp_path, 1) is None and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("at", few([3, 4, 11], [4]))
def test_it_may_be_stopped_several_times_and_where_an_epoch_ends(ready, monkeypatch, at):
    settings = BASE | {"SAVE_STEPS": "0"}
    _, whole = run(ready, "whole", **settings)
    interrupted(monkeypatch, ready, at, "stopped", **settings)
    interrupted(monkeypatch, ready, at + 1, "stopped", **settings) if at < 11 else None
    _, parts = run(ready, "again", **settings)
    same(ready, "whole", "again", (whole, parts))


def test_without_a_name_the_newest_run_resumes_if_its_settings_are_the_same(ready, monkeypatch, capsys):
    def folders():
        return sorted(p.name for p in (ready / "output").iterdir() if p.is_dir() and not p.is_symlink())

    settings = BASE | {"DATALOAD": "only"}
    interrupted(monkeypatch, ready, 5, "stopped", "", **settings)
    assert "Run the script again, as it is" in capsys.readouterr().err and len(folders()) == 1
    train.command(config(RUN_NAME="", **settings | {"EPOCH_SAVE": "2"}), ["--dry-run"])
    said = capsys.readouterr().out
    assert "goes on   output/" in said and "at step 5 of 12" in said
    train.command(config(RUN_NAME="", **settings | {"LR_INIT": "2e-3"}), ["--dry-run"])
    said = capsys.readouterr().out
    assert "goes on" not in said.replace("To go on", "") and "had other settings (LR_INIT=" in said
    train.command(config(RUN_NAME="", **settings), ["--dry-run", "--new"])
    assert "goes on   " not in capsys.readouterr().out
    train.command(config(RUN_NAME="", **settings), [])
    assert len(folders()) == 1  # a finished one does not go on: the next is a new run
    capsys.readouterr()
    train.command(config(RUN_NAME="", **settings), ["--dry-run"])
    said = capsys.readouterr().out
    [name] = folders()
    words = f"new run   output/{name} is finished. RUN_NAME={name} and a larger EPOCH_COUNT train that one further"
    assert words in said and "goes on   " not in said
    train.command(config(RUN_NAME="", **settings | {"LR_INIT": "2e-3"}), ["--dry-run"])
    assert "is finished" not in capsys.readouterr().out  # (it is another one that is wanted)
    train.command(config(RUN_NAME="", **settings), [])
    assert len(folders()) == 2


def test_what_may_not_change_is_refused_with_what_it_was(ready, monkeypatch):
    interrupted(monkeypatch, ready, 5, "stopped", **BASE)
    with pytest.raises(SettingErrors) as refused:
        run(ready, "again", **BASE | {"LR_INIT": "2e-3", "lora_r": "8", "EPOCH_SAVE": "2"})
    said = str(refused.value)
    assert "LR_INIT: was 0.01" in said and "lora_r: was 4" in said and "EPOCH_SAVE" not in said
    for name, value, was in (
        ("PRECISION", "bf16", "fp32"), ("LOSS_MASK", "pad", "qa"), ("SEED", "7", "42"), ("OPTIM", "lion8bit", "adamw"),
        ("DATALOAD", "only", "pack"), ("QUANT", "int8", "none"), ("GRAD_CLIP", "0.5", "1"), ("WARMUP_STEPS", "2", "3"),
    ):  # fmt: skip
        with pytest.raises(SettingErrors, match=f"{name}: was '?{was}"):
            run(ready, "again", **BASE | {name: value})


@pytest.mark.slow
def test_another_split_of_the_same_steps_resumes(ready, monkeypatch):
    """4 x 1 is 2 x 2 is 1 x 4; what makes other steps is refused."""
    settings = BASE | {"lora_dropout": "0", "SAVE_STEPS": "1", "MICRO_BSZ": "2", "MINI_BSZ": "1", "EPOCH_STEPS": "auto"}
    _, whole = run(ready, "whole", **settings)
    interrupted(monkeypatch, ready, 2, "killed", **settings)
    with pytest.raises(
        SettingErrors, match="MINI_BSZ: output/again at step 1 of 6 was begun with 1, which would be 2 now: set it back"
    ):
        run(ready, "again", **settings | {"MINI_BSZ": "2"})
    _, split = run(ready, "again", **settings | {"MICRO_BSZ": "1", "MINI_BSZ": "2"})
    assert [r["loss"] for r in split] == pytest.approx([r["loss"] for r in whole], rel=1e-5)


def test_other_data_or_another_base_of_the_same_name_is_refused(ready, monkeypatch):
    interrupted(monkeypatch, ready, 5, "stopped", **BASE)
    data, base = (ready / "data" / "chat.bin"), ready / "model" / "tiny.pth"
    content = data.read_bytes()
    data.write_bytes(content[:2] + bytes([content[2] ^ 1]) + content[3:])
    tiny.save_model(base, seed=5)
    with pytest.raises(SettingErrors) as refused:
        run(ready, "again", **BASE)
    assert "MODEL_PATH: is another file than tiny.pth" in str(refused.value)
    assert "DATA_PATH: has another content" in str(refused.value) and "chat.bin" in str(refused.value)


@pytest.mark.slow
def test_a_base_and_data_that_have_moved_are_the_same(ready, monkeypatch):
    _, whole = run(ready, "whole", **BASE)
    interrupted(monkeypatch, ready, 5, "stopped", **BASE)
    (ready / "model" / "tiny.pth").rename(ready / "model" / "moved.pth")
    for ending in (".bin", ".idx", ".roles.bin", ".roles.idx"):
        (ready / "data" / f"chat{ending}").rename(ready / "data" / f"talk{ending}")
    _, parts = run(ready, "again", **BASE | {"MODEL_PATH": "moved.pth", "DATA_PATH": "talk"})
    assert [r["loss"] for r in parts] == [r["loss"] for r in whole]


def test_a_finished_run_says_so_and_a_larger_epoch_count_trains_it_further(ready):
    settings = BASE | {"LR_SCHEDULE": "constant"}
    _, whole = run(ready, "whole", **settings)
    run(ready, "again", **settings | {"EPOCH_COUNT": "2"})
    with pytest.raises(
        SettingErrors, match="RUN_NAME: output/again is finished .8 steps, 2 epochs.. A larger EPOCH_COUNT"
    ):
        run(ready, "again", **settings | {"EPOCH_COUNT": "2"})
    _, parts = run(ready, "again", **settings)
    same(ready, "whole", "again", (whole, parts))


@pytest.mark.slow
def test_two_processes_go_on_as_if_they_had_never_stopped(kit):
    """From the middle of an epoch: of a whole run that has kept every state, the later ones are taken away."""
    validations = {"VAL_DATA": "chat", "VAL_STEPS": "2", "VAL_PATIENCE": "99"}
    prepare(kit, SAVE_STEPS="3", KEEP_LAST="99", GPU_COUNT="2", MICRO_BSZ="1", RUN_NAME="whole", **validations)
    kit.run("training.sh")
    output = kit.root / "output"
    shutil.copytree(output / "whole", output / "again")
    for name in train_state.state_names(output / "again")[2:]:
        shutil.rmtree(output / "again" / "state" / name)
    (output / "latest").unlink()
    (output / "latest").symlink_to("again")
    kit.set(RUN_NAME="")  # the rank 0 finds it, and shows the other
    assert "goes on   output/again at step 4 of 12" in kit.run("training.sh").stdout
    same(kit.root, "whole", "again", [records(kit.root, name) for name in ("whole", "again")])
    valid = output / "again" / "valid.jsonl"
    assert valid.read_bytes() == (output / "whole/valid.jsonl").read_bytes()
    # an early best look: all processes count from it, and end together
    for name in train_state.state_names(output / "again")[2:]:
        shutil.rmtree(output / "again" / "state" / name)
    first, *others = valid.read_text().splitlines()
    valid.write_text("\n".join([json.dumps({**json.loads(first), "loss": 1e-3}), *others]) + "\n")
    kit.set(VAL_PATIENCE="3")
    assert "VAL_PATIENCE=3: no better validation" in kit.run("training.sh").stdout
    assert train_state.read_manifest(output / "again/state" / train_state.state_names(output / "again")[-1]).facts[
        "finished"
    ]


ONE, TWO = {}, {"GPU_COUNT": "2", "MICRO_BSZ": "1"}
KILLED = {
    "lora": (ONE, 3), "state_tuning": (ONE, 3), "full": (ONE, 3), "fsdp": (TWO | {"STRATEGY": "fsdp"}, 1),
    "deepspeed_stage_2": (TWO | {"STRATEGY": "deepspeed_stage_2"}, 1),
}  # fmt: skip
SEEDED = [(name, seed) for name, (_, seeds) in KILLED.items() for seed in range(seeds)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), SEEDED if EVERYTHING else [("lora", 0)])
def test_killed_again_and_again_it_ends_as_if_nothing_had_happened(kit, name, seed):
    """F2, F3: SIGKILL at random instants, in steps and in saves."""
    settings = KILLED[name][0] | {"FINETUNE_MODE": name if not KILLED[name][0] else "lora", "RUN_NAME": "whole"}
    prepare(kit, SAVE_STEPS="1", EPOCH_COUNT="30", EPOCH_SAVE="10", LR_INIT="1e-3", SEED=str(seed), **settings)
    kit.run("training.sh", timeout=500)
    kit.set(RUN_NAME="again")
    rng, log = random.Random(seed), kit.root / "output/again/loss.jsonl"
    for _ in range(25 if EVERYTHING else 5):
        process = subprocess.Popen(
            [str(kit.root / "training.sh")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
        before = log.read_bytes() if log.exists() else b""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if log.exists() and log.read_bytes() != before:
                break
            time.sleep(0.01)
        time.sleep(rng.random() * 0.5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        assert "Traceback" not in process.communicate()[1]
        if process.returncode == 0:  # it was faster
            break
    if process.returncode != 0:
        kit.run("training.sh", timeout=500)
    same(kit.root, "whole", "again", [records(kit.root, name) for name in ("whole", "again")])
    assert not [p for p in (kit.root / "output/again").rglob("*") if "tmp" in p.name or p.name.startswith(".")]


def prepare(kit, **settings) -> None:
    tiny.save_model(kit.root / "model" / "tiny.pth")
    kit.data("chat.jsonl", *tiny.CHATS)
    kit.run("make_tokenize.sh", "chat.jsonl")
    common = {"MODEL_PATH": "tiny.pth", "DATA_PATH": "chat", "PRECISION": "fp32", "MICRO_BSZ": "2", "lora_r": "4"}
    kit.set(**BASE | common | settings)


@pytest.mark.slow
def test_a_damaged_state_is_reported_and_the_one_before_it_taken(ready, monkeypatch, capsys):
    settings = BASE | {"SAVE_STEPS": "2"}
    _, whole = run(ready, "whole", **settings)
    interrupted(monkeypatch, ready, 7, "killed", **settings)
    folder = ready / "output" / "again" / "state"
    assert train_state.state_names(folder.parent) == ["step-000004", "step-000006"]
    file = folder / "step-000006" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    _, parts = run(ready, "again", **settings)
    said = capsys.readouterr().out
    assert "step-000006/optimizer.safetensors: is damaged" in said and "at step 4 of 12" in said
    same(ready, "whole", "again", (whole, parts))


@pytest.mark.slow
def test_a_state_that_cannot_be_written_stops_nothing(ready, monkeypatch, capsys):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_state, "check_disk_space", full)
    run(ready, **BASE | {"SAVE_STEPS": "5"})
    said = capsys.readouterr().out
    assert said.count("could not be saved; training goes on. ") == 5 and "step 12/12" in said  # 5, 10, and three epochs
    interrupted(monkeypatch, ready, 5, "stopped", **BASE)
    assert "not the state of the optimizer. To go on, set lora_load=" in capsys.readouterr().err


def test_with_keep_last_0_nothing_is_kept_and_the_way_to_go_on_is_reported(ready, monkeypatch, capsys):
    interrupted(monkeypatch, ready, 5, "stopped", **BASE | {"KEEP_LAST": "0"})
    assert not (ready / "output/again/state").exists()
    assert "set lora_load=" in capsys.readouterr().err
    with pytest.raises(SettingErrors, match="holds an earlier run, which has saved no state"):
        run(ready, "again", **BASE)


def test_a_run_that_is_training_at_this_moment_does_not_go_on_twice(ready, monkeypatch):
    import fcntl

    interrupted(monkeypatch, ready, 5, "stopped", **BASE)
    with open(ready / "output/again/loss.jsonl", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SettingErrors, match="is being trained at this moment, by another process"):
            run(ready, "again", **BASE)


def test_only_the_last_states_are_kept_and_half_written_ones_vanish(tmp_path):
    for step in (5, 9, 12, 20):
        (tmp_path / "state").mkdir(exist_ok=True)
        (tmp_path / "state" / f"{train_state.UNFINISHED}step-000001").mkdir()
        saved(tmp_path, step, keep=2)
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["step-000012", "step-000020"]
    result = train_state.latest_valid(tmp_path, print)
    assert result.step == 20 and torch.equal(result.tensors("weights")["a"], torch.arange(64.0))


def test_a_state_that_is_saved_behind_a_damaged_later_one_stays(tmp_path):
    for step in (6, 8):
        saved(tmp_path, step, keep=2)
    (tmp_path / "state/step-000008/weights.safetensors").unlink()
    saved(tmp_path, 7)
    assert train_state.state_names(tmp_path) == ["step-000007", "step-000008"]
    train_state.remove_newer_states(tmp_path, 7)
    assert train_state.state_names(tmp_path) == ["step-000007"]


def test_a_state_that_was_about_to_be_replaced_is_detected_and_looking_changes_nothing(tmp_path):
    folder = saved(tmp_path, 4).folder
    folder.rename(folder.with_name(f"{train_state.REPLACED}{folder.name}"))
    (tmp_path / "state" / f"{train_state.UNFINISHED}step-000005").mkdir()
    assert train_state.latest_valid(tmp_path, print).step == 4 and len(list((tmp_path / "state").iterdir())) == 2
    train_state.remove_leftovers(tmp_path)
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["step-000004"]


@pytest.mark.parametrize("harm", ["cut", "gone", "manifest", "flipped", "another step", "a part left out"])
def test_no_damage_goes_unseen(tmp_path, harm):
    folder = saved(tmp_path, 3).folder
    file, manifest = folder / "weights.safetensors", folder / "manifest.json"
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "gone":
        file.unlink()
    elif harm == "manifest":
        manifest.write_text(manifest.read_text()[:-9])
    elif harm == "flipped":
        content = bytearray(file.read_bytes())
        content[99] ^= 1
        file.write_bytes(content)
    else:
        reported = json.loads(manifest.read_text())
        if harm == "another step":
            reported["step"] = 4
        else:
            del reported["files"]["optimizer.safetensors"]
        manifest.write_text(json.dumps(reported))
    said = []
    with pytest.raises(Exception, match="none of its states is whole"):
        train_state.latest_valid(tmp_path, said.append)
    assert said


@pytest.mark.slow
def test_the_checkpoint_of_an_epoch_is_not_lost_where_the_run_ended_while_it_was_saved(ready, monkeypatch):
    """A state of that step must not be there before the checkpoint is; and what is missing is written when the run continues."""
    settings = BASE | {"SAVE_STEPS": "4"}
    _, whole = run(ready, "whole", **settings)
    replace = os.replace

    def killed_at(name):
        def replace_or_die(source, target):
            if str(target).endswith(name):
                raise Killed
            replace(source, target)

        return replace_or_die

    for name in ("rwkv-0.pth", "rwkv-2.pth"):
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", killed_at(name))
            with pytest.raises(Killed):
                run(ready, "again", **settings)
    _, parts = run(ready, "again", **settings)
    same(ready, "whole", "again", (whole, parts))
    (ready / "output/again/rwkv-2.pth").unlink()  # lost in another way
    _, parts = run(ready, "again", **settings)
    same(ready, "whole", "again", (whole, parts))


def test_a_run_that_is_stopped_in_its_last_step_is_complete(ready, monkeypatch, capsys):
    interrupted(monkeypatch, ready, 12, "stopped", **BASE)
    assert "Stopped behind the last step: the run is complete" in capsys.readouterr().err
    assert json.loads((ready / "output/again/rwkv-2.json").read_text())["epoch_finished"] is True
    with pytest.raises(SettingErrors, match="is finished"):
        run(ready, "again", **BASE)


def test_an_epoch_count_below_what_is_done_is_refused_and_one_that_ends_there_writes_the_result(ready, monkeypatch):
    settings = BASE | {"EPOCH_SAVE": "9", "SAVE_STEPS": "2"}
    interrupted(monkeypatch, ready, 9, "killed", **settings)
    with pytest.raises(SettingErrors, match="EPOCH_COUNT: has 4 steps, and 8 are done in output/again"):
        run(ready, "again", **settings | {"EPOCH_COUNT": "1"})
    run(ready, "again", **settings | {"EPOCH_COUNT": "2"})
    assert run_dir.list_checkpoints(ready / "output/again") == ([1], [6, 8])


@pytest.mark.slow
def test_a_stream_may_be_made_longer_and_its_text_may_not_change(ready, monkeypatch):
    settings = BASE | CASES["stream"] | {"LR_SCHEDULE": "constant"}
    _, whole = run(ready, "whole", **settings)
    run(ready, "again", **settings | {"MAX_STEPS": "7"})
    _, parts = run(ready, "again", **settings)
    assert [r["loss"] for r in parts] == [r["loss"] for r in whole]
    file = ready / "data/chat.jsonl"
    file.write_text(file.read_text().replace("tomato", "cherry"))
    with pytest.raises(SettingErrors, match="DATA_PATH: has another content .*chat.jsonl"):
        run(ready, "again", **settings | {"MAX_STEPS": "14"})


def test_what_adapters_began_with_must_be_there(ready, monkeypatch):
    settings = BASE | {"FINETUNE_MODE": "pissa", "pissa_r": "4"}
    interrupted(monkeypatch, ready, 5, "stopped", **settings)
    start = ready / "output/again/init_pissa.pth"
    start.write_bytes(start.read_bytes()[:-1] + b"x")
    with pytest.raises(SettingErrors, match="init_pissa.pth is another file than what"):
        run(ready, "again", **settings)
    start.unlink()
    with pytest.raises(SettingErrors, match="init_pissa.pth is missing"):
        run(ready, "again", **settings)


@pytest.mark.slow
def test_a_run_that_was_killed_before_it_saved_anything_begins_again(ready, monkeypatch):
    _, whole = run(ready, "whole", **BASE)
    interrupted(monkeypatch, ready, 3, "killed", **BASE)
    _, parts = run(ready, "again", **BASE)
    same(ready, "whole", "again", (whole, parts))


def test_a_new_run_that_never_took_a_step_does_not_hide_the_one_that_was_stopped(ready, monkeypatch, capsys):
    interrupted(monkeypatch, ready, 5, "stopped", "", **BASE)
    (ready / "output/latest").unlink()
    (ready / "output/empty").mkdir()
    (ready / "output/latest").symlink_to("empty")
    train.command(config(RUN_NAME="", **BASE), ["--dry-run"])
    assert "at step 5 of 12" in capsys.readouterr().out
    with pytest.raises(SettingErrors, match="--new wants another name"):
        [name] = [p.parent.name for p in (ready / "output").glob("*/state")]
        train.command(config(RUN_NAME=name, **BASE), ["--dry-run", "--new"])


@pytest.mark.slow
def test_a_state_that_another_process_has_overtaken_is_looked_for_again(ready, monkeypatch, capsys):
    from rwkv_peft.train import resume

    settings = BASE | {"SAVE_STEPS": "2", "KEEP_LAST": "9"}
    interrupted(monkeypatch, ready, 7, "killed", **settings)
    find, before = resume.find_resume_state, []

    def find_and_lose(*given):
        result = find(*given)
        if not before:
            before.append(result)
            shutil.rmtree(result.folder)  # as if another process had gone on, saved later states and pruned this one
        return result

    monkeypatch.setattr(resume, "find_resume_state", find_and_lose)
    run(ready, "again", **settings)
    assert "at step 4 of 12" in capsys.readouterr().out and before[0].step == 6


@pytest.mark.smoke(1)
@pytest.mark.parametrize("log", ["missing", "torn", "without its losses"])
def test_a_log_with_gaps_is_reported_and_stops_nothing(ready, monkeypatch, capsys, log):
    interrupted(monkeypatch, ready, 5, "stopped", **BASE)
    file = ready / "output/again/loss.jsonl"
    lines = file.read_text().splitlines()
    if log == "missing":
        file.unlink()
    else:
        lines[2] = lines[2][:20] if log == "torn" else json.dumps({"step": 3, "seconds": "x"})
        file.write_text("\n".join(lines) + "\n")
    run(ready, "again", **BASE)
    missing = "steps 1 to 5" if log == "missing" else "step 3"
    assert f"loss.jsonl has no record of {missing}; loss.png shows the gap" in capsys.readouterr().out


@pytest.mark.slow
def test_records_behind_a_gap_stay_at_every_resume_and_the_gap_is_reported_once(ready, monkeypatch, capsys):
    interrupted(monkeypatch, ready, 5, "stopped", **BASE)
    file = ready / "output/again/loss.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]) + lines[2][:30])
    reported = []
    for at in (7, 9):
        interrupted(monkeypatch, ready, at, "stopped", **BASE)
        reported.append("no record of steps 3 to 5" in capsys.readouterr().out)
        assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, *range(6, at + 1)]
    assert reported == [True, False]


@pytest.mark.slow
def test_every_save_steps_there_is_a_checkpoint_that_merges(ready, capsys):
    from helpers.merging import merge

    settings = BASE | {"SAVE_STEPS": "3", "KEEP_LAST": "9", "EPOCH_SAVE": "2"}
    run(ready, "whole", **settings)
    folder = ready / "output/whole"
    assert run_dir.list_checkpoints(folder) == (
        [1, 2],
        [3, 6, 9],
    )  # (the epochs' checkpoints are those of steps 8 and 12)
    for step in (3, 6, 9):
        state = train_state.read_manifest(folder / f"state/step-{step:06}").tensors("weights")
        result = pth.load(folder / f"rwkv-step-{step}.pth")
        assert result.keys() == state.keys() and all(torch.equal(result[n], state[n]) for n in result)
    said = capsys.readouterr().out
    assert all(f"saved output/whole/rwkv-step-{step}.pth\n" in said for step in (3, 6, 9))
    merge("step-6", RUN="whole")
    assert "step 6" in capsys.readouterr().out and (ready / "merge/tiny-whole-step-6.pth").is_file()
    with pytest.raises(UserError, match=r"has no rwkv-step-7.pth; it has the epochs 1, 2 and the steps 3, 6, 9"):
        merge("step-7", RUN="whole")
    run(ready, "again", **settings | {"KEEP_LAST": "2"})
    assert run_dir.list_checkpoints(ready / "output/again") == ([1, 2], [6, 9])
    assert not (ready / "output/again/rwkv-step-3.json").exists()


def test_a_run_that_died_before_its_first_epoch_has_the_checkpoint_of_a_step(ready, monkeypatch):
    from helpers.merging import merge

    interrupted(monkeypatch, ready, 4, "killed", **BASE | {"SAVE_STEPS": "3", "EPOCH_STEPS": "99"})
    merge()
    assert (ready / "merge/tiny-again-step-3.pth").is_file()


@pytest.mark.slow
def test_a_full_disk_costs_the_checkpoint_of_a_step_and_not_the_training(ready, monkeypatch, capsys):
    write = pth.save

    def full(path, tensors):
        if "step-" in path.name:
            raise OSError(28, "No space left on device", str(path))
        write(path, tensors)

    monkeypatch.setattr(pth, "save", full)
    _, records = run(ready, "again", **BASE | {"SAVE_STEPS": "3"})
    said = capsys.readouterr().out
    assert len(records) == 12 and "warning   rwkv-step-3.pth could not be saved; training goes on." in said
    assert run_dir.list_checkpoints(ready / "output/again") == ([0, 1, 2], [])
