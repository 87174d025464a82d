"""./chat.sh: talk to a base, a base with an adapter, or a merged model.

usage: ./chat.sh [--model FILE] [--adapter FILE] [--prompt TEXT] [--raw] [--system TEXT]
                 [--prompt-type NAME] [--max-tokens N] [--temperature X] [--top-p X] [--seed N]

  --model         the model: a name in model/ or merge/, or any path (MODEL_PATH in the script). Alone it stands for itself:
                  ADAPTER in the script is then left out. With --adapter it is the base that the run was trained on
  --adapter       what a run learnt: output/RUN/rwkv-N.pth, output/RUN for its last epoch, or latest (ADAPTER in the script);
                  or a state from anywhere, like merge/<base>-STATE-N-alone.pth of ./merge.sh --export state
  --prompt TEXT   answer this one question and leave; without it you talk, and an empty line, /quit or Ctrl-D ends it
  --raw           the prompt is the beginning of a text to go on with, not a question
  --system TEXT   a system message at the start of the talk
  --prompt-type   the template to talk in, as in make_tokenize.sh; else that of the run, or PROMPT_TYPE in the script
  --temperature   0 takes the likeliest token every time; 1 is the model's own spread
  --top-p         only the likeliest tokens that together have this share
  --help          this text
While you talk, Ctrl-C ends an answer, /reset forgets the talk, and the arrow keys bring back earlier questions.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from . import project, runs, sidecars
from .errors import Problems, UserError
from .shell_vars import convert, enter, var
from .templates.named import template
from .templates.template import ENDINGS, Ending
from .words import did_you_mean, listed

# the endings of files for other programs -> what loads them
OTHERS = {".st": "Ai00 and web-rwkv", ".gguf": "llama.cpp", ".state": "Ai00", ".rwkvcpp.bin": "rwkv.cpp"}
COMMANDS = "/reset forgets the talk, /quit or an empty line ends it, Ctrl-C ends an answer"


@dataclass(frozen=True)
class ChatConfig:
    """The variables of chat.sh, in its order."""

    model_path: str = var("MODEL_PATH")
    adapter: str = var("ADAPTER")
    prompt_type: str = var("PROMPT_TYPE")
    system: str = var("SYSTEM")
    max_tokens: int = var("MAX_TOKENS", ge=1)
    temperature: float = var("TEMPERATURE", ge=0)
    top_p: float = var("TOP_P", gt=0, le=1)
    seed: int = var("SEED", ge=0, le=2**31 - 1)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = var("PRECISION")


def main(arguments: list[str]) -> None:
    enter(arguments, __doc__, ChatConfig, command)


def command(config: ChatConfig, typed: list[str]) -> None:
    config, prompt, raw, base_was_named = command_line(typed, config)
    was_typed = any(word.startswith("--prompt-type") for word in typed)
    if was_typed:
        check_template(config.prompt_type, f"--prompt-type {config.prompt_type}")
    else:
        template(config.prompt_type)  # a name that is none is told before a model is loaded
    model, name, run = load(config, base_was_named)
    trained_with, ending = run.get("prompt_type"), ENDINGS.get(run.get("eot"), ENDINGS["doc"])
    if trained_with and trained_with != config.prompt_type and not raw and not was_typed:
        print(f"PROMPT_TYPE={trained_with}: what it was trained with. --prompt-type takes another.", file=sys.stderr)
        check_template(trained_with, f"{name} was trained with PROMPT_TYPE={trained_with}, which")
        config = dataclasses.replace(config, prompt_type=trained_with)
    if prompt is not None:
        once(model, config, prompt, raw)
    else:
        talk(model, config, name, ending)


def check_template(name: str, who: str) -> None:
    """UserError if there is no such template. who: what asks for it, where it is not the script."""
    try:
        template(name)
    except Problems as found:
        raise UserError(f"{who} {found.problems[0].message}.") from None


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}. See ./chat.sh --help")


def command_line(arguments: list[str], config: ChatConfig) -> tuple[ChatConfig, str | None, bool, bool]:
    """The script's values with those of the command line in their place."""
    parser = Parser(add_help=False, allow_abbrev=False)
    options = {f.metadata["var"]: f for f in dataclasses.fields(ChatConfig)}
    flags = {"--model": "MODEL_PATH", "--adapter": "ADAPTER", "--system": "SYSTEM",
             "--prompt-type": "PROMPT_TYPE", "--max-tokens": "MAX_TOKENS",
             "--temperature": "TEMPERATURE", "--top-p": "TOP_P", "--seed": "SEED"}  # fmt: skip
    for flag, name in flags.items():
        parser.add_argument(flag, dest=name)
    parser.add_argument("--prompt")
    parser.add_argument("--raw", action="store_true")
    words = list(arguments)
    for i, word in reversed(list(enumerate(words[:-1]))):  # "--prompt -5+3?": what follows is its value, whatever it is
        if word in (*flags, "--prompt") and not words[i + 1].startswith("--"):
            words[i : i + 2] = [f"{word}={words[i + 1]}"]
    given = parser.parse_args(words)
    kinds = {"MAX_TOKENS": int, "SEED": int, "TEMPERATURE": float, "TOP_P": float}
    changed = {}
    for flag, name in flags.items():
        text = getattr(given, name)
        if text is not None:
            try:
                changed[options[name].name] = convert(text, kinds.get(name, str), options[name].metadata)
            except ValueError as error:
                raise UserError(f"{flag} {text}: {error}.") from None
    if given.raw and given.prompt is None:
        raise UserError("--raw needs --prompt: the beginning of the text to go on with.")
    if given.prompt is not None and not given.prompt.strip():
        raise UserError("--prompt is empty.")
    if given.MODEL_PATH and not given.ADAPTER:
        changed["adapter"] = ""  # another model was asked for: the script's adapter belongs to the script's model
        if config.adapter and given.ADAPTER is None:
            told = f"ADAPTER={config.adapter} of the script is left out, because --model asks for another model."
            print(f"{told} To have both: --model FILE --adapter FILE", file=sys.stderr)
    return dataclasses.replace(config, **changed), given.prompt, given.raw, given.MODEL_PATH is not None


