"""A run as it is before anything is loaded: what was found, what `auto` became, where it will be written."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_peft.adapters.specs import METHODS, Method
from rwkv_peft.checkpoint import run_dir
from rwkv_peft.common import bus_error, hashing, paths
from rwkv_peft.common.errors import SettingErrors
from rwkv_peft.common.file_watch import FileWatch
from rwkv_peft.common.formatting import plural
from rwkv_peft.config.train import TrainConfig
from rwkv_peft.distributed.launch import ProcessInfo, plugins

from . import run_forms
from .checks import check_init, open_files, questions_of
from .data_setup import TrainData, ValData, held_out, plan_run, plan_stream
from .run_record import options_of, resolved, script_values

if TYPE_CHECKING:
    from rwkv_peft.distributed.rendezvous import Rendezvous

# what to do where a file of a run, or its folder, has changed
CURE = (
    "Nothing was saved after that. Put it back as it was, and run the script again: it goes on from the last saved "
    "state, if there is one."
)
AGAIN = "Run it again when nothing writes to the file any more."  # where nothing is saved in any case
MOST_NAME = 80  # characters of a mixture's names in the name of a run


def as_json(value):
    """What comes back when it is written as JSON and read again: for comparing."""
    return json.loads(json.dumps(value))


@dataclass
class RunSetup:
    """config: the settings; settings: the same by their names in the script, with auto replaced by what it became. place: which
    process this is.

    base, stored, geometry: the model's file, what it holds, its numbers. setup: what becomes of it. ops, precision: what
    computes. trainer: arguments of Lightning's trainer. spread: what lies in pieces over the processes.
    data, steps: what is trained, in how many optimizer steps; held: what is not. questions: that it answers while it learns.
    found: the state of an earlier run that goes on; earlier: the checkpoint that a new one begins with. missing: a checkpoint
    that the run has lost, or that is due only now. content: of the base, where it had to be looked at already. folder: of the
    run. plan_facts: what a run that goes on must find as it was. in_use: the files that it reads.
    """

    config: TrainConfig
    place: ProcessInfo
    settings: dict
    base: Path
    stored: Any
    geometry: Any
    setup: Any
    ops: Any
    precision: str
    trainer: dict
    spread: Any
    data: TrainData
    held: ValData | None
    questions: list[str]
    steps: int
    workers: int
    found: Any
    earlier: Any
    missing: Path | None
    content: dict | None
    folder: Path
    plan_facts: dict
    in_use: FileWatch

    @property
    def plan(self):
        return self.data.plan

    @property
    def method(self) -> Method:
        return METHODS[self.config.method]

    @property
    def begins_with(self) -> Path | None:
        """The file of the checkpoint that a new run begins with."""
        return self.earlier.path if self.earlier else None

    @property
    def options(self) -> dict:
        return as_json(dict(self.setup.options))


def prepare_run(
    config: TrainConfig,
    place: ProcessInfo,
    dry_run: bool,
    anew: bool,
    cleanup: contextlib.ExitStack,
    say: Callable[[str], None],
    met: Rendezvous | None = None,
    accept_edited: bool = False,
) -> RunSetup:
    """Open and check everything, and claim the run's folder. Problems and UserErrors for all that is wrong.

    anew: begin a new run, even if one could go on. cleanup: what to do whether training ends well or not. met: the other
    processes, where somebody else has started them. accept_edited: take a checkpoint whose sidecar was edited.
    """
    from rwkv_peft.adapters import inject
    from rwkv_peft.common import hardware
    from rwkv_peft.distributed import strategy
    from rwkv_peft.ops import dispatch

    from . import optim, resume

    questions, base = questions_of(config.sample_prompts), paths.model_file(config.model_path)
    in_use = FileWatch("this run began", AGAIN if dry_run else CURE)
    cleanup.enter_context(bus_error.handled(in_use.leave_if_cut_off))
    in_use.silent = place.of_ours
    in_use.add([base])
    if met and not place.first:
        resume.receive(met)
    found = resume.find_resume_state(config, anew, place.first, say)
    if found:
        in_use.add(found.stamps, found.stamps)
    stored, geometry, files, earlier = open_files(config, base, found is None)
    optim.check_package(config.optim)
    ops = dispatch.choose(config.op, geometry.version, hardware.device_kind(), geometry.head_size)
    precision = hardware.resolve_precision(config.precision)
    word = config.strategy_name
    trainer, spread = strategy.trainer_arguments(precision, config.gpu_count, config.nnodes, word, config.grad_clip)
    trainer.setdefault("plugins", []).extend(plugins(place, config.processes))
    # (a run of an earlier version goes on as it began)
    kept = tuple(found.facts.get("quant_kept", ())) if found else config.quant_kept
    setup = inject.AdapterConfig(
        config.method,
        options_of(config),
        config.parts,
        config.lora_dropout,
        config.quantised,
        config.quantised_parts,
        kept,
    )
    begins = earlier is not None and earlier.path is not None
    content = None
    if begins and place.first:
        content = check_init(config, geometry, setup, base, earlier, say, accept_edited, in_use)
    if earlier:
        in_use.add(path.resolve() for path in (earlier.path, earlier.start) if path)
    data = (plan_stream if config.streaming else plan_run)(config, files, geometry.vocab_size, say, in_use)
    held = held_out(config, files, data.ctx_len, geometry.vocab_size, say, in_use)
    steps = data.plan.optimizer_steps * config.epoch_count
    names = [files.name.partition(".")[0]] if config.streaming else [prefix.name for prefix, _ in files]
    stem = f"{'+'.join(names)[:MOST_NAME]}-{config.finetune_mode}"
    workers = config.num_workers if config.num_workers != "auto" else int(hardware.device_kind() == "cuda")
    name = found.run.name if found else config.run_name
    on_host = hardware.embedding_on_host(
        config.emb_on_cpu,
        not {"emb", "emb.weight"} & {*setup.whole(geometry), *setup.compressed(geometry)}
        and not spread.memory_in_pieces,
        geometry.vocab_size * geometry.n_embd * hardware.DTYPES[precision].itemsize,
    )
    settings = resolved(config, ops.name, precision, on_host, data, data.plan, geometry, name, workers)
    run = RunSetup(
        config=config, place=place, settings=settings, base=base, stored=stored, geometry=geometry, setup=setup, ops=ops,
        precision=precision, trainer=trainer, spread=spread, data=data, held=held, questions=questions, steps=steps,
        workers=workers, found=found, earlier=earlier, missing=None, content=content, folder=Path(),
        plan_facts=resume.plan_facts(data.plan, config.streaming), in_use=in_use,
    )  # fmt: skip
    if found:
        run.missing = missing_checkpoint(run)
    if found and place.first:
        try:
            run.content = must_be_the_same(run)
        except SettingErrors as problems:
            if config.run_name:
                raise
            say(f"new run   {resume.place(found)} was stopped, and cannot go on: {problems.problems[0].message}")
            return prepare_run(config, place, dry_run, True, cleanup, say, met, accept_edited)
    if met:
        if place.first:
            resume.publish(met, found)
        compare(run, met)
    run.folder = claim(run, name, stem, cleanup) if place.first and not dry_run else run_dir.new_run_dir(name, stem)
    settings["RUN_NAME"] = run.folder.name
    return run


def compare(run: RunSetup, met: Rendezvous) -> None:
    """Problems if not all processes have the same."""
    from rwkv_peft.distributed.rendezvous import facts_of

    from . import resume

    content, found = run.content or hashing.fingerprint(run.base), run.found
    run.in_use.know(run.base, content["sha256"])
    data = resume.described(run.data.content(None))
    met.compare(facts_of(run.settings, content["sha256"], data, found.facts["files"] if found else None))
    run.content = content


def missing_checkpoint(run: RunSetup) -> Path | None:
    """The checkpoint of the last epoch that a run which goes on has finished, if it should be there and is not."""
    epoch, within = divmod(run.found.step, run.plan.optimizer_steps)
    last = run.found.run / f"rwkv-{epoch - 1}.pth"
    due = run.found.step == run.steps or epoch % run.config.epoch_save == 0
    return last if not within and due and not last.is_file() else None


def must_be_the_same(run: RunSetup) -> dict:
    """What the base holds, if everything that a run goes on with is as it was. Problems for what has changed."""
    from . import resume

    found = run.found
    content = hashing.fingerprint(run.base, found.facts["base"])
    start_file = run_dir.init_file(found.run, run.config.method)
    # first: what else may be different follows from another content
    resume.must_have_its_files(found, run.options, content, run.data.content(found.facts["data"]), start_file)
    resume.must_not_be_finished(found, run.steps, run.config, run.missing)
    resume.must_be_the_same(found, script_values(run.config), run.settings, run.plan_facts)
    return content


def claim(run: RunSetup, name: str, stem: str, cleanup: contextlib.ExitStack) -> Path:
    """The run's folder, ours until the end."""
    from . import resume

    folder = run_dir.lock_run_dir(name, stem, cleanup, run.found is not None)
    run.in_use.add_folder(folder)
    if run.found:
        resume.must_be_unchanged(run.found)
    else:
        cleanup.callback(run_dir.remove_empty_run, folder, functools.partial(run.in_use.is_there, folder))
        # of a run that was ended before it saved anything
        run_dir.init_file(folder, run.config.method).unlink(missing_ok=True)
    resume.hand_over(run.found)
    return folder


