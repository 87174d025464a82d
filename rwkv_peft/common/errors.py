"""Errors that the user can fix, and the place where a command turns them into a message and an exit code.

Every package may raise them; only the commands in cli/ catch them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from . import formatting
from .terminal import clean_output

EXIT_USER = 2  # a setting, a file or a row that the user can fix
EXIT_DISK = 3  # no space left, or a folder that cannot be written
EXIT_MEMORY = 4  # the device or the host ran out of memory
EXIT_PROCESS = 5  # another process of a training has died or is stalled
EXIT_INTERRUPTED = 130  # Ctrl-C, as shells count it (128 + SIGINT)


class UserError(Exception):
    """Something that the user can fix. The message says where, what is wrong and what to do."""


@dataclass(frozen=True)
class SettingError:
    """One thing wrong with one setting."""

    name: str
    message: str


class SettingErrors(Exception):
    """Everything wrong with the settings; raised before anything heavy is done."""

    def __init__(self, *problems: SettingError):
        self.problems = list(problems)
        super().__init__("; ".join(f"{p.name}: {p.message}" for p in problems))


@contextlib.contextmanager
def handle_errors(report_problems: Callable[[SettingErrors], str] = str, lean: str = "") -> Iterator[None]:
    """Run a command: print what the user can fix as a message and exit with a code; let bugs show their traceback.

    What is printed meanwhile is cleaned of control characters for the terminal.

    Args:
        report_problems: writes the message for wrong settings, with the line numbers of the script; by default only
            with their names.
        lean: settings that make this command use less memory if they are lowered.
    """
    with clean_output(), _exit_on_error(report_problems, lean):
        yield


@contextlib.contextmanager
def _exit_on_error(report_problems: Callable[[SettingErrors], str], lean: str) -> Iterator[None]:
    try:
        yield
        if sys.stdout:  # (it may have been closed)
            sys.stdout.flush()
    except SettingErrors as error:
        exit_with(report_problems(error), EXIT_USER)
    except UserError as error:
        exit_with(str(error), EXIT_USER)
    except BrokenPipeError:
        # the reader of our output has exited (| head): no message can reach it, and Python's own flush must not raise
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
        described = describe_error(error, lean)
        if described is None:
            raise
        exit_with(*described)
    except KeyboardInterrupt:
        exit_with("\nStopped by Ctrl-C. Nothing half-written was left behind.", EXIT_INTERRUPTED)


def pip_command(packages: str) -> str:
    """Return the command that installs packages for this Python; `pip` alone may belong to another one."""
    return f"{shlex.quote(sys.executable)} -m pip install {packages}"


WRITE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # only a write can fail with these
EXHAUSTED_ERRNOS = (
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
)  # a resource of this process is used up: they say nothing about the file
_UNTOUCHED = "Earlier files are untouched"
_SHARED_MEMORY = "/dev/shm"  # where processes share memory ...
_FULL = 16  # ... which is full if so few blocks are free


def describe_error(error: BaseException, lean: str = "") -> tuple[str, int] | None:
    """Describe what the system, or torch on its behalf, has refused.

    Args:
        error: any error.
        lean: settings that make the command use less memory.

    Returns:
        The message and the exit code; None for any other error: a bug.
    """
    error = find_system_error(error) or _earlier_system_error(error) or error
    # (each thread has a stack: where memory is limited, there is no room for another one)
    memory = [errno.ENOMEM, *([errno.EAGAIN] if resource_limit(resource.RLIMIT_AS) is not None else [])]
    if isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno in memory:
        return describe_out_of_memory(lean), EXIT_MEMORY
    if isinstance(error, OSError):
        return describe_os_error(error)
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return f"Out of GPU memory: {text.partition(chr(10))[0]}", EXIT_MEMORY
    worker = r"DataLoader worker \(pid\(?s?\)? .*?\) (?:is killed by signal: (.*?)\.|exited unexpectedly)"
    if dead := re.match(worker, text):
        return _describe_dead_worker(dead[1] or ""), EXIT_PROCESS
    return None


def find_system_error(error: BaseException) -> OSError | MemoryError | None:
    """Return the system's error that torch or Python report as another one; None for any other error."""
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
    for words, digits in re.findall(r": ([^:\n]+) \((\d+)\)", text):
        if words == os.strerror(int(digits)):
            file = re.search(r"<([^<>]+)>", text)
            return OSError(int(digits), words, *([file[1]] if file else []))
    return None


