"""Write the results: a merged model, which is read back before it gets its name, and exports, which are named when whole.

A name belongs to one run and epoch: a result of something else under that name gets a number appended.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rwkv_peft import __version__
from rwkv_peft.adapters.specs import METHODS
from rwkv_peft.checkpoint import base_model, prompt_format, pth, pth_rewrite, sidecars
from rwkv_peft.common import hashing, paths
from rwkv_peft.common.atomic_io import check_not_folder, fsync_dir, remove_path, remove_stale_temps, temp_path
from rwkv_peft.common.errors import SettingErrors, UserError
from rwkv_peft.common.file_watch import FileWatch
from rwkv_peft.common.formatting import join_names
from rwkv_peft.common.names import describe_fault, escape_invisible
from rwkv_peft.common.parallel_io import parallel_map
from rwkv_peft.export import EXPORTS
from rwkv_peft.model.arch import STATE_NAME, Geometry
from rwkv_peft.text.preset_names import recorded_name, recorded_template

from . import fold, inputs, legacy
from .by_rows import by_rows
from .inputs import LoadedCheckpoint
from .output_check import OutputCheck
from .verify import verify

LONGEST = 200  # bytes of a name; file systems allow 255 with all endings
# what the sidecar of a result says of how it was made, beside the runs
HOW = ("method", "weights", "merge_base", "base_sha256")


def merge(
    checkpoints: Sequence[LoadedCheckpoint],
    weights: Sequence[float] | None,
    base: Path,
    doubts: Sequence[Callable[[], None]] = (),
) -> tuple[Path, Geometry]:
    """Fold checkpoints into the base, in turn or (with weights) averaged. Returns the model's file and its geometry.

    doubts: what bases.base_of has left open about the base. It is settled before the result gets its name.
    """
    how = checkpoints[0].part
    described, geometry = base_model.read_geometry(base)
    sound = hashing.BackgroundTask(lambda: base_model.check_model(base, geometry))
    doubts = [sound.result, *doubts]
    compressed = f", compressed to {how.setup.quant} as the run had it (MERGE_BASE=quantised)" if how.quantised else ""
    print(f"base      {paths.display_path(base)}{compressed}")
    if words := pth.describe_differences(described):
        print(f"note: {words} The result is a .pth with the official names and shapes.")
    try:
        return folded(checkpoints, weights, base, doubts)
    except UserError:
        for settle in doubts:  # a wrong base explains whatever else is wrong
            settle()
        raise


def folded(
    checkpoints: Sequence[LoadedCheckpoint],
    weights: Sequence[float] | None,
    base: Path,
    doubts: Sequence[Callable[[], None]],
) -> tuple[Path, Geometry]:
    """Merge into a temporary file, check it, and return it with the base's geometry."""
    described, geometry = base_model.read_geometry(base)
    opened = parallel_map(lambda one: fold.opened(one.part, described, geometry), checkpoints)
    for one, part in zip(checkpoints, opened, strict=True):
        for doubt in [] if one.sidecar else legacy.warnings(one.path, part, base, geometry):
            print(f"warning   {paths.display_path(one.path)}: {doubt}")
    for words in differing_forms(checkpoints):
        print(f"warning   {words}")
    added = fold.added(opened, weights)
    change = fold.average(opened, weights, geometry) if weights else fold.in_turn(opened, geometry)
    change = OutputCheck(by_rows(change, opened, weights, geometry), described, opened, weights, geometry)
    sources = inputs.sources(checkpoints)
    about = describe(checkpoints, weights, sources, base, geometry)
    target = place_for(name_of(checkpoints, weights, base), about)
    note = sidecars.sidecar_path(target)
    for path in target, note:
        check_not_folder(path)
        remove_stale_temps(path)
    fresh, fresh_note = temp_path(target), temp_path(note)  # they get their names when the result is known to be right
    try:
        pth_rewrite.rewrite(base, fresh, change, added)
        checks = list(verify(base, fresh, change, added))
        for settle in doubts:
            settle()
        replaced = report_replaced(target, fresh)
        sidecars.write_sidecar(fresh_note, about)
        sidecars.replace_pair(fresh, fresh_note, target)
    finally:
        remove_path(fresh)
        remove_path(fresh_note)
    if any(one.sidecar for one in checkpoints):
        print("checked   the base is the file that it was trained on (same content)")
    for line in checks:
        print(f"checked   {line}")
    print(f"wrote     {paths.display_path(target)}: {target.stat().st_size / 1e6:,.1f} MB")
    for line in replaced:
        print(line)
    for line in next_lines(target, {*described, *added}, geometry):
        print(line)
    return target, geometry


