"""The runs in output/: a folder of its own for each, whose it is, which is the newest, and what it has saved."""

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

from . import step_log

BEST = "rwkv-best.pth"  # what was trained where the validation was best
BEFORE = "loss-before.jsonl"  # the logs of earlier runs of that name, which have saved nothing, one after another
EPOCH, STEP = re.compile(r"rwkv-([0-9]+)\.pth"), re.compile(r"rwkv-step-([0-9]+)\.pth")
# what a run's folder holds: files that lines are added to, folders, and files that are written as a whole
LINES = (step_log.FILE, BEFORE, "valid.jsonl", "samples.md")
TRACKERS = ("tensorboard", "swanlab", "wandb")
FOLDERS = ("state", *TRACKERS)
MOST_DIGITS = 18  # of the number of an epoch or a step
WHOLE = re.compile(r"run\.json|loss\.png|loss-damaged\.jsonl|init_.*\.pth|rwkv-.*\.(pth|json)", re.DOTALL)


def new_run_dir(name: str, stem: str) -> Path:
    """output/name, or for "" a folder that no run has: stem and the time."""
    if name:
        return paths.OUTPUT / name
    name = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, n = paths.OUTPUT / name, 2
    while os.path.lexists(folder):
        folder, n = paths.OUTPUT / f"{name}-{n}", n + 1
    return folder


def lock_run_dir(name: str, stem: str, cleanup: contextlib.ExitStack, goes_on: bool = False) -> Path:
    """The same, made ours until cleanup: of two runs that want one name at the same instant, one gets it. goes_on: it is an
    earlier run's, which goes on.

    The mark is a lock on the folder, which vanishes with its process, so a run that was killed blocks nobody; and one on
    loss.jsonl, for file systems that lock no folders (NFS). That alone would not do: an editor puts another file in its place.
    """
    atomic_io.make_folder(paths.OUTPUT)
    others: list[bool] = []

    def own(file: IO[Any]) -> None:
        others.append(not lock(file))

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
        except FileNotFoundError:  # who had it has just taken it away
            continue
        cleanup.callback(os.close, handle)
        locked = lock(handle)
        if not is_at(folder, handle):
            continue
        must_be_usable(folder)
        taken = not locked or (has_saved(folder) and not goes_on)
        file = None if taken else cleanup.enter_context(atomic_io.appending(folder / step_log.FILE, own=own))
        if file is None or any(others):
            message = f"{paths.display_path(folder)} has just been taken by another run; choose another name"
            if goes_on:
                message = f"{paths.display_path(folder)} is being trained at this moment, by another process"
            raise SettingErrors(SettingError("RUN_NAME", message))
        if not goes_on and os.fstat(file.fileno()).st_size:  # of a run that was ended before it had saved anything
            with atomic_io.reading(folder / step_log.FILE) as log, atomic_io.appending(folder / BEFORE, "ab") as before:
                shutil.copyfileobj(log, before)
            file.truncate(0)
        return folder


