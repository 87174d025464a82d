"""Checkpoints of a run with their sidecars, and what a training state holds."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from rwkv_peft import __version__
from rwkv_peft.adapters import inject
from rwkv_peft.adapters.specs import OPTIMS
from rwkv_peft.checkpoint import pth, pth_rewrite, run_dir, sidecars, train_state
from rwkv_peft.checkpoint.lazy_tensors import LazyTensors
from rwkv_peft.common import hashing, paths
from rwkv_peft.common.atomic_io import check_disk_space, remove_path, remove_stale_temps, temp_path
from rwkv_peft.common.errors import UserError, describe_nonfatal
from rwkv_peft.common.file_watch import FileChanged
from rwkv_peft.distributed.sharding import gather_to_main
from rwkv_peft.train.context import RunContext
from rwkv_peft.train.loss_plot import draw_loss
from rwkv_peft.train.model_setup import TrainModel
from rwkv_peft.train.module import TrainingModule
from rwkv_peft.train.run_record import describe_checkpoint, script_values
from rwkv_peft.train.setup import RunSetup

from .metrics import TOO_HIGH
from .train_state import TrainStateCallback

MOST_PLOT_TIME = 0.01  # share of the time that goes into loss.png

WriteCheckpoint = Callable[[LazyTensors, int, bool, int, str], Path]


def check_free_space(run: RunSetup) -> None:
    """Check that the disk has room for the checkpoints and training states that are kept at a time.

    Raises:
        UserError: it has not.
    """
    config, trained_values = run.config, inject.count_trained(run.base.geometry, run.base.adapter)
    moments = (4 + OPTIMS[config.optim].moments) * trained_values if config.keep_last else 0
    size = run.base.path.stat().st_size if run.method.saves_model else 4 * trained_values
    steps = config.keep_last + 1 if config.keep_last and config.save_steps else 0
    check_disk_space(run.run_dir, size * (1 + steps) + int(moments) * (config.keep_last + 1))


class CheckpointWriter:
    """Write checkpoints and training states. On rank 0 only.

    Args:
        run: what is trained.
        model: the model.
        running_facts: returns facts of the running training for a state.
    """

    def __init__(self, run: RunSetup, model: TrainModel, running_facts: Callable[[], dict]):
        self.run, self.model, self.running_facts = run, model, running_facts
        self.fingerprint = run.base.fingerprint or hashing.fingerprint(run.base.path)
        run.watch.know(run.base.path, self.fingerprint["sha256"])
        known = run.state.facts["data"] if run.state else None
        self.data_identity = hashing.BackgroundTask(lambda: run.data.train.content(known))  # read while training runs

    @functools.cached_property
    def init_sha256(self) -> str | None:
        """SHA-256 of the file of the adapters' initial tensors, which is written if it is not there; None without any.

        A run is of no use without that file.
        """
        if not self.model.initial_tensors:
            return None
        path = run_dir.init_file(self.run.run_dir, self.run.config.method)
        if not path.exists():
            pth.save(path, self.model.initial_tensors)
        return hashing.sha256(path)

    def write_state(self, parts: Mapping[str, LazyTensors], facts: dict) -> None:
        """Write a training state.

        Args:
            parts: tensors by file and name.
            facts: about them.
        """
        run, lisa = self.run, self.model.lisa
        more = {
            "steps": run.data.steps, "finished": facts["step"] == run.data.steps, "settings": script_values(run.config),
            "became": run.settings.values, "plan": run.data.plan_facts, "options": run.base.options,
            "start_sha256": self.init_sha256, "world": run.plan.world,
            "base": {"name": run.base.path.name, **self.fingerprint}, "data": self.data_identity.result(),
            "quant_kept": list(run.base.adapter.quant_kept), "blocks": lisa.active if lisa else None, "kit": __version__,
        }  # fmt: skip
        facts = {**facts, **more, **self.running_facts()}
        with self._in_own_folder():
            train_state.save_state(run.run_dir, parts, facts, run.config.keep_last, run.watch.must_be_unchanged)

    @contextlib.contextmanager
    def _in_own_folder(self) -> Iterator[None]:
        """Where the run's folder is renamed meanwhile, a save makes it again: remove it, so that it can be put back."""
        try:
            yield
        finally:
            if not self.run.owns_run_dir():
                for made in (train_state.state_folder(self.run.run_dir), self.run.run_dir):
                    with contextlib.suppress(OSError):  # it is not there, or not empty
                        made.rmdir()

    def write(self, trained: LazyTensors, epoch: int, finished: bool, step: int, name: str = "") -> Path:
        """Write a checkpoint and its sidecar.

        Args:
            trained: tensors of the checkpoint.
            epoch: number of the epoch, from 0.
            finished: the epoch is finished.
            step: optimizer steps so far.
            name: replaces the epoch's number in the name of the file.

        Returns:
            The path as it is displayed.

        Raises:
            UserError: a tensor holds NaN or infinity.
        """
        run, source = self.run, self.model.base_file
        path = run.run_dir / f"rwkv-{name or epoch}.pth"
        sidecar_path = sidecars.sidecar_path(path)
        for file in (path, sidecar_path):
            remove_stale_temps(file)

        def read_finite(name: str) -> Tensor:
            tensor = trained[name]
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"{name} has become NaN or infinite, so {paths.display_path(path)} was not written. {TOO_HIGH}"
                )
            return tensor

        def change(name: str) -> Callable[[Any], Tensor] | None:
            return (lambda _: read_finite(name)) if name in trained else None

        sidecar = describe_checkpoint(run, self.fingerprint, epoch, step, finished)
        if not run.config.streaming:
            sidecar["data"] = [[file["name"], file["sha256"]] for file in self.data_identity.result()["files"]]
        if self.model.initial_tensors:
            sidecar["start_sha256"] = self.init_sha256
        # both are renamed when both are complete: until then the disk may be full, and the earlier pair stays
        fresh, fresh_sidecar = temp_path(path), temp_path(sidecar_path)
        with self._in_own_folder():
            try:
                if source:
                    pth_rewrite.rewrite(source, fresh, change)
                else:
                    pth.save(fresh, {name: read_finite(name) for name in trained})
                sidecar["checkpoint_sha256"] = hashing.sha256(fresh, on_disk=True)
                sidecars.write_sidecar(fresh_sidecar, sidecar)
                run.watch.must_be_unchanged()
                sidecars.replace_pair(fresh, fresh_sidecar, path)
            finally:
                remove_path(fresh)
                remove_path(fresh_sidecar)
        return Path(paths.display_path(path))

    def restore_missing(self, log: Callable[[str], None]) -> Path | None:
        """Write the checkpoint of the last finished epoch, if a resumed run has lost it. Returns its path, None for none."""
        state, missing = self.run.state, self.run.resume.missing
        if not (state and missing):
            return None
        trained = LazyTensors(self.run.compute.sharding.weights(self.model.trained()))
        path = self.write(trained, int(missing.stem.removeprefix("rwkv-")), True, state.step)
        log(f"saved {path}, which was missing")
        return path


