"""Run folders in output/: a new one for each run, locks, the newest run, and the checkpoints that a run has saved."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from rwkv_peft.common import atomic_io, json_reader, paths
from rwkv_peft.common.errors import SettingError, SettingErrors, UserError
from rwkv_peft.common.formatting import did_you_mean, join_names
from rwkv_peft.common.trackers import TRACKERS

from . import step_log

BEST = "rwkv-best.pth"  # the checkpoint with the best validation loss
BEFORE = "loss-before.jsonl"  # the logs of earlier runs of that name that saved nothing, appended
EPOCH, STEP = re.compile(r"rwkv-([0-9]+)\.pth"), re.compile(r"rwkv-step-([0-9]+)\.pth")
# the content of a run folder: files that lines are added to, folders, and files that are written as a whole
LINES = (step_log.FILE, BEFORE, "valid.jsonl", "samples.md")
FOLDERS = ("state", *TRACKERS)
MOST_DIGITS = 18  # of the number of an epoch or a step
WHOLE = re.compile(r"run\.json|loss\.png|loss-damaged\.jsonl|init_.*\.pth|rwkv-.*\.(pth|json)", re.DOTALL)


def new_run_dir(name: str, stem: str) -> Path:
    """Return output/name; for "" a folder that no run has: stem and the time."""
    if name:
        return paths.OUTPUT / name
    name = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, n = paths.OUTPUT / name, 2
    while os.path.lexists(folder):
        folder, n = paths.OUTPUT / f"{name}-{n}", n + 1
    return folder


def lock_run_dir(name: str, stem: str, cleanup: contextlib.ExitStack, goes_on: bool = False) -> Path:
    """Create or reuse a run folder and lock it until cleanup: of two runs that want one name at once, one gets it.

    There is a lock on the folder, which vanishes with its process, so a run that was killed blocks no other; and one
    on loss.jsonl, for file systems that do not lock folders (NFS). The second alone would not be enough: an editor
    puts another file in its place.

    Args:
        name: RUN_NAME; "" for a name from `stem` and the time.
        stem: begins the name.
        cleanup: releases the locks.
        goes_on: an earlier run resumes in this folder.

    Raises:
        SettingErrors: another run has the folder.
    """
    atomic_io.make_folder(paths.OUTPUT)
    others: list[bool] = []

    def own(file: IO[Any]) -> None:
        others.append(not lock_file(file))

    while True:
        folder = new_run_dir(name, stem)
        if name:
            atomic_io.make_folder(folder)
        else:
            try:
                folder.mkdir()
            except FileExistsError:  # another run without a name was faster
                continue
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:  # its owner has just removed it
            continue
        cleanup.callback(os.close, handle)
        locked = lock_file(handle)
        if not is_same_file(folder, handle):
            continue
        check_run_paths(folder)
        taken = not locked or (has_saved(folder) and not goes_on)
        file = None if taken else cleanup.enter_context(atomic_io.open_append(folder / step_log.FILE, own=own))
        if file is None or any(others):
            message = f"{paths.display_path(folder)} has just been taken by another run; choose another name"
            if goes_on:
                message = f"{paths.display_path(folder)} is being trained at this moment, by another process"
            raise SettingErrors(SettingError("RUN_NAME", message))
        if not goes_on and os.fstat(file.fileno()).st_size:  # of a run that ended before it saved anything
            with (
                atomic_io.open_regular(folder / step_log.FILE) as log,
                atomic_io.open_append(folder / BEFORE, "ab") as before,
            ):
                shutil.copyfileobj(log, before)
            file.truncate(0)
        return folder


def lock_file(file: IO[Any] | int, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file or folder. Return False if another process has locked it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def is_same_file(path: Path, handle: int) -> bool:
    """Return whether an open file or folder is still what the path leads to."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except OSError:
        return False


def check_run_paths(folder: Path) -> None:
    """Check that everything in a run folder under a name that the kit writes is of the kind that it writes.

    Raises:
        UserError: it is not.
    """
    for path in sorted(folder.iterdir()):
        if path.name in LINES:
            atomic_io.check_line_file(path)
        elif path.name in FOLDERS:
            atomic_io.check_own_folder(path)
            if path.name in TRACKERS:
                check_tracker_links(path)
        elif WHOLE.fullmatch(path.name):
            atomic_io.check_not_folder(path)


