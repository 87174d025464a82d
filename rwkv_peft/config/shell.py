"""Read bash variables into a typed, frozen dataclass, and report every problem at once with its line in the script.

The script passes its variables through the environment (`set -a`); its own text gives line numbers and reveals typos.
There are no defaults here: a setting that is not in the script is a problem.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import operator
import os
import re
import resource
import shlex
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rwkv_peft.common.errors import SettingError, SettingErrors, UserError, handle_errors, resource_limit
from rwkv_peft.common.formatting import did_you_mean, format_size, join_names, plural
from rwkv_peft.common.names import escape_invisible
from rwkv_peft.common.trackers import TRACKERS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
MOST = 10**9  # of anything that is counted
# bytes; a smaller limit of the memory that a program may map is reported: torch maps 1 GB before it does anything
_ENOUGH_MEMORY = 4 << 30
_MAX_DIGITS = 18  # of an integer

_ASSIGNMENT = re.compile(r"^\s*(?:export\s+|declare\s+(?:-\w+\s+)*|readonly\s+)?([A-Za-z_]\w*)\+?=(.*)$")


def setting(
    name: str,
    *,
    choices: Sequence[str] = (),
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    refused: Mapping[str, str] | None = None,
    resume: Literal["fixed", "free", "split", "content"] = "fixed",
    per_node: bool = False,
    tracker: str = "",
) -> Any:
    """Declare a dataclass field that is read from the bash variable `name`, with all that is known about it.

    Args:
        name: the variable in the script.
        choices: the words that it may be, where another table has them; else its type does, as a Literal.
        ge: the least value.
        gt: an exclusive lower bound.
        le: the largest value.
        lt: an exclusive upper bound.
        refused: value -> why this version refuses it. A value that other kits know, and that is not implemented or has
            another name here, is refused with that reason instead of being ignored.
        resume: what may have changed when a run resumes. "fixed": nothing. "free": anything; the setting changes when the
            run ends, what it writes or how fast it is, and no step that is done. "split": how an optimizer step is split
            over processes and micro-batches, if it has the same rows as before. "content": the name of a file; if the run
            is named, the file's content counts.
        per_node: whether nodes may differ in it: where files are on a machine, and how it is reached.
        tracker: the tracker that it switches on; "" for other settings.
    """
    if tracker and tracker not in TRACKERS:
        raise TypeError(f"{name}: rwkv_peft/common/trackers.py: TRACKERS has no row for {tracker}")
    facts = {"var": name, "choices": choices, "ge": ge, "gt": gt, "le": le, "lt": lt, "refused": refused or {}}
    return dataclasses.field(metadata={**facts, "resume": resume, "per_node": per_node, "tracker": tracker})


def names_where(cls: type[DataclassInstance], **facts: Any) -> set[str]:
    """Return the variables of a dataclass whose declarations have these facts, as in `resume="free"`."""
    return {f.metadata["var"] for f in dataclasses.fields(cls) if all(f.metadata[k] == v for k, v in facts.items())}


class Script:
    """A bash script of settings.

    Args:
        path: the script.
        environment: the values that it has set; by default the environment of this process.

    Attributes:
        text: of the script.
        lines: variable -> line number.

    Raises:
        SettingErrors: the script has Windows line ends.
    """

    def __init__(self, path: str | os.PathLike[str], environment: Mapping[str, str] | None = None):
        self.path = Path(path)
        raw = self.path.read_bytes()
        if b"\r\n" in raw:
            how = f"has Windows line ends; run: sed -i 's/\\r$//' {shlex.quote(str(self.path))}"
            raise SettingErrors(SettingError(self.path.name, how))
        self.text = raw.decode("utf-8", "replace")
        self.environment = os.environ if environment is None else environment
        self.lines: dict[str, int] = {}
        self._earlier_lines: dict[str, int] = {}  # of names that are set twice; bash takes the last line
        self._same_line: dict[str, list[str]] = {}  # name -> further names that its line sets
        not_indented: dict[str, int] = {}  # not part of an `if`
        for number, line in enumerate(self.text.splitlines(), 1):
            if assignment := _ASSIGNMENT.match(line):
                name = assignment[1]
                self.lines[name] = number
                if others := _assigned_names(line)[1:]:
                    self._same_line[name] = others
                if not line[0].isspace():
                    if name in not_indented:
                        self._earlier_lines[name] = not_indented[name]
                    not_indented[name] = number

    def read(self, cls: type[T], retired: Mapping[str, str] | None = None) -> T:
        """Return the dataclass with the values of the script.

        It may have a static method `problems(values)` that checks what no single value shows. Its argument has the values
        as attributes, None for an invalid one.

        Args:
            cls: the dataclass; each field is a `setting`.
            retired: name of an older script -> what to use instead.

        Raises:
            SettingErrors: everything that is wrong.
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
            for name, first in self._earlier_lines.items()
            if name in fields
        ]
        problems += [
            SettingError(name, f"shares its line with {join_names(others)}; give each setting a line of its own")
            for name, others in self._same_line.items()
            if {name, *others} & {*fields}
        ]
        reported = {name for others in self._same_line.values() for name in others} - {*self.lines}
        values: dict[str, Any] = dict.fromkeys(f.name for f in fields.values())
        for name, field in fields.items():
            if name in reported:
                continue
            if name not in self.lines or name not in self.environment:
                problems.append(SettingError(name, f"is not set in {self.path.name}"))
                continue
            try:
                values[field.name] = parse_value(self.environment[name], hints[field.name], field.metadata)
            except ValueError as error:
                problems.append(SettingError(name, str(error)))
        if check := getattr(cls, "problems", None):
            problems += check(types.SimpleNamespace(**values))
        if problems:
            raise SettingErrors(*problems)
        return cls(**values)

    def ignored_shell_vars(self, cls: type[DataclassInstance]) -> list[str]:
        """Return a warning for each setting that the shell had set before the script did: LR_INIT=1e-4 ./training.sh."""
        if "LOCAL_RANK" in self.environment:  # another process has warned, or the launcher sets such names
            return []
        overridden = {*self.environment.get("_given", "").split()} - {*_names_from_shell(self.text, cls)}
        names = [f.metadata["var"] for f in dataclasses.fields(cls) if f.metadata["var"] in overridden]
        return [
            f"{name} was set in the shell, which counts for nothing: {self._assignment(name)} of {self.path.name} does "
            f"(line {self.lines[name]})"
            for name in names
        ]

    def report(self, errors: SettingErrors) -> str:
        """Return the problems as a table in the order of the script: line, NAME=value, what is wrong."""
        rows = sorted(errors.problems, key=lambda p: self.lines.get(p.name, 0))
        assignments = [self._assignment(p.name) for p in rows]
        width = min(max(map(len, assignments)), 40)
        table = [f"{self.path.name} has {plural(len(rows), 'problem')}:"]
        for problem, assignment in zip(rows, assignments, strict=True):
            number = self.lines.get(problem.name)
            table.append(f"  {f'line {number:>3}' if number else '        '}  {assignment:<{width}}  {problem.message}")
        return "\n".join(table)

    def _assignment(self, name: str) -> str:
        if name not in self.environment:
            return name
        value = escape_invisible(self.environment[name])
        return f"{name}={value if len(value) <= 60 else value[:57] + '...'}"


