"""./make_tokenize.sh: JSON lines -> data/NAME.bin/.idx and NAME.roles.bin/.idx (who said each token).

usage: ./make_tokenize.sh FILE [EPOCHS] [MAX_TOKENS] [--no-eof]

  FILE         a .jsonl file: its name in data/, or any path. Every line is one of
                 {"text": "User: Hi\\n\\nAssistant: Hello!"}
                 {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
                 {"conversations": [...]}    the same; "from" and "value" are understood as well
  EPOCHS       how often all rows are written, newly shuffled each time (1). training.sh shuffles anyway
  MAX_TOKENS   leave out rows with more tokens than this, the end of the document included (0: none)
  --no-eof     do not end rows with token 0. Without it the model does not learn to stop
  --help       this text

The files appear beside FILE when everything was fine; otherwise earlier files stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rwkv_peft import project
from rwkv_peft.atomic import need_space
from rwkv_peft.errors import UserError, leave
from rwkv_peft.shell_vars import enter, var, whole_number
from rwkv_peft.words import count, did_you_mean, listed

SHOW = 10  # problems and dropped lines that are listed; the rest are counted


@dataclass(frozen=True)
class TokenizeConfig:
    """The variables of make_tokenize.sh."""

    seed: int = var("SEED", ge=0, le=2**31 - 1)


def main(arguments: list[str]) -> None:
    enter(arguments, __doc__, TokenizeConfig, command)


def command(config: TokenizeConfig, typed: list[str]) -> None:
    source, epochs, max_tokens, end_of_doc = command_line(typed)
    tokenize(source, epochs, max_tokens, end_of_doc, config.seed)


def command_line(arguments: list[str]) -> tuple[Path, int, int, bool]:
    flags = [a for a in arguments if a.startswith("--")]
    words = [a for a in arguments if not a.startswith("--")]
    unknown = [f for f in flags if f != "--no-eof"]
    if unknown:
        meant = did_you_mean(unknown[0], ["--no-eof"])
        raise UserError(
            f"{unknown[0]}: is not an option{meant or '.'} There is --no-eof; see ./make_tokenize.sh --help"
        )
    if not 1 <= len(words) <= 3:
        leave(__doc__, 2)
    name, epochs, max_tokens = words + ["1", "0"][len(words) - 1 :]
    epochs, max_tokens = whole_number("EPOCHS", epochs, 1), whole_number("MAX_TOKENS", max_tokens, 0)
    source = project.find(name, "data")
    if not source.exists():
        there = [p.name for p in (project.ROOT / "data").glob("*.jsonl")]
        raise UserError(
            f"{project.shown(source)}: there is no such file{did_you_mean(source.name, there) or '.'} "
            f"In data/ there is: {listed(there)}."
        )
    if not source.is_file():
        raise UserError(f"{project.shown(source)}: is not a file.")
    if source.suffix != ".jsonl":
        raise UserError(f"{project.shown(source)}: must end in .jsonl (one JSON object per line).")
    if source.stem.endswith(".roles"):
        other = source.name.replace(".roles", "")
        raise UserError(
            f"{project.shown(source)}: would write over what belongs to {other}; take a name without .roles."
        )
    return source, epochs, max_tokens, "--no-eof" not in flags


def tokenize(source: Path, epochs: int, max_tokens: int, end_of_doc: bool, seed: int) -> None:
    import tempfile
    from collections import Counter

    import numpy as np
    from tqdm import tqdm

    from rwkv_peft.data.binidx import Writer
    from rwkv_peft.roles import Role
    from rwkv_peft.templates import overlooked_heading

    from .advice import advice
    from .encode import encode
    from .records import FORMS, RowError, lines, parse, rendered

    prefix, shown = source.with_suffix(""), project.shown(source)
    sizes: list[int] = []
    schemas: Counter[str] = Counter()
    wrong: list[str] = []
    dropped: list[tuple[int, int]] = []  # line, tokens
    overlooked: list[tuple[int, str]] = []  # line, what looks like a heading there and is none
    answers = 0
    # rows are encoded once, into files without a name that vanish with us; repeats only copy
    with tempfile.TemporaryFile(dir=source.parent) as ids_file, tempfile.TemporaryFile(dir=source.parent) as roles_file:
        bar = tqdm(
            total=source.stat().st_size, unit="B", unit_scale=True, desc=source.name, disable=not sys.stderr.isatty()
        )
        with bar:
            for number, line, read in lines(source):
                bar.update(read - bar.n)
                try:
                    schema, text, spans = rendered(parse(line))
                    ids, roles = encode(text, spans, end_of_doc)
                except RowError as error:
                    wrong.append(f"{shown}:{number}: {error}")
                    continue
                if wrong:  # nothing will be written: only look for more problems
                    continue
                schemas[schema] += 1
                if schema == "text" and (heading := overlooked_heading(text.encode("utf-8"), spans)):
                    overlooked.append((number, heading))
                if max_tokens and len(ids) > max_tokens:
                    dropped.append((number, len(ids)))
                    continue
                ids_file.write(ids.astype("<u2").tobytes())
                roles_file.write(roles.tobytes())
                sizes.append(len(ids))
                answers += bool((roles == Role.ASSISTANT).any())
        if wrong:
            first = "\n".join(wrong[:SHOW])
            more = f"\n... and {len(wrong) - SHOW} more" if len(wrong) > SHOW else ""
            many = count(len(wrong), "row")
            raise UserError(f"{first}{more}\n{shown} has {many} that cannot be used; nothing was written.\n{FORMS}")
        report_dropped(dropped, max_tokens)
        if not sizes:
            why = "every row was dropped" if dropped else "it has no rows"
            raise UserError(f"{shown}: {why}; nothing was written, earlier files are untouched.")
        ids_file.flush()
        roles_file.flush()
        all_ids = np.memmap(ids_file, dtype="<u2", mode="r")
        all_roles = np.memmap(roles_file, dtype=np.uint8, mode="r")
        starts = np.concatenate([[0], np.cumsum(sizes)])
        # ids, roles, and two indexes
        need_space(source.parent, epochs * (3 * int(starts[-1]) + 2 * 12 * len(sizes)))
        random = np.random.default_rng(seed)
        repeats = tqdm(range(epochs), desc="repeats", disable=epochs == 1 or not sys.stderr.isatty())
        with Writer(prefix, {"": np.uint16, ".roles": np.uint8}) as writer:
            for _ in repeats:
                for i in random.permutation(len(sizes)):
                    row = slice(starts[i], starts[i + 1])
                    writer.add({"": all_ids[row], ".roles": all_roles[row]})
            writer.commit()
    kinds = ", ".join(f"{n:,} {schema}" for schema, n in schemas.items())
    read, rows, tokens = len(sizes) + len(dropped), len(sizes) * epochs, sum(sizes) * epochs
    print(f"read      {shown}: {count(read, 'row')} ({kinds}), {len(sizes):,} kept, {answers:,} with an Assistant turn")
    print(
        f"wrote     {project.shown(prefix)}.bin/.idx and .roles.bin/.idx: {count(rows, 'row')}, {count(tokens, 'token')}"
    )
    name = prefix.name if prefix.parent == project.ROOT / "data" else project.shown(prefix.resolve())
    if overlooked:
        where = at_lines(overlooked)
        print(
            f"careful   {count(len(overlooked), 'row')} with what looks like a turn but is not written as the models know it: "
            f'{where}. A turn begins with exactly "User:", "Assistant:" or "System:", behind an empty line (\\n\\n in the JSON).'
        )
    print(advice(name, max(sizes), rows, end_of_doc, answers > 0 or len(overlooked) > 0))


def report_dropped(dropped: list[tuple[int, int]], max_tokens: int) -> None:
    if dropped:
        where = at_lines((line, f"{size:,} tokens") for line, size in dropped)
        print(f"dropped   {count(len(dropped), 'row')} with more than MAX_TOKENS={max_tokens} tokens: {where}")


def at_lines(found: Iterable[tuple[int, str]]) -> str:
    """line 5 (its note), line 9 (its note) and 3 more."""
    found = list(found)
    more = f" and {len(found) - SHOW:,} more" if len(found) > SHOW else ""
    return ", ".join(f"line {line} ({note})" for line, note in found[:SHOW]) + more


if __name__ == "__main__":
    main(sys.argv[1:])
