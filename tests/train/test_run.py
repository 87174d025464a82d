"""What the user sees of a run, and what it leaves: plan, progress, picture, checkpoints, folder."""

import contextlib
import json
import os
import signal
import sys
import time
import types
from pathlib import Path

import pytest
from helpers import tiny
from helpers.resuming import interrupted
from helpers.training import config, run

from rwkv_peft.checkpoint import run_dir
from rwkv_peft.cli import train
from rwkv_peft.common import paths, trackers
from rwkv_peft.common.errors import SettingErrors
from rwkv_peft.train import report
from rwkv_peft.train.callbacks.signals import GracefulStop


def test_a_run_that_never_took_a_step_leaves_no_folder(ready):
    tiny.save_model(ready / "model" / "other.pth", seed=1)
    run(ready, "first")
    with pytest.raises(SettingErrors):
        run(ready, "second", lora_load="output/first/rwkv-0.pth", lora_r="2")
    assert not (ready / "output/second").exists()


def test_the_progress_line_shows_the_plain_mean_of_the_last_steps(capsys):
    from rwkv_peft.train.callbacks.loggers import Progress
    from rwkv_peft.train.callbacks.metrics import StepMetrics

    progress = Progress(steps=8, epochs=1)
    for step in range(1, 9):
        progress(StepMetrics(step, 0, float(step), 1e-4, 1.0, 10, 10, 1.0, 1.0, 1.0))
    losses = [line.split("loss ")[1].split()[0] for line in capsys.readouterr().out.splitlines()]
    assert losses == ["1.000", "1.500", "2.000", "2.500", "3.000", "4.000", "5.000", "6.000"]


@pytest.mark.parametrize("steps", [8, 34, 400])
def test_without_a_terminal_there_are_some_twenty_lines_of_progress(capsys, steps):
    from rwkv_peft.train.callbacks.loggers import Progress
    from rwkv_peft.train.callbacks.metrics import StepMetrics

    progress = Progress(steps=steps, epochs=1)
    for step in range(1, steps + 1):
        progress(StepMetrics(step, 0, 1.0, 1e-4, 1.0, 10, 10, 1.0, 1.0, 1.0))
    lines = capsys.readouterr().out.splitlines()
    assert min(steps, 17) <= len(lines) <= 21 and f"step {steps}/{steps}" in lines[-1]


def test_a_slow_first_step_does_not_spoil_the_time_left(capsys):
    from rwkv_peft.train.callbacks.loggers import Progress
    from rwkv_peft.train.callbacks.metrics import StepMetrics

    for before, late in (((), 0.0), (({"step": 4, "seconds": 40.0, "loss": 1.0},), 40.0)):
        progress = Progress(steps=8, epochs=1, before=before, memory=lambda: 3 << 30, done=4 if before else 0)
        for i, seconds in enumerate((100.0, 101.0, 102.0), 1):
            progress(StepMetrics(len(before) * 4 + i, 0, 1.0, 1e-4, 1.0, 10, 10, 1.0, 1.0, late + seconds))
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].endswith(f"3.0 GB  0:0{2 if before else 6} left") and len(lines) == 3


def test_the_speed_is_that_of_the_last_steps_and_never_of_the_first(monkeypatch):
    import types

    import torch

    from rwkv_peft.train.callbacks import metrics
    from rwkv_peft.train.context import RunContext

    clock, result = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    recorder = metrics.MetricsCallback(RunContext(Path(), print, GracefulStop()), [result.append], 9)
    trainer = types.SimpleNamespace(global_step=0, world_size=1, is_global_zero=True, current_epoch=0)
    module = types.SimpleNamespace(shares=[], skipped=False, rate_of=lambda step: 1e-4, grad_norm=torch.tensor(1.0))
    recorder.on_train_start(trainer, module)
    for step, seconds in enumerate((90.0, 1.0, 3.0), 1):
        clock[0] += seconds
        trainer.global_step, module.shares = step, [1.0]
        batch = types.SimpleNamespace(tokens=100, beginning=(), step_targets=50)
        recorder.on_train_batch_end(trainer, module, None, batch, step - 1)
    assert [(r.tokens_per_s, r.targets_per_s) for r in result] == [(100 / 90, 50 / 90), (100.0, 50.0), (50.0, 25.0)]


