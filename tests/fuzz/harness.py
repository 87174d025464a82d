"""What a harness is, and the rules that hold for every input of every harness.

An input is read, and either refused (UserError or Problems, with the place in its words) or the result is sound; what
sound means, each harness says. In any case: memory below MEMORY, time in proportion to the size, nothing written
outside the folder that the harness was given, no program started, no connection made, no other exception."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import re
import resource
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzz import mutate
from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.common.formatting import printable

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CASES = HERE.parent / "cases"
MEMORY = 1 << 30  # bytes that one input may take
ADDRESSES = 3 << 30  # bytes of address space beyond those at the start: what asks for more gets a MemoryError
SECONDS, PER_BYTE = 5.0, 2e-4  # processor time of one input: so much, and so much for each of its bytes
WORDS = 20_000  # characters of a message
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.chown",
}
STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "socket.bind"}


class Finding(Exception):
    """An input that breaks a rule. kind: what all findings of the same fault share."""

    def __init__(self, kind: str, words: str):
        super().__init__(f"{kind}: {words}")
        self.kind = kind


class Harness:
    """Something that reads foreign bytes.

    words: what the mutator may put in. longest: bytes of an input. places: words of which a refusal must hold one: the
    file, or the setting. cases: which files of tests/cases it begins with as well."""

    name = ""
    longest = 1 << 14
    words: tuple[bytes, ...] = ()
    places: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    starts: tuple[str, ...] = ()  # programs that reading may start
    # while the time of several sizes of an input is compared: the input, which decides for all
    of_all_sizes: bytes = b""

    def choice(self, data: bytes) -> int:
        """A number that settings follow from, 32 bits."""
        return zlib.crc32(self.of_all_sizes or data)

    def seeds(self) -> list[Path]:
        """Inputs to begin with: those of the harness, and files of tests/cases."""
        own = sorted((HERE / "corpus" / self.name).glob("*"))
        return own + sorted(path for pattern in self.cases for path in CASES.glob(pattern))

    def warm_up(self) -> None:
        """Load what is loaded once, which is no input's fault."""

    def mutate(self, data: bytes, random: random.Random, other: bytes) -> bytes:
        """An input made of this one; other: another input, to take parts of."""
        return mutate.of_bytes(data, random, other, self.words)

    def grown(self, data: bytes, random: random.Random, size: int) -> bytes:
        """An input of about `size` bytes in which a part of this one is many times. The same random numbers: the
        same part."""
        return mutate.grown(data, random, size)

    def read(self, data: bytes, folder: Path) -> str:
        """Read an input with files in a folder. Returns a word for what became of it; UserError or Problems where it
        is refused. Finding where the result is not sound."""
        raise NotImplementedError


