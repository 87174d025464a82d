"""./test.sh --fuzz MINUTES: feed changed files and settings to everything that reads them, and report what breaks a rule.

usage: python tests/fuzz MINUTES [--only NAME ...] [--seconds N] [--runs N] [--seed N] [--results FOLDER]
       python tests/fuzz --replay NAME FILE
       python tests/fuzz --list

  MINUTES     for all harnesses together, one after the other
  --only      these harnesses alone
  --seconds   for each harness, in place of MINUTES
  --runs      inputs of each harness at most
  --seed      of the random numbers (another one each time)
  --results   where findings and what is worth keeping of the inputs go (fuzz/ in the project, which git ignores)
  --replay    judge one input again

With atheris (requirements-fuzz.txt) inputs that reach new lines of the kit are kept and changed further; without it inputs are
changed at random. The rules are in harness.py, and what a sound result is in harnesses/. Answers 1 when an input broke a rule,
and names its file. Put that file into tests/fuzz/corpus/NAME/ when the fault is fixed: every test run reads those.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE.parent), str(ROOT)]
SILENCE, BUSY = 60.0, 30.0  # seconds without an answer, in which the processor was used so long: it hangs
LEAST = 5.0  # seconds of a harness behind its start, which may take longer than its time
PATIENCE = 5.0  # seconds that it may take longer than it should


@dataclass
class Result:
    """What came of a harness."""

    name: str
    judged: int = 0
    grew: int = 0
    seconds: float = 0.0
    paths: str = ""
    findings: list[Path] = field(default_factory=list)

    def line(self) -> str:
        speed = self.judged / max(self.seconds, 0.1)
        return (
            f"{self.name:<18} {self.judged:>10,} inputs  {speed:>8,.0f}/s  {self.grew:>4} grown  {self.paths:<44} "
            f"{len(self.findings)} findings"
        )


def names() -> list[str]:
    return sorted(p.stem for p in (HERE / "harnesses").glob("*.py") if p.stem != "__init__")


def fuzz(name: str, seconds: float, runs: int, seed: int, results: Path) -> Result:
    """Run a harness for so long, its start included; again if it ends before that."""
    result, end = Result(name), time.monotonic() + seconds
    known = {path: path.stat().st_mtime_ns for path in findings(results, name)}
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=shared_memory()) as place:
        for attempt in range(5):
            left = end - time.monotonic()
            if attempt and (left < LEAST or (runs and result.judged >= runs)):
                break
            if not once(result, Path(place) / str(attempt), max(left, LEAST), runs, seed + attempt, results):
                break
    now = {path: path.stat().st_mtime_ns for path in findings(results, name)}
    result.findings = sorted(path for path, changed in now.items() if known.get(path) != changed)
    return result


def findings(results: Path, name: str) -> list[Path]:
    return [path for path in (results / "findings" / name).glob("*") if path.suffix != ".txt"]


def shared_memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def once(result: Result, place: Path, seconds: float, runs: int, seed: int, results: Path) -> bool:
    """One process of a harness. Returns whether it ended before its time, through an input, which is a finding."""
    from fuzz.worker import HEAD, ROOM

    (place / "work").mkdir(parents=True)
    shared, log = place / "shared", place / "log"
    with open(shared, "wb") as file:
        file.truncate(HEAD.size + ROOM)
    begun = time.monotonic()
    facts = {"harness": result.name, "results": str(results), "shared": str(shared), "folder": str(place / "work"),
             "until": time.time() + seconds, "least": LEAST, "runs": runs, "seed": seed}  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path[:2]),
        "TMPDIR": str(place),
    }
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "fuzz.worker", json.dumps(facts)],
            stdout=out,
            stderr=out,
            cwd=place / "work",
            env=environment,
        )
    judged, changed, used, ready, killed = -1, time.monotonic(), 0.0, None, ""
    try:
        while process.poll() is None:
            time.sleep(0.2)
            now = time.monotonic()
            with open(shared, "rb") as file:
                count, grew, size = HEAD.unpack(file.read(HEAD.size))
            if ready is None and b"READY" in log.read_bytes():
                ready = now
            if (count, grew) != judged:
                judged, changed, used = (count, grew), now, processor_time(process.pid)
            elif now - changed > SILENCE and processor_time(process.pid) - used > BUSY:
                killed = f"no answer for {now - changed:.0f} s"
                process.kill()
            elif (
                ready and count and now > max(begun + seconds, ready + LEAST) + PATIENCE and now - changed < SILENCE / 2
            ):
                process.kill()  # its time is over
                killed = "over"
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
    with open(shared, "rb") as file:
        count, grew, size = HEAD.unpack(file.read(HEAD.size))
        data = file.read(size)
    text = log.read_text(errors="replace")
    result.judged, result.grew = result.judged + count, result.grew + grew
    result.seconds += time.monotonic() - (ready or begun)
    result.paths = reached(text) or result.paths
    if (process.returncode == 0 or killed == "over") and count:
        return False
    tail = "\n".join(text.splitlines()[-30:])
    if ready is None or not count:
        raise SystemExit(f"The harness {result.name} does not start:\n{tail}")
    path = results / "findings" / result.name / f"end-{count}-{abs(process.returncode)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.with_name(f"{path.name}.txt").write_text(f"{killed or f'the process ended with {process.returncode}'}\n{tail}")
    return True


def processor_time(pid: int) -> float:
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def reached(log: str) -> str:
    """What was reached, and by how much more than by the first inputs: from the lines that libFuzzer writes."""
    result = re.findall(r"^#\d+\s+(\w+)\s+cov: (\d+) ft: (\d+)", log, re.M)
    if not result:
        return ""
    begun = next((f for f in result if f[0] == "INITED"), result[0])
    kept = re.findall(r"corp: (\d+)/", log)[-1]
    if result[-1][1] == "0":
        return f"{result[-1][2]} outcomes, {kept} kept"
    more = int(result[-1][2]) - int(begun[2])
    return f"{int(result[-1][1]):,} edges (+{int(result[-1][1]) - int(begun[1]):,}), {more:,} new paths, {kept} kept"


def replay(name: str, path: Path) -> int:
    """Judge one input; 1 if it breaks a rule."""
    from fuzz.harness import Finding, Judge
    from fuzz.worker import load

    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        os.chdir(folder)
        judge = Judge(load(name), Path(folder))
        try:
            print(judge.judge(path.read_bytes()))
        except Finding as finding:
            print(finding)
            return 1
    return 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="./test.sh --fuzz", usage=__doc__.partition("usage: ")[2], add_help=False)
    parser.add_argument("minutes", nargs="?", type=float)
    parser.add_argument("--only", nargs="+", choices=names(), default=names())
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--runs", type=int, default=0)
    parser.add_argument("--seed", type=int, default=random.randrange(1, 2**31 - 10))
    parser.add_argument("--results", type=Path, default=ROOT / "fuzz")
    parser.add_argument("--replay", nargs=2, metavar=("NAME", "FILE"))
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join(names()))
        return 0
    if given.replay:
        return replay(given.replay[0], Path(given.replay[1]).resolve())
    if not (given.seconds or given.minutes) or (given.minutes or 1) <= 0:
        parser.error("how many MINUTES?")
    import importlib.util

    if os.environ.get("FUZZ_WITHOUT_ATHERIS") or importlib.util.find_spec("atheris") is None:
        print(
            "atheris is not installed (there is none for this Python or machine, or requirements-fuzz.txt was not installed): "
            "inputs are changed at random, without looking at which lines they reach."
        )
    each = given.seconds or given.minutes * 60 / len(given.only)
    print(f"{len(given.only)} harnesses, {each:.0f} s each, seed {given.seed}", flush=True)
    results, total = given.results.resolve(), []
    for name in given.only:
        total.append(fuzz(name, each, given.runs, given.seed, results))
        print(total[-1].line(), flush=True)
    result = [(one.name, path) for one in total for path in one.findings]
    print(f"{sum(one.judged for one in total):,} inputs, {len(result)} findings")
    for name, path in result:
        words = path.with_name(f"{path.name}.txt").read_text(errors="replace").strip().splitlines()
        print(
            f"\n{name}: {words[0][:300] if words else ''}\n  the input: {path}\n  again: python tests/fuzz --replay {name} {path}"
        )
    return 1 if result else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
