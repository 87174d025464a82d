"""What is in the folders of the kit: a link is replaced or refused and never followed, a FIFO is never waited for, and the
links of a user's own (whole folders on another disk) work as before."""

import contextlib
import fcntl
import os
import shutil

import pytest
from helpers.merging import merge
from helpers.resuming import BASE, interrupted, saved
from helpers.training import config, run, tokenize

from rwkv_peft.checkpoint import base_model, run_dir, sidecars, train_state
from rwkv_peft.cli import train
from rwkv_peft.common import atomic_io, hashing, paths
from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.common.file_watch import FileWatch


@pytest.fixture
def theirs(tmp_path):
    file = tmp_path / "diary.txt"
    file.write_text("dear diary\n")
    return file


def kinds(path, theirs):
    """Each kind of thing that can stand at a name, one after another."""
    for make in (
        lambda: path.symlink_to(theirs), lambda: path.symlink_to(theirs.parent / "nothing"), lambda: os.link(theirs, path),
        lambda: os.mkfifo(path), lambda: path.mkdir(), lambda: path.symlink_to(theirs.parent), lambda: path.write_text("old"),
    ):  # fmt: skip
        make()
        yield
        atomic_io.remove_path(path)


def test_a_new_file_takes_the_place_of_anything_but_a_folder(tmp_path, theirs):
    path = tmp_path / "own" / "x.json"
    path.parent.mkdir()
    for _ in kinds(path, theirs):
        if path.is_dir() and not path.is_symlink():
            with pytest.raises(UserError, match="x.json: is a folder, and a file of this name"):
                atomic_io.write_json(path, {})
        else:
            atomic_io.write_json(path, {})
            assert path.read_text() == "{}\n" and path.stat().st_nlink == 1
    assert theirs.read_text() == "dear diary\n"


def test_what_is_at_a_temporary_name_goes(tmp_path, theirs):
    path = tmp_path / "x.json"
    for _ in kinds(atomic_io.temp_path(path), theirs):
        atomic_io.write_json(path, {})
        assert not os.path.lexists(atomic_io.temp_path(path))
    assert theirs.read_text() == "dear diary\n"


def test_lines_are_added_to_a_file_of_one_name_only(tmp_path, theirs):
    path = tmp_path / "x.jsonl"
    for _ in kinds(path, theirs):
        if path.is_symlink() or not path.is_file():
            with pytest.raises(UserError, match="x.jsonl: is a .*lines are added only to a file that lies here itself"):
                atomic_io.open_append(path)
        else:
            with atomic_io.open_append(path) as file:
                file.write("more\n")
            assert path.read_text() in ("dear diary\nmore\n", "oldmore\n")
    assert theirs.read_text() == "dear diary\n"


def test_nothing_but_a_file_is_read_and_nothing_waited_for(tmp_path, theirs):
    path = tmp_path / "x"
    for _ in kinds(path, theirs):
        if path.is_file():
            with atomic_io.open_regular(path) as file:
                file.read()
        else:
            with pytest.raises(OSError):
                atomic_io.open_regular(path)
            with pytest.raises(OSError):
                hashing.sha256(path)
            with pytest.raises(OSError):
                hashing.sample_hash(path)
    with pytest.raises(OSError, match="is a device, and a file is needed"):
        atomic_io.open_regular("/dev/zero")


def test_a_link_is_removed_and_what_it_leads_to_stays(tmp_path, theirs):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "kept").touch()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/link").symlink_to(folder)
    for name in ("link", "tree", "missing"):
        if name == "link":
            (tmp_path / name).symlink_to(folder)
        atomic_io.remove_path(tmp_path / name)
        assert not os.path.lexists(tmp_path / name)
    assert (folder / "kept").exists()


