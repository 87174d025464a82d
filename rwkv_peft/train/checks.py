"""The files of a run, opened and checked before anything is loaded: the base, the data, and what it goes on from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rwkv_peft.adapters.specs import METHODS
from rwkv_peft.checkpoint import run_dir, sidecars
from rwkv_peft.common import hashing, paths
from rwkv_peft.common.atomic_io import reading
from rwkv_peft.common.errors import SettingError, SettingErrors, UserError, in_words
from rwkv_peft.common.file_watch import FileWatch
from rwkv_peft.common.names import fault
from rwkv_peft.config.train import TrainConfig

from .data_setup import stream_source
from .run_record import options_of, script_values

MOST_TEXT = 1 << 20  # characters of a file of questions


def open_files(config: TrainConfig, base: Path, new: bool):
    """What the base holds, its geometry, the data (prefixes and weights, or what is streamed), and the checkpoint that a new
    run begins with. Problems with all that is wrong with the files. new: the run has no state of its own to go on from.
    """
    from rwkv_peft.checkpoint import base_model
    from rwkv_peft.data.tokenized_files import data_files
    from rwkv_peft.model.arch import NUMBERS

    found, stored, geometry = [], {}, None
    try:
        stored, geometry = base_model.read_geometry(base)
    except UserError as error:
        foreign = "" if base.exists() else paths.foreign_path(config.model_path)
        found.append(SettingError("MODEL_PATH", foreign or str(error)))
    if geometry:
        sizes = {"MODEL_VERSION": NUMBERS[geometry.version], "N_LAYER": geometry.n_layer, "EMBD_SIZE": geometry.n_embd}
        sizes["VOCAB_SIZE"] = geometry.vocab_size
        given = script_values(config)
        found += [
            SettingError(name, f"but {paths.display_path(base)} has {size}; use auto")
            for name, size in sizes.items()
            if given[name] not in ("auto", size)
        ]
        found += layer_problems(config, geometry)
    files, wrong = (stream_source if config.streaming else data_files)(config.data_path)
    found += [SettingError("DATA_PATH", message) for message in wrong]
    for name in [files.name] if config.streaming else [prefix.name for prefix, _ in files]:
        if odd := fault(name):  # the run, and more, is called after it
            found.append(SettingError("DATA_PATH", f"this name {odd}; rename the files"))
    earlier = None
    try:
        earlier = init_from(config) if new else None
    except SettingErrors as problems:
        found += problems.problems
    if found:
        raise SettingErrors(*found)
    return stored, geometry, files, earlier


def questions_of(text: str) -> list[str]:
    """SAMPLE_PROMPTS -> questions. Problems for a file that is not there or holds none."""
    found = text.split("|")
    if text.endswith(".txt"):
        path = paths.resolve_path(text, "data")
        try:
            with reading(path, "r", encoding="utf-8-sig") as file:
                found = file.read(MOST_TEXT).splitlines()
        except (OSError, ValueError) as error:
            raise SettingErrors(
                SettingError("SAMPLE_PROMPTS", f"{paths.display_path(path)} cannot be read: {in_words(error)}")
            ) from None
    questions = [question.strip() for question in found if question.strip()]
    if text.strip() and not questions:
        raise SettingErrors(SettingError("SAMPLE_PROMPTS", "holds no question"))
    return questions


def layer_problems(config: TrainConfig, geometry) -> list[SettingError]:
    """What the method's settings ask of layers that this base has not got."""
    from rwkv_peft.adapters.registry import ADAPTERS
    from rwkv_peft.model.arch import linear_layers, shapes

    if config.method == "lisa" and config.lisa_r > geometry.n_layer:
        return [SettingError("lisa_r", f"must be {geometry.n_layer} or less, the number of the base's layers")]
    if not METHODS[config.method].wraps:
        return []
    sizes = shapes(geometry)
    wanted = {sizes[f"{layer}.weight"]: layer for layer in linear_layers(geometry, config.parts)}
    try:
        options = options_of(config)
        for (outputs, inputs), layer in wanted.items():
            if refused := ADAPTERS[config.method].refusal(outputs, inputs, **options):
                variable = next(iter(METHODS[config.method].options.values()))
                return [SettingError(variable, f"{refused} ({layer} is {outputs} x {inputs})")]
    except UserError as error:  # a PEFT_CONFIG that is none
        return [SettingError("PEFT_CONFIG", str(error))]
    return []


