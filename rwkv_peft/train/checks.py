"""The files of a run, opened and checked before anything is loaded: base model, data, initial checkpoint, questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from rwkv_peft.adapters import inject
from rwkv_peft.adapters.registry import ADAPTERS
from rwkv_peft.adapters.specs import METHODS
from rwkv_peft.checkpoint import base_model, pth, run_dir, sidecars
from rwkv_peft.common import hashing, paths
from rwkv_peft.common.atomic_io import open_regular
from rwkv_peft.common.errors import SettingError, SettingErrors, UserError, describe_nonfatal
from rwkv_peft.common.file_watch import FileWatch
from rwkv_peft.common.names import describe_fault
from rwkv_peft.config.train import TrainConfig
from rwkv_peft.data.tokenized_files import data_files
from rwkv_peft.model.arch import NUMBERS, Geometry, linear_layers, misfits, shapes

from .data_setup import stream_source
from .run_record import format_setting, options_of, script_values

MOST_TEXT = 1 << 20  # characters of a file of questions


@dataclass(frozen=True)
class InitFrom:
    """What a new run is initialised with.

    Attributes:
        path: checkpoint, None for none.
        start: initial tensors of its adapters, None for none. Only PiSSA has them, and can start a new run with them alone.
    """

    path: Path | None = None
    start: Path | None = None


@dataclass(frozen=True)
class OpenedFiles:
    """The files of a run, opened and valid.

    Attributes:
        tensors: of the base model, not loaded.
        geometry: of the base model.
        tokenized: prefixes and weights of the tokenized files; none with STREAMING=1.
        stream: file or folder of rows; None without STREAMING=1.
        init: what a new run is initialised with.
    """

    tensors: Mapping[str, pth.TensorInfo]
    geometry: Geometry
    tokenized: list[tuple[Path, Fraction]]
    stream: Path | None
    init: InitFrom

    @property
    def names(self) -> list[str]:
        """Names of the data, for the name of the run."""
        return [self.stream.name.partition(".")[0]] if self.stream else [prefix.name for prefix, _ in self.tokenized]


def open_files(config: TrainConfig, base: Path, is_new: bool) -> OpenedFiles:
    """Open the files of a run.

    Args:
        config: settings of the script.
        base: file of the base model.
        is_new: the run is not resumed.

    Raises:
        SettingErrors: all that is wrong with the files.
    """
    errors: list[SettingError] = []
    opened = None
    try:
        opened = base_model.read_geometry(base)
    except UserError as error:
        foreign = "" if base.exists() else paths.explain_foreign_path(config.model_path)
        errors.append(SettingError("MODEL_PATH", foreign or str(error)))
    if opened:
        geometry = opened[1]
        sizes = {"MODEL_VERSION": NUMBERS[geometry.version], "N_LAYER": geometry.n_layer, "EMBD_SIZE": geometry.n_embd}
        sizes["VOCAB_SIZE"] = geometry.vocab_size
        values = script_values(config)
        errors += [
            SettingError(name, f"but {paths.display_path(base)} has {size}; use auto")
            for name, size in sizes.items()
            if values[name] not in ("auto", size)
        ]
        errors += _layer_errors(config, geometry)
    stream, tokenized = None, list[tuple[Path, Fraction]]()
    if config.streaming:
        stream, wrong = stream_source(config.data_path)
    else:
        tokenized, wrong = data_files(config.data_path)
    errors += [SettingError("DATA_PATH", message) for message in wrong]
    for name in [stream.name] if stream else [prefix.name for prefix, _ in tokenized]:
        if odd := describe_fault(name):  # the run, and more, gets this name
            errors.append(SettingError("DATA_PATH", f"this name {odd}; rename the files"))
    init = InitFrom()
    try:
        init = _find_init(config) if is_new else init
    except SettingErrors as problems:
        errors += problems.problems
    if errors or not opened:
        raise SettingErrors(*errors)
    return OpenedFiles(*opened, tokenized, stream, init)


def read_questions(text: str) -> list[str]:
    """Return the questions of SAMPLE_PROMPTS.

    Raises:
        SettingErrors: the file cannot be read, or there is no question.
    """
    lines = text.split("|")
    if text.endswith(".txt"):
        path = paths.resolve_path(text, "data")
        try:
            with open_regular(path, "r", encoding="utf-8-sig") as file:
                lines = file.read(MOST_TEXT).splitlines()
        except (OSError, ValueError) as error:
            words = f"{paths.display_path(path)} cannot be read: {describe_nonfatal(error)}"
            raise SettingErrors(SettingError("SAMPLE_PROMPTS", words)) from None
    questions = [line.strip() for line in lines if line.strip()]
    if text.strip() and not questions:
        raise SettingErrors(SettingError("SAMPLE_PROMPTS", "holds no question"))
    return questions


def _layer_errors(config: TrainConfig, geometry: Geometry) -> list[SettingError]:
    """What the method's settings need of layers and this base does not have."""
    if config.method == "lisa" and config.lisa_r > geometry.n_layer:
        return [SettingError("lisa_r", f"must be {geometry.n_layer} or less, the number of the base's layers")]
    if not METHODS[config.method].wraps:
        return []
    sizes = shapes(geometry)
    by_shape = {sizes[f"{layer}.weight"]: layer for layer in linear_layers(geometry, config.parts)}
    try:
        options = options_of(config)
        for (outputs, inputs), layer in by_shape.items():
            if refusal := ADAPTERS[config.method].refusal(outputs, inputs, **options):
                variable = next(iter(METHODS[config.method].options.values()))
                return [SettingError(variable, f"{refusal} ({layer} is {outputs} x {inputs})")]
    except UserError as error:  # a PEFT_CONFIG that is none
        return [SettingError("PEFT_CONFIG", str(error))]
    return []


