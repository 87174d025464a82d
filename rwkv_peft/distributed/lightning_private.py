"""Every use of Lightning's private parts, and of its public objects in ways that its documentation does not promise.

Checked against the version below. tests/distributed/test_lightning_private.py fails where another version changes what is used.
"""

from __future__ import annotations

import abc
import contextlib
import subprocess
from collections.abc import Callable
from unittest.mock import patch

import pytorch_lightning as pl
from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning.strategies import DeepSpeedStrategy
from pytorch_lightning.strategies.launchers import subprocess_script
from torch import nn
from torch.optim import Optimizer

CHECKED_VERSION = "2.6.6"  # of pytorch_lightning


def child_process_observer(
    observe: Callable[[list[subprocess.Popen]], None],
) -> contextlib.AbstractContextManager[object]:
    """Replace Lightning's observer of the processes that its launcher starts.

    Lightning's ends this process by SIGKILL some seconds after any of those processes has ended, even in the middle of a write.

    Needs: the module `subprocess_script` calls its global `_launch_process_observer` with the list of started processes.

    Args:
        observe: is called with the started processes, local rank 1 first.
    """
    return patch.object(subprocess_script, "_launch_process_observer", observe)


def set_progress(trainer: pl.Trainer, epoch: int, step: int) -> None:
    """Set the epoch (from 0) and the optimizer steps done, as `current_epoch` and `global_step` then report them.

    Lightning restores them only from its own checkpoint files.

    Needs: `fit_loop.epoch_progress` and the automatic optimization's `optim_progress`, whose counters can be assigned and
    are what the loop compares with `max_epochs`. To be called in `on_train_start`.
    """
    loop = trainer.fit_loop
    for progress in (loop.epoch_progress.total, loop.epoch_progress.current):
        for counter in ("ready", "started", "processed", "completed"):
            setattr(progress, counter, epoch)
    done = loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    done.ready = done.completed = step


def set_epoch_batches(trainer: pl.Trainer, batches: int) -> None:
    """Set how many micro-batches the epoch that begins has.

    Lightning counts the batches of an epoch from 0, wherever the loader begins.

    Needs: `fit_loop.max_batches` can be assigned in `on_train_epoch_start`, and the epoch ends at it.
    """
    trainer.fit_loop.max_batches = batches


class SrunEnvironment(SLURMEnvironment):
    """Lightning's environment for srun, without its checks of how tasks were ordered: the launcher is known already.

    Needs: the constructor does nothing but set these two attributes and check; `validate_settings` does nothing but check.
    """

    def __init__(self, processes: int):
        self.auto_requeue, self.requeue_signal = False, None
        self.processes = processes

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Check nothing."""

    def world_size(self) -> int:
        """Return the number of processes of the whole run."""
        return self.processes


class DeepSpeedOnAnyDevice(DeepSpeedStrategy, abc.ABC):
    """Lightning's DeepSpeed strategy, without its restriction to GPUs, with an engine of its own making.

    Needs: `setup_environment` of DeepSpeedStrategy checks the device and calls that of its base class, which calls
    `setup_distributed`; `_init_deepspeed_distributed` starts the process group; `_setup_model_and_optimizer` is the only
    place that makes the engine.
    """

    def setup_environment(self) -> None:
        """Set up without the check that refuses whatever is no GPU."""
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """Start the process group without the check of GPU indices."""
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
        return self.make_engine(model, optimizer, lr_scheduler)

    @abc.abstractmethod
    def make_engine(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: object
    ) -> tuple[nn.Module, Optimizer]:
        """Return DeepSpeed's engine and its optimizer."""
