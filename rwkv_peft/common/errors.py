"""What the user can mend, and the one place where a door turns it into words and an exit code.

Floor 0: every room may raise these; only the doors catch them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from . import formatting
from .terminal import clean_output

EXIT_USER = 2  # a setting, a file or a row that the user can mend
EXIT_DISK = 3  # no space left, or a folder that cannot be written
EXIT_MEMORY = 4  # the device or the host ran out of memory
EXIT_PROCESS = 5  # another process of a training has died, or stands still
EXIT_INTERRUPTED = 130  # Ctrl-C, as shells count it (128 + SIGINT)


class UserError(Exception):
    """Something the user can mend. The message says where, what is wrong and what to do."""


@dataclass(frozen=True)
class SettingError:
    """One thing wrong with one setting."""

    name: str
    message: str


class SettingErrors(Exception):
    """Everything wrong with the settings, found before anything heavy was done."""

    def __init__(self, *problems: SettingError):
        self.problems = list(problems)
        super().__init__("; ".join(f"{p.name}: {p.message}" for p in problems))


@contextlib.contextmanager
def handle_errors(report_problems=None, lean: str = "") -> Iterator[None]:
    """Run a command; turn what the user can mend into a message and an exit code, and let real bugs show their traceback. Nothing
    that is printed on the way is obeyed by a terminal.

    report_problems: function (Problems) -> str that knows the script's line numbers; without it names alone are shown.
    lean: settings of this command with which it takes less memory.
    """
    with clean_output(), ended_in_words(report_problems, lean):
        yield


@contextlib.contextmanager
def ended_in_words(report_problems, lean: str) -> Iterator[None]:
    """What ends a command, as a message and an exit code."""
    try:
        yield
        if sys.stdout:  # (it may have been closed)
            sys.stdout.flush()
    except SettingErrors as found:
        exit_with(report_problems(found) if report_problems else str(found), EXIT_USER)
    except UserError as error:
        exit_with(str(error), EXIT_USER)
    except BrokenPipeError:
        # the reader of our output has left (| head): no message can reach it, and Python's own flush must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_USER)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("rwkv_peft", "json2binidx"):
            raise
        exit_with(
            f"The Python package {error.name} is missing. Run ./test.sh or ./quickstart.sh once: they make .venv with all "
            f"that is needed. Or: {pip_command('-r requirements.txt')}",
            EXIT_USER,
        )
    except (OSError, MemoryError, RuntimeError, ImportError) as error:
        told = describe_error(error, lean)
        if told is None:
            raise
        exit_with(*told)
    except KeyboardInterrupt:
        exit_with("\nStopped by Ctrl-C. Nothing half-written was left behind.", EXIT_INTERRUPTED)


def pip_command(packages: str) -> str:
    """The command that installs packages where this Python finds them; another `pip` may belong to another one."""
    return f"{shlex.quote(sys.executable)} -m pip install {packages}"


# what only a write can be refused for
WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# what this process has used up: it says nothing of the file
OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
WHOLE = "Earlier files are untouched"
SHARED, FEW = "/dev/shm", 16  # where processes share memory; blocks: it is full


def describe_error(error: Exception, lean: str = "") -> tuple[str, int] | None:
    """The words and the exit code for what the system, or torch in its place, has refused. None for what is none of that: a bug.
    lean: settings with which it takes less memory.
    """
    error = cause(error) or hidden(error) or error
    # (each thread has a stack: where memory is limited, there is no room for another one)
    memory = [errno.ENOMEM, *([errno.EAGAIN] if limit(resource.RLIMIT_AS) is not None else [])]
    if isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno in memory:
        return describe_memory(lean), EXIT_MEMORY
    if isinstance(error, OSError):
        return describe_os_error(error)
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return f"Out of GPU memory: {text.partition(chr(10))[0]}", EXIT_MEMORY
    if dead := re.match(
        r"DataLoader worker \(pid\(?s?\)? .*?\) (?:is killed by signal: (.*?)\.|exited unexpectedly)", text
    ):
        return describe_worker(dead[1] or ""), EXIT_PROCESS
    return None


def cause(error: BaseException) -> OSError | MemoryError | None:
    """What the system has refused, where torch or Python tell it in words of their own; None where it is something else."""
    if isinstance(error, (OSError, MemoryError)):
        return error
    text = str(error)
    if isinstance(error, ImportError) and (
        file := re.match(r"(\S+): (failed to map segment|.*: Too many open files)", text)
    ):
        number = errno.EMFILE if file[2].endswith("files") else errno.ENOMEM
        return OSError(number, os.strerror(number), file[1])
    # (a GPU has an exception of its own)
    if re.search(r"can't allocate memory|not enough memory: you tried|std::bad_alloc", text) and "CUDA" not in text:
        return MemoryError(text)
    if "can't start new thread" in text:
        return OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    # as in: unable to mmap 40 bytes from file </a/b>: Cannot allocate memory (12)
    for words_, number in re.findall(r": ([^:\n]+) \((\d+)\)", text):
        if words_ == os.strerror(int(number)):
            file = re.search(r"<([^<>]+)>", text)
            return OSError(int(number), words_, *([file[1]] if file else []))
    return None


# what a process has come to the end of: it explains whatever else goes wrong while that is tidied up
ENDS = (*WRITING, *OURS, errno.EAGAIN, errno.EIO)


def hidden(error: BaseException) -> OSError | MemoryError | None:
    """What the system had refused before this error came: Lightning, as it tidies up, raises one that says nothing of it."""
    before = error.__context__
    while before:
        first, before = cause(before), before.__context__
        if isinstance(first, MemoryError) or first and first.errno in ENDS:
            return first
    return None


def in_words(error: Exception) -> str:
    """The words for an error after which the command continues."""
    told = None if isinstance(error, (UserError, SettingErrors)) else describe_error(error)
    return told[0] if told else str(error)


def limit(kind: int) -> int | None:
    """How much of something this process may have (a number of the module resource), if that is limited."""
    most = resource.getrlimit(kind)[0]
    return None if most == resource.RLIM_INFINITY else most


def describe_memory(lean: str = "") -> str:
    """Why no memory was given, and what to do."""
    for kind, option in ((resource.RLIMIT_AS, "-v"), (resource.RLIMIT_DATA, "-d")):
        if (most := limit(kind)) is not None:
            how = f"lower {lean}, or start it" if lean else "start it"
            why = f"this shell lets a program have {formatting.format_size(most)} (ulimit {option})"
            return f"Out of memory: {why}. To mend it, {how} in a shell without that limit."
    return f"Out of memory: the system has no more to give. Close other programs{f', or lower {lean}' if lean else ''}."


def describe_worker(signal: str) -> str:
    """signal: the words for what has ended a process that prepares batches; "" where that is not known."""
    how, cure = f"was ended by a signal ({signal})" if signal else "has ended", "NUM_WORKERS=0 needs none"
    if signal == "Bus error":
        how += f": {SHARED} is full ({room_in(SHARED)}), or a data file was cut off while it was read"
        cure += f", and docker run --shm-size=8g makes {SHARED} larger"
    elif signal in ("", "Killed"):
        how += ", most likely by the system because memory ran out (dmesg tells)"
    return f"A process that prepares batches {how}. {cure}."


def room_in(folder: str) -> str:
    there = os.statvfs(folder)
    free, of = (formatting.format_size(blocks * there.f_frsize) for blocks in (there.f_bavail, there.f_blocks))
    return f"{free} of {of} are free now"


def describe_os_error(error: OSError) -> tuple[str, int]:
    """The words and the exit code for what the operating system refused."""
    number, file = error.errno, "" if error.filename in (None, b"") else str(error.filename)
    file = re.sub(r"(\.tmp-\d+)+$", "", file)  # while it is written
    if number in WRITING:
        return {errno.ENOSPC: no_room, errno.EDQUOT: no_quota, errno.EFBIG: too_large}[number](file), EXIT_DISK
    if number == errno.EROFS:
        return f"{file or 'The disk'}: {error.strerror}. Nothing can be written there; use another disk.", EXIT_DISK
    if number in (errno.EACCES, errno.EPERM):
        return f"{file}: {error.strerror}. The folder or file cannot be used with your rights.", EXIT_DISK
    if number == errno.ENOENT and file:
        return f"{file}: there is no such file.", EXIT_USER
    if number == errno.ENAMETOOLONG:
        return f"{file[:60]}...: this name is too long for the file system.", EXIT_USER
    if number == errno.EMFILE:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (
            f"{file or 'A file'}: {most[0]} files may be open at once in this shell. {raised('-n', *most)}",
            EXIT_USER,
        )
    if number == errno.EAGAIN:
        most = resource.getrlimit(resource.RLIMIT_NPROC)
        how = "No further process or thread can be started. Close other programs, or raise their number"
        return (
            f"{how} (ulimit -u: it is {'unlimited' if most[0] == resource.RLIM_INFINITY else most[0]} here).",
            EXIT_USER,
        )
    cures = {
        errno.ENFILE: ("the whole system has as many files open as it can. Close other programs", EXIT_USER),
        errno.EIO: (
            "the disk or the share could not read or write it. Look at dmesg, and copy what is there",
            EXIT_DISK,
        ),
        errno.ESTALE: (
            "the share that it is on has gone, or has another file there now. Mount the share again",
            EXIT_DISK,
        ),
        errno.ELOOP: ("is a link that leads to itself. Delete the link, and name the file", EXIT_USER),
        errno.EMLINK: ("its folder cannot hold more. Use another folder", EXIT_DISK),
        errno.EISDIR: ("is a folder, where a file is wanted", EXIT_USER),
        errno.ENOTDIR: ("a part of this path is a file, not a folder", EXIT_USER),
    }
    told, code = cures.get(number or 0, (error.strerror or str(error), EXIT_USER))
    return f"{file or 'The system'}: {told}.", code


def no_room(file: str) -> str:
    where = f" while writing {file}" if file else ""
    with contextlib.suppress(OSError):
        # (torch's names for it have no folder; locks have no name)
        if file.startswith("/torch_") or not file and os.statvfs(SHARED).f_bavail <= FEW:
            why = f"in {SHARED}, where processes share memory ({room_in(SHARED)})"
            return f"No space left {why}. NUM_WORKERS=0 needs none, and docker run --shm-size=8g makes it larger."
        there = os.statvfs(os.path.dirname(file) or ".")
        room = formatting.format_size(there.f_bavail * there.f_frsize)
        if there.f_files and not there.f_favail and there.f_bavail:
            why = f"its inodes are used up, though {room} are free (df -i tells)"
            return f"The disk can hold no further file{where}: {why}. {WHOLE}; delete some files and run it again."
    return f"No space left on the disk{where}. {WHOLE}; free some space and run it again."


def no_quota(file: str) -> str:
    where = f" while writing {file}" if file else ""
    return (
        f"Your quota on the disk is used up{where} (quota -s tells). {WHOLE}; delete files of yours, or ask for more."
    )


def too_large(file: str) -> str:
    most = limit(resource.RLIMIT_FSIZE)
    if most is None:
        why = "is larger than its file system takes (FAT takes 4 GB). Use another disk"
    else:
        most_words = formatting.format_size(most)
        why = f"is larger than this shell lets a file be: {most_words} (ulimit -f). Start it in a shell without that limit"
    return f"{file or 'A file'}: {why}. {WHOLE}."


def raised(option: str, soft: int, hard: int) -> str:
    """How to raise a limit of the shell."""
    if hard == resource.RLIM_INFINITY or hard > soft:
        more = max(4096, 2 * soft)
        return f"Raise that: ulimit {option} {more if hard == resource.RLIM_INFINITY else min(hard, more)}."
    return f"Start it in another shell: this one cannot raise that (ulimit {option})."


def exit_with(message: str, code: int) -> None:
    with ignore_closed_pipe():
        if sys.stdout:
            sys.stdout.flush()  # what was said before comes before it, where both go into one file
        print(formatting.readable(message), file=sys.stderr, flush=True)
    sys.unraisablehook = lambda _: (
        None
    )  # the cause is reported: errors of half-made objects as Python exits add nothing
    sys.exit(code)


@contextlib.contextmanager
def ignore_closed_pipe() -> Iterator[None]:
    """Say something even if nobody listens any more (a closed terminal, | head): work goes on, in silence from here."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EPIPE):
            raise
        with open(os.devnull, "wb") as nowhere:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(nowhere.fileno(), stream.fileno())
