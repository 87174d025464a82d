"""Bash variables -> one typed, frozen dataclass; every problem at once, each with its line in the script.

The script hands its variables over through the environment (`set -a`); its own text gives line numbers and shows typos.
There are no defaults here: a value that is not in the script is a problem.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import resource
import shlex
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from rwkv_peft.common.errors import SettingError, SettingErrors, UserError, handle_errors, limit
from rwkv_peft.common.formatting import did_you_mean, format_size, join_names, plural
from rwkv_peft.common.names import visible
from rwkv_peft.common.trackers import TRACKERS

T = TypeVar("T")
MOST = 10**9  # of anything that is counted
ENOUGH = (
    4 << 30
)  # bytes that a program may map, from which on nothing is said of it: torch maps 1 GB before it does anything
DIGITS = 18  # of the longest whole number that a setting may be

ASSIGNMENT = re.compile(r"^\s*(?:export\s+|declare\s+(?:-\w+\s+)*|readonly\s+)?([A-Za-z_]\w*)\+?=(.*)$")


def setting(
    name: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    later: Mapping[str, str] | None = None,
    resume: Literal["fixed", "free", "split", "content"] = "fixed",
    per_node: bool = False,
    tracker: str = "",
) -> Any:
    """Declare a dataclass field that is read from the bash variable `name`, with all that is known of it.

    Args:
        name: The variable in the script.
        ge: The least value.
        gt: What the value is above.
        le: The largest value.
        lt: What the value is below.
        later: Value -> why this version refuses it. A value of the field that is not built yet, or is called otherwise
            here, is named and refused, never accepted and ignored.
        resume: What a run that resumes may find changed. "fixed": nothing. "free": anything; the setting changes when the
            run ends, what it writes or how fast it is, and no step that is done. "split": how an optimizer step is split
            over processes and micro-batches, if it has the same rows as before. "content": the name of a file; what counts
            for a run that is named is what the file holds.
        per_node: Whether nodes may differ in it: where files are on a machine, and how it is reached.
        tracker: The tracker that it switches on; "" for other settings.
    """
    if tracker and tracker not in TRACKERS:
        raise TypeError(f"{name}: rwkv_peft/common/trackers.py: TRACKERS has no row for {tracker}")
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    return dataclasses.field(
        metadata={
            "var": name,
            "later": later or {},
            "resume": resume,
            "per_node": per_node,
            "tracker": tracker,
            **bounds,
        }
    )


def names_where(cls: type, **facts: Any) -> set[str]:
    """The variables of a dataclass whose declarations state these facts, as in `resume="free"`."""
    return {f.metadata["var"] for f in dataclasses.fields(cls) if all(f.metadata[k] == v for k, v in facts.items())}


class Script:
    """A bash script of settings: its text for line numbers, the environment for the values it set."""

    def __init__(self, path: str | os.PathLike, environment: Mapping[str, str] | None = None):
        self.path = Path(path)
        raw = self.path.read_bytes()
        if b"\r\n" in raw:
            raise SettingErrors(
                SettingError(
                    self.path.name, f"has Windows line ends; run: sed -i 's/\\r$//' {shlex.quote(str(self.path))}"
                )
            )
        self.text = raw.decode("utf-8", "replace")
        self.environment = os.environ if environment is None else environment
        self.lines: dict[str, int] = {}
        self.twice: dict[str, int] = {}  # where a name was set before; bash takes the last line, but who reads it?
        self.beside: dict[str, list[str]] = {}  # further names that are set in a name's line
        plain: dict[str, int] = {}  # not indented: not part of an `if`
        for number, line in enumerate(self.text.splitlines(), 1):
            if found := ASSIGNMENT.match(line):
                name = found[1]
                self.lines[name] = number
                if others := names_in(line)[1:]:
                    self.beside[name] = others
                if not line[0].isspace():
                    if name in plain:
                        self.twice[name] = plain[name]
                    plain[name] = number

    def read(self, cls: type[T], retired: Mapping[str, str] | None = None) -> T:
        """The dataclass with every value of the script in it, or Problems with all that is wrong.

        retired: names of the field's older scripts -> what to use instead.
        """
        hints = typing.get_type_hints(cls)
        fields = {f.metadata["var"]: f for f in dataclasses.fields(cls)}
        problems = [
            SettingError(name, (retired or {}).get(name) or "is not a setting" + did_you_mean(name, fields))
            for name in self.lines
            if name not in fields and not name.startswith("_")
        ]
        problems += [
            SettingError(name, f"is set in line {first} as well; keep one of the two")
            for name, first in self.twice.items()
            if name in fields
        ]
        problems += [
            SettingError(name, f"shares its line with {join_names(others)}; give each setting a line of its own")
            for name, others in self.beside.items()
            if {name, *others} & {*fields}
        ]
        beside = {name for others in self.beside.values() for name in others}
        values = {}
        for name, field in fields.items():
            if name in beside - {*self.lines}:
                continue  # told already
            if name not in self.lines or name not in self.environment:
                problems.append(SettingError(name, f"is not set in {self.path.name}"))
                continue
            try:
                values[field.name] = parse_value(self.environment[name], hints[field.name], field.metadata)
            except ValueError as error:
                problems.append(SettingError(name, str(error)))
        # a dataclass may add `problems(values)`: what no single value can tell. It sees only the values that are sound
        if hasattr(cls, "problems"):
            problems += cls.problems(types.SimpleNamespace(**{f.name: values.get(f.name) for f in fields.values()}))
        if problems:
            raise SettingErrors(*problems)
        return cls(**values)

    def in_vain(self, cls: type) -> list[str]:
        """What to say of settings that the shell had set before the script did: as in LR_INIT=1e-4 ./training.sh."""
        if "LOCAL_RANK" in self.environment:  # another process has told it, or who starts us all sets such names
            return []
        given = {*self.environment.get("_given", "").split()} - {*taken_from_shell(self.text, cls)}
        names = [f.metadata["var"] for f in dataclasses.fields(cls) if f.metadata["var"] in given]
        return [
            f"{name} was set in the shell, which counts for nothing: {self.setting(name)} of {self.path.name} does "
            f"(line {self.lines[name]})"
            for name in names
        ]

    def report(self, found: SettingErrors) -> str:
        """The problems as a table: line, NAME=value, what is wrong; in the order of the script."""
        rows = sorted(found.problems, key=lambda p: self.lines.get(p.name, 0))
        shown = [self.setting(p.name) for p in rows]
        width = min(max(map(len, shown)), 40)
        lines = [f"{self.path.name} has {plural(len(rows), 'problem')}:"]
        for problem, setting in zip(rows, shown, strict=True):
            number = self.lines.get(problem.name)
            lines.append(f"  {f'line {number:>3}' if number else '        '}  {setting:<{width}}  {problem.message}")
        return "\n".join(lines)

    def setting(self, name: str) -> str:
        if name in self.environment:
            value = visible(self.environment[name])
            return f"{name}={value if len(value) <= 60 else value[:57] + '...'}"
        return name


def names_in(line: str) -> list[str]:
    """The names that a line of a script sets; quotes and comments are understood."""
    words = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    words.whitespace_split = True
    names = []
    with contextlib.suppress(ValueError):  # a quote that goes on in the next line
        for word in words:
            if found := re.match(r"([A-Za-z_]\w*)\+?=", word):
                names.append(found[1])
    return names


def parse_assignments(path: Path) -> dict[str, str]:
    """What a script sets, read without bash (which is not everywhere): plain assignments, quotes, comments and ${NAME:-else} are
    understood, the last as where the shell has no NAME.
    """
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if assignment := ASSIGNMENT.match(line):
            with contextlib.suppress(ValueError):  # a quote that goes on in the next line
                word = "".join(shlex.split(assignment[2], comments=True)[:1])
                found[assignment[1]] = re.sub(r"\$\{\w+:-([^{}]*)\}", r"\1", word)
    return found


def take_options(arguments: list[str], cls: type) -> tuple[dict[str, str], list[str]]:
    """Options behind a command that stand for settings, like --prompt-type chatml for PROMPT_TYPE; and the other words."""
    flags = {"--" + f.metadata["var"].lower().replace("_", "-"): f.metadata["var"] for f in dataclasses.fields(cls)}
    switches = {f.metadata["var"] for f in dataclasses.fields(cls) if f.type in (bool, "bool")}
    found, rest, words = {}, [], list(arguments)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag not in flags:
            rest.append(word)
        elif flags[flag] in switches and not equals and (not words or words[0] not in ("0", "1")):
            found[flags[flag]] = "1"  # said alone, it is switched on
        elif equals or words:
            found[flags[flag]] = value if equals else words.pop(0)
        else:
            raise UserError(f"{flag} wants a value behind it. See --help")
    return found, rest


def run_cli(
    arguments: list[str],
    usage: str,
    cls: type[T],
    body: Callable[[T, list[str]], None],
    retired=None,
    environment: Mapping[str, str] | None = None,
    options: bool = False,
    lean: str = "",
) -> None:
    """What every script's command does: show its usage, or read its settings and go on, with errors as sentences.

    arguments: the script's path, then what the user typed. body: (settings, what the user typed). environment: the values
    that the script set, if not those of this process. options: settings may be typed behind the command as well. lean: those
    with which it takes less memory.
    """
    if not arguments or {"-h", "--help"} & set(arguments[1:]):
        with handle_errors():
            print(usage)
            if arguments:
                print(where_to_set(Path(arguments[0]), cls))
        return
    script = None
    for stream in (sys.stdout, sys.stderr, sys.stdin):
        with contextlib.suppress(AttributeError):  # not a real stream (tests)
            stream.reconfigure(errors="replace")  # a terminal that knows no Chinese shows "?" instead of ending the run
    with handle_errors(lambda found: script.report(found) if script else str(found), lean):
        if (most := limit(resource.RLIMIT_AS)) is not None and most < ENOUGH:
            # (libraries that get no memory may end the process without a word)
            print(
                f"warning   this shell lets a program have {format_size(most)} of memory (ulimit -v)", file=sys.stderr
            )
        typed, rest = take_options(arguments[1:], cls) if options else ({}, arguments[1:])
        values = os.environ if environment is None else environment
        script = Script(arguments[0], {**values, **typed} if typed else values)
        settings = script.read(cls, retired)
        for words in script.in_vain(cls):
            print(f"warning   {words}", file=sys.stderr)
        body(settings, rest)


def taken_from_shell(text: str, cls: type) -> list[str]:
    """The settings that a script leaves to the shell, like RUN="${RUN:-}"."""
    return [f.metadata["var"] for f in dataclasses.fields(cls) if re.search(rf"\$\{{{f.metadata['var']}\b", text)]


def where_to_set(path: Path, cls: type) -> str:
    """That values are changed in the script, for --help."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    taken = taken_from_shell(text, cls)
    but = f" Only {join_names(taken)} is taken from there." if taken else ""
    return f"Settings are changed in {path.name} itself: NAME=value before the command does nothing.{but}"