@pytest.mark.parametrize("pid", ["9" * 30, "4194303", "0", "-5", "x", ""])
def test_leftovers_of_any_number_are_no_error(tmp_path, pid):
    left = tmp_path / f"x.tmp-{pid}"
    left.mkdir()
    atomic_io.remove_stale_temps(tmp_path / "x")
    assert left.exists() == (pid not in ("9" * 30, "4194303"))


def claimed(name: str = "run", goes_on: bool = False):
    with contextlib.ExitStack() as cleanup:
        return run_dir.lock_run_dir(name, "stem", cleanup, goes_on)


@pytest.mark.parametrize("name", ["run", ""])
@pytest.mark.parametrize(
    "what", ["the run is a file", "a FIFO", "a link to nothing", "output is a link to nothing", "output is a file"]
)
def test_a_run_without_a_folder_ends_in_a_sentence(project_folder, monkeypatch, what, name):
    monkeypatch.setattr(run_dir.time, "strftime", lambda _: "now")
    output, folder = paths.OUTPUT, paths.OUTPUT / (name or "stem-now")
    if what.startswith("output"):
        output.rmdir()
    path = output if what.startswith("output") else folder
    make = {"file": path.touch, "FIFO": lambda: os.mkfifo(path), "link to nothing": lambda: path.symlink_to("x")}
    make[what.partition("a ")[2]]()
    if name or what.startswith("output"):
        with pytest.raises(UserError, match=r"(output|run): is a .*, and a folder is needed there"):
            claimed(name)
    else:  # another name is taken
        assert claimed(name).name == "stem-now-2"


def test_a_log_of_several_names_is_locked_before_its_copy_is_to_be_seen(project_folder, theirs, monkeypatch):
    folder = paths.OUTPUT / "run"
    folder.mkdir()
    os.link(theirs, folder / "loss.jsonl")
    replace = os.replace

    def checked(source, target):
        if str(target).endswith("loss.jsonl"):
            with open(source) as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        replace(source, target)

    monkeypatch.setattr(os, "replace", checked)
    with contextlib.ExitStack() as cleanup:
        run_dir.lock_run_dir("run", "stem", cleanup)
        assert run_dir.is_running(folder)
        with pytest.raises(SettingErrors, match="has just been taken"):
            claimed()
    assert theirs.read_text() == "dear diary\n" and (folder / run_dir.BEFORE).read_text() == "dear diary\n"


def test_a_log_that_is_a_fifo_says_that_no_one_trains(project_folder):
    (paths.OUTPUT / "run").mkdir()
    os.mkfifo(paths.OUTPUT / "run/loss.jsonl")
    assert not run_dir.is_running(paths.OUTPUT / "run")


def test_latest_is_a_link_or_reported_of_and_leaves_nothing(project_folder, capsys):
    for left in (f".latest-{os.getpid()}", ".latest-4194303"):
        (paths.OUTPUT / left).symlink_to("x")
    (paths.OUTPUT / ".latest-x").symlink_to("x")
    for name in ("one", "two"):
        run_dir.point_latest(paths.OUTPUT / name)
        assert os.readlink(paths.OUTPUT / "latest") == name
    (paths.OUTPUT / "latest").unlink()
    (paths.OUTPUT / "latest").mkdir()
    run_dir.point_latest(paths.OUTPUT / "one")
    assert "output/latest is a folder, and not the link to the newest run" in capsys.readouterr().err
    assert sorted(path.name for path in paths.OUTPUT.iterdir()) == [".latest-x", "latest"]


@pytest.mark.parametrize(
    ("target", "result"),
    [("run", "run"), ("../output/run", "run"), ("{output}/run", "run"), ("nothing", None), ("..", None), ("../elsewhere", None),
     (".", None), ("latest", None), ("run/state", None), ("/", None)],
)  # fmt: skip
def test_latest_leads_to_a_run_in_output_only(project_folder, target, result):
    (paths.OUTPUT / "run/state").mkdir(parents=True)
    (project_folder / "elsewhere").mkdir()
    (paths.OUTPUT / "latest").symlink_to(target.format(output=paths.OUTPUT))
    assert run_dir.latest_run() == (paths.OUTPUT / result if result else None)


