"""What the user can mend, and the one place where a door turns it into words and an exit code.

Floor 0: every room may raise these; only the doors catch them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from .terminal import clean_output

EXIT_USER = 2  # a setting, a file or a row that the user can mend
EXIT_DISK = 3  # no space left, or a folder that cannot be written
EXIT_MEMORY = 4  # the device or the host ran out of memory
EXIT_PROCESS = 5  # another process of a training has died, or stands still
EXIT_INTERRUPTED = 130  # Ctrl-C, as shells count it (128 + SIGINT)


class UserError(Exception):
    """Something the user can mend. The message says where, what is wrong and what to do."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one setting."""

    name: str
    message: str


class Problems(Exception):
    """Everything wrong with the settings, found before anything heavy was done."""

    def __init__(self, *problems: Problem):
        self.problems = list(problems)
        super().__init__("; ".join(f"{p.name}: {p.message}" for p in problems))


@contextlib.contextmanager
def door(report_problems=None) -> Iterator[None]:
    """Run a command; turn what the user can mend into a message and an exit code, and let real bugs show their traceback. Nothing
    that is printed on the way is obeyed by a terminal.

    report_problems: function (Problems) -> str that knows the script's line numbers; without it names alone are shown.
    """
    with clean_output(), in_words(report_problems):
        yield


@contextlib.contextmanager
def in_words(report_problems) -> Iterator[None]:
    """What ends a command, as a message and an exit code."""
    try:
        yield
        if sys.stdout:  # (it may have been closed)
            sys.stdout.flush()
    except Problems as found:
        leave(report_problems(found) if report_problems else str(found), EXIT_USER)
    except UserError as error:
        leave(str(error), EXIT_USER)
    except BrokenPipeError:
        # the reader of our output has left (| head): no message can reach it, and Python's own flush must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_USER)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] in ("rwkv_peft", "json2binidx", "merge"):
            raise
        leave(
            f"The Python package {error.name} is missing. Run ./test.sh or ./quickstart.sh once: they make .venv with all "
            f"that is needed. Or: {install('-r requirements.txt')}",
            EXIT_USER,
        )
    except OSError as error:
        leave(*describe_os_error(error))
    except MemoryError:
        leave("Out of host memory. Close other programs, or lower CTX_LEN and MICRO_BSZ.", EXIT_MEMORY)
    except KeyboardInterrupt:
        leave("\nStopped by Ctrl-C. Nothing half-written was left behind.", EXIT_INTERRUPTED)


def install(packages: str) -> str:
    """The command that installs packages where this Python finds them; another `pip` may belong to another one."""
    return f"{shlex.quote(sys.executable)} -m pip install {packages}"


def describe_os_error(error: OSError) -> tuple[str, int]:
    """The words and the exit code for what the operating system refused."""
    where = f" while writing {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"No space left on the disk{where}. Earlier files are untouched; free some space and run it again.",
            EXIT_DISK,
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"{error.filename}: {error.strerror}. The folder or file cannot be used with your rights.", EXIT_DISK
    if error.errno == errno.ENOENT and error.filename:
        return f"{error.filename}: there is no such file.", EXIT_USER
    if error.errno == errno.ENAMETOOLONG:
        return f"{str(error.filename)[:60]}...: this name is too long for the file system.", EXIT_USER
    return f"{error.filename or 'The system'}: {error.strerror or error}.", EXIT_USER


def leave(message: str, code: int) -> None:
    with unheard():
        print(message, file=sys.stderr, flush=True)
    sys.exit(code)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Say something even if nobody listens any more (a closed terminal, | head): work goes on, in silence from here."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EPIPE):
            raise
        with open(os.devnull, "wb") as nowhere:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(nowhere.fileno(), stream.fileno())
