"""The setup of a run before anything is loaded: files, resolved settings, the state to resume from, the output folder."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_peft.adapters import inject
from rwkv_peft.adapters.specs import METHODS, Method
from rwkv_peft.checkpoint import run_dir
from rwkv_peft.checkpoint.pth import TensorInfo
from rwkv_peft.checkpoint.train_state import TrainState
from rwkv_peft.common import bus_error, hardware, hashing, paths
from rwkv_peft.common.errors import SettingErrors
from rwkv_peft.common.file_watch import FileWatch
from rwkv_peft.common.formatting import plural
from rwkv_peft.config.train import TrainConfig
from rwkv_peft.data.sampling import Plan
from rwkv_peft.distributed import strategy
from rwkv_peft.distributed.launch import ProcessInfo, environment_plugins
from rwkv_peft.distributed.rendezvous import Rendezvous, facts_of
from rwkv_peft.distributed.sharding import Sharding
from rwkv_peft.model.arch import NUMBERS, Geometry
from rwkv_peft.ops import dispatch

from . import optim, report, resume, run_forms
from .checks import InitFrom, OpenedFiles, check_init, open_files, read_questions
from .data_setup import Log, TrainData, ValData, plan_run, plan_stream, plan_validation
from .run_record import RunSettings, options_of, script_values

# what to do where a file of a run, or its folder, has changed
RESUME_ADVICE = (
    "Nothing was saved after that. Put it back as it was, and run the script again: it goes on from the last saved "
    "state, if there is one."
)
RESTART_ADVICE = "Run it again when nothing writes to the file any more."  # where nothing is saved in any case
MOST_NAME = 80  # characters of a mixture's names in the name of a run


@dataclass(frozen=True)
class BaseSetup:
    """The base model and what is done to it.

    Attributes:
        path: file of the base model.
        tensors: its tensors, not loaded.
        geometry: its sizes.
        adapter: what is wrapped, compressed and trained.
        fingerprint: SHA-256 and stamp of the file; None where it was not read yet.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    geometry: Geometry
    adapter: inject.AdapterConfig
    fingerprint: dict[str, Any] | None

    @property
    def options(self) -> dict[str, Any]:
        """The method's options as they are in JSON, to be compared."""
        return json.loads(json.dumps(dict(self.adapter.options)))


@dataclass(frozen=True)
class DataSetup:
    """What is trained and what is not.

    Attributes:
        train: training data.
        val: held-out data, None for none.
        questions: that the model answers during the training.
        steps: optimizer steps of the run.
        plan_facts: what must be the same where a run is resumed.
    """

    train: TrainData
    val: ValData | None
    questions: Sequence[str]
    steps: int
    plan_facts: Mapping[str, int]


@dataclass(frozen=True)
class ComputeSetup:
    """What computes.

    Attributes:
        process: which process of the training this one is.
        ops: implementation of the kernels.
        precision: PRECISION, never auto.
        trainer: arguments of Lightning's Trainer that concern the machine.
        sharding: how weights and optimizer state are sharded.
    """

    process: ProcessInfo
    ops: dispatch.Ops
    precision: str
    trainer: dict[str, Any]
    sharding: Sharding


@dataclass(frozen=True)
class ResumeSetup:
    """What the run continues.

    Attributes:
        state: training state that the run is resumed from; None for a new run.
        init: what a new run is initialised with.
        missing: checkpoint of the last finished epoch, if a resumed run should have it and has not.
    """

    state: TrainState | None
    init: InitFrom
    missing: Path | None