def check_tracker_links(folder: Path) -> None:
    """Check that no link in a tracker's folder leads out of it.

    A tracker writes to folders that it makes in there, whose names are not known before; wandb's own links in there
    lead to those.

    Raises:
        UserError: one does.
    """
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{paths.display_path(path)}: is {atomic_io.describe_kind(path)}, out of the tracker's folder. Remove the link."
            )


def is_running(folder: Path) -> bool:
    """Return whether a process is training this run."""
    with contextlib.ExitStack() as opened, contextlib.suppress(OSError):  # it has no log
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        opened.callback(os.close, handle)
        if not lock_file(handle, fcntl.LOCK_SH):
            return True
        return not lock_file(opened.enter_context(atomic_io.open_regular(folder / step_log.FILE)), fcntl.LOCK_SH)
    return False


def has_saved(folder: Path) -> bool:
    """Return whether a run has saved a checkpoint or a state. The folder of one that ended before may be reused."""
    return any(folder.glob("rwkv-*.pth")) or any(folder.glob("state/step-*"))


def point_latest(folder: Path) -> None:
    """Point output/latest to the newest run.

    A hint for people and for merge.sh; it is left out on file systems without links.
    """
    link, fresh = folder.parent / "latest", folder.parent / f".latest-{os.getpid()}"
    for left in folder.parent.glob(".latest-*"):
        number = left.name.removeprefix(".latest-")
        if left.is_symlink() and number.isdecimal() and (left == fresh or not atomic_io.is_alive(int(number))):
            left.unlink(missing_ok=True)
    try:
        fresh.symlink_to(folder.name)
        os.replace(fresh, link)
    except OSError:
        if fresh.is_symlink():
            fresh.unlink()
        if link.is_dir() and not link.is_symlink():
            words = "is a folder, and not the link to the newest run: rename it, or remove it"
            print(f"note: {paths.display_path(link)} {words}", file=sys.stderr)


def latest_run() -> Path | None:
    """Return the run that output/latest leads to; None if that is not a link, or leads out of output/."""
    link = paths.OUTPUT / "latest"
    try:
        target = paths.OUTPUT / os.readlink(link)
    except OSError:
        return None
    inside = target.parent.resolve() == paths.OUTPUT.resolve() and target.name not in ("..", link.name)
    return paths.OUTPUT / target.name if inside and (paths.OUTPUT / target.name).is_dir() else None


def init_file(folder: Path, method: str) -> Path:
    """Return where a run keeps the initial tensors of its adapters, if its method needs them to resume or to merge."""
    return folder / f"init_{method}.pth"


def remove_partial_files(folder: Path, ours: Callable[[], bool] = lambda: True) -> None:
    """Remove what an interrupted save leaves: an incomplete file, or a sidecar without its checkpoint.

    Args:
        folder: of the run.
        ours: whether the folder is still the run's own.
    """
    if not ours():
        return
    for half in folder.glob(f"*.tmp-{os.getpid()}"):
        target = half.with_name(half.name.removesuffix(f".tmp-{os.getpid()}"))
        note = target.with_suffix(".json")
        # a sidecar that is newer than its complete checkpoint was just renamed: its checkpoint follows
        if target.suffix == ".pth" and note.is_file() and note.stat().st_mtime_ns >= half.lstat().st_mtime_ns:
            half.replace(target)
        else:
            atomic_io.remove_path(half)
    for sidecar in folder.glob("rwkv-*.json"):
        if not sidecar.with_suffix(".pth").exists():
            sidecar.unlink()
    remove_empty_run(folder)


def remove_empty_run(folder: Path, ours: Callable[[], bool] = lambda: True) -> None:
    """Remove a run that never took a step, and the link to it.

    Args:
        folder: of the run.
        ours: whether the folder is still the run's own.
    """
    if not ours():
        return
    log = folder / step_log.FILE
    if log.is_file() and not log.stat().st_size and not has_saved(folder):
        log.unlink()
        (folder / "run.json").unlink(missing_ok=True)
        for tracker in TRACKERS:
            shutil.rmtree(folder / tracker, ignore_errors=True)
        with contextlib.suppress(OSError):  # something else is in it
            folder.rmdir()
            if os.readlink(paths.OUTPUT / "latest") == folder.name:
                (paths.OUTPUT / "latest").unlink()


