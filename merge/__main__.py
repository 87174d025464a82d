"""./merge.sh: fold what a run learnt into its base -> merge/<base>-<METHOD>-<epoch>.pth

usage: [RUN=name] ./merge.sh [EPOCH]

  EPOCH        which epoch of the run: the N of output/<run>/rwkv-N.pth, counted from 0 (the last one, if left out)
  RUN=name     which run: a folder in output/ (the newest that has saved something, if left out)
  --help       this text

Method, rank, alpha and base are read from the checkpoint's sidecar rwkv-N.json; that the base is the very file the run
was trained on is checked by its content. Tensors go through one by one, so memory does not grow with the model. Names,
shapes and number formats of the result are the base's. The result is read back and checked before it is called done.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from rwkv_peft import hashing, project, runs
from rwkv_peft.errors import UserError, leave
from rwkv_peft.shell_vars import enter, var, whole_number


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
    epoch = whole_number("EPOCH", typed[0], 0) if typed else None
    merge(runs.epoch_file(runs.run_folder(config.run), epoch), config.model_path)


def merge(adapter: Path, model_path: str) -> None:
    import os

    from rwkv_peft import bases, checkpoint
    from rwkv_peft.adapters.registry import ADAPTERS
    from rwkv_peft.atomic import clear_leftovers, sync_folder, temporary, write_json

    from .fold import fold, replace
    from .verify import verify

    wanted = ("method", "rank", "alpha", "base", "base_sha256", "geometry", "epoch", "step", "versions")
    sidecar, where = checkpoint.read_sidecar(adapter, wanted), project.shown(adapter)
    method, epoch = sidecar["method"], sidecar["epoch"]
    if method not in ADAPTERS and method != "full":
        raise UserError(f"{where}: holds a {method} run, which this version cannot merge.")
    checkpoint.describe(adapter)  # refuses what is no checkpoint before the base is read
    made = method if method == "full" else f"{method} r={sidecar['rank']} alpha={sidecar['alpha']:g}"
    early = "" if sidecar.get("epoch_finished", True) else " (stopped early)"
    print(f"run       {where}: {made}, step {sidecar['step']}{early}")
    base = bases.base_of(sidecar, adapter, model_path)
    described, _ = bases.inspect(base)
    print(f"base      {project.shown(base)}: the file that the run was trained on (same content)")
    tensors = checkpoint.load(adapter)
    change = replace(tensors, described, where) if method == "full" else fold(tensors, sidecar, described, where)
    target = project.ROOT / "merge" / f"{base.stem}-{method.upper()}-{epoch}.pth"
    clear_leftovers(target)
    fresh = temporary(target)  # it gets its name when it is known to be right
    try:
        checkpoint.rewrite(base, fresh, change)
        checks = list(verify(base, fresh, tensors, change, sidecar))
        source = {"run": adapter.parent.name, "checkpoint": where, "checkpoint_sha256": hashing.sha256(adapter)}
        make_room(target, source["checkpoint_sha256"])
        write_json(checkpoint.sidecar_path(target), source | sidecar)
        os.replace(fresh, target)
        sync_folder(target.parent)
    finally:
        fresh.unlink(missing_ok=True)
    for line in checks:
        print(f"checked   {line}")
    print(f"wrote     {project.shown(target)}: {target.stat().st_size / 1e6:,.1f} MB")
    print(
        f"next      ./chat.sh --model {shlex.quote(target.name)}      or load it in RWKV-Runner or with the rwkv package"
    )


def make_room(target: Path, sha256: str) -> None:
    """Keep a result of that name unless it came from this very checkpoint: it gets its run's name behind its own."""
    import json

    if not target.exists():
        return
    note, made = target.with_suffix(".json"), None
    with contextlib.suppress(OSError, ValueError):
        made = json.loads(note.read_text(encoding="utf-8"))
    made = made if isinstance(made, dict) else {}
    if made.get("checkpoint_sha256") == sha256:
        print(f"replaces  {project.shown(target)}, made from the same checkpoint before")
        return
    other = Path(str(made.get("run") or "earlier")).name
    number, kept = 2, target.with_name(f"{target.stem}.{other}.pth")
    while kept.exists():
        number, kept = number + 1, target.with_name(f"{target.stem}.{other}-{number}.pth")
    target.rename(kept)
    if note.is_file():
        note.rename(kept.with_suffix(".json"))
    print(f"kept      the earlier result of this name, as {project.shown(kept)}")


if __name__ == "__main__":
    main(sys.argv[1:])