def next_lines(model: Path, names: Iterable[str], geometry: Geometry) -> list[str]:
    """Where to go with a merged model. names: of its tensors."""
    talk = f"next      ./chat.sh --model {shlex.quote(model.name)}"
    states = [name for name in names if STATE_NAME.fullmatch(name)]
    if states and geometry.version == "x070":
        command = f"./merge.sh --export state {shlex.quote(paths.display_path(model))}"
        lines = [
            f"{talk}      begins from the state. The rwkv package and RWKV-Runner ignore a state inside a .pth of",
            f"          RWKV-7: load it there as a file of its own: {command}",
        ]
    else:
        lines = [f"{talk}      or load it in RWKV-Runner or with the rwkv package"]
    if any(name.endswith("ts_state") for name in states):
        lines.append(
            "warning   its learnt token shifts (state_shifts) are read by ./chat.sh, and by rwkv.cpp from --export rwkvcpp; other"
        )
        lines.append("          programs begin with zero there, and do not compute what was trained")
    return lines


def describe(
    checkpoints: Sequence[LoadedCheckpoint], weights, sources: list[dict], base: Path, geometry: Geometry
) -> dict:
    """The sidecar of a merged model: where it came from. A single run's own sidecar goes into it whole."""
    same = [one.sidecar for one in checkpoints if one.sidecar]
    forms = [sidecar_or_empty(one.path) for one in checkpoints]  # of merged models as well
    # (a run's own checksums are those of its checkpoint and sidecar, not of these files)
    of_files = ("checkpoint_sha256", sidecars.SEAL)
    own = {k: v for k, v in same[0].items() if k not in of_files} if len(same) == 1 == len(checkpoints) else {
        "method": "+".join(one.part.setup.method for one in checkpoints), "base": base.name, "base_path": str(base.resolve()),
        "geometry": geometry.as_dict(),
    }  # fmt: skip
    own |= {
        k: forms[0][k] for keys in FORM if all(alike(s, forms[0], keys) for s in forms) for k in keys if k in forms[0]
    }
    how: dict[str, Any] = {"weights": list(weights)} if weights else {}
    if checkpoints[0].part.quantised:
        how["merge_base"] = "quantised"
    if len(checkpoints) == 1:
        how |= checkpoints[0].part.setup.options
    return {"merged": sources, **own, **how, "merged_by": __version__}


# what says how a model's dialogues are written: a template's name means nothing without its content
FORM = (("prompt_type", "template"), ("eot",), ("bos",), ("blank_lines",))


def alike(one: dict, other: dict, keys: Sequence[str]) -> bool:
    """Return whether two prompt formats agree in these keys."""
    # (what an older version did not write was no)
    with contextlib.suppress(UserError):  # (a template that cannot be read is not like another)
        if "template" in keys and one.get("template") and other.get("template"):
            return recorded_template(one, "one") == recorded_template(other, "the other")
    return all((one.get(key) or 0) == (other.get(key) or 0) for key in keys)


def differing_forms(checkpoints: Sequence[LoadedCheckpoint]) -> Iterator[str]:
    """A warning where what goes together was trained to be asked in different ways."""
    forms = {one.path: sidecar_or_empty(one.path) for one in checkpoints}
    first = next(iter(forms.values()))
    if not all(alike(form, first, keys) for form in forms.values() for keys in FORM):
        words = "; ".join(f"{paths.display_path(path)}: {label_of(form)}" for path, form in forms.items())
        yield f"they were trained with different formats ({words}): the result has no format that all of it knows"