def load(config: ChatConfig, base_was_named: bool):
    """The model ready to talk, what to call it, and what its run tells of itself (nothing, if nobody knows).

    base_was_named: --model was typed beside an adapter: it must be the adapter's base. Else the sidecar says which.
    """
    import torch

    from . import bases, checkpoint, machine
    from .adapters import attach
    from .methods import METHODS
    from .model.rwkv import build, for_generating
    from .ops import dispatch

    base, adapter, setup, sidecar = None, None, attach.Setup("none"), {}
    if config.adapter:
        adapter = adapter_file(config.adapter)
        if is_bare_state(adapter):  # a state from anywhere: nothing else has to be known
            setup, base = attach.Setup("state"), model_or_merged(config.model_path)
        else:
            bases.must_not_lack_its_sidecar(adapter)
            sidecar = sidecars.read(adapter, ("method", "base", "base_sha256"))
            setup = attach.setup_of(sidecar, project.shown(adapter))
            bases.must_be_its_own(adapter, sidecar)
            if METHODS[setup.method].saves_model:
                base, adapter = adapter, None
            else:
                given = str(model_place(config.model_path)) if base_was_named else ""
                base = bases.base_of(sidecar, adapter, given, cure="./chat.sh --model FILE --adapter FILE")
    elif not config.model_path.strip():
        raise UserError("No model is named: give --model FILE or --adapter FILE, or MODEL_PATH in chat.sh.")
    else:
        base = model_or_merged(config.model_path)
    _, geometry = bases.inspect(base)
    ops = dispatch.choose("auto", geometry.version, machine.device_kind(), geometry.head_size)
    # where large matrices are read as they are stored, float32 costs no more than bfloat16 and rounds nothing
    exact = config.precision == "auto" and torch.bfloat16 in ops.reads
    dtype = torch.float32 if exact else machine.DTYPES[machine.precision(config.precision)]
    if ops.why and ops.name == "torch":
        print(f"OP=torch: {ops.why}", file=sys.stderr)
    model = build(geometry, checkpoint.load(base), ops, dtype)
    if adapter:
        start = bases.start_of(adapter, sidecar, setup.method)
        attach.attach_checkpoint(model, checkpoint.load(adapter), setup, project.shown(adapter), None, start)
    name = project.shown(base) + (f" + {project.shown(adapter)}" if adapter else "")
    if not sidecar and sidecars.path_of(base).is_file():  # a merged model
        with contextlib.suppress(UserError):
            sidecar = sidecars.read(base, ("prompt_type",))
    return for_generating(model).to(torch.device(machine.device_kind())), name, sidecar


def must_be_for_us(name: str) -> None:
    """UserError for a file that ./merge.sh --export writes for another program, with the name of what it was made of."""
    for ending, program in OTHERS.items():
        if name.endswith(ending):
            stem = name.removesuffix(ending).removesuffix(".bf16").removesuffix(".f32")
            raise UserError(f"{name}: ./chat.sh reads .pth, and this file is for {program}. Use {stem}.pth")