def _assigned_names(line: str) -> list[str]:
    """Return the names that a line of a script sets; quotes and comments are understood."""
    words = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    words.whitespace_split = True
    names = []
    with contextlib.suppress(ValueError):  # a quote that continues in the next line
        for word in words:
            if assignment := re.match(r"([A-Za-z_]\w*)\+?=", word):
                names.append(assignment[1])
    return names


def parse_assignments(path: Path) -> dict[str, str]:
    """Return what a script sets, read without bash (which not every system has).

    Plain assignments, quotes, comments and ${NAME:-default} are understood; the last becomes the default.
    """
    values = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if assignment := _ASSIGNMENT.match(line):
            with contextlib.suppress(ValueError):  # a quote that continues in the next line
                word = "".join(shlex.split(assignment[2], comments=True)[:1])
                values[assignment[1]] = re.sub(r"\$\{\w+:-([^{}]*)\}", r"\1", word)
    return values


def take_options(arguments: list[str], cls: type[DataclassInstance]) -> tuple[dict[str, str], list[str]]:
    """Split a command line into options for settings, like --prompt-type chatml for PROMPT_TYPE, and the other words.

    Args:
        arguments: the words.
        cls: the dataclass of the settings.

    Raises:
        UserError: an option lacks its value.
    """
    flags = {"--" + f.metadata["var"].lower().replace("_", "-"): f.metadata["var"] for f in dataclasses.fields(cls)}
    switches = {f.metadata["var"] for f in dataclasses.fields(cls) if f.type in (bool, "bool")}
    values, rest, words = {}, [], list(arguments)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag not in flags:
            rest.append(word)
        elif flags[flag] in switches and not equals and (not words or words[0] not in ("0", "1")):
            values[flags[flag]] = "1"  # without a value it is switched on
        elif equals or words:
            values[flags[flag]] = value if equals else words.pop(0)
        else:
            raise UserError(f"{flag} wants a value behind it. See --help")
    return values, rest


