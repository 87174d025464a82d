r"""./make_tokenize.sh: text of any format -> data/NAME.bin/.idx and NAME.roles.bin/.idx (who said each token).

usage: ./make_tokenize.sh FILE [EPOCHS] [MAX_TOKENS] [--no-eof] [--preview N] [--SETTING VALUE ...]

  FILE         a file or a folder: a name in data/, or any path. Formats: .jsonl .ndjson .json .csv .tsv .xlsx .xls .ods
               .parquet .arrow .txt, and packed ones (.jsonl.gz, .jsonl.zst, ...). The content decides where the name says
               something else. A folder may hold them mixed; parts named test or valid are not used (see VALID_SPLIT).
               The encoding of text is found (ENCODING), or the file refused with the option to add: --encoding gb18030
  EPOCHS       how often all rows are written, newly shuffled each time (1). training.sh shuffles anyway
  MAX_TOKENS   the longest row, its terminator included (0: no limit); OVERLONG says what happens to longer ones
  --no-eof     do not end rows with token 0. Without it the model does not learn to stop
  --preview N  show the first N rows token by token, what is learnt marked; write nothing
  --convert-headings  rewrite what was made for another tool (headings like Q:/A: or 用户：/助手：, ChatML tags, \n written as
               letters, <|endoftext|>) where it can be read in one way only; the report counts such rows in any case
  --SETTING    any variable of the script for this one call: --prompt-type rwkv-g1, --strict 1, --eot both, ...
  --help       this text

Rows, found by their columns (MAP_KEYS gives other names, HANDLER forces one kind):
  {"text": "User: Hi\n\nAssistant: Hello!"}                                             as it is
  {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
        also "conversations"; "from" and "value"; tools, tool_calls, reasoning_content, "weight": 0 or "loss": false (not to be
        learnt)
  {"instruction": "...", "input": "...", "output": "...", "system": "...", "history": [["...", "..."]]}
  {"prompt": "...", "completion": "..."}      also prompt/response, question/answer, input/target, 问题/回答, ...
Other names, shapes, flags and roles: docs/data.md. A column that is not used is reported.

The files appear beside FILE when everything was fine; otherwise earlier files stay as they are. Beside them: NAME.report.json
and NAME.lengths.png (what the data are like), NAME.rejects.jsonl (rows that cannot be used, with file, line and reason).
The same call again finds its own result and does nothing. `python -m json2binidx` is the same command without bash, with the
values of make_tokenize.sh; `python -m json2binidx.inspect NAME` shows and checks any .bin/.idx pair.
"""

from __future__ import annotations

import dataclasses
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_peft.common import paths
from rwkv_peft.common.errors import UserError, exit_with, handle_errors
from rwkv_peft.common.formatting import did_you_mean
from rwkv_peft.common.names import describe_fault, escape_invisible
from rwkv_peft.config.shell import run_cli, whole_number

if TYPE_CHECKING:
    from rwkv_peft.preprocess.config import TokenizeConfig

OWN = ("--no-eof", "--preview")


def main(arguments: list[str], environment: dict[str, str] | None = None) -> None:
    """Run the command."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # a closed terminal or a scheduler: leave, but tidily
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda received, _frame: sys.exit(128 + received))
    with handle_errors():  # a missing package is reported as an error as well
        from rwkv_peft.preprocess.config import TokenizeConfig

        run_cli(arguments, usage(), TokenizeConfig, command, environment=environment, options=True, lean="WORKERS")


def usage() -> str:
    """The text above, and the templates by their names."""
    from rwkv_peft.text.presets import ABOUT

    width = max(map(len, ABOUT)) + 2
    names = [f"  {name:<{width}}{about}" for name, about in ABOUT.items()]
    return "\n".join([
        __doc__,
        "PROMPT_TYPE, the template that dialogues are written in: auto (by MODEL_PATH in training.sh: rwkv-g1 for G1 models,",
        "else rwkv-world), a .json file of your own, or one of these:",
        *names,
        "",
    ])  # fmt: skip


def command(config: TokenizeConfig, typed: list[str]) -> None:
    """Tokenize, or show a preview."""
    options = [f"--{f.metadata['var'].lower().replace('_', '-')}" for f in dataclasses.fields(config)]
    words, end_of_doc, most = command_line(typed, options)
    source = find(words[0])
    epochs = whole_number("EPOCHS", words[1], 1) if len(words) > 1 else 1
    if len(words) > 2:
        config = dataclasses.replace(config, max_tokens=whole_number("MAX_TOKENS", words[2], 0))
    if most:
        from .preview import preview

        preview(source, config, end_of_doc, most)
    else:
        from rwkv_peft.preprocess.tokenize import tokenize

        tokenize(source, config, epochs, end_of_doc)


def command_line(typed: list[str], settings: list[str]) -> tuple[list[str], bool, int]:
    """FILE and the numbers behind it; whether rows end with token 0; how many rows --preview shows (0: no preview).

    settings: the options that stand for settings, which have been taken already.
    """
    words, end_of_doc, most = [], True, 0
    rest = list(typed)
    while rest:
        word = rest.pop(0)
        if word == "--no-eof":
            end_of_doc = False
        elif word == "--preview":
            most = whole_number("--preview", rest.pop(0), 1) if rest and rest[0].isdigit() else 5
        elif word.startswith("--preview="):
            most = whole_number("--preview", word.partition("=")[2], 1)
        elif word.startswith("--"):
            raise UserError(
                f"{word}: is not an option{did_you_mean(word, [*OWN, *settings]) or '.'} There are {', '.join(OWN)}, and every "
                "setting of the script; see ./make_tokenize.sh --help"
            )
        else:
            words.append(word)
    if not words:
        exit_with(usage(), 2)
    others = [word for word in words[1:] if not re.match(r"[+-]?\d", word)]
    if len(words) > 3 or others:
        many = f"{len(words)} words where at most 3 belong (FILE EPOCHS MAX_TOKENS)"
        message = many if len(words) > 3 else f"{others[0]}: is no number, where EPOCHS and MAX_TOKENS belong"
        raise UserError(
            f'{message}. Put quotes around a name with spaces, like "my chats.jsonl". See ./make_tokenize.sh --help'
        )
    return words, end_of_doc, most


def find(name: str) -> Path:
    """The file or folder, or UserError if it cannot be read, or its tokens would take the place of something else."""
    from rwkv_peft.preprocess import files

    source = files.named(name)
    stem = files.stem_of(source).name if source.is_file() else source.name
    for part in (".roles", ".valid"):
        if stem.endswith(part):
            raise UserError(
                f"{paths.display_path(source)}: would write over what belongs to {stem.removesuffix(part)}; take a name without "
                f"{part}."
            )
    if wrong := describe_fault(stem) or describe_fault(str(source), edges=False):
        raise UserError(f"{escape_invisible(paths.display_path(source))}: this name {wrong}; rename it.")
    if not (source.is_file() or source.is_dir()):
        raise UserError(f"{paths.display_path(source)}: is not a file. A pipe can be trained from with STREAMING=1.")
    return source
