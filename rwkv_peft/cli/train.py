"""./training.sh: fine-tune a model as the variables in the script say.

usage: ./training.sh [--dry-run] [--new] [--accept-edited] | --find-lr | --find-batch | --selftest

  --dry-run   check everything, print the plan and two samples with what is trained marked, and stop
  --new       begin a new run, also where the newest one was stopped and could go on
  --accept-edited  begin with a checkpoint (lora_load and its like) whose .json was edited since its run wrote it
  --find-lr   try rising learning rates for some steps, and report which ones the settings bear
  --find-batch  the largest MICRO_BSZ that fits the GPU
  --selftest  compare all that could compute on this machine (OP) with the definition, and stop
  --help      this text

The settings are the variables in the script itself, each with its explanation. Results go to output/<RUN_NAME>/:
  rwkv-N.pth + rwkv-N.json   what was trained, after epoch N (counted from 0), and how: ./merge.sh N folds it into the base
  rwkv-step-N.pth            the same after N optimizer steps (SAVE_STEPS): ./merge.sh step-N
  loss.jsonl, loss.png       every optimizer step; run.json: the settings as they were resolved
  state/                     where the run is, so that it can go on

A run that was stopped or killed resumes when ./training.sh is run again: the one that RUN_NAME names, or if that is empty the
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
from rwkv_peft.distributed.launch import ProcessInfo, detect_launcher, environment_plugins, set_master_address

SAMPLES = 2  # that a dry run shows
OPTIONS = ("--dry-run", "--new", ACCEPT, "--find-lr", "--find-batch", "--selftest")


def main(arguments: list[str]) -> None:
    """Run the command line of ./training.sh."""
    try:
        run_cli(arguments, __doc__, TrainConfig, command, RETIRED, lean="CTX_LEN and MICRO_BSZ")
    except SystemExit as left:
        connect = sys.modules.get("rwkv_peft.distributed.connect")
        if connect and any(thread.is_alive() for thread in connect.stuck):
            # torch aborts where its call returns while Python ends (all was printed and flushed)
            os._exit(left.code if isinstance(left.code, int) else int(left.code is not None))
        raise


def command(config: TrainConfig, options: list[str]) -> None:
    """Do what the options say.

    Args:
        config: settings of the script.
        options: arguments of the command line.
    """
    unknown = [word for word in options if word not in OPTIONS]
    if unknown:
        meant = did_you_mean(unknown[0], OPTIONS)
        raise UserError(
            f"{unknown[0]}: is not an option{meant or '.'} There are {', '.join(OPTIONS)}; the settings are in the script "
            "itself. See ./training.sh --help"
        )
    # heavy imports come after the settings are checked: a typo is reported in a fraction of a second
    if "--selftest" in options:
        from rwkv_peft.train.selftest import selftest

        return selftest()
    from rwkv_peft.train.resume import StateChanged

    process = detect_launcher(config, os.environ)
    set_master_address(config, process, os.environ)
    if {"--find-lr", "--find-batch"} & set(options):
        from rwkv_peft.train.lr_finder import find_batch, find_lr

        return (find_lr if "--find-lr" in options else find_batch)(config, process)
    while True:
        try:
            with contextlib.ExitStack() as cleanup:
                return run(config, process, "--dry-run" in options, "--new" in options, cleanup, ACCEPT in options)
        except StateChanged:  # another process has trained the run in the meantime
            continue


def run(
    config: TrainConfig,
    process: ProcessInfo,
    dry_run: bool,
    force_new: bool,
    cleanup: contextlib.ExitStack,
    accept_edited: bool = False,
) -> None:
    """Print the plan of a run and train.

    Args:
        config: settings of the script.
        process: which process of the training this one is.
        dry_run: check, print the plan and samples, and stop.
        force_new: start a new run, even if one could be resumed.
        cleanup: gets what to do at the end of the training, also after an error.
        accept_edited: accept a checkpoint whose sidecar was edited.
    """
    # heavy imports, as in `command`
    from rwkv_peft.checkpoint import base_model
    from rwkv_peft.distributed.rendezvous import open_rendezvous
    from rwkv_peft.train import report, setup
    from rwkv_peft.train.run import train
    from rwkv_peft.train.run_record import script_values

    log = print if process.is_main else lambda *_a, **_k: None
    with contextlib.ExitStack() as stack:
        rendezvous = None
        if process.needs_rendezvous():
            address = _rendezvous_address(process, config.processes, os.environ)
            if not dry_run:
                log_waiting = log if process.launcher else print  # each node has a terminal of its own
                rendezvous = stack.enter_context(open_rendezvous(process, config.processes, *address, log_waiting))
        prepared = setup.prepare_run(config, process, dry_run, force_new, cleanup, log, rendezvous, accept_edited)
    if process.node and process.local == 0:
        print(
            f"node {process.node} of {process.nodes} trains with node 0, which tells how it goes and writes the results",
            flush=True,
        )
    if dry_run:
        base_model.check_model(prepared.base.path, prepared.base.geometry)
    lines = setup.header(prepared)
    if dry_run:
        lines = report.setting_lines(dict(prepared.settings.values), script_values(config)) + lines
    log("\n".join(lines))
    if dry_run:
        report.print_samples(prepared.data.train.sequences(), SAMPLES)
        prepared.watch.must_be_unchanged()
        log("\nThis was a dry run: nothing was trained, nothing was written.")
    else:
        train(prepared, cleanup, log)


def _rendezvous_address(process: ProcessInfo, processes: int, environment: Mapping[str, str]) -> tuple[str, int]:
    """Host and port where all processes meet."""
    [lightning] = environment_plugins(process, processes)
    if not process.launcher and "MASTER_ADDR" not in environment:
        words = f"is empty; with NNODES={process.nodes} it is the address of node 0 (hostname -I tells it there)"
        raise SettingErrors(SettingError("MASTER_ADDR", words))
    return lightning.main_address, lightning.main_port