@dataclass(frozen=True)
class RunSetup:
    """All that is known of a run before its model is loaded.

    Attributes:
        settings: with `auto` resolved.
        base: base model and adapters.
        data: training and held-out data.
        compute: kernels, precision, processes.
        resume: what the run continues.
        run_dir: folder of the run.
        watch: watches the files that the run reads.
    """

    settings: RunSettings
    base: BaseSetup
    data: DataSetup
    compute: ComputeSetup
    resume: ResumeSetup
    run_dir: Path
    watch: FileWatch

    @property
    def config(self) -> TrainConfig:
        """The settings as the script has them."""
        return self.settings.config

    @property
    def method(self) -> Method:
        """What is known of the run's method."""
        return METHODS[self.config.method]

    @property
    def plan(self) -> Plan:
        """How rows become optimizer steps."""
        return self.data.train.plan

    @property
    def process(self) -> ProcessInfo:
        """Which process of the training this one is."""
        return self.compute.process

    @property
    def state(self) -> TrainState | None:
        """Training state that the run is resumed from."""
        return self.resume.state

    def owns_run_dir(self) -> bool:
        """Return whether the folder of the run's name is still its own: it may have been renamed or replaced."""
        return self.watch.is_there(self.run_dir)

    @property
    def is_trained(self) -> bool:
        """The run has done all its steps, and only a checkpoint is missing."""
        return self.state is not None and self.state.step == self.data.steps


def prepare_run(
    config: TrainConfig,
    process: ProcessInfo,
    dry_run: bool,
    force_new: bool,
    cleanup: contextlib.ExitStack,
    log: Log,
    rendezvous: Rendezvous | None = None,
    accept_edited: bool = False,
) -> RunSetup:
    """Open and check everything, and lock the run's folder.

    Args:
        config: settings of the script.
        process: which process of the training this one is.
        dry_run: write nothing.
        force_new: start a new run, even if one could be resumed.
        cleanup: gets what to do at the end of the training, also after an error.
        log: prints a message.
        rendezvous: the other processes, where an external launcher has started them.
        accept_edited: accept a checkpoint whose sidecar was edited.

    Raises:
        SettingErrors: all that is wrong with the settings.
        UserError: a file or the machine does not allow the run.
    """
    questions, base_path = read_questions(config.sample_prompts), paths.resolve_model(config.model_path)
    watch = FileWatch("this run began", RESTART_ADVICE if dry_run else RESUME_ADVICE)
    cleanup.enter_context(bus_error.handle_bus_error(watch.exit_if_truncated))
    watch.silent = process.spawned_by_us
    watch.add([base_path])
    if rendezvous and not process.is_main:
        resume.receive_state(rendezvous)
    state = resume.find_resume_state(config, force_new, process.is_main, log)
    if state:
        watch.add(state.stamps, state.stamps)
    files = open_files(config, base_path, state is None)
    optim.check_package(config.optim)
    compute = _prepare_compute(config, process, files.geometry)
    adapter = _adapter_config(config, state)
    fingerprint = None
    init = files.init
    if init.path and process.is_main:
        what = config, files.geometry, adapter, base_path, init.path, init.start
        fingerprint = check_init(*what, log, accept_edited, watch)
    watch.add(path.resolve() for path in (init.path, init.start) if path)
    data = _prepare_data(config, files, questions, log, watch)
    base = BaseSetup(base_path, files.tensors, files.geometry, adapter, fingerprint)
    name = state.run.name if state else config.run_name
    settings = resolve(config, base, data, compute, name)
    missing = _missing_checkpoint(config, state, data) if state else None
    if state and process.is_main:
        try:
            fingerprint = _check_resume(settings, base, data, state, missing)
        except SettingErrors as errors:
            if config.run_name:
                raise
            log(f"new run   {resume.describe(state)} was stopped, and cannot go on: {errors.problems[0].message}")
            return prepare_run(config, process, dry_run, True, cleanup, log, rendezvous, accept_edited)
    if rendezvous:
        if process.is_main:
            resume.send_state(rendezvous, state)
        fingerprint = fingerprint or hashing.fingerprint(base_path)
        watch.know(base_path, fingerprint["sha256"])
        identity = resume.data_identity(data.train.content(None))
        state_files = state.facts["files"] if state else None
        rendezvous.compare(facts_of(settings.values, fingerprint["sha256"], identity, state_files))
    stem = f"{'+'.join(files.names)[:MOST_NAME]}-{config.finetune_mode}"
    if process.is_main and not dry_run:
        folder = _lock_run_dir(name, stem, config.method, state, watch, cleanup)
    else:
        folder = run_dir.new_run_dir(name, stem)
    return RunSetup(
        dataclasses.replace(settings, values={**settings.values, "RUN_NAME": folder.name}),
        dataclasses.replace(base, fingerprint=fingerprint),
        data,
        compute,
        ResumeSetup(state, init, missing),
        folder,
        watch,
    )