@dataclass(frozen=True)
class InitFrom:
    """The checkpoint that a run goes on from, and what its adapters began with (PiSSA alone has that, and can begin a new
    run with it).
    """

    path: Path | None
    start: Path | None


def init_from(config: TrainConfig) -> InitFrom | None:
    """What a *_load variable names. Problems if it is not there, or is no checkpoint."""
    from rwkv_peft.checkpoint import pth

    load = METHODS[config.method].load
    name = script_values(config)[load] if load else ""
    if not name:
        return InitFrom(None, start_file(config, None)) if config.pissa_init else None
    try:
        path = run_dir.find_checkpoint(name)
        pth.read_header(path)
    except UserError as error:
        raise SettingErrors(SettingError(load, str(error))) from None
    return InitFrom(path, start_file(config, path))


def check_init(
    config: TrainConfig,
    geometry,
    setup,
    base: Path,
    earlier: InitFrom,
    say,
    accept_edited: bool = False,
    in_use: FileWatch | None = None,
) -> dict:
    """Whether a checkpoint is of this method with these options, was trained on this base, and has the tensors that this run
    trains; Problems with all that does not fit. setup: what becomes of the model. in_use: watches it. Returns
    the base's hashing.content.
    """
    from rwkv_peft.adapters import inject
    from rwkv_peft.checkpoint import base_model, pth
    from rwkv_peft.model.arch import misfits

    method, content, path = METHODS[config.method], hashing.fingerprint(base), earlier.path
    name, wrong = script_values(config)[method.load], []
    if sidecars.sidecar_path(path).is_file():
        sidecar = sidecars.read_sidecar(path, ("method", "base", "base_sha256"))
        try:
            # (a link like output/latest is about to point to this run)
            base_model.check_sidecar(path.resolve(), sidecar, accept_edited, in_use)
            base_model.load_adapter_init(path, sidecar, config.method, earlier.start)
        except UserError as error:
            raise SettingErrors(SettingError("pissa_init" if config.pissa_init else method.load, str(error))) from None
        if sidecar["method"] != config.method:
            theirs = METHODS[sidecar["method"]].words if sidecar["method"] in METHODS else sidecar["method"]
            raise SettingErrors(SettingError(method.load, f"holds a run of {theirs}, not of {method.words}"))
        wrong = [
            SettingError(variable, f"must be {as_written(sidecar[option])}, as {name} was trained")
            for option, variable in method.options.items()
            if option in sidecar and sidecar[option] != setup.options[option]
        ]
        if sidecar["base_sha256"] != content["sha256"]:
            wrong.append(SettingError("MODEL_PATH", f"{name} was trained on {sidecar['base']}, not on {base.name}"))
    else:
        say(f"{name} has no sidecar: its settings and its base are taken on trust.")
    if wrong:
        raise SettingErrors(*wrong)
    found = {tensor: stored.shape for tensor, stored in pth.read_header(path).items()}
    wanted = inject.trained_shapes(geometry, setup)
    strange = misfits(found, wanted) + [
        f"{tensor} belongs to other settings" for tensor in found if tensor not in wanted
    ]
    if strange:
        foreign = any(tensor.startswith("model.") or tensor.endswith(".bone") for tensor in found)
        advice = (
            "; a file of RWKV-PEFT goes through ./merge.sh"
            if foreign
            else " (lora_parts and ranks must be those of its run)"
        )
        raise SettingErrors(SettingError(method.load, f"does not fit: {'; '.join(strange[:2])}{advice}"))
    return content


def start_file(config: TrainConfig, path: Path | None) -> Path | None:
    """The file of what adapters began with: pissa_init, or what lies beside their checkpoint."""
    given = config.pissa_init
    start = paths.resolve_path(given, "output") if given else run_dir.init_file(path.parent, config.method)
    if not start.is_file():
        if config.method != "pissa":  # few others have one
            return None
        name = "pissa_init" if given else "pissa_load"
        advice = "" if given else "; name it with pissa_init"
        raise SettingErrors(SettingError(name, f"{paths.display_path(start)}: {paths.missing(start)}{advice}"))
    return start


def as_written(value) -> str:
    """A setting's value as the script would say it."""
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:g}" if isinstance(value, float) else str(value)
