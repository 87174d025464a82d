"""The rank of this process, by its launcher: ./training.sh, torchrun, or Slurm's srun."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from rwkv_peft.common.errors import SettingError, SettingErrors
from rwkv_peft.config.train import TrainConfig

TORCH_PORT = 29500  # torch's default


@dataclass(frozen=True)
class ProcessInfo:
    """The place of this process in the run.

    Attributes:
        rank: among all processes.
        local: the local rank, among the processes of this machine.
        node: number of this machine, from 0.
        nodes: number of machines.
        starter: the launcher: torchrun or srun, or "" if the kit starts the other processes of this machine itself.
        spawned_by_us: whether a process of the kit has started this one.
    """

    rank: int
    local: int
    node: int
    nodes: int
    launcher: str = ""
    spawned_by_us: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    def needs_rendezvous(self) -> bool:
        """Whether there are processes that the kit has not started, whose settings have to be compared."""
        return bool(self.launcher) or (self.nodes > 1 and not self.spawned_by_us)


def _read_number(environment: Mapping[str, str], *names: str) -> int:
    # the first of these variables that is set, 0 if none is
    return next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), 0)


def detect_launcher(config: TrainConfig, environment: Mapping[str, str]) -> ProcessInfo:
    """Return the place of this process, from the environment variables of its launcher.

    Raises:
        SettingErrors: if GPU_COUNT or NNODES of the script differ from what the launcher started.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        there = _read_number(environment, "LOCAL_WORLD_SIZE")
        nodes = _read_number(environment, "WORLD_SIZE") // max(1, there)
        names, launcher = ("RANK", "LOCAL_RANK", "GROUP_RANK"), "torchrun"
    elif (
        _read_number(environment, "SLURM_STEP_NUM_TASKS") > 1
    ):  # set by srun; sbatch's variables are only what may be used
        nodes = max(1, _read_number(environment, "SLURM_STEP_NUM_NODES"))
        there = _read_number(environment, "SLURM_STEP_NUM_TASKS") // nodes
        names, launcher = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "srun"
    else:
        local = _read_number(environment, "LOCAL_RANK")
        rank = config.node_rank * config.gpu_count + local
        return ProcessInfo(rank, local, config.node_rank, config.nnodes, "", "LOCAL_RANK" in environment)
    wrong = [
        SettingError(name, f"is {value}, but {launcher} has started {started}; set it to that")
        for name, value, started in (("GPU_COUNT", config.gpu_count, there), ("NNODES", config.nnodes, nodes))
        if value != started
    ]
    if wrong:
        raise SettingErrors(*wrong)
    rank, local, node = (_read_number(environment, name) for name in names)
    return ProcessInfo(rank, local, node, nodes, launcher)


def set_master_address(config: TrainConfig, place: ProcessInfo, environment: MutableMapping[str, str]) -> None:
    """Set MASTER_ADDR and MASTER_PORT in the environment as the script means them.

    Those that the script leaves empty or at auto are removed. (To torch, an empty list of devices means no device.)
    """
    if place.spawned_by_us:  # the process that started this one has done so
        return
    alone = place.nodes == 1 and not place.launcher  # any free port: two runs must not use the same
    for name, value in (("MASTER_ADDR", config.master_addr), ("MASTER_PORT", config.master_port)):
        if alone or value in ("", "auto"):
            environment.pop(name, None)
    if place.nodes > 1 and not place.launcher:
        environment.setdefault("MASTER_PORT", str(TORCH_PORT))


def environment_plugins(place: ProcessInfo, processes: int) -> list[Any]:
    """Return the plugin by which Lightning gets the same ranks. processes: of the whole run."""
    # here: Lightning takes seconds to import, and the commands that do not train need none of it
    from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

    from .lightning_private import SrunEnvironment

    if place.launcher == "srun":
        return [SrunEnvironment(processes)]
    return [TorchElasticEnvironment() if place.launcher else LightningEnvironment()]