@pytest.mark.slow
def test_latest_that_leads_to_another_folder_of_runs_changes_nothing_there(ready, monkeypatch, tmp_path):
    """Which it would prune, and tidy up."""
    interrupted(monkeypatch, ready, 5, "stopped", **BASE)
    there = tmp_path / "elsewhere" / "again"
    there.parent.mkdir()
    (ready / "output/again").rename(there)
    (there / "state/.unfinished-step-000009").mkdir()
    (ready / "output/latest").unlink()
    (ready / "output/latest").symlink_to(there)
    before = sorted(there.rglob("*"))
    train.command(config(**BASE | {"RUN_NAME": ""}), [])
    assert sorted(there.rglob("*")) == before


def test_states_that_are_those_of_another_run_are_refused(ready, monkeypatch):
    """A17."""
    interrupted(monkeypatch, ready, 5, "stopped", "other", **BASE)
    other = ready / "output/other"
    (ready / "output/again").mkdir()
    for file in other.glob("*.*"):
        shutil.copy(file, ready / "output/again")
    (ready / "output/again/state").symlink_to("../other/state")
    before = sorted(other.rglob("*"))
    with pytest.raises(
        UserError, match=r"again/state: is a symbolic link to ../other/state, and a folder of this name"
    ):
        run(ready, "again", **BASE)
    assert sorted(other.rglob("*")) == before


@pytest.mark.parametrize(
    "name", ["step-000003", ".unfinished-step-000009", ".replaced-step-000003", ".replaced-x", ".replaced-"]
)
def test_a_link_among_states_is_taken_away_and_not_followed(tmp_path, theirs, name):
    run_folder, other = tmp_path / "run", tmp_path / "other"
    (run_folder / "state").mkdir(parents=True)
    other.mkdir()
    (other / "kept").touch()
    (run_folder / "state" / name).symlink_to(other)
    train_state.states_newest_first(run_folder)
    train_state.remove_leftovers(run_folder)
    train_state.remove_newer_states(run_folder, 0)
    assert (other / "kept").exists()
    left = [path.name for path in (run_folder / "state").iterdir()]
    assert left == ([name] if name in (".replaced-x", ".replaced-") else [])


@pytest.mark.parametrize("file", ["manifest.json", "weights.safetensors"])
def test_a_fifo_in_a_state_is_reported_as_damage(tmp_path, file):
    for step in (1, 2):
        saved(tmp_path, step, keep=2)
    (tmp_path / "state/step-000002" / file).unlink()
    os.mkfifo(tmp_path / "state/step-000002" / file)
    reported = []
    assert train_state.latest_valid(tmp_path, reported.append).step == 1
    assert f"{file}: cannot be read (" in reported[0]


def test_a_fifo_as_a_sidecar_is_reported(tmp_path):
    (tmp_path / "rwkv-0.pth").touch()
    os.mkfifo(tmp_path / "rwkv-0.json")
    with pytest.raises(UserError, match="rwkv-0.json: is a FIFO"):
        sidecars.read_sidecar(tmp_path / "rwkv-0.pth", ())
    (tmp_path / "run.json").touch()
    with pytest.raises(UserError, match="rwkv-0.json: is a FIFO"):
        base_model.check_sidecar_exists(tmp_path / "rwkv-0.pth")
    assert run_dir.checkpoint_steps(tmp_path) == [] and run_dir.remove_unfinished(tmp_path, 0) is None


@pytest.mark.parametrize("tracker", run_dir.TRACKERS)
@pytest.mark.parametrize("what", ["the folder", "a link in it"])
def test_a_trackers_folder_leads_nowhere(project_folder, theirs, tracker, what):
    folder = paths.OUTPUT / "run" / tracker
    folder.parent.mkdir()
    if what == "the folder":
        folder.symlink_to(theirs.parent)
    else:
        folder.mkdir()
        (folder / "run-1").mkdir()
        (folder / "latest-run").symlink_to("run-1")  # as wandb has it
        claimed()
        (folder / "logs").symlink_to(theirs.parent)
    with pytest.raises(UserError, match="is a symbolic link to "):
        claimed()