def sound(right: Any, kind: str, *facts: Any) -> None:
    """Finding unless something is true."""
    if not right:
        raise Finding(kind, " | ".join(repr(fact)[:500] for fact in facts))


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """What is printed, caught."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        yield out


class Watch:
    """An audit hook that sees what is written, started and connected while an input is read. Hooks stay: one for the
    process."""

    def __init__(self):
        self.folder, self.seen, self.allowed = "", [], ()
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if not self.folder:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = flags & WRITES if isinstance(flags, int) and flags else set(str(mode or "")) & set("wax+")
            if writes and not self.inside(path):
                self.seen.append(f"open {path!r} {mode!r}")
        elif event in CHANGES:
            if not all(map(self.inside, [a for a in arguments if isinstance(a, (str, bytes, os.PathLike))])):
                self.seen.append(f"{event} {arguments!r}")
        elif event in STARTS and not any(repr(one)[1:-1] in repr(arguments) for one in self.allowed):
            self.seen.append(f"{event} {arguments!r}")

    def inside(self, path: Any) -> bool:
        if isinstance(path, int):  # a file that is open already
            return True
        name = os.path.abspath(os.fsdecode(path))
        return name == os.devnull or name.startswith((self.folder, "/dev/shm/sem."))


WATCH = Watch()


def memory_now() -> int:
    """Bytes that this process holds."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def most_memory() -> int:
    """The most bytes that it has kept."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def limit_addresses() -> None:
    with open("/proc/self/statm", "rb") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ADDRESSES, resource.getrlimit(resource.RLIMIT_AS)[1]))


class Judge:
    """Runs a harness on inputs. folder: the only one that may be written to."""

    def __init__(self, harness: Harness, folder: Path):
        self.harness, self.folder, self.watch = harness, folder, WATCH
        self.judged = self.resident = self.most = 0
        tempfile.tempdir = str(folder)
        with quiet():
            harness.warm_up()

    def judge(self, data: bytes) -> str:
        """What became of an input, in a word or the shape of its message. Finding if it broke a rule.

        Asking for processor time and memory takes longer than many inputs do: the clock on the wall is looked at first, and what
        this process holds now and then.
        """
        if self.judged % 100 == 0:
            self.resident, self.most = memory_now(), most_memory()
        self.judged += 1
        begun, limit = time.perf_counter(), SECONDS + PER_BYTE * len(data)
        outcome = self.watched(data)
        if time.perf_counter() - begun > limit:  # the input, or a busy machine
            begun = time.process_time()
            self.watched(data)
            seconds = time.process_time() - begun
            sound(seconds < limit, "time", f"{seconds:.1f} s for {len(data):,} bytes")
        most = most_memory()
        taken, self.most = most - self.resident if most > self.most else 0, most
        sound(taken < MEMORY, "memory", f"{taken:,} bytes for {len(data):,}")
        return outcome

    def watched(self, data: bytes) -> str:
        self.watch.folder, self.watch.seen = os.path.abspath(self.folder), []
        self.watch.allowed = self.harness.starts
        try:
            outcome = self.harness.read(data, self.folder)
        except (UserError, SettingErrors) as error:
            outcome = self.refused(error, len(data))
        except Finding:
            raise
        except MemoryError as error:
            raise Finding(f"memory {place(error)}", "asked for more memory than there is") from error
        except Exception as error:
            raise Finding(f"{type(error).__name__} {place(error)}", words_of(error)) from error
        finally:
            self.watch.folder = ""
        sound(not self.watch.seen, "touched what is not its own", self.watch.seen[:5])
        return outcome

    def refused(self, error: UserError | SettingErrors, size: int) -> str:
        words, places = printable(str(error)), self.harness.places
        sound(words.strip(), "a message without words", error)
        sound(len(words) < WORDS + 20 * size, "a message without end", f"{len(words):,} characters", words[:300])
        sound(not places or any(where in words for where in places), f"a message without a place {place(error)}", words)
        return shape(words)

    def seconds(self, data: bytes) -> float:
        """Processor time of an input; of two tries the shorter one."""
        result = []
        for _ in range(2):
            begun = time.process_time()
            self.judge(data)
            result.append(time.process_time() - begun)
        return min(result)

    def grow(self, data: bytes, seed: int, size: int, much: float = 0.5) -> str:
        """Whether time grows with the size: a part of an input many times, and twice as many. Finding if it grows
        faster. much: seconds below which nothing is said."""

        def made(size: int) -> bytes:
            return self.harness.grown(data, random.Random(seed), size)

        large = made(size)
        self.harness.of_all_sizes = data
        try:
            begun = time.process_time()
            self.judge(large)
            if time.process_time() - begun < much:
                return "fast"
            half, whole, double = (self.seconds(made(n)) for n in (size // 2, size, 2 * size))
        finally:
            self.harness.of_all_sizes = b""
        if whole > 3 * half and double > 3 * whole and double > much:
            facts = f"{half:.2f} s, {whole:.2f} s, {double:.2f} s for {size // 2:,}, {size:,}, {2 * size:,} bytes"
            result = Finding("time grows faster than the size", facts)
            result.data = large
            raise result
        return "linear"


def place(error: BaseException) -> str:
    """The innermost line of the kit in a traceback; of a harness, where there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if str(ROOT) in f.filename and "/.venv/" not in f.filename]
    kit = [f for f in ours if f"{HERE}/" not in f.filename]
    frame = (kit or ours or frames)[-1]
    return f"{os.path.relpath(frame.filename, ROOT)}:{frame.lineno} {frame.name}"


def words_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error, limit=-12))[-3000:]


def shape(words: str) -> str:
    """A message without what is of this one input."""
    return re.sub(r"[\"'].*?[\"']|\d[\d,.]*|\S*[/\\]\S*", "#", words)[:60]


def key_of(finding: Finding) -> str:
    """A name for all findings of the same kind."""
    return hashlib.sha256(finding.kind.encode("utf-8", "replace")).hexdigest()[:12]
