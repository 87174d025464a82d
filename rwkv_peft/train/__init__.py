"""./training.sh: fine-tune a model as the variables in the script say.

usage: ./training.sh [--dry-run] [--new] [--accept-edited] | --find-lr | --find-batch | --selftest

  --dry-run   check everything, print the plan and two samples with what is trained marked, and stop
  --new       begin a new run, also where the newest one was stopped and could go on
  --accept-edited  begin with a checkpoint (lora_load and its like) whose .json was edited since its run wrote it
  --find-lr   try rising learning rates for some steps, and tell which ones the settings bear
  --find-batch  the largest MICRO_BSZ that fits the GPU
  --selftest  compare all that could compute on this machine (OP) with the definition, and stop
  --help      this text

The settings are the variables in the script itself, each with its explanation. Results go to output/<RUN_NAME>/:
  rwkv-N.pth + rwkv-N.json   what was trained, after epoch N (counted from 0), and how: ./merge.sh N folds it into the base
  rwkv-step-N.pth            the same after N optimizer steps (SAVE_STEPS): ./merge.sh step-N
  loss.jsonl, loss.png       every optimizer step; run.json: the settings as they were resolved
  state/                     where the run is, so that it can go on

A run that was stopped or killed goes on when ./training.sh is run again: the one that RUN_NAME names, or if that is empty the
newest one, if its settings are those of the script. Steps, data and results are those of a run that was never stopped.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Mapping

from .. import runs
from ..config import RETIRED, TrainConfig
from ..errors import EXIT_MEMORY, EXIT_PROCESS, Problem, Problems, UserError, cause, leave, unheard
from ..shell_vars import enter
from ..sidecars import ACCEPT
from ..words import did_you_mean
from .place import Place, find_place, plugins, settle
from .prepared import header, prepare
from .record import script_values

SAMPLES = 2  # that a dry run shows
OPTIONS = ("--dry-run", "--new", ACCEPT, "--find-lr", "--find-batch", "--selftest")


def main(arguments: list[str]) -> None:
    try:
        enter(arguments, __doc__, TrainConfig, command, RETIRED, lean="CTX_LEN and MICRO_BSZ")
    except SystemExit as left:
        reach = sys.modules.get(f"{__name__}.reach")
        if reach and any(thread.is_alive() for thread in reach.stuck):
            os._exit(left.code)  # torch aborts where its call returns while Python ends (all was said and flushed)
        raise


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

    place = find_place(config, os.environ)
    settle(config, place, os.environ)
    if {"--find-lr", "--find-batch"} & set(typed):
        from .find import find_batch, find_lr

        return (find_lr if "--find-lr" in typed else find_batch)(config, place)
    while True:
        try:
            with contextlib.ExitStack() as cleanup:
                return run(config, place, "--dry-run" in typed, "--new" in typed, cleanup, ACCEPT in typed)
        except Moved:  # the run has gone on in the meantime, elsewhere
            continue


def run(
    config: TrainConfig,
    place: Place,
    dry_run: bool,
    anew: bool,
    cleanup: contextlib.ExitStack,
    accept_edited: bool = False,
) -> None:
    """anew: begin a new run, even if one could go on. cleanup: what to do whether training ends well or not. accept_edited: take
    a checkpoint whose sidecar was edited."""
    # heavy imports come after the settings are known to be sound: a typo answers in a fraction of a second
    from .. import bases
    from ..training import report
    from .meeting import meeting

    say = print if place.first else lambda *_a, **_k: None
    with contextlib.ExitStack() as others:
        met = None
        if place.meets():
            where = address(place, config.processes, os.environ)
            if not dry_run:
                speak = say if place.starter else print  # each node has a terminal of its own
                met = others.enter_context(meeting(place, config.processes, *where, speak))
        prepared = prepare(config, place, dry_run, anew, cleanup, say, met, accept_edited)
    if place.node and place.local == 0:
        print(
            f"node {place.node} of {place.nodes} trains with node 0, which tells how it goes and writes the results",
            flush=True,
        )
    if dry_run:
        bases.must_be_sound_model(prepared.base, prepared.geometry)
    lines = header(prepared)
    if dry_run:
        lines = report.setting_lines(prepared.settings, script_values(config)) + lines
    say("\n".join(lines))
    if dry_run:
        report.print_samples(prepared.data.sequences(), SAMPLES)
        prepared.in_use.must_be_unchanged()
        say("\nThis was a dry run: nothing was trained, nothing was written.")
    else:
        train(prepared, cleanup, say)


def address(place: Place, processes: int, environment: Mapping[str, str]) -> tuple[str, int]:
    """Where all processes meet."""
    [where] = plugins(place, processes)
    if not place.starter and "MASTER_ADDR" not in environment:
        words = f"is empty; with NNODES={place.nodes} it is the address of node 0 (hostname -I tells it there)"
        raise Problems(Problem("MASTER_ADDR", words))
    return where.main_address, where.main_port


def tell(words: str) -> None:
    with unheard():
        print(words, file=sys.stderr, flush=True)


def only_first(*_) -> None:
    raise AssertionError("only the first process writes")


def train(run, cleanup: contextlib.ExitStack, say) -> None:
    """Load the model and train it. run: prepared.Prepared."""
    import torch

    from ..adapters import attach
    from ..data.loading import heaviest
    from ..data.workers import end_workers, make_loader
    from ..training import report
    from ..training.callbacks import Save, StepRecorder, StopOnSignal, why_no_number
    from ..training.heaviest import Heaviest
    from ..training.lisa import Resample
    from ..training.resume import GoOn, Keep
    from ..training.run_files import RunFiles
    from ..training.spread import Parts
    from ..training.watch import Watch
    from .learner import make_learner, make_module
    from .results import Results, must_have_room
    from .rounds import make_rounds, make_validation
    from .told import everybody, nobody
    from .trainer import make_trainer

    config, found, folder, plan = run.config, run.found, run.folder, run.plan
    first, rank, in_use = run.place.first, run.place.rank, run.in_use
    if first:
        must_have_room(run, attach.count_trained(run.geometry, run.setup))
    with in_use.explaining():
        learner = make_learner(run, cleanup, say)
        in_use.must_be_unchanged()
    told = everybody(run, cleanup, say) if first else nobody(run, say)
    say = told.say

    ours = functools.partial(in_use.is_there, folder)
    tidy = functools.partial(runs.abandon, folder, ours) if first else lambda: None
    parent = os.getppid() if run.place.of_ours else None
    watch = Watch(rank, config.processes, config.gpu_count, parent, tidy, tell, in_use.look)
    cleanup.callback(watch.leave)
    in_use.before_leaving += [watch.leave, tidy]
    watches = run.place.local == 0  # for all processes of its machine
    if watches:
        cleanup.enter_context(in_use.watching(say))
    files = RunFiles(in_use, run.place.node if watches else None, watch.over.set)
    stop = StopOnSignal(lambda: (watch.leave(), tidy()), first, lambda: runs.has_saved(folder), files)

    past = (told.before[-1]["seconds"] if told.before else 0.0, found.facts["tokens"]) if found else (0.0, 0)
    in_a_row = found.facts.get("in_a_row", 0) if found else 0
    recorder = StepRecorder(told.steps, config.nan_limit, say, *past, in_a_row)

    def running() -> dict:
        ended = {"finished": True} if validation and validation.stopped else {}
        return {**ended, "tokens": recorder.seen, "in_a_row": recorder.in_a_row, **told.running()}

    results = Results(run, learner, running) if first else None
    write, keep_state = (results.write, results.keep_state) if results else (only_first, only_first)
    epoch_steps, trained = plan.optimizer_steps, learner.trained
    at = found.step if found else -1
    keep = Keep(keep_state if config.keep_last else None, trained, config.save_steps, epoch_steps, say, at)
    ends = config.epoch_save, config.epoch_count, epoch_steps
    save = Save(*ends, folder, write, trained, keep.save, say, config.keep_last)
    keep.beside, keep.paused = save.of_step, recorder.leave_out
    save.ours = ours
    keep.unchanged = save.unchanged = stop.unchanged
    if run.missing and results:
        as_found = Parts(run.spread.weights(trained()))
        save.newest = results.write(as_found, int(run.missing.stem.removeprefix("rwkv-")), True, found.step)
        say(f"saved {save.newest}, which was missing")
    go_on = None
    if found:
        of_epoch = None if config.streaming else len(run.data.batches(rank, 0))

        def loaded() -> None:
            files.look()
            in_use.release(found.stamps)

        go_on = GoOn(found, trained, epoch_steps, plan.accumulate, of_epoch, loaded)
    resample = [Resample(learner.lisa, learner.groups)] if learner.lisa else []
    validation = make_validation(run, told, save)
    rounds = make_rounds(run, told, validation, stop, recorder)
    rows = run.data.most_sequences
    first_of_all = Heaviest(heaviest(run.data.most_tokens // rows, rows))
    callbacks = [watch, *([go_on] if go_on else []), recorder, stop, first_of_all, *rounds, *resample, save, keep]
    module, trainer = make_module(run, learner), make_trainer(run, callbacks)
    epoch, begin = (go_on.epoch, go_on.first) if go_on else (0, 0)
    loader = make_loader(run.data.batches(rank, begin), run.workers, epoch, begin)
    cleanup.callback(end_workers, loader)
    began = time.monotonic()
    finished = found is not None and found.step == run.steps  # and only a checkpoint was missing
    try:
        with stop.listening(), watch.instead_of_lightnings(), in_use.explaining():
            if not finished:
                trainer.fit(module, loader)
    except UserError:
        if first:
            save.draw(True)  # which tells more than words
        raise
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError) or isinstance(cause(error), MemoryError):
            leave(report.out_of_memory(run.settings, error), EXIT_MEMORY)
        watch.caused(error)
        if isinstance(error, torch.distributed.DistError):
            words = f"Training ends: the processes cannot reach one another ({str(error).partition(chr(10))[0]})."
            leave(f"{words} Look at what the others say, and start all of them again.", EXIT_PROCESS)
        raise
    cleanup.close()
    if not first:
        if run.place.node and run.place.local == 0:
            how = "stopped" if stop.received else "done"
            print(f"node {run.place.node}: {how}; node 0 has the results", flush=True)
        sys.exit(128 + stop.received if stop.received else 0)
    if 0 < trainer.global_step <= recorder.in_a_row:
        steps = "The only step was" if trainer.global_step == 1 else f"All {trainer.global_step} steps were"
        why = why_no_number(module, trainer.global_step, recorder.in_a_row, config.processes == 1)
        raise UserError(f"{steps} left out, so nothing was learnt. {why}")
    complete = finished or trainer.global_step == run.steps
    early = validation is not None and validation.stopped
    if config.streaming and not complete and not stop.received and not early:
        print(f"The stream ended after {trainer.global_step} of MAX_STEPS={run.steps} steps.")
    looks = validation.records if validation else []
    spent = time.monotonic() - began
    report.finish(run.method, folder, save.newest, looks, keep.exact, complete, stop.received, spent)
