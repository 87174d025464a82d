"""The files that come out: a merged model, and exports of a model, a state or an adapter. Each has its name only when it is
whole and was read back; what was there before is kept."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rwkv_peft import __version__, bases, checkpoint, hashing, project, sidecars
from rwkv_peft.atomic import clear_leftovers, sync_folder, temporary, write_json
from rwkv_peft.errors import UserError
from rwkv_peft.methods import METHODS
from rwkv_peft.model.arch import Geometry

from . import fold, foreign, parts
from .exports import EXPORTS
from .parts import Found
from .rows import by_rows
from .verify import Answers, verify

# the kinds of --export that are several files
TOGETHER = {"state": ("state", "state-ai00")}


def merge(
    found: Sequence[Found],
    weights: Sequence[float] | None,
    base: Path,
    doubts: Sequence[Callable[[], None]] = (),
) -> tuple[Path, Geometry]:
    """Fold checkpoints into the base, in turn or (with weights) averaged. Returns the model's file and its geometry.

    doubts: what bases.base_of has left open about the base. It is settled before the result gets its name.
    """
    print(f"base      {project.shown(base)}")
    try:
        return folded(found, weights, base, doubts)
    except UserError:
        for settle in doubts:  # a wrong base explains whatever else is wrong
            settle()
        raise


def folded(
    found: Sequence[Found], weights: Sequence[float] | None, base: Path, doubts: Sequence[Callable[[], None]]
) -> tuple[Path, Geometry]:
    described, geometry = bases.inspect(base)
    opened = checkpoint.side_by_side(lambda one: fold.opened(one.part, described, geometry), found)
    for one, part in zip(found, opened, strict=True):
        for doubt in [] if one.sidecar else foreign.doubts(part, base, geometry):
            print(f"careful   {project.shown(one.path)}: {doubt}")
    added = fold.added(opened, weights)
    change = fold.average(opened, weights, geometry) if weights else fold.in_turn(opened, geometry)
    change = Answers(by_rows(change, opened, weights, geometry), described, opened, weights, geometry)
    label = "AVERAGE" if weights else "+".join(one.label for one in found)
    target = project.ROOT / "merge" / f"{base.stem}-{label}.pth"
    sources = parts.sources(found)
    clear_leftovers(target)
    fresh = temporary(target)  # it gets its name when it is known to be right
    try:
        checkpoint.rewrite(base, fresh, change, added)
        checks = list(verify(base, fresh, change, added))
        for settle in doubts:
            settle()
        make_room(target, fresh, sources)
        write_json(sidecars.path_of(target), describe(found, weights, sources, base, geometry))
        os.replace(fresh, target)
        sync_folder(target.parent)
    finally:
        fresh.unlink(missing_ok=True)
    if any(one.sidecar for one in found):
        print("checked   the base is the file that it was trained on (same content)")
    for line in checks:
        print(f"checked   {line}")
    print(f"wrote     {project.shown(target)}: {target.stat().st_size / 1e6:,.1f} MB")
    talk = f"./chat.sh --model {shlex.quote(target.name)}"
    if added and geometry.version == "x070":
        print(
            f"next      {talk}      begins from the state. The rwkv package and RWKV-Runner ignore a state inside a .pth of"
        )
        print("          RWKV-7: load it there as a file of its own, which ./merge.sh --export state writes")
    else:
        print(f"next      {talk}      or load it in RWKV-Runner or with the rwkv package")
    return target, geometry


def describe(found: Sequence[Found], weights, sources: list[dict], base: Path, geometry: Geometry) -> dict:
    """The sidecar of a merged model: where it came from. A single run's own sidecar goes into it whole."""
    same = [one.sidecar for one in found if one.sidecar]
    # (a run's own checksum is that of its checkpoint, not of this file)
    own = {k: v for k, v in same[0].items() if k != "checkpoint_sha256"} if len(same) == 1 == len(found) else {
        "method": "+".join(one.part.setup.method for one in found), "base": base.name, "base_path": str(base.resolve()),
        "geometry": geometry.as_dict(),
        **{k: same[0][k] for k in ("prompt_type", "eot") if same and len({s.get(k) for s in same}) == 1 and k in same[0]},
    }  # fmt: skip
    how = {"weights": list(weights)} if weights else {}
    if found[0].part.quantised:
        how["merge_base"] = "quantised"
    if len(found) == 1:
        how |= found[0].part.setup.options
    return {"merged": sources, **own, **how, "merged_by": __version__}