@pytest.mark.slow
def test_whole_folders_on_another_disk_work_as_before(ready, tmp_path, monkeypatch, capsys):
    disk = tmp_path / "another disk"
    disk.mkdir()
    for folder in ("output", "data", "merge"):
        shutil.move(ready / folder, disk / folder)
        (ready / folder).symlink_to(disk / folder)
    rows = ready / "data/chat.jsonl"
    shutil.move(rows.resolve(), disk / "rows.jsonl")
    rows.symlink_to(disk / "rows.jsonl")
    tokenize(rows, OVERWRITE_CACHE="1")
    assert (disk / "data/chat.bin").is_file() and not (disk / "rows.bin").exists()
    interrupted(monkeypatch, ready, 5, "stopped", **BASE)
    shutil.move(disk / "output/again", disk / "moved")  # the run itself as well
    (disk / "output/again").symlink_to(disk / "moved")
    train.command(config(**BASE | {"RUN_NAME": ""}), [])
    assert "at step 5 of" in capsys.readouterr().out
    merge("again")
    assert list((disk / "merge").glob("tiny-*.pth"))
    assert run_dir.run_folder("") == ready / "output/again" == run_dir.latest_run()


def test_an_export_does_not_replace_a_folder_of_the_users(project_folder, monkeypatch):
    from rwkv_peft.merge import write

    (project_folder / "merge/x.gguf").mkdir()
    (project_folder / "merge/x.gguf/mine").touch()
    with write.writing_export("x", ".gguf", FileWatch("it was opened", ""), own=True) as (fresh, placed):
        fresh.write_text("new")
    assert [path.name for path in placed] == ["x-v2.gguf"] and (project_folder / "merge/x.gguf/mine").exists()


def test_an_export_of_a_folder_takes_the_place_of_a_link_and_not_of_its_target(project_folder, theirs):
    from rwkv_peft.merge import write

    other = theirs.parent / "adapter"
    other.mkdir()
    (other / "weights").write_text("same")
    (project_folder / "merge/x-peft").symlink_to(other)
    with write.writing_export("x-peft", "", FileWatch("it was opened", "")) as (fresh, placed):
        fresh.mkdir()
        (fresh / "weights").write_text("same")
    assert placed[0].name == "x-peft" and not placed[0].is_symlink() and (other / "weights").exists()


@pytest.mark.smoke(1)
@pytest.mark.parametrize(
    "name", ["chat.bin", "chat.roles.idx", "chat.report.json", "chat.lengths.png", "chat.rejects.jsonl"]
)
def test_a_folder_where_tokens_belong_is_reported_before_a_row_is_read(ready, name):
    (ready / f"data/{name}").unlink(missing_ok=True)
    (ready / f"data/{name}").mkdir()
    with pytest.raises(UserError, match=f"data/{name}: is a folder, and a file of this name"):
        tokenize(ready / "data/chat.jsonl", OVERWRITE_CACHE="1")


@pytest.mark.parametrize("name", ["chat.report.json", "chat.roles.idx", "chat.roles.bin"])
def test_what_belongs_to_tokens_and_is_a_fifo_is_not_taken_for_missing(ready, name):
    (ready / f"data/{name}").unlink()
    os.mkfifo(ready / f"data/{name}")
    with pytest.raises(UserError, match=f"{name}: .*is a FIFO"):
        train.command(config(), ["--dry-run"])


def test_a_report_that_is_a_fifo_is_made_again(ready):
    (ready / "data/chat.report.json").unlink()
    os.mkfifo(ready / "data/chat.report.json")
    tokenize(ready / "data/chat.jsonl")
    assert (ready / "data/chat.report.json").is_file()
