"""./training.sh again: whether it goes on with a run that was stopped, and what may have changed since.

With RUN_NAME the run of that name goes on. Without one the newest run does, if it is not finished and the script says what it
said then; otherwise a new one begins.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path

from rwkv_peft.checkpoint import run_dir, train_state
from rwkv_peft.checkpoint.train_state import TrainState
from rwkv_peft.common import hashing, paths
from rwkv_peft.common.errors import SettingError, SettingErrors, UserError
from rwkv_peft.common.formatting import plural
from rwkv_peft.config.shell import names_where
from rwkv_peft.config.train import TrainConfig
from rwkv_peft.distributed.rendezvous import Rendezvous

from .checks import as_written
from .run_record import script_values

# what a setting's declaration says of runs that resume (config/shell.py: setting)
FREE = names_where(TrainConfig, resume="free")
SPLIT = names_where(TrainConfig, resume="split")
BY_CONTENT = names_where(TrainConfig, resume="content")
# the first process tells the others that it starts: the folder of the state, or nothing for a new run
HANDED = "RWKV_PEFT_GOES_ON"


class StateChanged(Exception):
    """Another process has trained the run while this one was getting ready: to be looked at again."""


def find_resume_state(config: TrainConfig, anew: bool, first: bool, say: Callable[[str], None]) -> TrainState | None:
    """The state that this run goes on from; None if it is a new one. anew: the user wants a new one. first: this is the process
    that decides. Problems if RUN_NAME names a run that cannot go on."""
    if not first and HANDED in os.environ:
        return train_state.read_manifest(Path(os.environ[HANDED])) if os.environ[HANDED] else None
    folder = paths.OUTPUT / config.run_name
    if anew and config.run_name and run_dir.has_saved(folder):
        raise SettingErrors(
            SettingError(
                "RUN_NAME", f"{paths.display_path(folder)} holds an earlier run; --new wants another name, or none"
            )
        )
    if anew:
        return None
    if config.run_name:
        return named(folder, config, say) if run_dir.has_saved(folder) else None
    folder = newest_run()
    if folder is None or (first and run_dir.is_running(folder)):
        return None
    different: list[tuple[str, str]] = []
    finished: list[TrainState] = []

    def wanted(found: TrainState) -> bool:
        changed = changed_settings(found, config, FREE | SPLIT)
        if found.facts["finished"]:
            finished.extend([found] if ended_early(found) or not changed else [])
            return False
        different.extend(changed)
        return not different

    try:
        found = train_state.latest_valid(folder, say, wanted)
    except UserError as error:
        say(f"new run   {error}")
        return None
    its_name = f"RUN_NAME={shlex.quote(folder.name)}"
    if different:
        names = ", ".join(f"{name}={was}" for name, was in different[:4]) + (", ..." if len(different) > 4 else "")
        say(
            f"new run   {paths.display_path(folder)} was stopped, and had other settings ({names}). To "
            f"go on with it, set them back "
            f"and {its_name}"
        )
    for one in finished:
        how, more = f"{paths.display_path(folder)} is finished", longer(one)
        if ended_early(one):
            how, more = f"VAL_PATIENCE has ended {place(one)}", "VAL_PATIENCE, or 0,"
        say(f"new run   {how}. {its_name} and a larger {more} train that one further")
    return found


def newest_run() -> Path | None:
    """The folder of the newest run that has saved a state."""
    latest, link = run_dir.latest_run(), paths.OUTPUT / "latest"
    if latest and train_state.states_newest_first(latest):
        return latest
    # the link is missing, or its run was ended before it had anything to save
    others = [
        p.parent for p in paths.OUTPUT.glob("*/state") if p.parent != link and train_state.states_newest_first(p.parent)
    ]
    return max(others, key=lambda p: (p / "state").stat().st_mtime, default=None)


def named(folder: Path, config: TrainConfig, say) -> TrainState:
    there = paths.display_path(folder)
    different: list[tuple[str, str]] = []

    def wanted(found: TrainState) -> bool:
        different.extend(changed_settings(found, config, FREE | SPLIT | BY_CONTENT))
        return not different

    try:
        found = train_state.latest_valid(folder, say, wanted)
    except UserError as error:
        raise SettingErrors(SettingError("RUN_NAME", f"{error} Choose another name")) from None
    if different:
        advice = f"{there} goes on as it began. Set it back, or choose another RUN_NAME"
        raise SettingErrors(*(SettingError(name, f"was {was}; {advice}") for name, was in different))
    if found is None:
        raise SettingErrors(
            SettingError(
                "RUN_NAME",
                f"{there} holds an earlier run, which has saved no state to go on from and is never overwritten; choose another "
                "name",
            )
        )
    return found


def publish(met: Rendezvous, found: TrainState | None) -> None:
    """Let the processes that somebody else has started know what was decided."""
    met.publish("found", [found.run.name, found.folder.name] if found else None)


def receive(met: Rendezvous) -> None:
    """UserError if the state that the first process goes on from is not here."""
    told = met.wait_for("found")
    if told is None:
        os.environ[HANDED] = ""
        return
    folder = train_state.state_folder(paths.OUTPUT / told[0]) / told[1]
    if not folder.is_dir():
        raise UserError(
            f"{paths.display_path(folder)} is not there, and the first node goes on from it: output/ "
            f"has to be the same folder on all "
            "nodes (a network drive), or a copy of the run has to lie in it."
        )
    os.environ[HANDED] = str(folder)


def hand_over(found: TrainState | None) -> None:
    """Tell the processes that this one starts what was decided."""
    os.environ[HANDED] = str(found.folder) if found else ""


def longer(found: TrainState) -> str:
    """The setting that says how long a run is."""
    return "MAX_STEPS" if found.facts["settings"].get("STREAMING") else "EPOCH_COUNT"


def ended_early(found: TrainState) -> bool:
    """Whether VAL_PATIENCE has ended it before its last step."""
    return found.facts["finished"] and found.step < found.facts["steps"]


def must_be_unchanged(found: TrainState) -> None:
    """Moved if another process has saved a state since this one was found. To be asked once the run is ours."""
    train_state.remove_leftovers(found.run)
    if tuple(p.name for p in train_state.states_newest_first(found.run)) != found.beside:
        raise StateChanged
    train_state.remove_newer_states(found.run, found.step)


def must_not_be_finished(found: TrainState, steps: int, config: TrainConfig, missing: Path | None) -> None:
    """Problems if there is nothing left to do. steps: of the whole run as the script has it now. missing: the last epoch's
    checkpoint, if it is not there."""
    stream = found.facts["settings"].get("STREAMING")
    more, run = longer(found), paths.display_path(found.run)
    if found.step > steps:
        raise SettingErrors(
            SettingError(
                more, f"has {plural(steps, 'step')}, and {found.step:,} are done in {run}; it cannot be less than that"
            )
        )
    if (
        ended_early(found)
        and config.val_data != "none"
        and config.val_patience == found.facts["settings"].get("VAL_PATIENCE")
    ):
        words = (
            f"has ended {run} at step {found.step:,}: no better validation for so long. 0, or more, trains it further"
        )
        raise SettingErrors(SettingError("VAL_PATIENCE", words))
    if found.step == steps and missing is None:
        done = plural(found.step, "step") + ("" if stream else f", {plural(config.epoch_count, 'epoch')}")
        raise SettingErrors(
            SettingError(
                "RUN_NAME",
                f"{run} is finished ({done}). A larger {more} trains it further; another name begins a new run",
            )
        )


def place(found: TrainState) -> str:
    return f"{paths.display_path(found.run)} at step {found.step:,} of {found.facts['steps']:,}"


def changed_settings(found: TrainState, config: TrainConfig, free: set[str]) -> list[tuple[str, str]]:
    """Settings that are not what they were, with what they were; but for the free ones, and those that the kit had not
    got then."""
    told, given = found.facts["settings"], script_values(config)
    return [
        (name, said(told[name])) for name in given if name in told and name not in free and told[name] != given[name]
    ]


def said(value) -> str:
    return as_written(value) or '""'


def must_have_its_files(found: TrainState, options: dict, content: dict, data: dict, start: Path) -> None:
    """Problems where what lies in files is not what it was. options: of the method. content: of the base. data: what identifies
    the data. start: the file of what adapters began with."""
    facts, where = found.facts, place(found)
    wrong = []
    if content["sha256"] != facts["base"]["sha256"]:
        wrong.append(
            SettingError("MODEL_PATH", f"is another file than {facts['base']['name']}, which {where} was trained on")
        )
    if described(data) != described(facts["data"]):
        wrong.append(
            SettingError("DATA_PATH", f"has another content than when {where} began: {difference(facts['data'], data)}")
        )
    if options != facts["options"]:
        wrong.append(SettingError("PEFT_CONFIG", f"has another content than when {where} began; set it back"))
    if facts["start_sha256"] and not (start.is_file() and hashing.sha256(start) == facts["start_sha256"]):
        how = "another file than" if start.is_file() else "missing; it is"
        wrong.append(
            SettingError(
                "RUN_NAME",
                f"{paths.display_path(start)} is {how} what {where} began with: put it back from a copy of the run",
            )
        )
    if wrong:
        raise SettingErrors(*wrong)


def must_be_the_same(found: TrainState, given: dict, settings: dict, plan: dict) -> None:
    """Problems where what only the machine can tell of the settings is not what it was. given: the settings of the script;
    settings: resolved. plan: what `plan_facts` says."""
    facts, where = found.facts, place(found)
    became, wrong = facts["became"], []
    free = FREE | BY_CONTENT | ({"EPOCH_STEPS"} if settings["STREAMING"] else set())
    alike = plan == facts["plan"] or same_steps(settings, plan, became, facts["plan"])
    free |= SPLIT if alike else {"EPOCH_STEPS"} if given["EPOCH_STEPS"] == "auto" else set()
    wrong += [
        SettingError(
            name,
            f"{where} was begun with {said(became[name])}, which would be {said(settings[name])} now: {cure(name)}",
        )
        for name in became
        if name not in free and name in settings and settings[name] != became[name]
    ]
    if not wrong and not alike:
        wrong.append(
            SettingError("DATA_PATH", f"makes other steps than when {where} began ({facts['plan']} then, {plan} now)")
        )
    if wrong:
        raise SettingErrors(*wrong)


def cure(name: str) -> str:
    """What to do where a setting is another than a run began with."""
    keep = (
        ", or change MINI_BSZ so that a step has as many rows as it had"
        if name in SPLIT - {"EPOCH_STEPS", "MINI_BSZ"}
        else ""
    )
    return f"set it back{keep}"


def same_steps(settings: dict, plan: dict, became: dict, before: dict) -> bool:
    """Whether another split makes the same optimizer steps of the same rows."""
    if settings["STREAMING"] or settings["DATALOAD"] == "bucket":
        return False
    if not all(isinstance(before.get(key), int) for key in ("accumulate", "world")):
        return False
    if not isinstance(became.get("MICRO_BSZ"), int):
        return False
    rows = [one["accumulate"] * one["world"] * told["MICRO_BSZ"] for one, told in ((plan, settings), (before, became))]
    return rows[0] == rows[1] and all(plan[key] == before.get(key) for key in ("rows", "epoch_steps"))


def described(data):
    """What identifies data, without the names and the marks of its files, which change when they are copied, and without the
    samples, which earlier versions had not got."""
    if isinstance(data, dict):
        return {key: described(value) for key, value in data.items() if key not in ("mark", "name", "pieces")}
    return [described(value) for value in data] if isinstance(data, list) else data


def difference(before: dict, now: dict) -> str:
    """What of the data is another."""
    old, new = before["files"], now["files"]
    if len(old) != len(new):
        return f"{plural(len(old), 'file')} then, {len(new)} now"
    other = [f["name"] for f, g in zip(old, new, strict=True) if described(f) != described(g)]
    if other:
        return ", ".join(other[:3])
    return "the weights of the mixture" if "weights" in now else "make_tokenize.sh has other settings"


def plan_facts(plan, streaming: bool) -> dict:
    """How the data become steps. A stream's plan says how long it goes on, which may change."""
    facts = {"accumulate": plan.accumulate, "world": plan.world}
    if streaming:
        return facts | {"micro_bsz": plan.micro_bsz}
    return facts | {"rows": plan.rows, "micro_batches": plan.micro_batches, "epoch_steps": plan.optimizer_steps}