def label_of(form: dict) -> str:
    """Return a prompt format in words."""
    return f"PROMPT_TYPE={form.get('prompt_type') or 'unknown'}, EOT={form.get('eot') or 'unknown'}, BOS={form.get('bos') or 0}"


def name_of(checkpoints: Sequence[LoadedCheckpoint], weights: Sequence[float] | None, base: Path) -> str:
    """Return the name of the result without its ending.

    BASE-RUN-EPOCH, BASE-RUN-EPOCH+RUN-EPOCH, BASE-average-RUN-EPOCH+RUN-EPOCH; of whole models average-MODEL+MODEL.
    """
    label = "+".join(one.label for one in checkpoints)
    models = all(one.part.setup.method == "full" and not one.sidecar for one in checkpoints)
    words = [*([] if models and weights else [base.stem]), *(["average"] if weights else []), label]
    words += ["quantised"] if checkpoints[0].part.quantised else []
    return short("-".join(words))


def short(name: str) -> str:
    """A name that leaves room for endings: of one that is too long the beginning, and a number that stands for all of it."""
    raw = name.encode()
    if len(raw) <= LONGEST:
        return name
    return f"{raw[: LONGEST - 9].decode(errors='ignore')}-{hashlib.sha256(raw).hexdigest()[:8]}"


def place_for(name: str, about: dict) -> Path:
    """The file of a result: its name, or where something else has that name already, with -v2, -v3 and so on.

    about: the result's sidecar. Its own earlier file is one that was made of the same runs in the same way.
    """
    endings = [".pth", *(one.ending for one in EXPORTS.values() if one.source == "model")]
    for stem in versions(name):
        there = [place for ending in endings if (place := merged_place(stem, ending)).exists()]
        if not there or same_source(sidecar_of(merged_place(stem, ".pth")), about):
            break
    if stem != name:
        print(f"note: {name} in merge/ was made of something else and stays; this result is called {stem}")
    return merged_place(stem, ".pth")


def versions(name: str) -> Iterator[str]:
    """name, name-v2, name-v3 ..."""
    yield name
    yield from (f"{name}-v{number}" for number in itertools.count(2))


def merged_place(stem: str, ending: str) -> Path:
    """Return the path of a result of this name. Raises UserError for a name that a file should not have."""
    if wrong := describe_fault(stem):
        raise UserError(
            f"merge/{escape_invisible(stem)}{ending}: this name {wrong}; rename the base or the folder of the run."
        )
    return paths.ROOT / "merge" / f"{stem}{ending}"


def sidecar_of(model: Path) -> dict:
    """What the sidecar of a merged model says; nothing where it is missing or damaged."""
    with contextlib.suppress(UserError):
        return sidecars.read_sidecar(model, ())
    return {}


def same_source(earlier: dict, about: dict) -> bool:
    """Return whether two sidecars of merged models name the same runs, in the same order and with the same settings.

    A run that was trained further is the same; another one of its name is not.
    """
    about = json.loads(json.dumps(about))  # as it would have been written
    before, now = earlier.get("merged"), about["merged"]
    if not isinstance(before, list) or not all(isinstance(part, dict) for part in before) or len(before) != len(now):
        return False
    for old, new in zip(before, now, strict=True):
        same_run = new["began"] is not None and all(old.get(key) == new[key] for key in ("run", "began"))
        if not same_run and old.get("sha256") != new["sha256"] or old.get("options", new["options"]) != new["options"]:
            return False
    return all(earlier.get(key) == about.get(key) for key in HOW)


def report_replaced(target: Path, fresh: Path) -> list[str]:
    """Say that an earlier result of the same run is replaced. Returns what to say of exports that were made of it."""
    if not target.exists():
        return []
    same = hashing.sha256(target) == hashing.sha256(fresh)
    print(
        f"replaces  {paths.display_path(target)}, {'which is the same' if same else 'an earlier result of the same run'}"
    )
    exports = [merged_place(target.stem, one.ending) for one in EXPORTS.values() if one.source == "model"]
    old = [] if same else [paths.display_path(path) for path in exports if path.exists()]
    words = "still the earlier result: --export writes it again"
    return [f"warning: {join_names(old)}: {words}"] if old else []


