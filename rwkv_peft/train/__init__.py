"""./training.sh: fine-tune a model as the variables in the script say.

usage: ./training.sh [--dry-run] [--new] | --selftest

  --dry-run   check everything, print the plan and two samples with what is trained marked, and stop
  --new       begin a new run, also where the newest one was stopped and could go on
  --selftest  compare all that could compute on this machine (OP) with the definition, and stop
  --help      this text

The settings are the variables in the script itself, each with its explanation. Results go to output/<RUN_NAME>/:
  rwkv-N.pth + rwkv-N.json   what was trained, after epoch N (counted from 0), and how: ./merge.sh N folds it into the base
  loss.jsonl, loss.png       every optimizer step; run.json: the settings as they were resolved
  state/                     where the run is, so that it can go on

A run that was stopped or killed goes on when ./training.sh is run again: the one that RUN_NAME names, or if that is empty the
newest one, if its settings are those of the script. Steps, data and results are those of a run that was never stopped.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import time
from pathlib import Path

from .. import hashing, project, runs, sidecars
from ..atomic import clear_leftovers, need_space, sync_folder, temporary, write_json
from ..config import RETIRED, TrainConfig
from ..errors import EXIT_MEMORY, Problems, UserError, leave
from ..methods import METHODS, OPTIMS
from ..shell_vars import enter
from ..words import did_you_mean
from .data import plan_run, plan_stream
from .opening import check_earlier, open_files
from .record import describe_run, options_of, resolved, script_values

# Lightning starts one more process for every further GPU, numbered from 1: those are quiet and write nothing
SAMPLES = 2  # that a dry run shows
RANK = int(os.environ.get("LOCAL_RANK", 0))
MAIN_PROCESS = RANK == 0
OPTIONS = ("--dry-run", "--new", "--selftest")
MOST_NAME = 80  # characters of a mixture's names in the name of a run

# GRAD_CP -> what the model computes again
RECOMPUTE = {"0": "nothing", "1": "blocks", "selective": "cheap"}


def as_json(value):
    """What comes back when it is written as JSON and read again: for comparing."""
    return json.loads(json.dumps(value))


def main(arguments: list[str]) -> None:
    enter(arguments, __doc__, TrainConfig, command, RETIRED)


def command(config: TrainConfig, typed: list[str]) -> None:
    unknown = [word for word in typed if word not in OPTIONS]
    if unknown:
        meant = did_you_mean(unknown[0], OPTIONS)
        raise UserError(
            f"{unknown[0]}: is not an option{meant or '.'} There are {', '.join(OPTIONS)}; the settings are in the script "
            "itself. See ./training.sh --help"
        )
    if "--selftest" in typed:
        from .selftest import selftest

        return selftest()
    from .again import Moved

    while True:
        try:
            with contextlib.ExitStack() as cleanup:
                return run(config, "--dry-run" in typed, "--new" in typed, cleanup)
        except Moved:  # the run has gone on in the meantime, elsewhere
            continue


def run(config: TrainConfig, dry_run: bool, anew: bool, cleanup: contextlib.ExitStack) -> None:
    """anew: begin a new run, even if one could go on. cleanup: what to do whether training ends well or not."""
    # heavy imports come after the settings are known to be sound: a typo answers in a fraction of a second
    import warnings

    import torch

    from .. import checkpoint, machine
    from ..adapters import attach
    from ..data.workers import end_workers, make_loader
    from ..model import arch
    from ..model.rwkv import build
    from ..ops import dispatch
    from ..training import optim, report, snapshot, strategy
    from . import again

    say = print if MAIN_PROCESS else lambda *_a, **_k: None
    base = project.model_file(config.model_path)
    found = again.find(config, anew, MAIN_PROCESS, say)
    stored, geometry, files, earlier = open_files(config, base, found is None)
    optim.must_be_there(config.optim)
    ops = dispatch.choose(config.op, geometry.version, machine.device_kind())
    precision = machine.precision(config.precision)
    trainer_arguments = strategy.trainer_arguments(precision, config.gpu_count, config.strategy)
    method = METHODS[config.method]
    setup = attach.Setup(
        config.method, options_of(config), config.parts, config.lora_dropout, config.quantised, config.quantised_parts
    )
    goes_on = earlier is not None and earlier.path is not None
    content = check_earlier(config, geometry, setup, base, earlier, say) if goes_on and MAIN_PROCESS else None
    data = (plan_stream if config.streaming else plan_run)(config, files, geometry.vocab_size, say)
    plan = data.plan
    steps = plan.optimizer_steps * config.epoch_count
    names = [files.name.partition(".")[0]] if config.streaming else [prefix.name for prefix, _ in files]
    stem = f"{'+'.join(names)[:MOST_NAME]}-{config.finetune_mode}"
    workers = config.num_workers if config.num_workers != "auto" else int(machine.device_kind() == "cuda")
    name = found.run.name if found else config.run_name
    settings = resolved(config, ops.name, precision, data, plan, geometry, name, workers)
    plan_facts = again.plan_facts(plan, config.streaming)
    missing = None  # a checkpoint that the run has lost, or that is due only now
    if found:
        epoch, within = divmod(found.step, plan.optimizer_steps)
        last = found.run / f"rwkv-{epoch - 1}.pth"
        due = found.step == steps or epoch % config.epoch_save == 0
        missing = last if not within and due and not last.is_file() else None
    if found and MAIN_PROCESS:
        try:
            again.must_not_be_finished(found, steps, config.epoch_count, missing)
            content = hashing.content(base, found.facts["base"])
            start_file = runs.init_file(found.run, config.method)
            contents = content, data.content(found.facts["data"])
            again.must_be_the_same(found, settings, plan_facts, as_json(dict(setup.options)), *contents, start_file)
        except Problems as problems:
            if config.run_name:
                raise
            say(f"new run   {again.place(found)} was stopped, and cannot go on: {problems.problems[0].message}")
            return run(config, dry_run, True, cleanup)
    if MAIN_PROCESS and not dry_run:
        folder = runs.claim(name, stem, cleanup, found is not None)
        if found:
            again.must_be_unchanged(found)
        else:
            cleanup.callback(runs.release, folder)
            # of a run that was ended before it saved anything
            runs.init_file(folder, config.method).unlink(missing_ok=True)
        again.hand_over(found)
    else:
        folder = runs.choose(name, stem)
    dtype = machine.DTYPES[precision]
    trained_values = attach.count_trained(geometry, setup)
    settings["RUN_NAME"] = folder.name
    lines = data.lines(settings)
    largest = data.most_tokens, data.most_sequences
    header = report.plan_lines(
        settings, setup, base, geometry, lines, *largest, plan, steps, trained_values, stored, dtype, ops.why
    )
    if found:
        header.append(f"goes on   {again.place(found)}, as if it had never stopped")
    if dry_run:
        header = report.setting_lines(settings, script_values(config)) + header
    say("\n".join(header))
    if dry_run:
        report.print_samples(data.sequences(), SAMPLES)
        say("\nThis was a dry run: nothing was trained, nothing was written.")
        return

    import pytorch_lightning as pl

    from .. import __version__
    from ..training.callbacks import TOO_HIGH, LossFile, Progress, Save, StepRecorder, StopOnSignal, wandb_sink
    from ..training.lisa import Lisa, Resample
    from ..training.module import TrainingModule
    from ..training.optim import parameter_groups
    from ..training.resume import GoOn, Keep

    if MAIN_PROCESS:
        moments = (4 + OPTIMS[config.optim].moments) * trained_values if config.keep_last else 0
        states = int(moments) * (config.keep_last + 1)
        need_space(folder, (base.stat().st_size if method.saves_model else 4 * trained_values) + states)
    torch.manual_seed(config.seed)
    # a run that saves models writes into a copy of the base: held open, it stays what it is even if another takes its name
    held = cleanup.enter_context(checkpoint.Archive(base)) if method.saves_model else None
    if MAIN_PROCESS:
        content = content or hashing.content(base)
        identity = hashing.Meanwhile(lambda: data.content(found.facts["data"] if found else None))
    model = build(geometry, checkpoint.load(base), ops, dtype, RECOMPUTE[config.grad_cp])
    start_file = runs.init_file(folder, config.method) if found else earlier and earlier.start
    start = checkpoint.load(start_file) if start_file and start_file.is_file() else None
    begun = attach.adapt(model, setup, dtype, start, machine.device(RANK))
    begun = {name: tensor.cpu() for name, tensor in begun.items()}
    lisa = None
    if config.method == "lisa":
        lisa = Lisa(model, config.parts, config.lisa_r, config.lisa_k, config.seed, dtype)
        lisa.follow(0)
    if goes_on:
        attach.load_trained(model, checkpoint.load(earlier.path), project.shown(earlier.path))
        say(f"starts from {project.shown(earlier.path)} (what it has learnt; the optimizer starts anew)")
    trained = lisa.saved if lisa else functools.partial(attach.trained, model)
    if found:
        weights = found.tensors("weights")
        if lisa:
            lisa.go_on(found.facts["blocks"], weights)
        attach.load_into(trained(), weights, project.shown(found.folder))
    torch.manual_seed(config.seed + RANK)  # dropout differs between ranks, the weights do not

    def kept_start() -> Path:
        """The file of what the adapters began with: a run is nothing without it."""
        path = runs.init_file(folder, config.method)
        if begun and not path.exists():
            checkpoint.save(path, begun)
        return path

    @functools.cache
    def start_sha256() -> str | None:
        return hashing.sha256(kept_start()) if begun else None

    def keep_state(parts: dict, facts: dict) -> None:
        step = facts["step"]
        log.sync()
        more = {
            "steps": steps, "finished": step == steps, "settings": script_values(config), "became": settings,
            "plan": plan_facts, "options": as_json(dict(setup.options)), "start_sha256": start_sha256(),
            "world": plan.world, "base": {"name": base.name, **content},
            "data": identity.result(), "tokens": recorder.seen, "blocks": lisa.active if lisa else None,
            "wandb": tracker.run.id if tracker and tracker.run else None, "kit": __version__,
        }  # fmt: skip
        snapshot.write(folder, parts, {**facts, **more}, config.keep_last)

    def write(epoch: int, finished: bool, step: int) -> Path:
        path = folder / f"rwkv-{epoch}.pth"
        clear_leftovers(path)
        changed = trained()
        bad = next((name for name, p in changed.items() if not torch.isfinite(p).all()), None)
        if bad:
            raise UserError(f"{bad} has become NaN or infinite, so {project.shown(path)} was not written. {TOO_HIGH}")
        sidecar = describe_run(config, geometry, setup.options, base, content, precision, epoch, step, finished)
        sidecar["prompt_type"], sidecar["eot"] = data.templates[0] if len(data.templates) == 1 else (None, None)
        if begun:
            sidecar["start_sha256"] = start_sha256()
        fresh = temporary(path)  # it gets its name when its sidecar is there
        try:
            if held:
                change = lambda name: (lambda _: changed[name].detach().cpu()) if name in changed else None  # noqa: E731
                checkpoint.rewrite(held, fresh, change)
            else:
                checkpoint.save(fresh, changed)
            sidecar["checkpoint_sha256"] = hashing.sha256(fresh)
            path.unlink(
                missing_ok=True
            )  # of the epoch when it was not finished: it must not lie beside another's sidecar
            write_json(sidecars.path_of(path), sidecar)
            os.replace(fresh, path)
            sync_folder(folder)
        finally:
            fresh.unlink(missing_ok=True)
        return Path(project.shown(path))

    def groups() -> list[dict]:
        rate = functools.partial(arch.lr_scale, geometry)
        return parameter_groups(
            attach.trained(model).items(), config.weight_decay, arch.decays, rate, config.loraplus_lr_ratio
        )

    sinks, tracker, before = [], None, []
    if MAIN_PROCESS:
        before = runs.cut_log(folder, found.step) if found else []
        write_json(folder / "run.json", settings)
        runs.point_latest(folder)
        progress = Progress(steps, config.epoch_count, before)
        log = LossFile(folder / "loss.jsonl")
        sinks = [log, progress]
        if found and len(before) < found.step:
            say(
                f"careful   loss.jsonl has only {len(before)} of the {found.step} steps that are done; loss.png will show a gap"
            )
        for sink in sinks:
            cleanup.callback(sink.close)
        known = found.facts["wandb"] if found else None
        if config.wandb and (tracker := wandb_sink(config.wandb, folder.name, folder, settings, progress.say, known)):
            sinks.append(tracker)
            cleanup.callback(tracker.close)
        say = progress.say
    stop = StopOnSignal(lambda: runs.abandon(folder) if MAIN_PROCESS else None)
    keep = Keep(
        keep_state if config.keep_last else None,
        trained,
        config.save_steps,
        plan.optimizer_steps,
        say,
        found.step if found else -1,
    )
    save = Save(config.epoch_save, config.epoch_count, plan.optimizer_steps, folder, write, keep.save, say)
    if missing and MAIN_PROCESS:
        save.newest = write(int(missing.stem.removeprefix("rwkv-")), True, found.step)
        say(f"saved {save.newest}, which was missing")
    recorder = StepRecorder(sinks, before[-1]["seconds"] if before else 0.0, found.facts["tokens"] if found else 0)
    go_on = None
    if found:
        batches = None if config.streaming else plan.micro_batches
        go_on = GoOn(found, trained, plan.optimizer_steps, plan.accumulate, batches)
    callbacks = [*([go_on] if go_on else []), recorder, stop, *([Resample(lisa, groups)] if lisa else []), save, keep]
    module = TrainingModule(
        model,
        groups(),
        steps,
        config.lr_schedule,
        config.lr_init,
        config.lr_final,
        config.warmup_steps,
        (config.beta1, config.beta2),
        config.adam_eps,
        config.grad_clip,
        config.chunk_ctx if config.train_type == "infctx" else None,
        config.infctx_grad,
        config.optim,
    )
    # Lightning's hints are about loggers and workers that we have settled; its errors come as exceptions
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.ERROR)
    trainer = pl.Trainer(
        **trainer_arguments,
        max_epochs=config.epoch_count,
        accumulate_grad_batches=config.mini_bsz,
        use_distributed_sampler=False,  # ours gives every rank its rows; Lightning's would shuffle them again
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    epoch, first = (go_on.epoch, go_on.first) if go_on else (0, 0)
    loader = make_loader(data.batches(RANK, first), workers, epoch, first)
    cleanup.callback(end_workers, loader)
    began = time.monotonic()
    finished = found is not None and found.step == steps  # and only a checkpoint was missing
    try:
        with stop.listening():
            if not finished:
                trainer.fit(module, loader)
    except RuntimeError as error:
        # torch's words for an empty host; a GPU has an exception of its own
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            leave(report.out_of_memory(settings, error), EXIT_MEMORY)
        raise
    cleanup.close()
    if not MAIN_PROCESS:
        return
    complete = finished or trainer.global_step == steps
    if config.streaming and not complete and not stop.received:
        print(f"The stream ended after {trainer.global_step} of MAX_STEPS={steps} steps.")
    report.finish(method, folder, save.newest, keep.exact, complete, stop.received, time.monotonic() - began)
