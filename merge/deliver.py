"""The files that come out: a merged model, which is read back before it has its name, and exports of a model, a state or an
adapter, which have theirs when they are whole; what was there before is kept."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rwkv_peft import __version__, bases, checkpoint, hashing, project, sidecars
from rwkv_peft.atomic import clear_leftovers, sync_folder, temporary, write_json
from rwkv_peft.errors import UserError
from rwkv_peft.methods import METHODS
from rwkv_peft.model.arch import STATE_NAME, Geometry
from rwkv_peft.pieces import side_by_side
from rwkv_peft.words import listed

from . import fold, foreign, parts
from .answers import Answers
from .exports import EXPORTS
from .parts import Found
from .rows import by_rows
from .verify import verify

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
    how = found[0].part
    described, geometry = bases.inspect(base)
    sound = hashing.Meanwhile(lambda: bases.must_be_sound_model(base, geometry))
    doubts = [*doubts, sound.result]
    compressed = f", compressed to {how.setup.quant} as the run had it (MERGE_BASE=quantised)" if how.quantised else ""
    print(f"base      {project.shown(base)}{compressed}")
    if words := checkpoint.differences(described):
        print(f"note: {words} The result is a .pth with the official names and shapes.")
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
    opened = side_by_side(lambda one: fold.opened(one.part, described, geometry), found)
    for one, part in zip(found, opened, strict=True):
        for doubt in [] if one.sidecar else foreign.doubts(one.path, part, base, geometry):
            print(f"careful   {project.shown(one.path)}: {doubt}")
    added = fold.added(opened, weights)
    change = fold.average(opened, weights, geometry) if weights else fold.in_turn(opened, geometry)
    change = Answers(by_rows(change, opened, weights, geometry), described, opened, weights, geometry)
    label = "AVERAGE" if weights else "+".join(one.label for one in found)
    label += "-quantised" if found[0].part.quantised else ""
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
    for line in next_lines(target, {*described, *added}, geometry):
        print(line)
    return target, geometry


def next_lines(model: Path, names: Iterable[str], geometry: Geometry) -> list[str]:
    """Where to go with a merged model. names: of its tensors."""
    talk = f"next      ./chat.sh --model {shlex.quote(model.name)}"
    states = [name for name in names if STATE_NAME.fullmatch(name)]
    if states and geometry.version == "x070":
        command = f"./merge.sh --export state {shlex.quote(project.shown(model))}"
        lines = [
            f"{talk}      begins from the state. The rwkv package and RWKV-Runner ignore a state inside a .pth of",
            f"          RWKV-7: load it there as a file of its own: {command}",
        ]
    else:
        lines = [f"{talk}      or load it in RWKV-Runner or with the rwkv package"]
    if any(name.endswith("ts_state") for name in states):
        lines.append(
            "careful   its learnt token shifts (state_shifts) are read by ./chat.sh, and by rwkv.cpp from --export rwkvcpp; other"
        )
        lines.append("          programs begin with zero there, and do not compute what was trained")
    return lines


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


def make_room(target: Path, fresh: Path, sources: Sequence[dict]) -> None:
    """Keep a merged model of that name, and what was exported from it, unless it is the same.

    fresh: the new result. sources: what that is made of.
    """
    if target.exists():
        same = sums(made_of(target)) == sums(sources)
        if same and hashing.sha256(target) == hashing.sha256(fresh):
            print(f"replaces  {project.shown(target)}, which is the same")
            return
    keep(target.with_suffix(""), [".pth", *(one.ending for one in EXPORTS.values() if one.what == "model")])


def made_of(model: Path) -> list[dict]:
    """What the sidecar of a merged model says of its parts; nothing where it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        made = json.loads(sidecars.path_of(model).read_text(encoding="utf-8")).get("merged")
        if isinstance(made, list) and all(isinstance(part, dict) for part in made):
            return made
    return []


def sums(parts: Sequence[dict]) -> list:
    return [part.get("sha256") for part in parts]


def keep(stem: Path, endings: Sequence[str]) -> None:
    """Put earlier files of one name away together: behind their name comes that of the run that made them, where the sidecar of
    the model among or beside them tells it, and a number where that is taken. What is kept already is not kept twice.

    stem: the name without its ending. endings: what may be there. The first that is there tells whether a kept one is equal.
    """
    at = lambda name, ending: stem.with_name(name + ending)  # noqa: E731 (names have dots: no with_suffix)
    there = [ending for ending in endings if at(stem.name, ending).exists()]
    if not there:
        return
    made = made_of(at(stem.name, ".pth"))
    run = Path(str((made[0] if made else {}).get("run") or "earlier")).name
    for number in itertools.count(1):
        kept = f"{stem.name}.{run}" + (f"-{number}" if number > 1 else "")
        double = [e for e in there if at(kept, e).exists() and equal(at(stem.name, e), at(kept, e))]
        free = not any(at(kept, ending).exists() for ending in endings)
        if free or (there[0] in double and all(e in double or not at(kept, e).exists() for e in there)):
            break
    for ending in there:
        if ending in double:
            print(
                f"replaces  {project.shown(at(stem.name, ending))}, which is kept already as {project.shown(at(kept, ending))}"
            )
            remove(at(stem.name, ending))
        else:
            at(stem.name, ending).rename(at(kept, ending))
            print(f"kept      the earlier result of this name, as {project.shown(at(kept, ending))}")
    note = at(stem.name, ".json")
    if ".pth" in there and ".pth" not in double and note.is_file():
        note.rename(at(kept, ".json"))


def equal(one: Path, other: Path) -> bool:
    """Whether two files or folders hold the same. What a merged model was made of and its size are known sooner than that."""
    if one.is_dir() or other.is_dir():
        return one.is_dir() and other.is_dir() and contents(one) == contents(other)
    made = one.suffix != ".pth" or sums(made_of(one)) == sums(made_of(other))
    return made and one.stat().st_size == other.stat().st_size and contents(one) == contents(other)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def replacing(stem: Path, ending: str) -> Iterator[Path]:
    """A name to write an export to, which becomes stem + ending when it is whole. What was there stays, under another name,
    unless it is the same."""
    target = stem.with_name(stem.name + ending)
    clear_leftovers(target)
    fresh = temporary(target)
    try:
        yield fresh
        if target.exists() and contents(target) == contents(fresh):
            print(f"replaces  {project.shown(target)}, which is the same")
            remove(target)
        keep(stem, [ending])
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
        with replacing(target.with_name(stem), one.ending) as fresh:
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
    from rwkv_peft.adapters import attach
    from rwkv_peft.adapters.peft_export import METHODS as WRITTEN
    from rwkv_peft.adapters.peft_export import peft_weights

    from .exports import adapter_folder

    one = alone("peft", found)
    described, geometry = bases.inspect(base)
    opened = fold.opened(one.part, described, geometry)
    whole = attach.sorted_by_place(opened.tensors, geometry)[1]
    if whole and opened.setup.method in WRITTEN:
        raise UserError(
            f"{project.shown(one.path)}: has trained {listed(whole, 3)} whole, and a peft adapter has no place for that. Train "
            'with lora_parts="att,ffn" and EMB_FINETUNE=0 in training.sh to export to peft, or merge this run as it is.'
        )
    tensors = {**opened.tensors, **opened.start}
    sidecar = {**one.sidecar, **one.part.setup.options, "method": one.part.setup.method}
    config, weights = peft_weights(tensors, sidecar, opened.leaves)
    target = project.ROOT / "merge" / f"{base.stem}-{one.label}-peft"
    with replacing(target, "") as fresh:
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
