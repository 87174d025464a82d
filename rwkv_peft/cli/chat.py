"""./chat.sh: talk to a base, a base with an adapter, or a merged model.

usage: ./chat.sh [--model FILE] [--adapter RUN] [--prompt TEXT] [--raw] [--system TEXT] [--prompt-type NAME]
                 [--bos X] [--max-tokens N] [--temperature X] [--top-p X] [--top-k N] [--seed N] [--accept-edited]
       ./chat.sh --diagnose RUN [--model FILE] [--accept-edited]

  --model         the model: a name in model/ or merge/, or any path (MODEL_PATH in the script). Alone it stands for itself:
                  ADAPTER in the script is then left out. With --adapter it is the base that the run was trained on
  --adapter       what a run learnt: RUN for its last epoch, RUN/EPOCH, EPOCH of the newest run, or a file (ADAPTER in the
                  script). RUN: latest, a name in output/, or a path. EPOCH: a number, last, best or step-N. The same as in
                  ./merge.sh. Or a state from anywhere, like merge/<base>-<run>-<epoch>-alone.pth of ./merge.sh --export state
  --prompt TEXT   answer this one question and leave; without it you talk, and an empty line, /quit or Ctrl-D ends it
  --raw           the prompt is the beginning of a text to go on with, not a question
  --system TEXT   a system message at the start of the talk
  --prompt-type   the template to talk in, as in make_tokenize.sh; else that of the run, else PROMPT_TYPE in the script (auto: by
                  the base's name)
  --bos           1: token 0 comes before the first turn; 0: it does not; auto: as the run was trained, else as the template says
  --temperature   0 takes the likeliest token every time; 1 is the model's own spread; auto: as the template says
  --top-k         only so many of the likeliest tokens, before --top-p; 0: all of them; auto: as the template says
  --top-p         only the likeliest tokens that together have this share; auto: as the template says
  --diagnose RUN  how well did a run fit? Rows that it has learnt from and held-out ones go through its base and what became
                  of it, their questions are asked, and in words: underfit, overfit, a learning rate too high or too low, with
                  the numbers behind it. RUN: whatever --adapter takes, like latest, my-run or my-run/best
  --accept-edited take a run or a merged model whose .json was edited since it was written
  --help          this text
While you talk, Ctrl-C ends an answer, /reset forgets the talk, and the arrow keys bring back earlier questions.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rwkv_peft.checkpoint.base_template import AUTO, describe_mismatch, find_base_template
from rwkv_peft.checkpoint.prompt_format import PromptFormat
from rwkv_peft.checkpoint.run_dir import is_epoch
from rwkv_peft.checkpoint.sidecars import ACCEPT
from rwkv_peft.common import bus_error
from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.common.file_watch import FileWatch
from rwkv_peft.config.shell import parse_value, run_cli, setting
from rwkv_peft.text.preset_names import find_template, recorded_name, recorded_template
from rwkv_peft.text.presets import PRESETS
from rwkv_peft.text.template import ENDINGS, Dialogue, Message, Template, split_thought, tidy_answer
from rwkv_peft.text.tokenizer import END_OF_DOC

if TYPE_CHECKING:
    from torch import Tensor

    from rwkv_peft.model.rwkv import RWKV

COMMANDS = "/reset forgets the talk, /quit or an empty line ends it, Ctrl-C ends an answer"


@dataclass(frozen=True)
class ChatConfig:
    """The variables of chat.sh, in its order."""

    model_path: str = setting("MODEL_PATH")
    adapter: str = setting("ADAPTER")
    prompt_type: str = setting("PROMPT_TYPE")
    bos: Literal["auto", "0", "1"] = setting("BOS")
    system: str = setting("SYSTEM")
    max_tokens: int = setting("MAX_TOKENS", ge=1)
    temperature: Literal["auto"] | float = setting("TEMPERATURE", ge=0)
    top_p: Literal["auto"] | float = setting("TOP_P", gt=0, le=1)
    top_k: Literal["auto"] | int = setting("TOP_K", ge=0, le=65536)
    seed: int = setting("SEED", ge=0, le=2**31 - 1)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = setting("PRECISION")


class Asked(NamedTuple):
    """The command line.

    Attributes:
        config: Settings, with those of the command line.
        prompt: --prompt.
        raw: --raw.
        base_was_named: --model was given.
        run: The run to be diagnosed, None for none.
        accept_edited: --accept-edited.
    """

    config: ChatConfig
    prompt: str | None
    raw: bool
    base_was_named: bool
    run: str | None
    accept_edited: bool = False


def main(arguments: list[str]) -> None:
    """Run the command."""
    run_cli(arguments, __doc__, ChatConfig, command)


def command(config: ChatConfig, typed: list[str]) -> None:
    """Talk, answer once, or diagnose a run."""
    config, prompt, raw, base_was_named, run, accept_edited = command_line(typed, config)
    if run is not None:
        from rwkv_peft.chat.diagnose import diagnose

        return diagnose(run, config.model_path if base_was_named else "", config.precision, accept_edited)
    was_typed = any(word.startswith("--prompt-type") for word in typed) and config.prompt_type != AUTO
    if was_typed:
        check_template(config.prompt_type, f"--prompt-type {config.prompt_type}")
    elif config.prompt_type != AUTO:
        find_template(config.prompt_type)  # an unknown name is reported before a model is loaded
    in_use = FileWatch("it was opened", "Start ./chat.sh again when nothing writes to the file any more.")
    with bus_error.handle_bus_error(in_use.exit_if_truncated), in_use.explaining():
        talk_with_model(config, prompt, raw, base_was_named, was_typed, accept_edited, in_use)


def talk_with_model(
    config: ChatConfig,
    prompt: str | None,
    raw: bool,
    base_was_named: bool,
    was_typed: bool,
    accept_edited: bool,
    in_use: FileWatch,
) -> None:
    """Load the model, and talk or answer once."""
    from rwkv_peft.chat.load import load_chat_model, locate_model

    model, name, sidecar = load_chat_model(config, base_was_named, accept_edited, in_use)
    base = Path(sidecar["base_path"]) if sidecar.get("base_path") else locate_model(config.model_path)
    form = PRESETS["empty"] if raw else form_to_talk_in(config.prompt_type, was_typed, sidecar, name, base)
    asked = prompting(config, form, sidecar, name)
    config = with_sampling(config, form)
    if prompt is not None:
        if sys.stdout.isatty():
            print(f"{name}:", file=sys.stderr)  # standard output holds the answer alone
        once(model, config, asked, prompt, raw, in_use)
    else:
        talk(model, config, asked, name, in_use)


def prompting(config: ChatConfig, form: Template, sidecar: Mapping[str, Any], name: str) -> PromptFormat:
    """Return how to talk in a template: with the end of turns and the token 0 in front that were trained."""
    eot = sidecar["eot"] if sidecar.get("eot") in ENDINGS else "doc"
    trained = (
        bool(sidecar.get("bos")) if sidecar.get("prompt_type") or "bos" in sidecar else None
    )  # older runs had none
    bos = form.begins_with_zero(config.bos) if config.bos != "auto" or trained is None else trained
    if trained is not None and bos != trained:
        say(f"warning: BOS={config.bos}, but {name} was trained with BOS={int(trained)}.")
    return PromptFormat(form, eot, bos, blank_lines=bool(sidecar.get("blank_lines")))


def with_sampling(config: ChatConfig, form: Template) -> ChatConfig:
    """The settings with `auto` replaced by the sampling of the template."""
    names = [name for name in ("temperature", "top_p", "top_k") if getattr(config, name) == "auto"]
    return dataclasses.replace(config, **{name: getattr(form, name) for name in names})


def form_to_talk_in(asked: str, was_typed: bool, sidecar: Mapping[str, Any], name: str, base: Path) -> Template:
    """Return the template to talk in; print a note where the candidates differ.

    It is the one of the command line, else the one that the model was trained with, else that of the script, where auto
    is the one that the base suggests.

    Args:
        asked: PROMPT_TYPE.
        was_typed: It was given on the command line.
        sidecar: Of the model.
        name: Of the model, for messages.
        base: Its file, or that of the base below it.
    """
    try:
        trained = recorded_template(sidecar, f"{name} (its .json)")
    except SettingErrors as errors:
        if was_typed:
            return find_template(asked)
        which = f"{name} was trained with PROMPT_TYPE={sidecar['prompt_type']}, which"
        raise UserError(f"{which} {errors.problems[0].message}.") from None
    trained_with = trained and (recorded_name(sidecar) or trained.name)
    form = find_template(asked) if asked != AUTO else trained or find_base_template(base).template
    if trained and was_typed and trained != form:
        say(
            f"warning: --prompt-type {asked}, but {name} was trained with PROMPT_TYPE={trained_with}: it may not end its answers."
        )
    elif trained and trained != form:
        say(f"PROMPT_TYPE={trained_with}: what it was trained with. --prompt-type takes another.")
    elif not trained and asked == AUTO:
        say(
            f"PROMPT_TYPE=auto became {find_base_template(base).name} (by the base, {base.name}). --prompt-type takes another."
        )
    elif not trained and (words := describe_mismatch(base, form)):
        say(f"warning: PROMPT_TYPE={asked}, but {words}.")
    return form if was_typed or not trained else trained


def say(words: str) -> None:
    """Beside the answer, which standard output holds alone."""
    print(words, file=sys.stderr)


def check_template(name: str, who: str) -> None:
    """UserError if there is no such template. who: what asks for it, where it is not the script."""
    try:
        find_template(name)
    except SettingErrors as errors:
        raise UserError(f"{who} {errors.problems[0].message}.") from None


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors end as those of all commands."""

    def error(self, message: str):
        """Raise the error for the user."""
        alone = message.startswith("unrecognized arguments:") and "-" not in message
        hint = " (a question goes behind --prompt)" if alone else ""
        word = message.removeprefix("unrecognized arguments: ")
        if is_epoch(word):
            hint = f" (a run and its epoch are one word: --adapter RUN/{word}, --diagnose RUN/{word})"
        raise UserError(f"{message}{hint}. See ./chat.sh --help")


