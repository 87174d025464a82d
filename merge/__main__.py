"""./merge.sh: fold what a run learnt into its base -> merge/<base>-<METHOD>-<epoch>.pth

usage: [RUN=name] ./merge.sh [EPOCH]

  EPOCH        which epoch of the run: the N of output/<run>/rwkv-N.pth (the newest, if left out)
  RUN=name     which run: a folder in output/ (the newest, if left out)
  --help       this text

Method, rank, alpha and base are read from the checkpoint's sidecar rwkv-N.json; that the base is the very file the run
was trained on is checked by its content. Tensors go through one by one, so memory does not grow with the model. Names,
shapes and number formats of the result are the base's. The result is read back and checked before it is called done.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from rwkv_peft import project
from rwkv_peft.errors import UserError, leave
from rwkv_peft.shell_vars import enter, var


@dataclass(frozen=True)
class MergeConfig:
    """The variables of merge.sh, in its order."""

    run: str = var("RUN")
    model_path: str = var("MODEL_PATH")


def main(arguments: list[str]) -> None:
    enter(arguments, __doc__, MergeConfig, command)


def command(config: MergeConfig, typed: list[str]) -> None:
    if len(typed) > 1:
        leave(__doc__, 2)
    epoch = None
    if typed:
        if not (typed[0].isascii() and typed[0].isdigit()):
            raise UserError(f"{typed[0]}: is no epoch; give a number like 0. See ./merge.sh --help")
        epoch = int(typed[0])
    merge(project.epoch_file(project.run_folder(config.run), epoch), config.model_path)


def merge(adapter: Path, model_path: str) -> None:
    from rwkv_peft import checkpoint
    from rwkv_peft.adapters.registry import ADAPTERS
    from rwkv_peft.model import arch

    from .fold import fold, replace
    from .verify import verify

    wanted = ("method", "rank", "alpha", "base", "base_sha256", "geometry", "epoch", "step", "versions")
    sidecar = checkpoint.read_sidecar(adapter, wanted)
    method, epoch = sidecar["method"], sidecar["epoch"]
    if method not in ADAPTERS and method != "full":
        raise UserError(f"{project.shown(adapter)}: holds a {method} run, which this version cannot merge.")
    base = project.base_of(sidecar, model_path)
    described = checkpoint.describe(base)
    arch.detect({n: s.shape for n, s in described.items()}, project.shown(base))
    say = f"run       {project.shown(adapter)}: {method}"
    say += "" if method == "full" else f" r={sidecar['rank']} alpha={sidecar['alpha']:g}"
    print(
        f"{say}, epoch {epoch}, step {sidecar['step']}{'' if sidecar.get('epoch_finished', True) else ' (stopped early)'}"
    )
    print(f"base      {project.shown(base)}", end="", flush=True)
    if checkpoint.sha256(base) != sidecar["base_sha256"]:
        print()
        raise UserError(
            f"{project.shown(base)}: is not the file that the run was trained on (its content differs from "
            f"{sidecar['base']} then). Put the right one into model/, or name it with MODEL_PATH in merge.sh."
        )
    print(": the file that the run was trained on (same content)")
    target = project.ROOT / "merge" / f"{base.stem}-{method.upper()}-{epoch}.pth"
    if target.exists():
        print(f"replaces  {project.shown(target)}, an earlier result of that name")
    tensors = checkpoint.load(adapter)
    change = replace(tensors) if method == "full" else fold(tensors, sidecar, described, project.shown(adapter))
    checkpoint.rewrite(base, target, change)
    print(f"wrote     {project.shown(target)}: {target.stat().st_size / 1e6:,.1f} MB")
    for line in verify(base, target, tensors, change, sidecar):
        print(f"checked   {line}")
    print(f"next      ./chat.sh --model {target.name}      or load it in RWKV-Runner, Ai00 or the rwkv package")


if __name__ == "__main__":
    main(sys.argv[1:])