def make_room(target: Path, fresh: Path | None, sources: Sequence[dict] = ()) -> None:
    """Keep a result of that name unless it is the same: it gets its run's name behind its own, if its sidecar tells one.

    fresh: the new result, to compare with; None where it is not written yet. sources: what that is made of.
    """
    if not target.exists():
        return
    note, made = target.with_suffix(".json"), None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        made = json.loads(note.read_text(encoding="utf-8")).get("merged")
    made = made if isinstance(made, list) and all(isinstance(part, dict) for part in made) else []
    same = [part.get("sha256") for part in made] == [part["sha256"] for part in sources]
    if fresh and same and hashing.sha256(target) == hashing.sha256(fresh):
        print(f"replaces  {project.shown(target)}, which is the same")
        return
    other = Path(str((made[0] if made else {}).get("run") or "earlier")).name
    ending = "".join(target.suffixes[-1:]) if target.is_file() else ""
    stem, number = target.name.removesuffix(ending), 2
    kept = target.with_name(f"{stem}.{other}{ending}")
    while kept.exists():
        number, kept = number + 1, target.with_name(f"{stem}.{other}-{number}{ending}")
    target.rename(kept)
    if ending == ".pth" and note.is_file():
        note.rename(kept.with_suffix(".json"))
    print(f"kept      the earlier result of this name, as {project.shown(kept)}")


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A name to write an export to, which becomes target when it is whole. What was there stays, under another name, unless
    it is the same."""
    clear_leftovers(target)
    fresh = temporary(target)
    try:
        yield fresh
        if target.exists() and contents(target) == contents(fresh):
            print(f"replaces  {project.shown(target)}, which is the same")
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        make_room(target, None)
        os.replace(fresh, target)
        sync_folder(target.parent)
    finally:
        if fresh.is_dir():
            shutil.rmtree(fresh)
        fresh.unlink(missing_ok=True)


def contents(path: Path) -> dict[str, str]:
    """Name -> SHA-256 of a file, or of all in a folder."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name if path.is_dir() else "": hashing.sha256(file) for file in files}


def export(kind: str, source: Path, stem: str, geometry: Geometry) -> None:
    """Write a model or a state as other programs want it, into merge/."""
    for name in TOGETHER.get(kind, (kind,)):
        one = EXPORTS[name]
        target = project.ROOT / "merge" / f"{stem}{one.ending}"
        with replacing(target) as fresh:
            said = list(one.write(source, fresh, geometry))
        print(f"wrote     {project.shown(target)}: {target.stat().st_size / 1e6:,.1f} MB")
        for line in said:
            print(f"          {line}")


def export_state(kind: str, found: Sequence[Found], base: Path) -> None:
    """A learnt state as a file of its own."""
    one = alone(kind, found)
    if one.part.setup.method != "state":
        raise UserError(
            f"{project.shown(one.path)}: holds a run of {METHODS[one.part.setup.method].words}, and no state."
        )
    described, geometry = bases.inspect(base)
    fold.opened(one.part, described, geometry)
    export(kind, one.path, f"{base.stem}-{one.label}-alone", geometry)


def export_adapter(found: Sequence[Found], base: Path) -> None:
    """A run as an adapter folder of the peft package."""
    from rwkv_peft.adapters.peft_export import peft_weights

    from .exports import adapter_folder

    one = alone("peft", found)
    described, geometry = bases.inspect(base)
    opened = fold.opened(one.part, described, geometry)
    tensors = {**opened.tensors, **opened.start}
    sidecar = {**one.sidecar, **one.part.setup.options, "method": one.part.setup.method}
    config, weights = peft_weights(tensors, sidecar, opened.leaves)
    target = project.ROOT / "merge" / f"{base.stem}-{one.label}-peft"
    with replacing(target) as fresh:
        adapter_folder.write(fresh, config, weights)
    size = sum(file.stat().st_size for file in target.iterdir())
    print(
        f"wrote     {project.shown(target)}/: {size / 1e6:,.1f} MB, adapter_config.json and adapter_model.safetensors"
    )
    print(
        "          peft.PeftModel.from_pretrained(model, folder) takes it; the model's layers must be called blocks.0.att.key"
    )


def alone(kind: str, found: Sequence[Found]) -> Found:
    if len(found) != 1:
        raise UserError(f"--export {kind} takes one checkpoint, not {len(found)}.")
    return found[0]