def command_line(arguments: list[str], config: ChatConfig) -> Asked:
    """The script's values with those of the command line in their place, and what it asks for beside them."""
    parser = Parser(add_help=False, allow_abbrev=False)
    options = {f.metadata["var"]: f for f in dataclasses.fields(ChatConfig)}
    flags = {"--model": "MODEL_PATH", "--adapter": "ADAPTER", "--system": "SYSTEM",
             "--prompt-type": "PROMPT_TYPE", "--bos": "BOS", "--max-tokens": "MAX_TOKENS",
             "--temperature": "TEMPERATURE", "--top-p": "TOP_P", "--top-k": "TOP_K", "--seed": "SEED"}  # fmt: skip
    for flag, name in flags.items():
        parser.add_argument(flag, dest=name)
    parser.add_argument("--prompt")
    parser.add_argument("--raw", action="store_true")
    parser.add_argument("--diagnose")
    parser.add_argument(ACCEPT, action="store_true", dest="accept_edited")
    words = list(arguments)
    for i, word in reversed(list(enumerate(words[:-1]))):  # "--prompt -5+3?": what follows is its value, whatever it is
        if word in (*flags, "--prompt") and not words[i + 1].startswith("--"):
            words[i : i + 2] = [f"{word}={words[i + 1]}"]
    given = parser.parse_args(words)
    given.SYSTEM = given.SYSTEM and readable(given.SYSTEM)
    kinds = typing.get_type_hints(ChatConfig)
    changed = {}
    for flag, name in flags.items():
        text = getattr(given, name)
        if text is not None:
            try:
                changed[options[name].name] = parse_value(text, kinds[options[name].name], options[name].metadata)
            except ValueError as error:
                raise UserError(f"{flag} {text}: {error}.") from None
    if given.diagnose is not None:
        given_too = [flag for flag, name in flags.items() if getattr(given, name) is not None and flag != "--model"]
        given_too += ["--prompt"] * (given.prompt is not None) + ["--raw"] * given.raw
        if given_too:
            raise UserError(f"{given_too[0]} has no place beside --diagnose, which takes only --model.")
    if given.raw and given.prompt is None:
        raise UserError("--raw needs --prompt: the beginning of the text to go on with.")
    if given.prompt is not None and not given.prompt.strip():
        raise UserError("--prompt is empty.")
    if given.MODEL_PATH and not given.ADAPTER:
        changed["adapter"] = ""  # another model was asked for: the script's adapter belongs to the script's model
        if config.adapter and given.ADAPTER is None and given.diagnose is None:
            notice = f"ADAPTER={config.adapter} of the script is left out, because --model asks for another model."
            print(f"{notice} To have both: --model FILE --adapter FILE", file=sys.stderr)
    return Asked(
        dataclasses.replace(config, **changed),
        given.prompt,
        given.raw,
        given.MODEL_PATH is not None,
        given.diagnose,
        given.accept_edited,
    )