# a used-up resource: it explains whatever else fails during the clean-up
_EXHAUSTED_ERRNOS = (*WRITE_ERRNOS, *EXHAUSTED_ERRNOS, errno.EAGAIN, errno.EIO)


def _earlier_system_error(error: BaseException) -> OSError | MemoryError | None:
    """Return the system's error before this one: when Lightning cleans up, it raises one that does not mention it."""
    before = error.__context__
    while before:
        first, before = find_system_error(before), before.__context__
        if isinstance(first, MemoryError) or first and first.errno in _EXHAUSTED_ERRNOS:
            return first
    return None


def describe_nonfatal(error: Exception) -> str:
    """Return the message for an error after which the command continues."""
    described = None if isinstance(error, (UserError, SettingErrors)) else describe_error(error)
    return described[0] if described else str(error)


def resource_limit(kind: int) -> int | None:
    """Return how much of a resource (a number of the module `resource`) this process may use; None if it has no limit."""
    most = resource.getrlimit(kind)[0]
    return None if most == resource.RLIM_INFINITY else most


def describe_out_of_memory(lean: str = "") -> str:
    """Return why no memory could be allocated, and what to do; `lean`: settings to lower."""
    for kind, option in ((resource.RLIMIT_AS, "-v"), (resource.RLIMIT_DATA, "-d")):
        if (most := resource_limit(kind)) is not None:
            how = f"lower {lean}, or start it" if lean else "start it"
            why = f"this shell lets a program have {formatting.format_size(most)} (ulimit {option})"
            return f"Out of memory: {why}. To mend it, {how} in a shell without that limit."
    return f"Out of memory: the system has no more to give. Close other programs{f', or lower {lean}' if lean else ''}."


def _describe_dead_worker(signal: str) -> str:
    """signal: the description of the one that ended a process that prepares batches; "" if unknown."""
    how = f"was ended by a signal ({signal})" if signal else "has ended"
    advice = "NUM_WORKERS=0 needs none"
    if signal == "Bus error":
        how += (
            f": {_SHARED_MEMORY} is full ({_free_space(_SHARED_MEMORY)}), or a data file was cut off while it was read"
        )
        advice += f", and docker run --shm-size=8g makes {_SHARED_MEMORY} larger"
    elif signal in ("", "Killed"):
        how += ", most likely by the system because memory ran out (dmesg tells)"
    return f"A process that prepares batches {how}. {advice}."


def _free_space(folder: str) -> str:
    disk = os.statvfs(folder)
    free, total = (formatting.format_size(blocks * disk.f_frsize) for blocks in (disk.f_bavail, disk.f_blocks))
    return f"{free} of {total} are free now"


_OTHER_ERRORS = {
    errno.ENFILE: "the whole system has as many files open as it can. Close other programs",
    errno.EIO: "the disk or the share could not read or write it. Look at dmesg, and copy what is there",
    errno.ESTALE: "the share that it is on has gone, or has another file there now. Mount the share again",
    errno.ELOOP: "is a link that leads to itself. Delete the link, and name the file",
    errno.EMLINK: "its folder cannot hold more. Use another folder",
    errno.EISDIR: "is a folder, where a file is wanted",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
}