def is_epoch(word: str) -> bool:
    """Return whether a word addresses a checkpoint of a run: a number, last, best or step-N."""
    number = word[5:] if word.startswith("step-") else word.lstrip("+-")
    return word in ("last", "best") or (number.isdecimal() and len(number) <= MOST_DIGITS)


def epoch_file(folder: Path, word: str = "last") -> Path:
    """Return the checkpoint of a run that a word addresses.

    Raises:
        UserError: there is none; the message lists those there are.
    """
    if word == "last":
        return checkpoint_file(folder)
    if word == "best":
        return best_checkpoint(folder)
    if word.startswith("step-"):
        return checkpoint_file(folder, step=int(word[5:]))
    if not word.isdecimal():
        raise UserError(f"{word}: an epoch is a whole number from 0.")
    return checkpoint_file(folder, int(word))


def find_checkpoint(word: str, run: str = "", places: Sequence[str] = ("output",)) -> Path:
    """Find a checkpoint by its address, the same in every command and setting.

    Args:
        word: an epoch (a number, last, best, step-N) of `run`; or a run (latest, a name in output/, or a path), for
            its last epoch; or a run and an epoch, as my-run/best; or a file. A word that can be an epoch is one: a run
            of such a name is addressed by its path, as output/7.
        run: a run, "" for the newest.
        places: the kit's folders in which a file is searched.

    Raises:
        UserError: there is no such checkpoint.
    """
    if is_epoch(word):
        folder = run_folder(run)
        if not run and (paths.OUTPUT / word).is_dir():
            print(f"note: {word} is taken for an epoch; the run of that name is output/{word}", file=sys.stderr)
        return epoch_file(folder, word)
    if named := find_run_folder(word):
        return checkpoint_file(named)
    for place in places:
        if (path := paths.resolve_path(word, place)).is_file():
            return path
    head, _, tail = word.rstrip("/").rpartition("/")
    run_dir = find_run_folder(head) if head else None
    epoch = tail.removeprefix("rwkv-").removesuffix(".pth")
    if run_dir and is_epoch(epoch):
        return epoch_file(run_dir, epoch)
    if run_dir:
        how = "Write a run and its epoch as RUN/EPOCH; an epoch is a number, last, best or step-N."
        raise UserError(f"{word}: {paths.display_path(run_dir)} has no {tail}. {how}")
    raise unknown_run_error(f"{word}: there is no such run or checkpoint", word)


def find_run_folder(word: str) -> Path | None:
    """Return the folder of a run; None if there is no such run.

    Args:
        word: latest for the newest run, a name in output/, or a path.
    """
    if word.rstrip("/") in ("latest", "output/latest", str(paths.OUTPUT / "latest")):
        return run_folder("")
    literal = paths.OUTPUT / word
    if "/" not in word and word not in ("", ".", "..") and literal.is_dir():
        return literal
    path = paths.resolve_path(word, "output")
    is_one = path.is_dir() and (
        path.parent == paths.OUTPUT or (path / "run.json").is_file() or any(list_checkpoints(path))
    )
    return path if is_one else None


def merge_arguments(folder: Path, epoch: str = "") -> str:
    """Return the arguments of ./merge.sh for an epoch of a run."""
    name = folder.name if folder.parent == paths.OUTPUT else str(folder)
    if is_epoch(name) or name.startswith("-"):
        name = f"output/{name}" if folder.parent == paths.OUTPUT else f"./{name}"
    return shlex.quote(name) + (f" {epoch}" if epoch else "")


def run_folder(name: str) -> Path:
    """Return the folder of a run (see `find`); for "" that of the newest run that has saved something.

    Raises:
        UserError: there is none.
    """
    if name and name.rstrip("/") not in ("latest", "output/latest"):
        if folder := find_run_folder(name):
            return folder
        raise unknown_run_error(f"RUN={name}: there is no such run", name)
    newest = latest_run()
    if newest and any(list_checkpoints(newest)):
        return newest
    # the link is missing, or its run ended before it saved anything
    runs = [p.parent for p in paths.OUTPUT.glob("*/run.json") if any(list_checkpoints(p.parent))]
    if not runs:
        raise UserError(
            f"No run in {paths.display_path(paths.OUTPUT)}/ has saved a checkpoint yet. Train first: ./training.sh"
        )
    newest_saved = max(runs, key=lambda p: (p / "run.json").stat().st_mtime)
    if newest:
        words = f"the newest run, {paths.display_path(newest)}, has saved nothing; this is {paths.display_path(newest_saved)}"
        print(f"note: {words}", file=sys.stderr)
    return newest_saved