@contextlib.contextmanager
def writing_export(name: str, ending: str, in_use: FileWatch, own: bool = False) -> Iterator[tuple[Path, list[Path]]]:
    """A path to write an export to, which gets its name in merge/ when it is whole; and a list that then holds that name.

    own: what has the name is an earlier export of the same model, and is replaced. Else it stays, if it is not the same, and the
    export is called name-v2 and so on; so does a folder where a file is to be written. in_use: watches what the
    export is made of.
    """
    first = merged_place(name, ending)
    remove_stale_temps(first)
    fresh = temp_path(first)
    placed: list[Path] = []
    remove_path(fresh)
    try:
        yield fresh, placed
        in_use.must_be_unchanged()
        for stem in versions(name):
            target = merged_place(stem, ending)
            same = target.exists() and contents(target) == contents(fresh)
            if same or not target.exists() or (own and not is_folder(target) and not is_folder(fresh)):
                break
        if target.exists():
            words = "which is the same" if same else "an earlier export of this model"
            print(f"replaces  {paths.display_path(target)}, {words}")
        if is_folder(target) or is_folder(fresh):  # (they have the same content, or a link leads nowhere)
            remove_path(target)
        elif stem != name:
            print(
                f"note: {paths.display_path(first)} holds something else and stays; this export is called {target.name}"
            )
        os.replace(fresh, target)
        fsync_dir(target.parent)
        placed.append(target)
    finally:
        remove_path(fresh)


def is_folder(path: Path) -> bool:
    """A real one, not a link to one."""
    return path.is_dir() and not path.is_symlink()