@pytest.mark.smoke(5)
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"EPOCH_COUNT": "2", "DATALOAD": "only"}, "steps will hardly change a model"),
        ({"EPOCH_COUNT": "1", "WARMUP_STEPS": "100"}, "WARMUP_STEPS=100 is as long as the whole run"),
        ({"EPOCH_COUNT": "10", "WARMUP_STEPS": "6", "DATALOAD": "only"}, "of the run; a tenth of the run, "),
        ({"EPOCH_STEPS": "64"}, "EPOCH_STEPS makes an epoch"),
        (
            {"FINETUNE_MODE": "state_tuning", "LR_INIT": "1e-4"},
            "note      LR_INIT=0.0001 will hardly move a state: usual are 1e-3 (0.1B) to 1e-2 (7B)",
        ),
        (
            {"FINETUNE_MODE": "state_tuning", "LR_INIT": "1"},
            "warning   LR_INIT=1 is far above what is usual (0.03 at most): usual",
        ),
        ({"LR_INIT": "0.5"}, "warning   LR_INIT=0.5 is far above what is usual (0.01 at most); ./training.sh"),
        ({"TRAIN_TYPE": "infctx"}, "one chunk holds it, so infctx changes nothing here"),
        ({"GPU_COUNT": "64"}, "GPU_COUNT=64 starts 64 processes, but this machine has"),
    ],
)
def test_the_plan_warns_of_what_will_not_go_well(ready, capsys, settings, words):
    train.command(config(**({"MICRO_BSZ": "4"} | settings)), ["--dry-run"])
    assert words in capsys.readouterr().out


def test_only_a_second_ctrl_c_leaves_at_once_and_nothing_half_written(project_folder, monkeypatch, capfd):
    import os
    import signal

    from rwkv_peft.checkpoint import run_dir
    from rwkv_peft.train.callbacks.signals import GracefulStop

    class Left(BaseException):
        pass

    def leave(code):
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)
    folder = project_folder / "output" / "run"
    folder.mkdir()
    for name in ("loss.jsonl", "rwkv-0.pth", "rwkv-0.json", "rwkv-1.json", f"rwkv-1.pth.tmp-{os.getpid()}"):
        (folder / name).write_text("x")
    stop = GracefulStop(lambda: run_dir.remove_partial_files(folder))
    for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        stop.receive(number, None)
    assert capfd.readouterr().err.count("Stopping after this batch") == 1
    with pytest.raises(Left, match="130"):
        stop.receive(signal.SIGINT, None)
    assert "Left at once" in capfd.readouterr().err
    assert sorted(p.name for p in folder.iterdir()) == ["loss.jsonl", "rwkv-0.json", "rwkv-0.pth"]


def test_a_picture_that_cannot_be_drawn_stops_nothing(ready, monkeypatch, capsys):
    def broken(folder):
        raise ValueError("no ink")

    monkeypatch.setattr("rwkv_peft.train.callbacks.checkpoint.draw_loss", broken)
    run(ready, EPOCH_COUNT="2")
    assert "loss.png could not be drawn (ValueError: no ink); training goes on" in capsys.readouterr().out


def test_a_folder_that_a_killed_run_has_left_empty_may_be_used(ready):
    (ready / "output/run").mkdir()
    (ready / "output/run/loss.jsonl").touch()
    run(ready)


def test_a_dry_run_refuses_a_checkpoint_that_does_not_fit(ready):
    run(ready, "first")
    with pytest.raises(SettingErrors, match="lora_r: must be 4"):
        train.command(config(lora_load="output/first", lora_r="8"), ["--dry-run"])
    (ready / "output/junk.pth").write_text("x")
    with pytest.raises(SettingErrors, match="lora_load: .*is no .pth checkpoint"):
        train.command(config(lora_load="junk.pth"), ["--dry-run"])


