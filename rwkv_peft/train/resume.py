"""Whether ./training.sh resumes an earlier run, and which settings may have changed since.

With RUN_NAME the run of that name is resumed. Without one the newest run is, if it is not finished and the script has the
settings that it had then; otherwise a new run starts.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rwkv_peft.checkpoint import run_dir, train_state
from rwkv_peft.checkpoint.train_state import TrainState
from rwkv_peft.common import hashing, paths
from rwkv_peft.common.errors import SettingError, SettingErrors, UserError
from rwkv_peft.common.formatting import plural
from rwkv_peft.config.shell import names_where
from rwkv_peft.config.train import TrainConfig
from rwkv_peft.data.sampling import Plan
from rwkv_peft.distributed.rendezvous import Rendezvous

from .run_record import format_setting, script_values

# what a setting's declaration states about runs that are resumed (config/shell.py: setting)
FREE = names_where(TrainConfig, resume="free")
SPLIT = names_where(TrainConfig, resume="split")
BY_CONTENT = names_where(TrainConfig, resume="content")
# environment variable by which rank 0 gives its decision to the processes that it starts: the folder of the state, or nothing
# for a new run
STATE_VARIABLE = "RWKV_PEFT_GOES_ON"

Changes = list[tuple[str, str]]  # names of settings and what they were


class StateChanged(Exception):
    """Another process has trained the run while this one was being set up: look for a state again."""


def find_resume_state(
    config: TrainConfig, force_new: bool, is_main: bool, log: Callable[[str], None]
) -> TrainState | None:
    """Return the state to resume from, or None to start a new run.

    Args:
        config: settings of the script.
        force_new: ignore existing states.
        is_main: this process decides; others get the decision of rank 0.
        log: prints a message.

    Raises:
        SettingErrors: RUN_NAME names a run that cannot be resumed.
    """
    if not is_main and STATE_VARIABLE in os.environ:
        return train_state.read_manifest(Path(os.environ[STATE_VARIABLE])) if os.environ[STATE_VARIABLE] else None
    folder = paths.OUTPUT / config.run_name
    has_saved = bool(config.run_name) and run_dir.has_saved(folder)
    if force_new:
        if has_saved:
            words = f"{paths.display_path(folder)} holds an earlier run; --new wants another name, or none"
            raise SettingErrors(SettingError("RUN_NAME", words))
        return None
    if config.run_name:
        return _find_named_state(folder, config, log) if has_saved else None
    newest = _newest_run()
    if newest is None or (is_main and run_dir.is_running(newest)):
        return None
    return _find_newest_state(newest, config, log)


def _find_newest_state(folder: Path, config: TrainConfig, log: Callable[[str], None]) -> TrainState | None:
    different: Changes = []
    finished: list[TrainState] = []

    def is_resumable(state: TrainState) -> bool:
        changed = changed_settings(state, config, FREE | SPLIT)
        if state.facts["finished"]:
            finished.extend([state] if ended_early(state) or not changed else [])
            return False
        different.extend(changed)
        return not different

    try:
        state = train_state.latest_valid(folder, log, is_resumable)
    except UserError as error:
        log(f"new run   {error}")
        return None
    shown, run_name = paths.display_path(folder), f"RUN_NAME={shlex.quote(folder.name)}"
    if different:
        names = ", ".join(f"{name}={was}" for name, was in different[:4]) + (", ..." if len(different) > 4 else "")
        words = f"was stopped, and had other settings ({names}). To go on with it, set them back and {run_name}"
        log(f"new run   {shown} {words}")
    for one in finished:
        how, more = f"{shown} is finished", length_setting(one)
        if ended_early(one):
            how, more = f"VAL_PATIENCE has ended {describe(one)}", "VAL_PATIENCE, or 0,"
        log(f"new run   {how}. {run_name} and a larger {more} train that one further")
    return state


def _newest_run() -> Path | None:
    """The folder of the newest run that has saved a state."""
    latest, link = run_dir.latest_run(), paths.OUTPUT / "latest"
    if latest and train_state.states_newest_first(latest):
        return latest
    # the link is missing, or its run was stopped before it had anything to save
    others = [p.parent for p in paths.OUTPUT.glob("*/state") if p.parent != link]
    others = [folder for folder in others if train_state.states_newest_first(folder)]
    return max(others, key=lambda p: (p / "state").stat().st_mtime, default=None)


def _find_named_state(folder: Path, config: TrainConfig, log: Callable[[str], None]) -> TrainState:
    shown = paths.display_path(folder)
    different: Changes = []

    def is_resumable(state: TrainState) -> bool:
        different.extend(changed_settings(state, config, FREE | SPLIT | BY_CONTENT))
        return not different

    try:
        state = train_state.latest_valid(folder, log, is_resumable)
    except UserError as error:
        raise SettingErrors(SettingError("RUN_NAME", f"{error} Choose another name")) from None
    if different:
        advice = f"{shown} goes on as it began. Set it back, or choose another RUN_NAME"
        raise SettingErrors(*(SettingError(name, f"was {was}; {advice}") for name, was in different))
    if state is None:
        words = (
            "holds an earlier run, which has saved no state to go on from and is never overwritten; choose another name"
        )
        raise SettingErrors(SettingError("RUN_NAME", f"{shown} {words}"))
    return state


def send_state(rendezvous: Rendezvous, state: TrainState | None) -> None:
    """Send the decision of rank 0 to the processes that an external launcher has started."""
    rendezvous.publish("found", [state.run.name, state.folder.name] if state else None)


def receive_state(rendezvous: Rendezvous) -> None:
    """Receive the decision of rank 0.

    Raises:
        UserError: the state is not on this node.
    """
    names = rendezvous.wait_for("found")
    if names is None:
        os.environ[STATE_VARIABLE] = ""
        return
    folder = train_state.state_folder(paths.OUTPUT / names[0]) / names[1]
    if not folder.is_dir():
        raise UserError(
            f"{paths.display_path(folder)} is not there, and the first node goes on from it: output/ has to be the same folder "
            "on all nodes (a network drive), or a copy of the run has to lie in it."
        )
    os.environ[STATE_VARIABLE] = str(folder)


def export_state(state: TrainState | None) -> None:
    """Give the decision to the processes that this one starts."""
    os.environ[STATE_VARIABLE] = str(state.folder) if state else ""


def length_setting(state: TrainState) -> str:
    """Return the name of the setting for the length of a run."""
    return "MAX_STEPS" if state.facts["settings"].get("STREAMING") else "EPOCH_COUNT"


def ended_early(state: TrainState) -> bool:
    """Return whether VAL_PATIENCE has ended the run before its last step."""
    return state.facts["finished"] and state.step < state.facts["steps"]


def check_unchanged(state: TrainState) -> None:
    """Check that the state is still the newest one. To be called when the run's folder is locked.

    Raises:
        StateChanged: another process has saved a state since.
    """
    train_state.remove_leftovers(state.run)
    if tuple(p.name for p in train_state.states_newest_first(state.run)) != state.beside:
        raise StateChanged
    train_state.remove_newer_states(state.run, state.step)


def check_not_finished(state: TrainState, steps: int, config: TrainConfig, missing: Path | None) -> None:
    """Check that the run has something left to do.

    Args:
        state: to resume from.
        steps: optimizer steps of the whole run with the settings of the script.
        config: settings of the script.
        missing: checkpoint of the last epoch, if it is not there.

    Raises:
        SettingErrors: nothing is left to do.
    """
    settings = state.facts["settings"]
    more, run = length_setting(state), paths.display_path(state.run)
    if state.step > steps:
        words = f"has {plural(steps, 'step')}, and {state.step:,} are done in {run}; it cannot be less than that"
        raise SettingErrors(SettingError(more, words))
    if ended_early(state) and config.val_data != "none" and config.val_patience == settings.get("VAL_PATIENCE"):
        words = (
            f"has ended {run} at step {state.step:,}: no better validation for so long. 0, or more, trains it further"
        )
        raise SettingErrors(SettingError("VAL_PATIENCE", words))
    if state.step == steps and missing is None:
        epochs = "" if settings.get("STREAMING") else f", {plural(config.epoch_count, 'epoch')}"
        words = (
            f"{run} is finished ({plural(state.step, 'step')}{epochs}). A larger {more} trains it further; another name begins "
            "a new run"
        )
        raise SettingErrors(SettingError("RUN_NAME", words))


def describe(state: TrainState) -> str:
    """Return the run and its step in words."""
    return f"{paths.display_path(state.run)} at step {state.step:,} of {state.facts['steps']:,}"


def changed_settings(state: TrainState, config: TrainConfig, free: set[str]) -> Changes:
    """Return the settings that are not what they were when the state was saved, with what they were.

    Args:
        state: a training state. Settings that its version of the kit did not have do not count.
        config: settings of the script.
        free: settings that may change.
    """
    before, now = state.facts["settings"], script_values(config)
    return [
        (name, _format(before[name]))
        for name in now
        if name in before and name not in free and before[name] != now[name]
    ]


def _format(value: object) -> str:
    return format_setting(value) or '""'


def check_files(state: TrainState, options: Mapping, fingerprint: Mapping, data: Mapping, init_file: Path) -> None:
    """Check that the files of a run have the content that they had when the state was saved.

    Args:
        state: to resume from.
        options: of the method.
        fingerprint: of the base.
        data: content of the data.
        init_file: initial tensors of the adapters.

    Raises:
        SettingErrors: the content of a file differs.
    """
    facts, where = state.facts, describe(state)
    errors = []
    if fingerprint["sha256"] != facts["base"]["sha256"]:
        words = f"is another file than {facts['base']['name']}, which {where} was trained on"
        errors.append(SettingError("MODEL_PATH", words))
    if data_identity(data) != data_identity(facts["data"]):
        words = f"has another content than when {where} began: {_describe_difference(facts['data'], data)}"
        errors.append(SettingError("DATA_PATH", words))
    if options != facts["options"]:
        errors.append(SettingError("PEFT_CONFIG", f"has another content than when {where} began; set it back"))
    if facts["start_sha256"] and not (init_file.is_file() and hashing.sha256(init_file) == facts["start_sha256"]):
        how = "another file than" if init_file.is_file() else "missing; it is"
        words = f"is {how} what {where} began with: put it back from a copy of the run"
        errors.append(SettingError("RUN_NAME", f"{paths.display_path(init_file)} {words}"))
    if errors:
        raise SettingErrors(*errors)


def check_settings(state: TrainState, script: Mapping, resolved: Mapping, plan: Mapping) -> None:
    """Check the settings that `auto` was resolved to, and that data become the same steps.

    Args:
        state: to resume from.
        script: settings of the script, by their names.
        resolved: the same with `auto` resolved.
        plan: see plan_facts.

    Raises:
        SettingErrors: a setting differs that may not.
    """
    before, where = state.facts["became"], describe(state)
    free = FREE | BY_CONTENT | ({"EPOCH_STEPS"} if resolved["STREAMING"] else set())
    same = plan == state.facts["plan"] or _same_steps(resolved, plan, before, state.facts["plan"])
    free |= SPLIT if same else {"EPOCH_STEPS"} if script["EPOCH_STEPS"] == "auto" else set()
    errors = []
    for name in before:
        if name not in free and name in resolved and resolved[name] != before[name]:
            advice = "set it back"
            if name in SPLIT - {"EPOCH_STEPS", "MINI_BSZ"}:
                advice += ", or change MINI_BSZ so that a step has as many rows as it had"
            words = f"was begun with {_format(before[name])}, which would be {_format(resolved[name])} now: {advice}"
            errors.append(SettingError(name, f"{where} {words}"))
    if not errors and not same:
        words = f"makes other steps than when {where} began ({state.facts['plan']} then, {plan} now)"
        errors.append(SettingError("DATA_PATH", words))
    if errors:
        raise SettingErrors(*errors)


def _same_steps(resolved: Mapping, plan: Mapping, resolved_before: Mapping, plan_before: Mapping) -> bool:
    """Whether another split makes the same optimizer steps of the same rows."""
    if resolved["STREAMING"] or resolved["DATALOAD"] == "bucket":
        return False
    sizes = plan_before.get("accumulate"), plan_before.get("world"), resolved_before.get("MICRO_BSZ")
    if not all(isinstance(size, int) for size in sizes):
        return False
    rows, rows_before = (
        facts["accumulate"] * facts["world"] * settings["MICRO_BSZ"]
        for facts, settings in ((plan, resolved), (plan_before, resolved_before))
    )
    return rows == rows_before and all(plan[key] == plan_before.get(key) for key in ("rows", "epoch_steps"))


def data_identity(data: Any) -> Any:
    """Return what identifies data.

    The names and stamps of files are left out, as they change when files are copied, and so are the samples, which earlier
    versions did not have.
    """
    if isinstance(data, Mapping):
        return {key: data_identity(value) for key, value in data.items() if key not in ("mark", "name", "pieces")}
    return [data_identity(value) for value in data] if isinstance(data, list) else data


def _describe_difference(before: Mapping, now: Mapping) -> str:
    old, new = before["files"], now["files"]
    if len(old) != len(new):
        return f"{plural(len(old), 'file')} then, {len(new)} now"
    other = [f["name"] for f, g in zip(old, new, strict=True) if data_identity(f) != data_identity(g)]
    if other:
        return ", ".join(other[:3])
    return "the weights of the mixture" if "weights" in now else "make_tokenize.sh has other settings"


def plan_facts(plan: Plan, is_stream: bool) -> dict[str, int]:
    """Return how data become steps. The length of a stream's plan may change, so it is left out."""
    facts = {"accumulate": plan.accumulate, "world": plan.world}
    if is_stream:
        return facts | {"micro_bsz": plan.micro_bsz}
    return facts | {"rows": plan.rows, "micro_batches": plan.micro_batches, "epoch_steps": plan.optimizer_steps}
