"""./merge.sh: fold what a run learnt into its base -> merge/<base>-<run>-<epoch>.pth, and write files for other programs.

usage: ./merge.sh [RUN] [EPOCH] [--export KIND ...] [--accept-edited]
       ./merge.sh FILE [--export KIND ...]
       ./merge.sh --stack CHECKPOINT CHECKPOINT ... [--export KIND ...]
       ./merge.sh --average CHECKPOINT:WEIGHT CHECKPOINT:WEIGHT ... [--export KIND ...]

  RUN           latest (the newest run that has saved something: the default), a name in output/, or a path. --run RUN and
                RUN=name ./merge.sh say the same; the command line counts where both are there
  EPOCH         a number, the N of rwkv-N.pth, counted from 0; last (the default); best: where the validation was best, if
                KEEP_BEST=1 kept it; step-N: after N optimizer steps (rwkv-step-N.pth). A word that can be an epoch is one: a run
                of the name 7 is output/7, or --run 7
  FILE          a checkpoint, like output/my-run/rwkv-2.pth; or a whole model, with --export
  CHECKPOINT    RUN, RUN/EPOCH, EPOCH (of the newest run, or of --run) or FILE
  --stack       fold several checkpoints into the same base, one after the other
  --average     the weighted mean of checkpoints of one base, or of whole models; weights are shares (1 if left out)
  --export      what to write, for which program (several: --export gguf --export safetensors):
{kinds}
  --accept-edited  take checkpoints whose .json was edited since it was written
  --help        this text

Names: <base>-<run>-<epoch>.pth; of a stack <base>-<run>-<epoch>+<run>-<epoch>.pth, of an average <base>-average-...; with
MERGE_BASE=quantised the name ends in -quantised. The same run and epoch, merged again, replaces its own file; whatever else would
get a name that is taken is called ...-v2, -v3, and says so.
Method, rank, alpha and base are read from the checkpoint's sidecar rwkv-N.json; that the base is the very file the run
was trained on is checked by its content. Files of RWKV-PEFT have no sidecar: MODEL_PATH, and for some METHOD, LORA_ALPHA and
PISSA_INIT, say in merge.sh what they do not. Tensors go through one by one, so memory does not grow with the model. Names,
shapes and number formats of the result are the base's. The result is read back and checked before it is called done.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rwkv_peft.adapters.specs import MOST_ALPHA
from rwkv_peft.checkpoint import run_dir, sidecars
from rwkv_peft.checkpoint.sidecars import ACCEPT
from rwkv_peft.common import bus_error, paths
from rwkv_peft.common.errors import SettingError, SettingErrors, UserError
from rwkv_peft.common.file_watch import FileWatch
from rwkv_peft.common.formatting import did_you_mean
from rwkv_peft.config.shell import run_cli, setting
from rwkv_peft.export import EXPORTS, KINDS

SEVERAL = ("--stack", "--average")  # take several checkpoints

USAGE = __doc__.replace(
    "{kinds}", "\n".join(f"                  {kind:<12}  {what}" for kind in KINDS if (what := EXPORTS[kind].help))
)


@dataclass(frozen=True)
class MergeConfig:
    """The variables of merge.sh, in its order."""

    run: str = setting("RUN")
    model_path: str = setting("MODEL_PATH")
    merge_base: Literal["original", "quantised"] = setting("MERGE_BASE")
    method: Literal["", "lora", "pissa", "bone", "miss", "disha", "bat", "state"] = setting("METHOD")
    lora_alpha: Literal[""] | float = setting("LORA_ALPHA", gt=0, le=MOST_ALPHA)
    pissa_init: str = setting("PISSA_INIT")


def main(arguments: list[str]) -> None:
    """Run the command."""
    run_cli(arguments, USAGE, MergeConfig, command)


UNCHANGED = "Nothing was written after that. Run it again when nothing writes to the file any more."


def command(config: MergeConfig, typed: list[str]) -> None:
    """Merge or export, and tidy up after an error."""
    in_use = FileWatch("it was opened", UNCHANGED)
    in_use.before_exit.append(remove_what_is_half_written)
    with bus_error.handle_bus_error(in_use.exit_if_truncated), in_use.explaining():
        merge_or_export(config, typed, in_use)


def remove_what_is_half_written() -> None:
    """Remove unfinished files in merge/."""
    for half in (paths.ROOT / "merge").glob(f"*.tmp-{os.getpid()}"):
        shutil.rmtree(half) if half.is_dir() else half.unlink()


def merge_or_export(config: MergeConfig, typed: list[str], in_use: FileWatch) -> None:
    """Merge or export what the command line names."""
    accept_edited = ACCEPT in typed
    words, run, how, kinds = command_line([word for word in typed if word != ACCEPT])
    averaged = how == "--average"
    if run and words and not how and not all(map(run_dir.is_epoch, words)):
        raise UserError(f"--run {run} and {shlex.join(words)}: both say which run. Leave one of the two away.")
    from rwkv_peft.checkpoint import base_model
    from rwkv_peft.merge import inputs, legacy
    from rwkv_peft.merge.write import export, export_adapter, export_state, merge

    # a model is exported when it is merged; a state or an adapter as it is
    alone = [kind for kind in kinds if EXPORTS[kind].source != "model"]
    of_model = [kind for kind in kinds if kind not in alone]
    names, weights = inputs.shares(words) if averaged else (words, None)
    files = inputs.checkpoint_files(names, run or config.run, how)
    init = paths.resolve_path(config.pissa_init, "output") if config.pissa_init else None
    beside = [sidecars.sidecar_path(path) for path in files]
    beside += [start for path in files for start in path.parent.glob("init_*.pth")]
    in_use.add([*files, *beside, *([init] if init else [])])
    models = [path for path in files if is_whole_model(path, legacy.is_model)]
    if models and not kinds and not averaged:
        message = (
            f"{paths.display_path(models[0])}: is a whole model, no checkpoint of a run: there is nothing to fold."
        )
        raise UserError(f"{message} --average takes models, and --export writes one for other programs.")
    if kinds and len(files) == 1 and models:
        if "peft" in alone:
            raise UserError(
                f"--export peft takes the checkpoint of a run; {paths.display_path(files[0])} is a whole model."
            )
        must_be_unset(config, ("merge_base", "method", "lora_alpha", "pissa_init"), "a model is exported as it is")
        _, geometry = base_model.read_geometry(files[0])
        if sidecars.sidecar_path(files[0]).is_file():
            sidecars.check_unedited(files[0], sidecars.read_sidecar(files[0], ()), accept_edited)
        stems = {kind: f"{files[0].stem}-alone" if kind in alone else files[0].stem for kind in kinds}
        all_that_can_be(
            [functools.partial(export, kind, files[0], stem, geometry, in_use) for kind, stem in stems.items()]
        )
        return
    alpha = config.lora_alpha if config.lora_alpha != "" else None
    # METHOD and LORA_ALPHA are of those that need them, if there are any; else they may contradict what a sidecar says
    strangers = {path for path in files if not inputs.has_sidecar(path) and legacy.has(path, legacy.ADAPTER)}
    unsaid = {path for path in strangers if legacy.has(path, legacy.LORA)}
    foreign = [
        (config.method if path in (strangers or files) else "", alpha if path in (unsaid or files) else None)
        for path in files
    ]
    quantised = config.merge_base == "quantised"
    checkpoints = [
        inputs.load_checkpoint(path, method, path_alpha, init, quantised, accept_edited, in_use)
        for path, (method, path_alpha) in zip(files, foreign, strict=True)
    ]
    if config.merge_base == "quantised":
        inputs.must_be_one_compressed_run(checkpoints)
    if not any(one.part.setup.method == "pissa" for one in checkpoints):
        must_be_unset(config, ("pissa_init",), "no PiSSA is among the checkpoints")
    if not any(one.part.setup.method in ("lora", "dora") for one in checkpoints):
        must_be_unset(config, ("lora_alpha",), "no LoRA is among the checkpoints")
    if any(kind.startswith("gguf") for kind in kinds) and any(one.part.setup.method == "state" for one in checkpoints):
        raise UserError(
            "llama.cpp has no place for a tuned state: a .gguf would be the bare base. See ./merge.sh --help"
        )
    for one in checkpoints:
        print(f"run       {one.words}")
    doubts: list[Callable[[], None]] = []  # only a merge continues before the base's content is known
    base = inputs.base_of(checkpoints, config.model_path, None if alone else doubts, in_use)
    doubts.append(in_use.must_be_unchanged)
    in_use.add([base])
    in_use.know(base, next((one.sidecar["base_sha256"] for one in checkpoints if one.sidecar), None))
    jobs = [
        functools.partial(export_adapter, checkpoints, base, in_use)
        if kind == "peft"
        else functools.partial(export_state, kind, checkpoints, base, in_use)
        for kind in alone
    ]
    if of_model or not alone:
        target, geometry = merge(checkpoints, weights, base, doubts)
        jobs += [functools.partial(export, kind, target, target.stem, geometry, in_use) for kind in of_model]
    all_that_can_be(jobs)


def all_that_can_be(exports: Sequence[Callable[[], None]]) -> None:
    """Write what can be written. UserError with all refusals behind that."""
    refused = []
    for write in exports:
        try:
            write()
        except UserError as error:
            refused.append(str(error))
    if refused:
        raise UserError("\n".join(dict.fromkeys(refused)))


def must_be_unset(config: MergeConfig, names: Sequence[str], why: str) -> None:
    """Problems for settings that would do nothing."""
    wrong = []
    for field in dataclasses.fields(MergeConfig):
        neutral = "original" if field.name == "merge_base" else ""
        if field.name in names and getattr(config, field.name) != neutral:
            wrong.append(SettingError(field.metadata["var"], f'must be "{neutral}": {why}'))
    if wrong:
        raise SettingErrors(*wrong)


def command_line(typed: Sequence[str]) -> tuple[list[str], str, str, list[str]]:
    """The words behind ./merge.sh: checkpoints, the run of --run, --stack or --average or "", and the kinds of exports."""
    words, run, how, kinds = [], "", "", []
    rest = list(typed)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if flag in ("--export", "--run"):
            if not equals and not rest:
                wanted = f"a kind behind it: {', '.join(KINDS)}" if flag == "--export" else "a run behind it"
                raise UserError(f"{flag} wants {wanted}.")
            value = value if equals else rest.pop(0)
            if flag == "--run":
                if not value.strip():
                    raise UserError("--run wants a run behind it.")
                run = value
                continue
            if value not in KINDS:
                raise UserError(f"--export {value}: must be one of {', '.join(KINDS)}{did_you_mean(value, KINDS)}")
            kinds.append(value)
        elif word in SEVERAL:
            if how not in ("", word):
                raise UserError("--stack and --average do not go together: take one of them.")
            how = word
        elif flag in ("--epoch", "--epochs"):
            number = value if equals else "".join(rest[:1])
            raise UserError(
                f"{flag}: is not an option. An epoch is a bare word: ./merge.sh {number if run_dir.is_epoch(number) else 1}"
            )
        elif word.startswith("--"):
            options = ["--export", "--run", *SEVERAL, ACCEPT]
            raise UserError(f"{word}: is not an option{did_you_mean(word, options) or '.'} See ./merge.sh --help")
        elif not word.strip():
            raise UserError("A word behind ./merge.sh is empty: give an epoch, or a checkpoint. See ./merge.sh --help")
        else:
            words.append(word)
    return words, run, how, list(dict.fromkeys(kinds))


def is_whole_model(path: Path, is_model) -> bool:
    """Whether a file is a model that stands for itself: not a checkpoint of a full run, which its sidecar names."""
    from rwkv_peft.checkpoint import pth

    if not is_model(pth.read_header(path)):
        return False
    sidecar = sidecars.sidecar_path(path)
    return not sidecar.is_file() or "merged" in sidecars.read_sidecar(path, ())


if __name__ == "__main__":
    main(sys.argv[1:])
