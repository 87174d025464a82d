"""./training.sh: fine-tune a model as the variables in the script say.

usage: ./training.sh [--dry-run]

  --dry-run   check everything, print the plan and two samples with what is trained marked, and stop
  --help      this text

The settings are the variables in the script itself, each with its explanation. Results go to output/<RUN_NAME>/:
  rwkv-N.pth + rwkv-N.json   what was trained, after epoch N (counted from 0), and how: ./merge.sh N folds it into the base
  loss.jsonl, loss.png       every optimizer step; run.json: the settings as they were resolved
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import time
from pathlib import Path

from .. import hashing, project, runs
from ..atomic import need_space, write_json
from ..config import RETIRED, TrainConfig
from ..errors import EXIT_MEMORY, Problem, Problems, UserError, leave
from ..shell_vars import enter
from ..words import did_you_mean
from .data import Planned, data_files, plan_run, plan_stream, stream_source

# Lightning starts one more process for every further GPU, numbered from 1: those are quiet and write nothing
SAMPLES = 2  # that a dry run shows
RANK = int(os.environ.get("LOCAL_RANK", 0))
MAIN_PROCESS = RANK == 0
MOST_NAME = 80  # characters of a mixture's names in the name of a run


def main(arguments: list[str]) -> None:
    enter(arguments, __doc__, TrainConfig, command, RETIRED)


def command(config: TrainConfig, typed: list[str]) -> None:
    unknown = [word for word in typed if word != "--dry-run"]
    if unknown:
        meant = did_you_mean(unknown[0], ["--dry-run"])
        raise UserError(
            f"{unknown[0]}: is not an option{meant or '.'} There is --dry-run; the settings are in the script itself. "
            "See ./training.sh --help"
        )
    with contextlib.ExitStack() as cleanup:
        run(config, bool(typed), cleanup)


def run(config: TrainConfig, dry_run: bool, cleanup: contextlib.ExitStack) -> None:
    """cleanup: what to do whether training ends well or not."""
    # heavy imports come after the settings are known to be sound: a typo answers in a fraction of a second
    import warnings

    import torch

    from .. import checkpoint, machine
    from ..adapters import attach
    from ..data.workers import end_workers, make_loader
    from ..model import arch
    from ..model.rwkv import build
    from ..ops import dispatch
    from ..training import report, strategy

    say = print if MAIN_PROCESS else lambda *_a, **_k: None
    base = project.model_file(config.model_path)
    stored, geometry, files = open_files(config, base)
    op, wkv7 = dispatch.wkv7(config.op)
    precision = machine.precision(config.precision)
    trainer_arguments = strategy.trainer_arguments(precision, config.gpu_count, config.strategy)
    base_sha256 = check_lora(config, base) if config.lora_load and MAIN_PROCESS else ""
    data = (plan_stream if config.streaming else plan_run)(config, files, geometry.vocab_size, say)
    plan = data.plan
    steps = plan.optimizer_steps * config.epoch_count
    full = config.finetune_mode == "full"

    names = [files.name.partition(".")[0]] if config.streaming else [prefix.name for prefix, _ in files]
    stem = f"{'+'.join(names)[:MOST_NAME]}-{config.finetune_mode}"
    if MAIN_PROCESS and not dry_run:
        folder = runs.claim(config.run_name, stem, cleanup)
        cleanup.callback(runs.release, folder)
    else:
        folder = runs.choose(config.run_name, stem)
    dtype = machine.DTYPES[precision]
    trained_values = attach.count_trained(arch.shapes(geometry), full, config.parts, config.lora_r)
    workers = config.num_workers if config.num_workers != "auto" else int(machine.device_kind() == "cuda")
    settings = resolved(config, op, precision, data, plan, geometry, folder.name, workers)
    lines = data.lines(settings)
    header = report.plan_lines(
        settings, base, geometry, lines, data.most_tokens, plan, steps, trained_values, stored, dtype
    )
    if dry_run:
        header = report.setting_lines(settings, script_values(config)) + header
    say("\n".join(header))
    if dry_run:
        report.print_samples(data.sequences(), SAMPLES)
        say("\nThis was a dry run: nothing was trained, nothing was written.")
        return

    import pytorch_lightning as pl

    from ..training.callbacks import TOO_HIGH, LossFile, Progress, Save, StepRecorder, StopOnSignal, wandb_sink
    from ..training.module import TrainingModule
    from ..training.optim import parameter_groups

    if MAIN_PROCESS:
        need_space(folder, base.stat().st_size if full else 4 * trained_values)
    torch.manual_seed(config.seed)
    # a full run writes itself into a copy of the base: held open, it stays what it is even if another file takes its name
    held = cleanup.enter_context(checkpoint.Archive(base)) if full else None
    if MAIN_PROCESS:
        base_sha256 = base_sha256 or hashing.sha256(base)
    tensors = checkpoint.load(base)
    model = build(geometry, tensors, wkv7, dtype, config.grad_cp, keep=torch.float32 if full else dtype)
    if full:
        attach.train_everything(model)
    else:
        attach.adapt(model, config.finetune_mode, config.parts, config.lora_r, config.lora_alpha, config.lora_dropout)
    if config.lora_load:
        attach.load_trained(model, checkpoint.load(lora_file(config)), project.shown(lora_file(config)))
        say(f"starts from {project.shown(lora_file(config))} (weights; the optimizer starts anew)")
    trained = attach.trained(model)
    torch.manual_seed(config.seed + RANK)  # dropout differs between ranks, the weights do not

    def write(epoch: int, finished: bool) -> Path:
        path = folder / f"rwkv-{epoch}.pth"
        bad = next((name for name, p in trained.items() if not torch.isfinite(p).all()), None)
        if bad:
            raise UserError(f"{bad} has become NaN or infinite, so {project.shown(path)} was not written. {TOO_HIGH}")
        sidecar = describe_run(config, geometry, base, base_sha256, precision, epoch, trainer.global_step, finished)
        sidecar["prompt_type"], sidecar["eot"] = data.templates[0] if len(data.templates) == 1 else (None, None)
        write_json(checkpoint.sidecar_path(path), sidecar)
        if full:
            checkpoint.rewrite(
                held, path, lambda name: (lambda _: trained[name].detach().cpu()) if name in trained else None
            )
        else:
            checkpoint.save(path, trained)
        return Path(project.shown(path))

    callbacks, sinks = [], []
    if MAIN_PROCESS:
        write_json(folder / "run.json", settings)
        runs.point_latest(folder)
        progress = Progress(steps, config.epoch_count)
        sinks = [LossFile(folder / "loss.jsonl"), progress]
        for sink in sinks:
            cleanup.callback(sink.close)
        if config.wandb and (sink := wandb_sink(config.wandb, folder.name, folder, settings, progress.say)):
            sinks.append(sink)
            cleanup.callback(sink.close)
        say = progress.say
    stop = StopOnSignal(lambda: runs.abandon(folder) if MAIN_PROCESS else None)
    save = Save(config.epoch_save, config.epoch_count, folder, write, say)
    callbacks = [StepRecorder(sinks), stop, save]
    module = TrainingModule(
        model,
        parameter_groups(trained.items(), config.weight_decay, arch.decays, arch.lr_scale),
        steps,
        config.lr_schedule,
        config.lr_init,
        config.lr_final,
        config.warmup_steps,
        (config.beta1, config.beta2),
        config.adam_eps,
        config.grad_clip,
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
    loader = make_loader(data.batches(RANK), workers)
    cleanup.callback(end_workers, loader)
    began = time.monotonic()
    try:
        with stop.listening():
            trainer.fit(module, loader)
    except RuntimeError as error:
        # torch's words for an empty host; a GPU has an exception of its own
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            leave(report.out_of_memory(settings, error), EXIT_MEMORY)
        raise
    cleanup.close()
    if not MAIN_PROCESS:
        return
    if config.streaming and trainer.global_step < steps and not stop.received:
        print(f"The stream ended after {trainer.global_step} of MAX_STEPS={steps} steps.")
    report.finish(full, folder, save.newest, stop.received, time.monotonic() - began)


def open_files(config: TrainConfig, base: Path):
    """What the base holds, its geometry, and the data: prefixes and weights, or what is streamed. Problems with all that is
    wrong with the files."""
    from .. import bases

    found, stored, geometry = [], {}, None
    try:
        stored, geometry = bases.inspect(base)
    except UserError as error:
        found.append(Problem("MODEL_PATH", str(error)))
    if geometry:
        sizes = {"N_LAYER": geometry.n_layer, "EMBD_SIZE": geometry.n_embd, "VOCAB_SIZE": geometry.vocab_size}
        given = {"N_LAYER": config.n_layer, "EMBD_SIZE": config.embd_size, "VOCAB_SIZE": config.vocab_size}
        found += [
            Problem(name, f"but {project.shown(base)} has {sizes[name]}; use auto")
            for name, value in given.items()
            if value not in ("auto", sizes[name])
        ]
    files, wrong = (stream_source if config.streaming else data_files)(config.data_path)
    found += [Problem("DATA_PATH", message) for message in wrong]
    if config.run_name and MAIN_PROCESS and runs.is_taken(project.OUTPUT / config.run_name):
        there = project.shown(project.OUTPUT / config.run_name)
        found.append(
            Problem("RUN_NAME", f"{there} holds an earlier run, which is never overwritten; choose another name")
        )
    if config.lora_load and not lora_file(config).is_file():
        found.append(Problem("lora_load", f"{config.lora_load}: there is no such file"))
    if found:
        raise Problems(*found)
    return stored, geometry, files


def lora_file(config: TrainConfig) -> Path:
    path = project.find(config.lora_load, "output")
    return runs.epoch_file(path, None) if path.is_dir() else path


def check_lora(config: TrainConfig, base: Path) -> str:
    """Whether lora_load was trained on this base with this rank and alpha; Problems if not. Returns the base's SHA-256."""
    from .. import checkpoint

    path = lora_file(config)
    base_sha256 = hashing.sha256(base)
    try:
        checkpoint.describe(path)  # refuses what is no checkpoint before its sidecar is asked for
    except UserError as error:
        raise Problems(Problem("lora_load", str(error))) from None
    if checkpoint.sidecar_path(path).is_file():
        sidecar = checkpoint.read_sidecar(path, ("method", "rank", "alpha", "base", "base_sha256"))
        wrong = []
        if sidecar["method"] != config.finetune_mode:
            raise Problems(Problem("lora_load", f"holds a {sidecar['method']} run, not a {config.finetune_mode} one"))
        if sidecar["rank"] != config.lora_r:
            wrong.append(Problem("lora_r", f"must be {sidecar['rank']}, the rank of {config.lora_load}"))
        if sidecar["alpha"] != config.lora_alpha:
            wrong.append(Problem("lora_alpha", f"must be {sidecar['alpha']:g}, the alpha of {config.lora_load}"))
        if sidecar["base_sha256"] != base_sha256:
            wrong.append(
                Problem("MODEL_PATH", f"{config.lora_load} was trained on {sidecar['base']}, not on {base.name}")
            )
        if wrong:
            raise Problems(*wrong)
    else:
        print(f"{config.lora_load} has no sidecar: its alpha ({config.lora_alpha:g}) and base are taken on trust.")
    return base_sha256