def _prepare_compute(config: TrainConfig, process: ProcessInfo, geometry: Geometry) -> ComputeSetup:
    ops = dispatch.choose(config.op, geometry.version, hardware.device_kind(), geometry.head_size)
    precision = hardware.resolve_precision(config.precision)
    trainer, sharding = strategy.make_trainer_arguments(
        precision, config.gpu_count, config.nnodes, config.strategy_name, config.grad_clip
    )
    trainer.setdefault("plugins", []).extend(environment_plugins(process, config.processes))
    return ComputeSetup(process, ops, precision, trainer, sharding)


def _adapter_config(config: TrainConfig, state: TrainState | None) -> inject.AdapterConfig:
    # (a run of an earlier version has no such fact: it compressed all layers, and is resumed so)
    kept = tuple(state.facts.get("quant_kept", ())) if state else config.quant_kept
    return inject.AdapterConfig(
        config.method,
        options_of(config),
        config.parts,
        config.lora_dropout,
        config.quantised,
        config.quantised_parts,
        kept,
    )


def _prepare_data(
    config: TrainConfig, files: OpenedFiles, questions: Sequence[str], log: Log, watch: FileWatch
) -> DataSetup:
    vocab_size = files.geometry.vocab_size
    if files.stream:
        train = plan_stream(config, files.stream, vocab_size, log, watch)
    else:
        train = plan_run(config, files.tokenized, vocab_size, log, watch)
    val = plan_validation(config, files.tokenized, train.ctx_len, vocab_size, log, watch)
    steps = train.plan.optimizer_steps * config.epoch_count
    return DataSetup(train, val, questions, steps, resume.plan_facts(train.plan, config.streaming))


def resolve(config: TrainConfig, base: BaseSetup, data: DataSetup, compute: ComputeSetup, run_name: str) -> RunSettings:
    """Return the settings with `auto` replaced.

    Args:
        config: settings of the script.
        base: base model.
        data: training data.
        compute: kernels, precision, processes.
        run_name: name of the run's folder, empty where it is not chosen yet.
    """
    geometry, adapter, plan = base.geometry, base.adapter, data.train.plan
    trained = {*adapter.whole(geometry), *adapter.compressed(geometry)}
    is_on_host = hardware.resolve_emb_on_cpu(
        config.emb_on_cpu,
        not {"emb", "emb.weight"} & trained and not compute.sharding.is_state_sharded,
        geometry.vocab_size * geometry.n_embd * hardware.DTYPES[compute.precision].itemsize,
    )
    workers = config.num_workers if isinstance(config.num_workers, int) else int(hardware.device_kind() == "cuda")
    resolved: dict[str, Any] = {
        "RUN_NAME": run_name, "MODEL_VERSION": NUMBERS[geometry.version], "N_LAYER": geometry.n_layer,
        "EMBD_SIZE": geometry.n_embd, "VOCAB_SIZE": geometry.vocab_size, "CTX_LEN": data.train.ctx_len,
        "EPOCH_STEPS": plan.micro_batches, "MICRO_BSZ": plan.micro_bsz, "OP": compute.ops.name,
        "PRECISION": compute.precision, "STRATEGY": config.strategy_name, "NUM_WORKERS": workers,
        "EMB_ON_CPU": str(int(is_on_host)),
    }  # fmt: skip
    if buckets := data.train.buckets:
        resolved |= {
            "TRAIN_LENGTHS": " ".join(map(str, buckets.edges)), "TRAIN_BATCH_SIZES": " ".join(map(str, buckets.sizes)),
            "CTX_LEN": min(data.train.ctx_len, buckets.edges[-1]), "MICRO_BSZ": "auto",
        }  # fmt: skip
    return RunSettings(config, script_values(config) | resolved, workers, is_on_host)


