"""What a run writes: checkpoints with their sidecars, and the states that it can go on from. On the first process only."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_peft import __version__
from rwkv_peft.adapters.specs import OPTIMS
from rwkv_peft.checkpoint import pth, pth_rewrite, run_dir, sidecars, train_state
from rwkv_peft.checkpoint.lazy_tensors import LazyTensors
from rwkv_peft.common import hashing, paths
from rwkv_peft.common.atomic_io import check_disk_space, remove, remove_stale_temps, temp_path
from rwkv_peft.common.errors import UserError
from rwkv_peft.data.tokenized_files import common_form
from rwkv_peft.train.model_setup import TrainModel
from rwkv_peft.train.run_record import describe_run, script_values
from rwkv_peft.train.setup import RunSetup

from .core import TOO_HIGH


def check_room(run: RunSetup, trained_values: int) -> None:
    """UserError if the disk has no room for a checkpoint and the states beside it."""
    config = run.config
    moments = (4 + OPTIMS[config.optim].moments) * trained_values if config.keep_last else 0
    size = run.base.stat().st_size if run.method.saves_model else 4 * trained_values
    steps = config.keep_last + 1 if config.keep_last and config.save_steps else 0
    check_disk_space(run.folder, size * (1 + steps) + int(moments) * (config.keep_last + 1))


class CheckpointWriter:
    """running: what only the running training can tell of itself, for a state's facts."""

    def __init__(self, run: RunSetup, learner: TrainModel, running: Callable[[], dict]):
        self.run, self.learner, self.running = run, learner, running
        self.content = run.content or hashing.fingerprint(run.base)
        run.in_use.know(run.base, self.content["sha256"])
        known = run.found.facts["data"] if run.found else None
        self.identity = hashing.BackgroundTask(lambda: run.data.content(known))  # read while training goes on

    def kept_start(self) -> Path:
        """The file of what the adapters began with: a run is nothing without it."""
        path = run_dir.init_file(self.run.folder, self.run.config.method)
        if not path.exists():
            pth.save(path, self.learner.begun)
        return path

    @functools.cached_property
    def start_sha256(self) -> str | None:
        return hashing.sha256(self.kept_start()) if self.learner.begun else None

    def keep_state(self, parts: Mapping[str, LazyTensors], facts: dict) -> None:
        """Write a state: tensors by file and name, and facts about them."""
        run, lisa = self.run, self.learner.lisa
        more = {
            "steps": run.steps, "finished": facts["step"] == run.steps, "settings": script_values(run.config),
            "became": run.settings, "plan": run.plan_facts, "options": run.options, "start_sha256": self.start_sha256,
            "world": run.plan.world, "base": {"name": run.base.name, **self.content}, "data": self.identity.result(),
            "quant_kept": list(run.setup.quant_kept), "blocks": lisa.active if lisa else None, "kit": __version__,
        }  # fmt: skip
        facts = {**facts, **more, **self.running()}
        with self.in_own_folder():
            train_state.save_state(run.folder, parts, facts, run.config.keep_last, run.in_use.must_be_unchanged)

    @contextlib.contextmanager
    def in_own_folder(self) -> Iterator[None]:
        """Where the run's folder is renamed in here, a save makes it anew: take that away, so that it can be put back."""
        try:
            yield
        finally:
            if not self.run.in_use.is_there(self.run.folder):
                for made in (train_state.state_folder(self.run.folder), self.run.folder):
                    with contextlib.suppress(OSError):  # it is not there, or not empty
                        made.rmdir()

    def write(self, trained: LazyTensors, epoch: int, finished: bool, step: int, name: str = "") -> Path:
        """Write a checkpoint of what is trained, and its sidecar; returns its path. name: instead of the epoch's number.
        UserError if it would hold NaN.
        """
        run, learner = self.run, self.learner
        path = run.folder / f"rwkv-{name or epoch}.pth"
        remove_stale_temps(path)

        def sound(name: str) -> Tensor:
            tensor = trained[name]
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"{name} has become NaN or infinite, so {paths.display_path(path)} was not written. {TOO_HIGH}"
                )
            return tensor

        about = run.config, run.geometry, run.setup.options, run.base, self.content, run.precision
        sidecar = describe_run(*about, epoch, step, finished)
        form = common_form(run.data.forms)
        sidecar["prompt_type"], sidecar["eot"] = (form.prompt_type, form.eot) if form else (None, None)
        sidecar["template"] = form.template.to_dict() if form and form.template else None
        sidecar["quant_kept"] = list(run.setup.quant_kept)
        sidecar["bos"] = run.data.bos[0] if len(run.data.bos) == 1 else None
        sidecar["blank_lines"] = run.data.blank_lines
        if not run.config.streaming:
            sidecar["data"] = [[file["name"], file["sha256"]] for file in self.identity.result()["files"]]
        if learner.begun:
            sidecar["start_sha256"] = self.start_sha256
        # both get their names when both are whole: until then the disk may be full, and what was there before stays
        note = sidecars.sidecar_path(path)
        remove_stale_temps(note)
        fresh, fresh_note = temp_path(path), temp_path(note)
        with self.in_own_folder():
            try:
                if learner.held:
                    change = lambda name: (lambda _: sound(name)) if name in trained else None  # noqa: E731
                    pth_rewrite.rewrite(learner.held, fresh, change)
                else:
                    pth.save(fresh, {name: sound(name) for name in trained})
                sidecar["checkpoint_sha256"] = hashing.sha256(fresh, on_disk=True)
                sidecars.write_sidecar(fresh_note, sidecar)
                run.in_use.must_be_unchanged()
                sidecars.replace_pair(fresh, fresh_note, path)
            finally:
                remove(fresh)
                remove(fresh_note)
        return Path(paths.display_path(path))