class CheckpointSaver:
    """Save checkpoints. All ranks must call its methods: they gather sharded weights.

    Args:
        run: what is trained.
        model: the model.
        context: of the run.
        write: CheckpointWriter.write; is called on rank 0 only.
        newest: path of the last checkpoint of an epoch.
    """

    def __init__(
        self, run: RunSetup, model: TrainModel, context: RunContext, write: WriteCheckpoint, newest: Path | None
    ):
        self.model, self.context, self.write, self.newest = model, context, write, newest
        self.config, self.epoch_steps = run.config, run.plan.optimizer_steps
        self.next_plot = 0.0  # time from which loss.png may be drawn again

    def is_due(self, epoch: int) -> bool:
        """Return whether the end of an epoch has a checkpoint."""
        return (epoch + 1) % self.config.epoch_save == 0 or epoch + 1 == self.config.epoch_count

    def save(
        self, trainer: pl.Trainer, module: TrainingModule, epoch: int, finished: bool, name: str = ""
    ) -> Path | None:
        """Write a checkpoint. Arguments: see CheckpointWriter.write.

        Returns:
            The path on rank 0, None on other ranks.
        """
        sharding, device, path = module.spread, trainer.strategy.root_device, None
        self.context.stop.check_files(trainer)
        sharding.settle(module.model)
        trained = {"weights": sharding.weights(self.model.trained())}
        with gather_to_main(trained, sharding.are_weights_sharded, trainer.is_global_zero, device) as gathered:
            if gathered:
                with contextlib.suppress(FileChanged):  # at the last moment: check_files raises it on all ranks
                    path = self.write(gathered["weights"], epoch, finished, trainer.global_step, name)
        self.context.stop.check_files(trainer)
        return path

    def save_epoch(self, trainer: pl.Trainer, module: TrainingModule, finished: bool) -> None:
        """Write rwkv-N.pth."""
        epoch = trainer.current_epoch
        if path := self.save(trainer, module, epoch, finished):
            self.newest = path
            self.plot(epoch + 1 == self.config.epoch_count or trainer.should_stop)
            words = "" if finished else ", not finished"
            self.context.log(f"saved {path} (epoch {epoch + 1} of {self.config.epoch_count}{words})")

    def save_best(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Write rwkv-best.pth."""
        self.save(trainer, module, trainer.current_epoch, True, "best")

    def save_step(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Write rwkv-step-N.pth, unless an epoch ends here that has a checkpoint."""
        step = trainer.global_step
        epoch, finished = (step - 1) // self.epoch_steps, step % self.epoch_steps == 0
        if finished and self.is_due(epoch):
            return
        try:
            if path := self.save(trainer, module, epoch, finished, f"step-{step}"):
                self.context.log(f"saved {path}")
                run_dir.remove_old_steps(self.context.run_dir, step, self.config.keep_last)
                self.plot(False)
        except FileChanged:
            raise
        except (OSError, UserError) as error:
            self.context.log(
                f"warning   rwkv-step-{step}.pth could not be saved; training goes on. {describe_nonfatal(error)}"
            )

    def remove_unfinished(self, epoch: int) -> None:
        """Remove the checkpoint of a stop in the middle of an epoch that is finished now."""
        if path := run_dir.remove_unfinished(self.context.run_dir, epoch):
            self.context.log(f"removed {paths.display_path(path)}: of the middle of an epoch that is finished now")

    def plot(self, is_end: bool) -> None:
        """Draw loss.png, if that does not take more than MOST_PLOT_TIME of the time, or at the end of the run."""
        began = time.monotonic()
        if (not is_end and began < self.next_plot) or not self.context.owns_run_dir():
            return
        try:
            draw_loss(self.context.run_dir)
        except Exception as error:  # a plot is no reason to end a training
            self.context.log(f"loss.png could not be drawn ({type(error).__name__}: {error}); training goes on.")
        now = time.monotonic()
        self.next_plot = now + (now - began) / MOST_PLOT_TIME


class CheckpointCallback(pl.Callback):
    """Save a checkpoint and a training state at the end of epochs that are due, and when the run is stopped.

    Args:
        saver: of checkpoints.
        state: of training states.
    """

    def __init__(self, saver: CheckpointSaver, state: TrainStateCallback):
        self.saver, self.state = saver, state

    def on_train_epoch_end(self, trainer, module) -> None:
        """Save a checkpoint and a training state, if they are due."""
        saver, context = self.saver, self.saver.context
        epoch, step = trainer.current_epoch, trainer.global_step
        # (a stream may end early; a run that is stopped in the last step of an epoch has finished it)
        finished = not trainer.should_stop or step >= (epoch + 1) * saver.epoch_steps
        due = saver.is_due(epoch) or not finished or trainer.should_stop
        if due and step:
            saver.save_epoch(trainer, module, finished)
        elif not due and trainer.is_global_zero and context.owns_run_dir():
            saver.remove_unfinished(epoch)
        if trainer.world_size > 1:
            trainer.strategy.barrier()
        if due and step:
            self.state.save(trainer)
