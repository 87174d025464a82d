"""Which of all processes of the training this one is, as whoever started it says: ./training.sh, torchrun, or Slurm's srun."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from rwkv_peft.common.errors import SettingError, SettingErrors
from rwkv_peft.config.train import TrainConfig


@dataclass(frozen=True)
class ProcessInfo:
    """Which process of a training this is.

    Attributes:
        rank: Among all processes.
        local: Among the processes of this machine.
        node: The machine's number.
        nodes: How many machines there are.
        launcher: What has started the processes of this machine; "" if ./training.sh does.
        launched_by_us: A process of this training has started this one.
    """

    rank: int
    local: int
    node: int
    nodes: int
    launcher: str = ""
    launched_by_us: bool = False

    @property
    def is_main(self) -> bool:
        """The process that speaks, and writes."""
        return self.rank == 0

    def needs_rendezvous(self) -> bool:
        """Return whether there are processes that this training has not started: their settings have to be compared."""
        return bool(self.launcher) or (self.nodes > 1 and not self.launched_by_us)


def number(environment: Mapping[str, str], *names: str) -> int:
    """The first of these variables that is there, 0 if none is."""
    return next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), 0)


def detect_launcher(config: TrainConfig, environment: Mapping[str, str]) -> ProcessInfo:
    """Problems where the script says something else than who has started this process."""
    if "TORCHELASTIC_RUN_ID" in environment:
        there = number(environment, "LOCAL_WORLD_SIZE")
        nodes = number(environment, "WORLD_SIZE") // max(1, there)
        place = ProcessInfo(
            number(environment, "RANK"), number(environment, "LOCAL_RANK"), number(environment, "GROUP_RANK"), nodes, "torchrun"
        )  # fmt: skip
    elif number(environment, "SLURM_STEP_NUM_TASKS") > 1:  # (srun's variables; sbatch's name only what may be used)
        nodes = max(1, number(environment, "SLURM_STEP_NUM_NODES"))
        there = number(environment, "SLURM_STEP_NUM_TASKS") // nodes
        rank, local, node = (number(environment, name) for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"))
        place = ProcessInfo(rank, local, node, nodes, "srun")
    else:
        local = number(environment, "LOCAL_RANK")
        rank = config.node_rank * config.gpu_count + local
        return ProcessInfo(rank, local, config.node_rank, config.nnodes, "", "LOCAL_RANK" in environment)
    wrong = [
        SettingError(name, f"is {given}, but {place.launcher} has started {started}; set it to that")
        for name, given, started in (
            ("GPU_COUNT", config.gpu_count, there),
            ("NNODES", config.nnodes, nodes),
        )
        if given != started
    ]
    if wrong:
        raise SettingErrors(*wrong)
    return place


PORT = 29500  # torch's own


def set_master_address(config: TrainConfig, place: ProcessInfo, environment: MutableMapping[str, str]) -> None:
    """Set MASTER_ADDR and MASTER_PORT for torch to what the script means by them. It does not take empty names."""
    if place.launched_by_us:  # ours has done so
        return
    alone = place.nodes == 1 and not place.launcher  # any free port: two trainings must not want the same
    for name, said in (("MASTER_ADDR", config.master_addr), ("MASTER_PORT", config.master_port)):
        if alone or said in ("", "auto"):
            environment.pop(name, None)
    if place.nodes > 1 and not place.launcher:
        environment.setdefault("MASTER_PORT", str(PORT))


def plugins(place: ProcessInfo, processes: int) -> list[Any]:
    """Return what gives Lightning the same facts."""
    from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

    class Srun(SLURMEnvironment):
        """Lightning's environment of Slurm, without its check of how tasks were ordered: detect_launcher has done that."""

        def __init__(self):
            self.auto_requeue, self.requeue_signal = False, None

        def validate_settings(self, num_devices: int, num_nodes: int) -> None:
            pass

        def world_size(self) -> int:
            return processes

    if place.launcher == "srun":
        return [Srun()]
    return [TorchElasticEnvironment() if place.launcher else LightningEnvironment()]