def _missing_checkpoint(config: TrainConfig, state: TrainState, data: DataSetup) -> Path | None:
    epoch, within = divmod(state.step, data.train.plan.optimizer_steps)
    last = state.run / f"rwkv-{epoch - 1}.pth"
    due = state.step == data.steps or epoch % config.epoch_save == 0
    return last if not within and due and not last.is_file() else None


def _check_resume(
    settings: RunSettings, base: BaseSetup, data: DataSetup, state: TrainState, missing: Path | None
) -> dict[str, Any]:
    """Return the fingerprint of the base; SettingErrors where anything is not what it was when the state was saved."""
    config = settings.config
    fingerprint = hashing.fingerprint(base.path, state.facts["base"])
    init_file = run_dir.init_file(state.run, config.method)
    # the files first: other differences follow from another content
    resume.check_files(state, base.options, fingerprint, data.train.content(state.facts["data"]), init_file)
    resume.check_not_finished(state, data.steps, config, missing)
    resume.check_settings(state, script_values(config), settings.values, data.plan_facts)
    return fingerprint


def _lock_run_dir(
    name: str, stem: str, method: str, state: TrainState | None, watch: FileWatch, cleanup: contextlib.ExitStack
) -> Path:
    """Lock the run's folder until the end of the training."""
    folder = run_dir.lock_run_dir(name, stem, cleanup, state is not None)
    watch.watch_folder(folder)
    if state:
        resume.check_unchanged(state)
    else:
        cleanup.callback(run_dir.remove_empty_run, folder, functools.partial(watch.is_there, folder))
        # of a run that was stopped before it saved anything
        run_dir.init_file(folder, method).unlink(missing_ok=True)
    resume.export_state(state)
    return folder


def header(run: RunSetup) -> list[str]:
    """Return what is printed before anything is loaded.

    It is what was read, what `auto` was resolved to, how long the run will be, what it needs.
    """
    train, val, base = run.data.train, run.data.val, run.base
    lines = report.plan_lines(
        run.settings.values, base.adapter, base.path, base.geometry, train.lines(run.settings.values), train.most_tokens,
        train.most_sequences, run.plan, run.data.steps, inject.count_trained(base.geometry, base.adapter), base.tensors,
        hardware.DTYPES[run.compute.precision], run.compute.ops.why,
    )  # fmt: skip
    val_prefixes = list(val.prefixes) if val else []
    lines[-1:-1] = [f"{'warning':<10}{words}" for words in run_forms.warnings(base.path, train.forms, val_prefixes)]
    if val:
        every = f"every {run.config.val_steps} steps" if run.config.val_steps else "after every epoch"
        what = f"{', '.join(val.names)}: {val.targets:,} trained tokens in {plural(val.rows, 'pack')}"
        what += f", {plural(val.untrained, 'row')} with nothing to train left out" if val.untrained else ""
        what += f" (none of {', '.join(val.missing)})" if val.missing else ""
        lines.insert(-1, f"{'valid':<10}{what}; before training and {every}")
    if run.state:
        steps, before = run.data.steps, run.state.facts["steps"]
        how = f"; it has {steps:,} now, and the learning rate follows that" if steps != before else ""
        lines.append(f"goes on   {resume.describe(run.state)}{how or ', as if it had never stopped'}")
    return lines