def _find_init(config: TrainConfig) -> InitFrom:
    """What a *_load variable names; SettingErrors if it does not exist, or is not a checkpoint."""
    load = METHODS[config.method].load
    name = script_values(config)[load] if load else ""
    if not name:
        return InitFrom(start=_find_start(config, None) if config.pissa_init else None)
    try:
        path = run_dir.find_checkpoint(name)
        pth.read_header(path)
    except UserError as error:
        raise SettingErrors(SettingError(load, str(error))) from None
    return InitFrom(path, _find_start(config, path))


def _find_start(config: TrainConfig, checkpoint: Path | None) -> Path | None:
    """The file of an adapter's initial tensors: pissa_init, or the one beside the checkpoint."""
    if config.pissa_init or not checkpoint:
        start = paths.resolve_path(config.pissa_init, "output")
    else:
        start = run_dir.init_file(checkpoint.parent, config.method)
    if start.is_file():
        return start
    if config.method != "pissa":  # few others have one
        return None
    name, advice = ("pissa_init", "") if config.pissa_init else ("pissa_load", "; name it with pissa_init")
    raise SettingErrors(SettingError(name, f"{paths.display_path(start)}: {paths.describe_missing(start)}{advice}"))


def check_init(
    config: TrainConfig,
    geometry: Geometry,
    adapter: inject.AdapterConfig,
    base: Path,
    path: Path,
    start: Path | None,
    log: Callable[[str], None],
    accept_edited: bool = False,
    watch: FileWatch | None = None,
) -> dict[str, Any]:
    """Check that a new run can be initialised with a checkpoint.

    It must be of the same method with the same options, trained on this base, and have the tensors that the run trains.

    Args:
        config: settings of the run.
        geometry: of the base model.
        adapter: what the run trains.
        base: file of the base model.
        path: the checkpoint.
        start: initial tensors of its adapters, None for none.
        log: prints a message.
        accept_edited: accept a sidecar that was edited.
        watch: watches the checkpoint.

    Returns:
        The fingerprint of the base.

    Raises:
        SettingErrors: all that does not fit.
    """
    method, fingerprint = METHODS[config.method], hashing.fingerprint(base)
    name = script_values(config)[method.load]
    if sidecars.sidecar_path(path).is_file():
        sidecar = sidecars.read_sidecar(path, ("method", "base", "base_sha256"))
        try:
            # (a link like output/latest is about to point to this run)
            base_model.check_sidecar(path.resolve(), sidecar, accept_edited, watch)
            base_model.load_adapter_init(path, sidecar, config.method, start)
        except UserError as error:
            raise SettingErrors(SettingError("pissa_init" if config.pissa_init else method.load, str(error))) from None
        if sidecar["method"] != config.method:
            other = METHODS[sidecar["method"]].words if sidecar["method"] in METHODS else sidecar["method"]
            raise SettingErrors(SettingError(method.load, f"holds a run of {other}, not of {method.words}"))
        errors = [
            SettingError(variable, f"must be {format_setting(sidecar[option])}, as {name} was trained")
            for option, variable in method.options.items()
            if option in sidecar and sidecar[option] != adapter.options[option]
        ]
        if sidecar["base_sha256"] != fingerprint["sha256"]:
            errors.append(SettingError("MODEL_PATH", f"{name} was trained on {sidecar['base']}, not on {base.name}"))
        if errors:
            raise SettingErrors(*errors)
    else:
        log(f"{name} has no sidecar: its settings and its base are taken on trust.")
    tensors = {tensor: stored.shape for tensor, stored in pth.read_header(path).items()}
    trained = inject.trained_shapes(geometry, adapter)
    wrong = misfits(tensors, trained)
    wrong += [f"{tensor} belongs to other settings" for tensor in tensors if tensor not in trained]
    if wrong:
        if any(tensor.startswith("model.") or tensor.endswith(".bone") for tensor in tensors):
            advice = "; a file of RWKV-PEFT goes through ./merge.sh"
        else:
            advice = " (lora_parts and ranks must be those of its run)"
        raise SettingErrors(SettingError(method.load, f"does not fit: {'; '.join(wrong[:2])}{advice}"))
    return fingerprint