def model_place(name: str) -> Path:
    """Where a model lies, in model/ or merge/ or anywhere. May not exist."""
    must_be_for_us(name)
    path = project.model_file(name)
    merged = project.find(name if name.endswith(".pth") else f"{name}.pth", "merge")
    return merged if merged.exists() and not path.exists() else path


def model_or_merged(name: str) -> Path:
    path = model_place(name)
    if path.exists():
        return path
    there = [p.name for folder in ("model", "merge") for p in (project.ROOT / folder).glob("*.pth")]
    raise UserError(
        f"{name}: there is no such model{did_you_mean(name, there) or '.'} In model/ and merge/ there is: {listed(there)}."
    )


def adapter_file(name: str) -> Path:
    """ADAPTER -> the checkpoint; a run's folder stands for its last epoch. UserError if it is a model of its own."""
    from . import checkpoint
    from .methods import METHODS
    from .model.arch import ARCHS

    must_be_for_us(name)
    path = runs.run_folder("") if name in ("latest", "output/latest") else project.find(name, "output")
    if path.is_dir():
        return runs.epoch_file(path, None)
    holds = checkpoint.describe(path)
    if sidecars.path_of(path).is_file():
        method = METHODS.get(sidecars.read(path, ("method",))["method"])
        if method and method.saves_model:
            return path
    if "head.weight" in holds and any(arch.marker in holds for arch in ARCHS.values()):
        raise UserError(f"{project.shown(path)}: is a whole model, not an adapter. Use it with --model (MODEL_PATH).")
    return path


def is_bare_state(path: Path) -> bool:
    """Whether a file holds a learnt state and nothing else, without a sidecar."""
    from . import checkpoint
    from .model.arch import STATE_NAME

    return not sidecars.path_of(path).is_file() and all(map(STATE_NAME.fullmatch, checkpoint.describe(path)))


def once(model, config: ChatConfig, prompt: str, raw: bool) -> None:
    """--prompt: one answer to standard output."""
    from . import tokenizer
    from .generate import advance
    from .roles import Role
    from .templates.template import Message

    form = template(config.prompt_type)
    text = prompt.encode("utf-8", "replace").decode()  # bytes that are no text arrive as half characters
    if not raw:
        system = [Message(Role.SYSTEM, config.system)] if config.system.strip() else []
        text = form.prompt([*system, Message(Role.USER, text)])
    stops = () if raw else form.stops()
    if form.opening and not raw:
        print(form.opening, end="")  # the answer goes on from it
    answer(model, config, *advance(model, tokenizer.encode(text)), stops=stops, strip=not raw)
    print()


def answer(model, config: ChatConfig, logits, state, stops, strip: bool, talking: bool = False) -> str:
    """Print an answer while it is made; returns it. talking: Ctrl-C ends the answer, not the program."""
    from .generate import generate

    text = ""
    try:
        for piece in generate(
            model, logits, state, config.max_tokens, config.temperature, config.top_p, config.seed, stops
        ):
            if strip and not text:
                piece = piece.lstrip()
            text += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not talking:
            raise
        print(" ...", end="", flush=True)
    return text


def talk(model, config: ChatConfig, name: str, ending: Ending = ENDINGS["doc"]) -> None:
    """A conversation. The whole of it is encoded anew each turn, and the model goes on from the end of the last prompt: that
    is a border which later text cannot move, while the end of an answer is not. ending: how turns of the training data end."""
    with contextlib.suppress(ImportError):  # gives input() its line editing and the arrow keys
        import readline  # noqa: F401

    from . import tokenizer
    from .generate import advance
    from .roles import Role
    from .templates.template import Message, split_thought

    form = template(config.prompt_type)
    print(f"{name}: type a question. {COMMANDS}.")
    start = [Message(Role.SYSTEM, config.system)] if config.system.strip() else []
    messages, known, state = list(start), 0, None
    while True:
        try:
            print()
            question = input("User: ").encode("utf-8", "replace").decode()
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
        messages.append(Message(Role.USER, question))
        ids = tokenizer.encode(form.prompt(messages, ending=ending))
        try:
            logits, state = advance(model, ids[known:], state)
        except KeyboardInterrupt:
            messages.pop()
            print("\nStopped before the answer began; this question is forgotten.")
            continue
        known = len(ids)
        print(f"\nAssistant: {form.opening}", end="", flush=True)
        said = answer(model, config, logits, state, form.stops(), strip=True, talking=True)
        print()
        think, words = split_thought(form.opening + said)
        messages.append(Message(Role.ASSISTANT, words.strip() or "...", think))


if __name__ == "__main__":
    main(sys.argv[1:])