def header(run: RunSetup) -> list[str]:
    """What is printed before anything is loaded: what was read, what auto became, how long it will be, what it needs."""
    from rwkv_peft.adapters import inject
    from rwkv_peft.common import hardware

    from . import report, resume

    largest = run.data.most_tokens, run.data.most_sequences
    lines = report.plan_lines(
        run.settings, run.setup, run.base, run.geometry, run.data.lines(run.settings), *largest, run.plan, run.steps,
        inject.count_trained(run.geometry, run.setup), run.stored, hardware.DTYPES[run.precision], run.ops.why,
    )  # fmt: skip
    held = list(run.held.prefixes) if run.held else []
    lines[-1:-1] = [f"{'warning':<10}{words}" for words in run_forms.warnings(run.base, run.data.forms, held)]
    if run.held:
        every = f"every {run.config.val_steps} steps" if run.config.val_steps else "after every epoch"
        what = f"{', '.join(run.held.names)}: {run.held.targets:,} trained tokens in {plural(run.held.rows, 'pack')}"
        what += f", {plural(run.held.untrained, 'row')} with nothing to train left out" if run.held.untrained else ""
        what += f" (none of {', '.join(run.held.missing)})" if run.held.missing else ""
        lines.insert(-1, f"{'valid':<10}{what}; before training and {every}")
    if run.found:
        before = run.found.facts["steps"]
        how = f"; it has {run.steps:,} now, and the learning rate follows that" if run.steps != before else ""
        lines.append(f"goes on   {resume.place(run.found)}{how or ', as if it had never stopped'}")
    return lines