def readable(typed: str) -> str:
    """What was typed, with ? for bytes that are no text: they arrive as half characters."""
    return typed.encode("utf-8", "replace").decode()


def once(model, config: ChatConfig, asked: PromptFormat, prompt: str, raw: bool, in_use: FileWatch) -> None:
    """--prompt: one answer to standard output. in_use: the model's files."""
    from rwkv_peft.model.generate import advance
    from rwkv_peft.text.roles import Role

    form = asked.template
    text = readable(prompt)
    if not raw:
        system = [Message(Role.SYSTEM, config.system)] if config.system.strip() else []
        messages = [*system, Message(Role.USER, text)]
        if word := form.find_reserved(Dialogue(tuple(messages))):
            raise UserError(
                f"--prompt or SYSTEM holds {word}, which ends a turn in PROMPT_TYPE={form.name}: ask without it."
            )
        text = form.prompt(messages, ending=asked.ending)
    stops: Stops = ((), (END_OF_DOC,)) if raw else (form.stops(), asked.stop_tokens)
    strip, lead = not raw and not form.opening, form.patterns[Role.ASSISTANT].lead
    in_use.must_be_unchanged()
    if form.opening and not raw:
        print(form.opening, end="")  # the answer continues it
    logits, state = advance(model, asked.encode(text))
    answer(model, config, logits, state, stops, strip, lead=lead)
    print()


