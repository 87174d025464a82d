"""Which of all processes of the training this one is, as whoever started it says: ./training.sh, torchrun, or Slurm's srun."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from rwkv_peft.common.errors import SettingError, SettingErrors
from rwkv_peft.config.train import TrainConfig


@dataclass(frozen=True)
class ProcessInfo:
    """rank: among all processes; local: among those of this machine, which is node `node` of `nodes`. starter: "" if we start
    the other processes of this machine ourselves, else who has. of_ours: one of ours has started this one.
    """

    rank: int
    local: int
    node: int
    nodes: int
    starter: str = ""
    of_ours: bool = False

    @property
    def first(self) -> bool:
        """The process that speaks, and writes."""
        return self.rank == 0

    def meets(self) -> bool:
        """Whether there are others that nobody of ours has started: those have to be asked what they have."""
        return bool(self.starter) or (self.nodes > 1 and not self.of_ours)


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
    elif number(environment, "SLURM_STEP_NUM_TASKS") > 1:  # (of srun's; what sbatch tells is only what may be used)
        nodes = max(1, number(environment, "SLURM_STEP_NUM_NODES"))
        there = number(environment, "SLURM_STEP_NUM_TASKS") // nodes
        ranks = (number(environment, name) for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"))
        place = ProcessInfo(*ranks, nodes, "srun")
    else:
        local = number(environment, "LOCAL_RANK")
        rank = config.node_rank * config.gpu_count + local
        return ProcessInfo(rank, local, config.node_rank, config.nnodes, "", "LOCAL_RANK" in environment)
    wrong = [
        SettingError(name, f"is {given}, but {place.starter} has started {found}; set it to that")
        for name, given, found in (
            ("GPU_COUNT", config.gpu_count, there),
            ("NNODES", config.nnodes, nodes),
        )
        if given != found
    ]
    if wrong:
        raise SettingErrors(*wrong)
    return place


PORT = 29500  # torch's own


def set_master_address(config: TrainConfig, place: ProcessInfo, environment: MutableMapping[str, str]) -> None:
    """Let MASTER_ADDR and MASTER_PORT say to torch what the script means by them. (Empty names of devices mean none to it.)"""
    if place.of_ours:  # ours has done so
        return
    alone = place.nodes == 1 and not place.starter  # any free port: two trainings must not want the same
    for name, said in (("MASTER_ADDR", config.master_addr), ("MASTER_PORT", config.master_port)):
        if alone or said in ("", "auto"):
            environment.pop(name, None)
    if place.nodes > 1 and not place.starter:
        environment.setdefault("MASTER_PORT", str(PORT))


def plugins(place: ProcessInfo, processes: int) -> list[Any]:
    """What tells Lightning the same."""
    from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

    class Srun(SLURMEnvironment):
        """Lightning's, but for what it asks of how tasks were ordered: that is told already."""

        def __init__(self):
            self.auto_requeue, self.requeue_signal = False, None

        def validate_settings(self, num_devices: int, num_nodes: int) -> None:
            pass

        def world_size(self) -> int:
            return processes

    if place.starter == "srun":
        return [Srun()]
    return [TorchElasticEnvironment() if place.starter else LightningEnvironment()]
