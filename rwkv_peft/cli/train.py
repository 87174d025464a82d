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
import os
import sys
from collections.abc import Mapping

from rwkv_peft.checkpoint.sidecars import ACCEPT
from rwkv_peft.common.errors import SettingError, SettingErrors, UserError
from rwkv_peft.common.formatting import did_you_mean
from rwkv_peft.config.shell import run_cli
from rwkv_peft.config.train import RETIRED, TrainConfig
from rwkv_peft.distributed.launch import ProcessInfo, detect_launcher, plugins, set_master_address
from rwkv_peft.train.run_record import script_values
from rwkv_peft.train.setup import header, prepare_run

SAMPLES = 2  # that a dry run shows
OPTIONS = ("--dry-run", "--new", ACCEPT, "--find-lr", "--find-batch", "--selftest")


def main(arguments: list[str]) -> None:
    try:
        run_cli(arguments, __doc__, TrainConfig, command, RETIRED, lean="CTX_LEN and MICRO_BSZ")
    except SystemExit as left:
        connect = sys.modules.get("rwkv_peft.distributed.connect")
        if connect and any(thread.is_alive() for thread in connect.stuck):
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
        from rwkv_peft.train.selftest import selftest

        return selftest()
    from rwkv_peft.train.resume import StateChanged

    place = detect_launcher(config, os.environ)
    set_master_address(config, place, os.environ)
    if {"--find-lr", "--find-batch"} & set(typed):
        from rwkv_peft.train.lr_finder import find_batch, find_lr

        return (find_lr if "--find-lr" in typed else find_batch)(config, place)
    while True:
        try:
            with contextlib.ExitStack() as cleanup:
                return run(config, place, "--dry-run" in typed, "--new" in typed, cleanup, ACCEPT in typed)
        except StateChanged:  # the run has gone on in the meantime, elsewhere
            continue


def run(
    config: TrainConfig,
    place: ProcessInfo,
    dry_run: bool,
    anew: bool,
    cleanup: contextlib.ExitStack,
    accept_edited: bool = False,
) -> None:
    """anew: begin a new run, even if one could go on. cleanup: what to do whether training ends well or not. accept_edited: take
    a checkpoint whose sidecar was edited."""
    # heavy imports come after the settings are known to be sound: a typo answers in a fraction of a second
    from rwkv_peft.checkpoint import base_model
    from rwkv_peft.distributed.rendezvous import open_rendezvous
    from rwkv_peft.train import report
    from rwkv_peft.train.run import train

    say = print if place.first else lambda *_a, **_k: None
    with contextlib.ExitStack() as others:
        met = None
        if place.needs_rendezvous():
            where = address(place, config.processes, os.environ)
            if not dry_run:
                speak = say if place.starter else print  # each node has a terminal of its own
                met = others.enter_context(open_rendezvous(place, config.processes, *where, speak))
        prepared = prepare_run(config, place, dry_run, anew, cleanup, say, met, accept_edited)
    if place.node and place.local == 0:
        print(
            f"node {place.node} of {place.nodes} trains with node 0, which tells how it goes and writes the results",
            flush=True,
        )
    if dry_run:
        base_model.check_model(prepared.base, prepared.geometry)
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


def address(place: ProcessInfo, processes: int, environment: Mapping[str, str]) -> tuple[str, int]:
    """Where all processes meet."""
    [where] = plugins(place, processes)
    if not place.starter and "MASTER_ADDR" not in environment:
        words = f"is empty; with NNODES={place.nodes} it is the address of node 0 (hostname -I tells it there)"
        raise SettingErrors(SettingError("MASTER_ADDR", words))
    return where.main_address, where.main_port