def resolved(config: TrainConfig, op, precision, data: Planned, plan, geometry, run_name, workers) -> dict:
    """run.json: every setting of the script by its name, with auto replaced by what it became."""
    became = {
        "RUN_NAME": run_name, "MODEL_VERSION": "v7", "N_LAYER": geometry.n_layer, "EMBD_SIZE": geometry.n_embd,
        "VOCAB_SIZE": geometry.vocab_size, "CTX_LEN": data.ctx_len, "EPOCH_STEPS": plan.micro_batches,
        "MICRO_BSZ": plan.micro_bsz, "OP": op, "PRECISION": precision,
        "STRATEGY": "ddp" if config.gpu_count > 1 or config.strategy == "ddp" else "single", "NUM_WORKERS": workers,
    }  # fmt: skip
    if data.buckets:
        edges, sizes = data.buckets.edges, data.buckets.sizes
        became |= {
            "TRAIN_LENGTHS": " ".join(map(str, edges)), "TRAIN_BATCH_SIZES": " ".join(map(str, sizes)),
            "CTX_LEN": min(data.ctx_len, edges[-1]), "MICRO_BSZ": "auto",
        }  # fmt: skip
    return script_values(config) | became


def script_values(config: TrainConfig) -> dict:
    """The settings by their names in the script."""
    return {f.metadata["var"]: getattr(config, f.name) for f in dataclasses.fields(config)}


def describe_run(config, geometry, base: Path, base_sha256, precision, epoch: int, step: int, finished: bool) -> dict:
    """The sidecar of a checkpoint."""
    import pytorch_lightning
    import torch

    from .. import __version__

    full = config.finetune_mode == "full"
    return {
        "method": config.finetune_mode,
        "rank": None if full else config.lora_r,
        "alpha": None if full else config.lora_alpha,
        "dropout": None if full else config.lora_dropout,
        "parts": None if full else list(config.parts),
        "base": base.name,
        "base_path": str(base.resolve()),
        "base_sha256": base_sha256,
        "geometry": geometry.as_dict(),
        "quant": config.quant,
        "precision": precision,
        "epoch": epoch,
        "epoch_finished": finished,
        "step": step,
        "versions": {
            "kit": __version__,
            "torch": torch.__version__,
            "lightning": pytorch_lightning.__version__,
            "python": platform.python_version(),
        },
    }