def lock(file: IO[Any] | int, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file or folder; False if another process has done so."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def is_at(path: Path, handle: int) -> bool:
    """Whether an open file or folder is still what the name leads to."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except OSError:
        return False


def must_be_usable(folder: Path) -> None:
    """UserError if something in a run's folder stands where the kit writes, and is not what it writes there."""
    for path in sorted(folder.iterdir()):
        if path.name in LINES:
            atomic_io.must_be_lines(path)
        elif path.name in FOLDERS:
            atomic_io.must_be_own_folder(path)
            if path.name in TRACKERS:
                must_lead_nowhere(path)
        elif WHOLE.fullmatch(path.name):
            atomic_io.must_not_be_folder(path)


def must_lead_nowhere(folder: Path) -> None:
    """UserError if a link in a tracker's folder leads out of it. A tracker writes to folders of its own making in there, whose
    names nobody knows before; wandb's own links in there lead to those."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{paths.display_path(path)}: is {atomic_io.what_it_is(path)}, out of the tracker's folder. Remove the link."
            )


def is_running(folder: Path) -> bool:
    """Whether a process trains this run now."""
    with contextlib.ExitStack() as opened, contextlib.suppress(OSError):  # it has no log
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        opened.callback(os.close, handle)
        if not lock(handle, fcntl.LOCK_SH):
            return True
        return not lock(opened.enter_context(atomic_io.reading(folder / step_log.FILE)), fcntl.LOCK_SH)
    return False


def has_saved(folder: Path) -> bool:
    """Whether a run has left results there, or a state to go on from. A folder of one that was ended before may be used."""
    return any(folder.glob("rwkv-*.pth")) or any(folder.glob("state/step-*"))


def point_latest(folder: Path) -> None:
    """output/latest -> the newest run. A hint for people and for merge.sh; file systems without links go without."""
    link, fresh = folder.parent / "latest", folder.parent / f".latest-{os.getpid()}"
    for left in folder.parent.glob(".latest-*"):
        number = left.name.removeprefix(".latest-")
        if left.is_symlink() and number.isdecimal() and (left == fresh or not atomic_io.alive(int(number))):
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


def latest() -> Path | None:
    """The run in output/ that output/latest leads to. None where it is no link, or leads out of output/."""
    link = paths.OUTPUT / "latest"
    try:
        target = paths.OUTPUT / os.readlink(link)
    except OSError:
        return None
    inside = target.parent.resolve() == paths.OUTPUT.resolve() and target.name not in ("..", link.name)
    return paths.OUTPUT / target.name if inside and (paths.OUTPUT / target.name).is_dir() else None


def init_file(folder: Path, method: str) -> Path:
    """Where a run keeps what its adapters began with, if its method needs that to go on or to be merged."""
    return folder / f"init_{method}.pth"


def remove_partial_files(folder: Path, ours: Callable[[], bool] = lambda: True) -> None:
    """What leaving in the middle of a save must not leave behind: half a file, or a sidecar without its checkpoint. ours: whether
    the folder is still the run's own."""
    if not ours():
        return
    for half in folder.glob(f"*.tmp-{os.getpid()}"):
        target = half.with_name(half.name.removesuffix(f".tmp-{os.getpid()}"))
        note = target.with_suffix(".json")
        # a sidecar that is younger than its whole checkpoint was renamed just now: its checkpoint follows
        if target.suffix == ".pth" and note.is_file() and note.stat().st_mtime_ns >= half.lstat().st_mtime_ns:
            half.replace(target)
        else:
            atomic_io.remove(half)
    for sidecar in folder.glob("rwkv-*.json"):
        if not sidecar.with_suffix(".pth").exists():
            sidecar.unlink()
    remove_empty_run(folder)


def remove_empty_run(folder: Path, ours: Callable[[], bool] = lambda: True) -> None:
    """Leave nothing behind of a run that never took a step, and no link to it. ours: whether the folder is still its own."""
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
    """Whether a word addresses an epoch of a run: a number, last, best or step-N."""
    number = word[5:] if word.startswith("step-") else word.lstrip("+-")
    return word in ("last", "best") or (number.isdecimal() and len(number) <= MOST_DIGITS)


def epoch_file(folder: Path, word: str = "last") -> Path:
    """The checkpoint of a run that a word addresses. UserError naming what there is."""
    if word == "last":
        return checkpoint_file(folder)
    if word == "best":
        return best_file(folder)
    if word.startswith("step-"):
        return checkpoint_file(folder, step=int(word[5:]))
    if not word.isdecimal():
        raise UserError(f"{word}: an epoch is a whole number from 0.")
    return checkpoint_file(folder, int(word))


def find(word: str, run: str = "", places: Sequence[str] = ("output",)) -> Path:
    """The one way to address a checkpoint, in every command and setting.

    word: an epoch (a number, last, best, step-N) of `run`; or a run (latest, a name in output/, or a path), for its last epoch;
    or a run and an epoch, as my-run/best; or a file. A word that can be an epoch is one: a run of such a name is addressed by
    its path, as output/7. run: a run, "" for the newest. places: the kit's folders that a file is looked for in.
    UserError if there is no such checkpoint.
    """
    if is_epoch(word):
        folder = run_folder(run)
        if not run and (paths.OUTPUT / word).is_dir():
            print(f"note: {word} is taken for an epoch; the run of that name is output/{word}", file=sys.stderr)
        return epoch_file(folder, word)
    if folder := folder_of(word):
        return checkpoint_file(folder)
    for place in places:
        if (path := paths.resolve_path(word, place)).is_file():
            return path
    head, _, tail = word.rstrip("/").rpartition("/")
    folder = folder_of(head) if head else None
    epoch = tail.removeprefix("rwkv-").removesuffix(".pth")
    if folder and is_epoch(epoch):
        return epoch_file(folder, epoch)
    if folder:
        how = "Write a run and its epoch as RUN/EPOCH; an epoch is a number, last, best or step-N."
        raise UserError(f"{word}: {paths.display_path(folder)} has no {tail}. {how}")
    raise none_of_that_name(f"{word}: there is no such run or checkpoint", word)


def folder_of(word: str) -> Path | None:
    """The folder of a run: of the newest for latest, of a name in output/, or a path. None if there is no such run."""
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


def words_for(folder: Path, epoch: str = "") -> str:
    """What to write behind ./merge.sh for an epoch of a run."""
    name = folder.name if folder.parent == paths.OUTPUT else str(folder)
    if is_epoch(name) or name.startswith("-"):
        name = f"output/{name}" if folder.parent == paths.OUTPUT else f"./{name}"
    return shlex.quote(name) + (f" {epoch}" if epoch else "")


def run_folder(name: str) -> Path:
    """The folder of a run (see find); for "" that of the newest run that has saved something. UserError if there is none."""
    if name and name.rstrip("/") not in ("latest", "output/latest"):
        folder = folder_of(name)
        if folder is None:
            raise none_of_that_name(f"RUN={name}: there is no such run", name)
        return folder
    newest = latest()
    if newest and any(list_checkpoints(newest)):
        return newest
    # the link is missing, or its run was ended before it had anything to save
    runs = [p.parent for p in paths.OUTPUT.glob("*/run.json") if any(list_checkpoints(p.parent))]
    if not runs:
        raise UserError(
            f"No run in {paths.display_path(paths.OUTPUT)}/ has saved a checkpoint yet. Train first: ./training.sh"
        )
    found = max(runs, key=lambda p: (p / "run.json").stat().st_mtime)
    if newest:
        words = f"the newest run, {paths.display_path(newest)}, has saved nothing; this is {paths.display_path(found)}"
        print(f"note: {words}", file=sys.stderr)
    return found


def none_of_that_name(words: str, name: str) -> UserError:
    """words, and which runs there are instead of the one of this name."""
    there = [p.name for p in paths.OUTPUT.glob("*") if p.is_dir() and not p.is_symlink()]
    return UserError(
        f"{words}{did_you_mean(name, there) or '.'} In {paths.display_path(paths.OUTPUT)}/ there is: {join_names(there)}."
    )


def best_file(folder: Path) -> Path:
    """What a run has kept where its validation was best. UserError if it has not."""
    if not (folder / BEST).is_file():
        raise UserError(
            f"{paths.display_path(folder)}: has no {BEST}; KEEP_BEST=1 in training.sh keeps it, if there are held-out rows."
        )
    return folder / BEST


def checkpoints(folder: Path) -> list[tuple[Path, int]]:
    """A run's checkpoints and the steps that they are of; the best one last, whose step another may share."""
    found = []
    for path in sorted(folder.glob("rwkv-*.pth"), key=lambda path: path.name == BEST):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            found.append((path, int(json_reader.load(path.with_suffix(".json"))["step"])))
    return found


def has_better_checkpoint(folder: Path, checkpoint: Path) -> bool:
    """Whether a run has kept an earlier checkpoint, of where its validation was better."""
    steps = {path.name: step for path, step in checkpoints(folder)}
    return steps.get(BEST, 0) < steps.get(checkpoint.name, 0) and BEST in steps


def list_checkpoints(folder: Path) -> tuple[list[int], list[int]]:
    """The epochs and the steps that a run has checkpoints of."""
    files = [path.name for path in folder.glob("rwkv-*.pth")]
    epochs, steps = (sorted(int(m[1]) for name in files if (m := kind.fullmatch(name))) for kind in (EPOCH, STEP))
    return epochs, steps


def checkpoint_file(folder: Path, epoch: int | None = None, step: int | None = None) -> Path:
    """The checkpoint of an epoch or a step of a run; with neither that of the last epoch, or step where no epoch has ended.
    UserError naming what there is."""
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


def drop_unfinished(folder: Path, epoch: int) -> Path | None:
    """Remove the checkpoint that was saved in the middle of an epoch when the run was stopped; returns what it was, if there is
    one."""
    file = folder / f"rwkv-{epoch}.pth"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if json_reader.load(file.with_suffix(".json")).get("epoch_finished") is False:
            file.unlink(missing_ok=True)
            file.with_suffix(".json").unlink()
            return file
    return None


def drop_old_steps(folder: Path, step: int, keep: int) -> None:
    """Remove the checkpoints of steps up to this one, but for the newest."""
    for old in [n for n in list_checkpoints(folder)[1] if n <= step][:-keep]:
        file = folder / f"rwkv-step-{old}.pth"
        file.unlink()  # first: a checkpoint without its sidecar would be a riddle
    for sidecar in folder.glob("rwkv-step-*.json"):
        if not sidecar.with_suffix(".pth").exists():
            sidecar.unlink()
