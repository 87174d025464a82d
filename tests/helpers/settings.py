"""What training.sh's checks say of changed settings."""

from __future__ import annotations

from helpers.kit import ROOT
from helpers.scripts import shell_values
from rwkv_peft.common.errors import SettingErrors
from rwkv_peft.config.shell import Script
from rwkv_peft.config.train import RETIRED, TrainConfig

SHIPPED = shell_values(ROOT / "training.sh")


def problems(**changes) -> dict[str, str]:
    try:
        Script(ROOT / "training.sh", SHIPPED | changes).read(TrainConfig, RETIRED)
    except SettingErrors as result:
        return {p.name: p.message for p in result.problems}
    return {}