def parse_value(text: str, kind: Any, bounds: Mapping[str, Any]) -> Any:
    """Text as a value of type kind, or ValueError in the user's words.

    Understood: str, int, float, bool (0 or 1), Literal[...] of words, and Union of these (Literal["auto"] | int).
    """
    text = text.strip() if kind is not str else text
    if text in bounds["later"]:
        raise ValueError(bounds["later"][text])
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        words = [w for k in typing.get_args(kind) if typing.get_origin(k) is Literal for w in typing.get_args(k)]
        if text in words:
            return text
        others = [k for k in typing.get_args(kind) if typing.get_origin(k) is not Literal]
        try:
            return parse_value(text, others[0], bounds)
        except ValueError as error:
            offered = [w or '""' for w in words]
            raise ValueError(f"{error}, or {' or '.join(offered)}") from None
    if origin is Literal:
        words = typing.get_args(kind)
        if text in words:
            return text
        offered = [w or '""' for w in words]
        raise ValueError(f"must be one of {', '.join(offered)}{did_you_mean(text, words)}")
    if kind is str:
        return text
    if kind is bool:
        if text not in ("0", "1"):
            raise ValueError("must be 0 or 1")
        return text == "1"
    if kind is int:
        if not re.fullmatch(r"[+-]?\d+", text):
            raise ValueError("must be a whole number")
        if len(text.lstrip("+-")) > DIGITS:
            check_bounds(-1 if text[0] == "-" else 1, bounds | {"le": None, "lt": None})
            raise ValueError("is too small" if text[0] == "-" else "is too large")
        return check_bounds(int(text), bounds)
    if kind is float:
        try:
            number = float(text)
        except ValueError:
            raise ValueError("must be a number, like 2e-5") from None
        if not math.isfinite(number):
            raise ValueError("must be a finite number, like 2e-5")
        return check_bounds(number, bounds)
    raise TypeError(f"shell_vars cannot read a {kind}")


def whole_number(name: str, text: str, least: int) -> int:
    """A number typed behind a command. name: what to call it. UserError in the words that a setting would get."""
    try:
        return parse_value(text, int, setting(name, ge=least, le=MOST).metadata)
    except ValueError as error:
        raise UserError(f"{name}={text[:20]}: {error}. --help tells the rest.") from None


def check_bounds(number, bounds: Mapping[str, Any]):
    ge, gt, le, lt = bounds["ge"], bounds["gt"], bounds["le"], bounds["lt"]
    if ge is not None and number < ge:
        raise ValueError(f"must be {ge} or more")
    if gt is not None and number <= gt:
        raise ValueError(f"must be more than {gt}")
    if le is not None and number > le:
        raise ValueError(f"must be {le} or less")
    if lt is not None and number >= lt:
        raise ValueError(f"must be less than {lt}")
    return number