def describe_os_error(error: OSError) -> tuple[str, int]:
    """Return the message and the exit code for what the operating system refused."""
    number, file = error.errno, "" if error.filename in (None, b"") else str(error.filename)
    file = re.sub(r"(\.tmp-\d+)+$", "", file)  # while it is written
    if number == errno.ENOSPC:
        return _describe_no_space(file), EXIT_DISK
    if number == errno.EDQUOT:
        where = f" while writing {file}" if file else ""
        advice = "delete files of yours, or ask for more"
        return f"Your quota on the disk is used up{where} (quota -s tells). {_UNTOUCHED}; {advice}.", EXIT_DISK
    if number == errno.EFBIG:
        return _describe_too_large(file), EXIT_DISK
    if number == errno.EROFS:
        return f"{file or 'The disk'}: {error.strerror}. Nothing can be written there; use another disk.", EXIT_DISK
    if number in (errno.EACCES, errno.EPERM):
        return f"{file}: {error.strerror}. The folder or file cannot be used with your rights.", EXIT_DISK
    if number == errno.ENOENT and file:
        return f"{file}: there is no such file.", EXIT_USER
    if number == errno.ENAMETOOLONG:
        return f"{file[:60]}...: this name is too long for the file system.", EXIT_USER
    if number == errno.EMFILE:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        how = _how_to_raise("-n", soft, hard)
        return f"{file or 'A file'}: {soft} files may be open at once in this shell. {how}", EXIT_USER
    if number == errno.EAGAIN:
        most = resource_limit(resource.RLIMIT_NPROC)
        how = "No further process or thread can be started. Close other programs, or raise their number"
        return f"{how} (ulimit -u: it is {'unlimited' if most is None else most} here).", EXIT_USER
    message = _OTHER_ERRORS.get(number or 0, error.strerror or str(error))
    code = EXIT_DISK if number in (errno.EIO, errno.ESTALE, errno.EMLINK) else EXIT_USER
    return f"{file or 'The system'}: {message}.", code


def _describe_no_space(file: str) -> str:
    where = f" while writing {file}" if file else ""
    with contextlib.suppress(OSError):
        # (torch's names for it have no folder; locks have no name)
        if file.startswith("/torch_") or not file and os.statvfs(_SHARED_MEMORY).f_bavail <= _FULL:
            why = f"in {_SHARED_MEMORY}, where processes share memory ({_free_space(_SHARED_MEMORY)})"
            return f"No space left {why}. NUM_WORKERS=0 needs none, and docker run --shm-size=8g makes it larger."
        disk = os.statvfs(os.path.dirname(file) or ".")
        room = formatting.format_size(disk.f_bavail * disk.f_frsize)
        if disk.f_files and not disk.f_favail and disk.f_bavail:
            why = f"its inodes are used up, though {room} are free (df -i tells)"
            return f"The disk can hold no further file{where}: {why}. {_UNTOUCHED}; delete some files and run it again."
    return f"No space left on the disk{where}. {_UNTOUCHED}; free some space and run it again."


def _describe_too_large(file: str) -> str:
    most = resource_limit(resource.RLIMIT_FSIZE)
    if most is None:
        why = "is larger than its file system takes (FAT takes 4 GB). Use another disk"
    else:
        size = formatting.format_size(most)
        why = f"is larger than this shell lets a file be: {size} (ulimit -f). Start it in a shell without that limit"
    return f"{file or 'A file'}: {why}. {_UNTOUCHED}."


def _how_to_raise(option: str, soft: int, hard: int) -> str:
    if hard == resource.RLIM_INFINITY or hard > soft:
        more = max(4096, 2 * soft)
        return f"Raise that: ulimit {option} {more if hard == resource.RLIM_INFINITY else min(hard, more)}."
    return f"Start it in another shell: this one cannot raise that (ulimit {option})."


def exit_with(message: str, code: int) -> NoReturn:
    """Print a message to standard error and exit."""
    with ignore_closed_pipe():
        if sys.stdout:
            sys.stdout.flush()  # keeps the order of both streams where they go into one file
        print(formatting.printable(message), file=sys.stderr, flush=True)
    # the cause is reported: errors of half-made objects while Python exits add nothing
    sys.unraisablehook = lambda _: None
    sys.exit(code)


@contextlib.contextmanager
def ignore_closed_pipe() -> Iterator[None]:
    """Print without failing if the reader has exited (a closed terminal, | head); nothing is printed any more then."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EPIPE):
            raise
        with open(os.devnull, "wb") as nowhere:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(nowhere.fileno(), stream.fileno())