@pytest.mark.pictures
@pytest.mark.parametrize("name", ["我的数据", "costs $5 to $^6"])
@pytest.mark.filterwarnings("error")
def test_a_run_may_have_any_name_and_its_picture_is_drawn_without_a_warning(project_folder, name):
    from rwkv_peft.train.loss_plot import draw_loss

    folder = project_folder / "output" / name
    folder.mkdir()
    rows = [{"step": n, "epoch": n // 3, "loss": 9.0 - n, "lr": 1e-4, "tokens_per_s": 10.0} for n in range(1, 8)]
    (folder / "loss.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert draw_loss(folder).read_bytes().startswith(b"\x89PNG")


def test_bf16_on_a_processor_without_it_is_warned_of(ready, capsys, monkeypatch):
    monkeypatch.setattr("rwkv_peft.train.report.cpu_has_bf16", lambda: False)
    train.command(config(PRECISION="bf16"), ["--dry-run"])
    assert "no instructions for bf16" in capsys.readouterr().out


def test_a_dry_run_prints_every_setting_and_what_auto_became(ready, capsys):
    train.command(config(CTX_LEN="auto"), ["--dry-run"])
    said = " ".join(capsys.readouterr().out.split("model ")[0].split())
    assert "CTX_LEN=64(auto)" in said and "FINETUNE_MODE=lora" in said and "lora_dropout=" in said


def test_epochs_are_saved_when_the_setting_says_and_always_at_the_end(ready):
    run(ready, EPOCH_COUNT="5", EPOCH_SAVE="2")
    assert sorted(p.name for p in (ready / "output/run").glob("*.pth")) == ["rwkv-1.pth", "rwkv-3.pth", "rwkv-4.pth"]


@pytest.mark.slow
def test_wandb_offline_gets_the_records_and_a_broken_one_stops_nothing(ready, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(ready, "with", WANDB="test")
    assert list((ready / "output/with/wandb").glob("offline-run-*/run-*.wandb"))
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    _, records = run(ready, "without", WANDB="test")
    assert records


def test_tensorboard_has_every_step_once_also_where_a_run_resumes(ready, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {
        "TENSORBOARD": "1",
        "VAL_DATA": "chat",
        "VAL_STEPS": "1",
        "KEEP_LAST": "2",
        "SAVE_STEPS": "1",
        "EPOCH_STEPS": "4",
    }
    interrupted(monkeypatch, ready, 3, "killed", "again", **settings)
    _, records = run(ready, "again", **settings)
    result = EventAccumulator(str(ready / "output/again/tensorboard"))
    result.Reload()
    losses = [(one.step, one.value) for one in result.Scalars("loss")]
    assert losses == [(r["step"], pytest.approx(r["loss"])) for r in records] and len(losses) == 4
    assert {one.step for one in result.Scalars("validation_loss")} == {1, 2, 3, 4}


@pytest.mark.smoke(1)
@pytest.mark.parametrize("name", ["wandb", "tensorboard", "swanlab", "trackio"])
def test_a_tracker_that_is_missing_or_fails_says_so_once_and_stops_nothing(ready, monkeypatch, capsys, name):
    variable = {name.upper(): "1" if name == "tensorboard" else "test"}
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)
    _, records = run(ready, "without", **variable)
    said = capsys.readouterr().out
    assert records and said.count(f"{name} did not start") == 1 and f"pip install {name}" in said

    def broken(*_):
        raise SystemExit("the disk is full")

    monkeypatch.setitem(trackers.TRACKERS, name, lambda *_: trackers.TrackerRun(broken, broken, "x"))
    _, records = run(ready, "broken", **variable)
    assert (
        records
        and capsys.readouterr().out.count(f"{name} failed (the disk is full); training goes on without it.") == 1
    )


def test_swanlab_and_trackio_are_given_their_words(ready, monkeypatch):
    """As swanlab 0.10.3 and trackio 0.43.0 want them: tried with both by hand, 2026-11-23."""
    seen = []

    class Fake(types.SimpleNamespace):
        def init(self, **given):
            seen.append(given)
            return types.SimpleNamespace(id="x")

        def log(self, numbers, step):
            seen.append((step, numbers["loss"]))

        def finish(self):
            seen.append("finished")

    for name in ("swanlab", "trackio"):
        seen.clear()
        monkeypatch.setitem(sys.modules, name, Fake())
        _, records = run(ready, name, **{name.upper(): "my project"})
        assert seen[0]["project"] == "my project" and seen[0]["name"] == name and seen[0]["config"]["LR_INIT"] == 1e-2
        assert seen[1:] == [*((r["step"], r["loss"]) for r in records), "finished"]


def checkpoint_of(folder, name, step):
    (folder / f"rwkv-{name}.pth").touch()
    (folder / f"rwkv-{name}.json").write_text(json.dumps({"step": step}))


@pytest.mark.parametrize(
    ("saved", "validations", "chosen", "words"),
    [
        ({"0": 4, "1": 8, "best": 4}, {0: 9.0, 4: 1.0, 8: 2.0}, "best", "at step 4, in epoch 1; {}/rwkv-best.pth holds it"),
        # kept when the run was another
        ({"0": 4, "1": 8, "2": 12, "best": 4}, {4: 3.0, 8: 1.0, 12: 2.0}, "1", "at step 8, in epoch 2; {}/rwkv-1.pth holds it"),
        ({"0": 4, "1": 8}, {0: 0.5, 4: 1.0, 8: 2.0}, "0", "before training: nothing that was learnt does better"),
        ({"0": 4, "1": 8}, {2: 0.5, 4: 1.0, 8: 2.0}, "0", "at step 2, in epoch 1; of what was saved, {}/rwkv-0.pth was best"),
        ({"0": 4, "1": 8}, {0: 9.0, 6: 0.5}, "1", "at step 6, in epoch 2"),
        ({"1": 8}, {0: 9.0, 4: 2.0, 8: 1.0}, "1", "at step 8, in epoch 2; {}/rwkv-1.pth holds it"),
    ],
)  # fmt: skip
def test_the_checkpoint_to_go_on_with_is_that_of_the_best_look_that_there_is_one_of(
    tmp_path, capsys, saved, validations, chosen, words
):
    for name, step in saved.items():
        checkpoint_of(tmp_path, name, step)
    records = [{"step": step, "loss": loss, "epoch": max(0, step - 1) // 4} for step, loss in validations.items()]
    newest = max((name for name in saved if name != "best"), key=int)
    result = report.report_best_validation(records, tmp_path, tmp_path / f"rwkv-{newest}.pth")
    assert result.name == f"rwkv-{chosen}.pth" and words.format(tmp_path) in capsys.readouterr().out


def test_no_log_of_a_run_that_saved_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "OUTPUT", tmp_path)
    for text in ("first\n", "second\n", ""):
        with contextlib.ExitStack() as cleanup:
            folder = run_dir.lock_run_dir("run", "stem", cleanup, False)
            (folder / "loss.jsonl").write_text(text)
    assert (folder / run_dir.BEFORE).read_text() == "first\nsecond\n"


def test_it_is_reported_that_the_newest_run_has_saved_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "OUTPUT", tmp_path)
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").touch()
    checkpoint_of(tmp_path / "old", "0", 4)
    run_dir.point_latest(tmp_path / "new")
    assert run_dir.run_folder("").name == "old"
    assert "the newest run" in capsys.readouterr().err
    checkpoint_of(tmp_path / "new", "0", 4)
    assert run_dir.run_folder("").name == "new" and not capsys.readouterr().err


def test_a_signal_that_comes_while_processes_agree_is_not_lost():
    exchanges = []

    def reduce(reported, reduce_op):
        exchanges.append(reported.clone())
        if len(exchanges) == 1:  # it comes when what this process knew is on its way
            stop.receive(signal.SIGTERM, None)
        return reported

    stop = GracefulStop(is_main=False)
    strategy = types.SimpleNamespace(reduce=reduce, root_device="cpu")
    trainer = types.SimpleNamespace(world_size=2, strategy=strategy)
    assert [stop.agree(trainer), stop.agree(trainer)] == [False, True]


def test_a_signal_to_another_process_stops_this_one():
    strategy = types.SimpleNamespace(
        reduce=lambda reported, reduce_op: reported + reported.new_tensor([signal.SIGINT, 0]), root_device="cpu"
    )
    stop = GracefulStop(is_main=False)
    assert stop.agree(types.SimpleNamespace(world_size=2, strategy=strategy)) and stop.received == signal.SIGINT


def test_who_leaves_at_once_is_reported_whether_anything_is_saved(monkeypatch):
    reported = []
    monkeypatch.setattr(os, "_exit", lambda code: None)
    monkeypatch.setattr(os, "write", lambda _file, message: reported.append(message.decode()))
    for saved in (True, False):
        stop = GracefulStop(has_saved=lambda saved=saved: saved)
        stop.received = signal.SIGINT
        stop.receive(signal.SIGINT, None)
    assert "Checkpoints that were saved before are whole" in reported[0] and "Nothing had been saved yet" in reported[1]