def run_cli(
    arguments: list[str],
    usage: str,
    cls: type[T],
    body: Callable[[T, list[str]], None],
    retired: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    options: bool = False,
    lean: str = "",
) -> None:
    """Run the command of a script: show its usage, or read its settings and call `body`; errors become messages.

    Args:
        arguments: the script's path, then what the user typed.
        usage: the text for --help.
        cls: the dataclass of the settings.
        body: the command; gets the settings and what the user typed.
        retired: as in `Script.read`.
        environment: as in `Script`.
        options: settings may be typed as options too.
        lean: settings that make the command use less memory if they are lowered.
    """
    if not arguments or {"-h", "--help"} & set(arguments[1:]):
        with handle_errors():
            print(usage)
            if arguments:
                print(_where_to_set(Path(arguments[0]), cls))
        return
    script = None
    for stream in (sys.stdout, sys.stderr, sys.stdin):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Chinese shows "?" instead of ending the run
    with handle_errors(lambda errors: script.report(errors) if script else str(errors), lean):
        if (most := resource_limit(resource.RLIMIT_AS)) is not None and most < _ENOUGH_MEMORY:
            # (libraries that get no memory may end the process without a message)
            print(
                f"warning   this shell lets a program have {format_size(most)} of memory (ulimit -v)", file=sys.stderr
            )
        typed, rest = take_options(arguments[1:], cls) if options else ({}, arguments[1:])
        values = os.environ if environment is None else environment
        script = Script(arguments[0], {**values, **typed} if typed else values)
        settings = script.read(cls, retired)
        for warning in script.ignored_shell_vars(cls):
            print(f"warning   {warning}", file=sys.stderr)
        body(settings, rest)


def _names_from_shell(text: str, cls: type[DataclassInstance]) -> list[str]:
    """Return the settings that a script takes from the shell, like RUN="${RUN:-}"."""
    return [f.metadata["var"] for f in dataclasses.fields(cls) if re.search(rf"\$\{{{f.metadata['var']}\b", text)]


def _where_to_set(path: Path, cls: type[DataclassInstance]) -> str:
    """Return the sentence of --help that settings are changed in the script."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    names = _names_from_shell(text, cls)
    but = f" Only {join_names(names)} is taken from there." if names else ""
    return f"Settings are changed in {path.name} itself: NAME=value before the command does nothing.{but}"


def parse_value(text: str, kind: Any, facts: Mapping[str, Any]) -> Any:
    """Parse the text of a setting.

    Args:
        text: the value in the script.
        kind: the type of its field: str, int, float, bool (0 or 1), a Literal of words, or Literal["auto"] | int.
        facts: the metadata of a `setting`.

    Raises:
        ValueError: it is not a value of the setting; the message is for users.
    """
    kinds = typing.get_args(kind) if typing.get_origin(kind) is not Literal else (kind,)
    words = facts["choices"] or [w for k in kinds if typing.get_origin(k) is Literal for w in typing.get_args(k)]
    if words or kind is not str:
        text = text.strip()
    if text in facts["refused"]:
        raise ValueError(facts["refused"][text])
    if text in words:
        return text
    offered = [word or '""' for word in words]
    if kind in (int, float) or {int, float} & {*kinds}:
        try:
            return _parse_number(text, kind is int or int in kinds, facts)
        except ValueError as error:
            if not words:
                raise
            raise ValueError(f"{error}, or {' or '.join(offered)}") from None
    if words:
        raise ValueError(f"must be one of {', '.join(offered)}{did_you_mean(text, words)}")
    if kind is str:
        return text
    if kind is bool:
        if text not in ("0", "1"):
            raise ValueError("must be 0 or 1")
        return text == "1"
    raise TypeError(f"shell_vars cannot read a {kind}")


def _parse_number(text: str, is_int: bool, facts: Mapping[str, Any]) -> float:
    if is_int:
        if not re.fullmatch(r"[+-]?\d+", text):
            raise ValueError("must be a whole number")
        if len(text.lstrip("+-")) > _MAX_DIGITS:
            _check_bounds(-1 if text[0] == "-" else 1, {**facts, "le": None, "lt": None})
            raise ValueError("is too small" if text[0] == "-" else "is too large")
        return _check_bounds(int(text), facts)
    try:
        number = float(text)
    except ValueError:
        raise ValueError("must be a number, like 2e-5") from None
    if not math.isfinite(number):
        raise ValueError("must be a finite number, like 2e-5")
    return _check_bounds(number, facts)


_BOUNDS = (
    ("ge", operator.ge, "{} or more"),
    ("gt", operator.gt, "more than {}"),
    ("le", operator.le, "{} or less"),
    ("lt", operator.lt, "less than {}"),
)


def _check_bounds(number: float, facts: Mapping[str, Any]) -> float:
    for key, is_within, words in _BOUNDS:
        if (bound := facts[key]) is not None and not is_within(number, bound):
            raise ValueError(f"must be {words.format(bound)}")
    return number


def whole_number(name: str, text: str, least: int) -> int:
    """Parse an integer that was typed as an option; `name` is for the message.

    Raises:
        UserError: it is not one, or less than `least`; with the message that a setting would get.
    """
    try:
        return parse_value(text, int, setting(name, ge=least, le=MOST).metadata)
    except ValueError as error:
        raise UserError(f"{name}={text[:20]}: {error}. --help tells the rest.") from None


def split_words(text: str) -> tuple[str, ...]:
    """Return words with commas or spaces between."""
    return tuple(text.replace(",", " ").split())


def parse_numbers(text: str) -> tuple[int, ...]:
    """Return positive integers with spaces or commas between; () for "" and auto.

    Raises:
        ValueError: a word is none; the message is for users.
    """
    words = split_words(text)
    if words in ((), ("auto",)):
        return ()
    facts = setting("", ge=1, le=MOST).metadata
    return tuple(parse_value(word, int, facts) for word in words)
