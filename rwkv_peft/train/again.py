"""./training.sh again: whether it goes on with a run that was stopped, and what may have changed since.

With RUN_NAME the run of that name goes on. Without one the newest run does, if it is not finished and the script says what it
said then; otherwise a new one begins.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .. import project, runs
from ..config import TrainConfig
from ..errors import Problem, Problems, UserError
from ..training import snapshot
from ..training.snapshot import Snapshot
from ..words import count
from .record import script_values

# settings that may differ: they change when it ends, what is written, or how fast it is, and no step that is done
FREE = {
    "RUN_NAME", "EPOCH_COUNT", "MAX_STEPS", "EPOCH_SAVE", "SAVE_STEPS", "KEEP_LAST", "WANDB", "NUM_WORKERS", "OP", "GRAD_CP",
    "STRATEGY",
}  # fmt: skip
# settings that name files: for a run that is named, what counts is what is in them
BY_CONTENT = {"MODEL_PATH", "DATA_PATH"}


def find(config: TrainConfig, anew: bool, say: Callable[[str], None]) -> Snapshot | None:
    """The state that this run goes on from; None if it is a new one. anew: the user wants a new one. Problems if RUN_NAME
    names one that cannot go on."""
    if anew:
        return None
    if config.run_name:
        folder = project.OUTPUT / config.run_name
        if not runs.is_taken(folder) and not snapshot.names(folder):
            return None
        found = named(folder, say)
        different = changes(found, config, FREE | BY_CONTENT)
        if different:
            where = f"{project.shown(folder)} goes on as it began"
            raise Problems(
                *(
                    Problem(name, f"was {was}; {where}. Set it back, or choose another RUN_NAME")
                    for name, was in different
                )
            )
        return found
    folder = project.OUTPUT / "latest"
    try:
        found = snapshot.newest(folder.resolve(), lambda _: None) if folder.is_dir() else None
    except UserError:
        return None
    if found is None or is_finished(found, config) or runs.is_running(found.run):
        return None
    different = changes(found, config, FREE)
    if different:
        names = ", ".join(name for name, _ in different[:4]) + (", ..." if len(different) > 4 else "")
        say(
            f"new run   {place(found)} was stopped, and had other settings ({names}). To go on with it, set them back and "
            f"RUN_NAME={found.run.name}"
        )
        return None
    return found


def named(folder: Path, say) -> Snapshot:
    there = project.shown(folder)
    try:
        found = snapshot.newest(folder, say)
    except UserError as error:
        raise Problems(Problem("RUN_NAME", f"{error} Choose another name")) from None
    if found is None:
        raise Problems(
            Problem(
                "RUN_NAME",
                f"{there} holds an earlier run, which has saved no state to go on from and is never overwritten; choose another "
                "name",
            )
        )
    return found


def must_not_be_finished(found: Snapshot, steps: int, epochs: int) -> None:
    """Problems if there is nothing left to do. steps, epochs: of the whole run as the script has it now."""
    if found.step >= steps:
        more = "MAX_STEPS" if found.facts["settings"].get("STREAMING") else "EPOCH_COUNT"
        done = (
            f"{count(found.step, 'step')}"
            if more == "MAX_STEPS"
            else f"{count(found.step, 'step')}, {count(epochs, 'epoch')}"
        )
        raise Problems(
            Problem(
                "RUN_NAME",
                f"{project.shown(found.run)} is finished ({done}). A larger {more} trains it further; another "
                "name begins a new run",
            )
        )


def is_finished(found: Snapshot, config: TrainConfig) -> bool:
    """Whether a run has nothing left to do under these settings."""
    told = found.facts["settings"]
    same = told["EPOCH_COUNT"] == config.epoch_count and told["MAX_STEPS"] == config.max_steps
    return found.facts["finished"] and same


def place(found: Snapshot) -> str:
    return f"{project.shown(found.run)} at step {found.step:,} of {found.facts['steps']:,}"


def changes(found: Snapshot, config: TrainConfig, free: set[str]) -> list[tuple[str, str]]:
    """Settings that are not what they were, with what they were; but for the free ones."""
    told, given = found.facts["settings"], script_values(config)
    return [(name, repr(told.get(name))) for name in given if name not in free and told.get(name) != given[name]]


def must_be_the_same(found: Snapshot, settings: dict, plan: dict, content: dict, data: dict) -> None:
    """Problems where what only the machine and the files can tell is not what it was. settings: resolved. plan: what
    `plan_facts` says. content: of the base. data: what identifies the data."""
    facts, where = found.facts, place(found)
    became, wrong = facts["became"], []
    if content["sha256"] != facts["base"]["sha256"]:
        wrong.append(
            Problem("MODEL_PATH", f"is another file than {facts['base']['name']}, which {where} was trained on")
        )
    if described(data) != described(facts["data"]):
        wrong.append(
            Problem("DATA_PATH", f"has another content than when {where} began: {difference(facts['data'], data)}")
        )
    for name in became:
        if name not in FREE | BY_CONTENT and settings.get(name) != became[name]:
            wrong.append(
                Problem(
                    name,
                    f"was {became[name]} and would be {settings.get(name)} now; {where} goes on as it began: set it",
                )
            )
    if not wrong and plan != facts["plan"]:
        wrong.append(
            Problem("DATA_PATH", f"makes other steps than when {where} began ({facts['plan']} then, {plan} now)")
        )
    if wrong:
        raise Problems(*wrong)


def described(data: dict) -> dict:
    """What identifies data, without the marks of its files, which change when they are copied."""
    if isinstance(data, dict):
        return {key: described(value) for key, value in data.items() if key not in ("mark", "name")}
    return [described(value) for value in data] if isinstance(data, list) else data


def difference(before: dict, now: dict) -> str:
    """Which of the files is another one."""
    old, new = before.get("files", []), now.get("files", [])
    if len(old) != len(new):
        return f"{count(len(old), 'file')} then, {len(new)} now"
    other = [f["name"] for f, g in zip(old, new, strict=True) if described(f) != described(g)]
    return ", ".join(other[:3]) or "make_tokenize.sh has other settings"


def plan_facts(plan) -> dict:
    """How the data become steps."""
    return {
        "rows": plan.rows, "micro_batches": plan.micro_batches, "epoch_steps": plan.optimizer_steps,
        "accumulate": plan.accumulate, "world": plan.world,
    }  # fmt: skip