Stops = tuple[Sequence[str], Collection[int]]  # texts and tokens


def answer(
    model: RWKV,
    config: ChatConfig,
    logits: Tensor,
    state: Any,
    stops: Stops,
    strip: bool,
    talking: bool = False,
    lead: str = " ",
) -> str:
    """Print an answer while it is generated, and return it.

    Args:
        model: For generation.
        config: Settings.
        logits: After the prompt.
        state: After the prompt.
        stops: Texts and tokens.
        strip: Without blanks before its text; its indentation stays.
        talking: Ctrl-C ends the answer, not the program.
        lead: What the template writes after the heading.
    """
    from rwkv_peft.model.generate import generate

    text = before = ""
    try:
        for piece in generate(
            model, logits, state, config.max_tokens, float(config.temperature), float(config.top_p), config.seed,
            stops[0], stops[1], int(config.top_k),
        ):  # fmt: skip
            if strip and not text:
                before += piece
                piece = tidy_answer(before.removeprefix(lead) + ".")[:-1] if before.strip() else ""
            text += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not talking:
            raise
        print(" ...", end="", flush=True)
    return text


def talk(model, config: ChatConfig, asked: PromptFormat, name: str, in_use: FileWatch) -> None:
    """Have a conversation.

    The whole of it is encoded again each turn, and the model continues from the end of the last prompt: later text
    cannot change the tokens up to there, while it can change those at the end of an answer. in_use: watches the model's
    files.
    """
    with contextlib.suppress(ImportError):  # gives input() its line editing and the arrow keys
        import readline  # noqa: F401

    from rwkv_peft.model.generate import advance
    from rwkv_peft.text.roles import Role

    form = asked.template
    print(f"{name}: type a question. {COMMANDS}.")
    start, lead = (
        [Message(Role.SYSTEM, config.system)] if config.system.strip() else [],
        form.patterns[Role.ASSISTANT].lead,
    )
    if word := form.find_reserved(Dialogue(tuple(start))):
        raise UserError(f"SYSTEM holds {word}, which ends a turn in PROMPT_TYPE={form.name}: write it without.")
    messages, known, state = list(start), 0, None
    while True:
        try:
            print()
            question = readable(input("User: "))
        except (EOFError, KeyboardInterrupt):
            print()
            return
        word = question.strip()
        if word in ("", "/quit", "/exit"):
            return
        if word == "/reset":
            messages, known, state = list(start), 0, None
            print("The talk is forgotten.")
            continue
        if word in ("/help", "/?"):
            print(COMMANDS)
            continue
        if word := form.find_reserved(Dialogue((Message(Role.USER, question),))):
            print(f"{word} ends a turn in PROMPT_TYPE={form.name}: ask without it.")
            continue
        in_use.must_be_unchanged()
        messages.append(Message(Role.USER, form.add_cue(question)))
        ids = asked.encode(form.prompt(messages, ending=asked.ending))
        try:
            logits, state = advance(model, ids[known:], state)
        except KeyboardInterrupt:
            messages.pop()
            print("\nStopped before the answer began; this question is forgotten.")
            continue
        known = len(ids)
        print(f"\nAssistant: {form.opening}", end="", flush=True)
        said = answer(model, config, logits, state, (form.stops(), asked.stop_tokens), not form.opening, True, lead)
        print()
        think, words = split_thought(form.opening + said)
        messages.append(Message(Role.ASSISTANT, tidy_answer(words) or "...", think))


if __name__ == "__main__":
    main(sys.argv[1:])