def unknown_run_error(words: str, name: str) -> UserError:
    """Return an error that begins with `words` and lists the runs there are."""
    there = [p.name for p in paths.OUTPUT.glob("*") if p.is_dir() and not p.is_symlink()]
    return UserError(
        f"{words}{did_you_mean(name, there) or '.'} In {paths.display_path(paths.OUTPUT)}/ there is: {join_names(there)}."
    )


def best_checkpoint(folder: Path) -> Path:
    """Return the checkpoint of a run with the best validation loss.

    Raises:
        UserError: the run has kept none.
    """
    if not (folder / BEST).is_file():
        raise UserError(
            f"{paths.display_path(folder)}: has no {BEST}; KEEP_BEST=1 in training.sh keeps it, if there are held-out rows."
        )
    return folder / BEST


def checkpoint_steps(folder: Path) -> list[tuple[Path, int]]:
    """Return a run's checkpoints and their steps. The best one, which may share its step with another, comes last."""
    files = []
    for path in sorted(folder.glob("rwkv-*.pth"), key=lambda path: path.name == BEST):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            files.append((path, int(json_reader.load_json(path.with_suffix(".json"))["step"])))
    return files


def has_better_checkpoint(folder: Path, checkpoint: Path) -> bool:
    """Return whether a run has kept an earlier checkpoint with a better validation loss."""
    steps = {path.name: step for path, step in checkpoint_steps(folder)}
    return steps.get(BEST, 0) < steps.get(checkpoint.name, 0) and BEST in steps


def list_checkpoints(folder: Path) -> tuple[list[int], list[int]]:
    """Return the epochs and the steps that a run has checkpoints of."""
    files = [path.name for path in folder.glob("rwkv-*.pth")]
    epochs, steps = (sorted(int(m[1]) for name in files if (m := kind.fullmatch(name))) for kind in (EPOCH, STEP))
    return epochs, steps


def checkpoint_file(folder: Path, epoch: int | None = None, step: int | None = None) -> Path:
    """Return the checkpoint of an epoch or of a step.

    With neither it is that of the last epoch, or of the last step if no epoch has ended.

    Raises:
        UserError: there is none; the message lists those there are.
    """
    epochs, steps = list_checkpoints(folder)
    if not epochs and not steps:
        raise UserError(f"{paths.display_path(folder)}: this run has saved no checkpoint yet.")
    if epoch is None and step is None:
        epoch, step = (epochs[-1], None) if epochs else (None, steps[-1])
    name = f"rwkv-{epoch}.pth" if step is None else f"rwkv-step-{step}.pth"
    if (epoch if step is None else step) not in (epochs if step is None else steps):
        there = [f"{what} {join_names(map(str, n))}" for what, n in (("the epochs", epochs), ("the steps", steps)) if n]
        raise UserError(f"{paths.display_path(folder)}: has no {name}; it has {' and '.join(there)}.")
    return folder / name


def remove_unfinished(folder: Path, epoch: int) -> Path | None:
    """Remove the checkpoint that was saved within an epoch when the run was stopped.

    Returns:
        Its path, None if there was none.
    """
    file = folder / f"rwkv-{epoch}.pth"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if json_reader.load_json(file.with_suffix(".json")).get("epoch_finished") is False:
            file.unlink(missing_ok=True)
            file.with_suffix(".json").unlink()
            return file
    return None


def remove_old_steps(folder: Path, step: int, keep: int) -> None:
    """Remove the checkpoints of steps up to this one, except the newest `keep`."""
    for old in [n for n in list_checkpoints(folder)[1] if n <= step][:-keep]:
        file = folder / f"rwkv-step-{old}.pth"
        file.unlink()  # first: an orphaned sidecar is harmless, an orphaned checkpoint is not
    for sidecar in folder.glob("rwkv-step-*.json"):
        if not sidecar.with_suffix(".pth").exists():
            sidecar.unlink()