def contents(path: Path) -> dict[str, str]:
    """Name -> SHA-256 of a file, or of all in a folder; "" for what is no file."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name if path.is_dir() else "": hashing.sha256(file) if file.is_file() else "" for file in files}


def export(kind: str, source: Path, stem: str, geometry: Geometry, in_use: FileWatch) -> None:
    """Write a model or a state for other programs, into merge/, and beside it its prompt format. in_use: watches the source."""
    in_use.add([source])
    asked = prompting_of(source)
    if asked.assumed:
        print(f"warning   {asked.assumed}. ./chat.sh shows which template it answers in")
    merged = source.parent == paths.ROOT / "merge" and source.stem == stem and "merged" in sidecar_of(source)
    for name in (kind, *EXPORTS[kind].also):
        one = EXPORTS[name]
        with writing_export(stem, one.ending, in_use, merged) as (fresh, placed):
            assert one.write is not None, "a folder for peft is not made of a file"
            said = list(one.write(source, fresh, geometry, asked))
        [target] = placed
        asked.write(target)
        print(f"wrote     {paths.display_path(target)}: {target.stat().st_size / 1e6:,.1f} MB")
        for line in said:
            print(f"          {line}")
        if not name.startswith("gguf"):  # which reports it itself: most of it is inside
            for line in client_lines(asked):
                print(f"          {line}")
        print(
            f"          {paths.display_path(prompt_format.prompt_file(target))}: an example prompt, stop texts and stop tokens"
        )


def prompting_of(source: Path) -> prompt_format.PromptFormat:
    """Return the prompt format that a model or checkpoint was trained with, from its sidecar."""
    sidecar = sidecar_or_empty(source)
    return prompt_format.read_prompt_format(
        sidecar, paths.display_path(sidecars.sidecar_path(source)), Path(sidecar.get("base_path") or source)
    )


def sidecar_or_empty(path: Path) -> dict:
    """Return a sidecar, {} for none.

    What an older version has left out of its prompt format is filled in: a template is known by its name alone, and EOT
    was doc.
    """
    sidecar = sidecars.read_sidecar(path, ()) if sidecars.sidecar_path(path).is_file() else {}
    if name := recorded_name(sidecar):
        sidecar = sidecar | {"prompt_type": name, "eot": sidecar.get("eot") or "doc"}
        with contextlib.suppress(SettingErrors):  # (a file of the user's that is gone)
            if sidecar.get("template") is None and (
                form := recorded_template(sidecar, paths.display_path(sidecars.sidecar_path(path)))
            ):
                sidecar["template"] = form.to_dict()
    return sidecar


def client_lines(asked: prompt_format.PromptFormat) -> Iterator[str]:
    """What a client must be set to whose files have no place for it."""
    texts = ", ".join(map(prompt_format.quote_for_bash, asked.stop_strings))
    sidecar = (
        f"If the guess is right, its format is {asked.label}" if asked.assumed else f"It was trained with {asked.label}"
    )
    yield f"{sidecar}. Set the client to that format, and to stop at token 0 and at: {texts}"
    if not asked.stops_at_blank_lines:
        yield "Its answers may hold blank lines, at which Ai00 stops unless a request has a stop of its own."
    if asked.bos:
        yield "Its prompts begin with token 0, which RWKV-Runner and Ai00 do not send by themselves (docs/data.md)."


def export_state(kind: str, checkpoints: Sequence[LoadedCheckpoint], base: Path, in_use: FileWatch) -> None:
    """A learnt state as a file of its own."""
    one = alone(kind, checkpoints)
    if one.part.setup.method != "state":
        raise UserError(
            f"{paths.display_path(one.path)}: holds a run of {METHODS[one.part.setup.method].words}, and no state."
        )
    described, geometry = base_model.read_geometry(base)
    fold.opened(one.part, described, geometry)
    export(kind, one.path, f"{short(f'{base.stem}-{one.label}')}-alone", geometry, in_use)


def export_adapter(checkpoints: Sequence[LoadedCheckpoint], base: Path, in_use: FileWatch) -> None:
    """A run as an adapter folder of the peft package."""
    from rwkv_peft.adapters import inject
    from rwkv_peft.export import peft_export
    from rwkv_peft.export.peft_adapter import has_peft_form, peft_weights

    one = alone("peft", checkpoints)
    described, geometry = base_model.read_geometry(base)
    opened = fold.opened(one.part, described, geometry)
    whole = inject.sorted_by_place(opened.tensors, geometry)[1]
    if whole and has_peft_form(opened.setup.method):
        raise UserError(
            f"{paths.display_path(one.path)}: has trained {join_names(whole, 3)} whole, and a peft "
            f"adapter has no place for that. Train "
            'with lora_parts="att,ffn" and EMB_FINETUNE=0 in training.sh to export to peft, or merge this run as it is.'
        )
    tensors = {**opened.tensors, **opened.start}
    sidecar = {**one.sidecar, **one.part.setup.options, "method": one.part.setup.method}
    config, weights = peft_weights(tensors, sidecar, opened.leaves)
    asked = prompt_format.read_prompt_format(one.sidecar, paths.display_path(sidecars.sidecar_path(one.path)), base)
    if asked.assumed:
        print(f"warning   {asked.assumed}")
    with writing_export(f"{short(f'{base.stem}-{one.label}')}-peft", "", in_use) as (fresh, placed):
        peft_export.write(fresh, config, weights)
        asked.write(fresh)
    [target] = placed
    size = sum(file.stat().st_size for file in target.iterdir())
    print(
        f"wrote     {paths.display_path(target)}/: {size / 1e6:,.1f} MB, adapter_config.json and adapter_model.safetensors"
    )
    print(
        "          peft.PeftModel.from_pretrained(model, folder) takes it; the model's layers must be called blocks.0.att.key"
    )
    for line in client_lines(asked):
        print(f"          {line}")


def alone(kind: str, checkpoints: Sequence[LoadedCheckpoint]) -> LoadedCheckpoint:
    """Return the only checkpoint. Raises UserError if there are several."""
    if len(checkpoints) != 1:
        raise UserError(f"--export {kind} takes one checkpoint, not {len(checkpoints)}.")
    return checkpoints[0]
