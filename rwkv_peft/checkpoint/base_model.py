"""Base model files: geometry, finiteness, identity by content, and the initial tensors of adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from rwkv_peft.common import hashing, paths
from rwkv_peft.common.errors import UserError
from rwkv_peft.common.file_watch import FileWatch
from rwkv_peft.common.parallel_io import parallel_map
from rwkv_peft.model import arch
from rwkv_peft.model.arch import Geometry

from . import pth, run_dir, sidecars


def read_geometry(path: Path) -> tuple[dict[str, pth.TensorInfo], Geometry]:
    """Read the tensor descriptions and the geometry of a model file, without reading a weight.

    Raises:
        UserError: the file is not a model.
    """
    stored = pth.read_header(path)
    geometry = arch.detect({name: s.shape for name, s in stored.items()}, paths.display_path(path))
    odd = [name for name in arch.shapes(geometry) if not stored[name].dtype.is_floating_point]
    if odd:
        raise UserError(
            f"{paths.display_path(path)}: {odd[0]} holds {stored[odd[0]].dtype}, not floating-point numbers."
        )
    return stored, geometry


def check_finite(path: Path, names: Iterable[str]) -> None:
    """Check that tensors of a model hold neither NaN nor infinity and match the checksums of their file.

    Reads a few MB at a time and keeps nothing in memory.

    Args:
        path: the model file.
        names: the tensors to check; names that the file does not have are ignored.

    Raises:
        UserError: a value is not finite, or a checksum is wrong.
    """
    with pth.PthReader(path) as archive:

        def check(name: str) -> None:
            stored = archive.described[name]
            parts: Iterable[Tensor] = (
                [archive.tensor(name)]
                if not (stored.whole and stored.dtype.is_floating_point)
                else (torch.frombuffer(piece, dtype=stored.dtype) for piece in archive.pieces(name))
            )
            for numbers in parts:
                if not are_finite(numbers):
                    what = "NaN" if torch.isnan(numbers).any() else "infinity"
                    raise UserError(
                        f"{paths.display_path(path)}: {name} holds {what}, so nothing can be computed with this file. Either the "
                        "download is damaged (get it again and compare its sha256 with that of its page), or an earlier run "
                        "has damaged the model (take an earlier checkpoint). Nothing was written."
                    )

        parallel_map(check, [name for name in names if name in archive.described])


def check_model(path: Path, geometry: Geometry) -> None:
    """Run `check_finite` on all tensors that a model of this geometry computes with."""
    check_finite(path, [*arch.shapes(geometry), *arch.state_shapes(geometry)])


def are_finite(numbers: Tensor) -> bool:
    """Return whether all numbers are finite.

    Their sum is finite if all are finite and small enough; the sum takes a tenth of the time of the full check.
    """
    return bool(torch.isfinite(numbers.sum())) or bool(torch.isfinite(numbers).all())


def find_base_model(
    sidecar: dict,
    adapter: Path,
    given: str = "",
    doubts: list[Callable[[], None]] | None = None,
    option: str = "MODEL_PATH in merge.sh",
    in_use: FileWatch | None = None,
) -> Path:
    """Find the file that a checkpoint was trained on, by its content.

    Args:
        sidecar: the sidecar of the checkpoint.
        adapter: the checkpoint.
        given: path that the user gives for the base; "" searches by name in model/ and at the recorded path.
        doubts: list for deferred checks, for callers that can start before the base is verified. If there is only one
            candidate, it is returned at once, its content is read in the background, and a function is appended that
            must be called before anything final is done.
        option: the setting by which the user can name the file, for messages.
        in_use: file watch that gets the candidates before they are read.

    Raises:
        UserError: no candidate is that file; raised here or by the deferred check.
    """
    places = [paths.resolve_model(given)] if given else [paths.ROOT / "model" / sidecar["base"]]
    if not given and sidecar.get("base_path"):
        places.append(Path(sidecar["base_path"]))
    there = [place for place in places if place.is_file()]
    if in_use:
        in_use.add(there)
    for place in there:
        if sidecar.get("base_mark") and hashing.file_stamp(place) == sidecar["base_mark"]:
            return place  # it has not been written to since its hash was taken
    if len(there) == 2 and there[0].samefile(there[1]):
        del there[1]
    if not there:
        try:
            read_geometry(places[0])  # raises the error for a missing file
        except UserError as error:
            raise UserError(
                f"{error} {paths.display_path(adapter)} was trained on {sidecar['base']}: put it into "
                f"model/, or name it with {option}."
            ) from None
    wrong = UserError(
        f"{paths.display_path(there[0])}: is not the file that {paths.display_path(adapter)} was trained on (its content "
        f"differs from {sidecar['base']} then). Put the right one into model/, or name it with {option}."
    )
    if doubts is not None and len(there) == 1:
        meanwhile = hashing.BackgroundTask(lambda: hashing.sha256(there[0]))

        def must_be_it() -> None:
            if meanwhile.result() != sidecar["base_sha256"]:
                raise wrong

        doubts.append(must_be_it)
        return there[0]
    for place in there:
        if hashing.sha256(place) == sidecar["base_sha256"]:
            return place
    raise wrong


def check_sidecar_exists(adapter: Path) -> None:
    """Check that a checkpoint in a run folder of this kit has its sidecar; the kit has written one.

    Raises:
        UserError: the sidecar is missing.
    """
    sidecar = sidecars.sidecar_path(adapter)
    if not sidecar.is_file() and (adapter.parent / "run.json").is_file():
        raise UserError(
            f"{paths.display_path(sidecar)}: {sidecars.missing_reason(sidecar)}, and says how {paths.display_path(adapter)} was "
            f"made. Copy {sidecar.name} from the run: it was written beside the checkpoint."
        )


def check_sidecar(adapter: Path, sidecar: dict, accept_edited: bool = False, in_use: FileWatch | None = None) -> None:
    """Check that a checkpoint is the one that its sidecar was written for.

    Another checkpoint of the same shapes would fit too.

    Args:
        adapter: the checkpoint.
        sidecar: its content.
        accept_edited: accept a sidecar that was edited.
        in_use: file watch that gets the checkpoint before it is read.

    Raises:
        UserError: the content differs, or the sidecar was edited and that is not accepted.
    """
    if in_use:
        in_use.add([adapter])
    sidecars.check_unedited(adapter, sidecar, accept_edited)
    if sidecar.get("checkpoint_sha256") in (None, hashing.sha256(adapter)):
        return
    if not sidecars.complete_pair(adapter, sidecar):
        raise UserError(
            f"{paths.display_path(adapter)}: is not the file that its .json was written with (its content differs). Copy the two "
            "together; for a checkpoint of RWKV-PEFT, or one that you changed, take the .json away."
        )
    if in_use:  # the file was only now renamed
        in_use.release([adapter])
        in_use.add([adapter])


def load_adapter_init(adapter: Path, sidecar: dict, method: str, given: Path | None = None) -> dict[str, Tensor]:
    """Load the initial tensors of a checkpoint's adapters, by name; empty for a run that has no such file.

    Args:
        adapter: the checkpoint.
        sidecar: its sidecar, which records the content of the file.
        method: the fine-tuning method.
        given: path that the user gives for the file; None: beside the checkpoint.

    Raises:
        UserError: the file is missing or belongs to another run.
    """
    path = given or run_dir.init_file(adapter.parent, method)
    if not path.is_file():
        if sidecar.get("start_sha256"):
            raise UserError(
                f"{paths.display_path(path)}: is missing. {paths.display_path(adapter)} means nothing without what it began "
                f"with: copy {run_dir.init_file(adapter.parent, method).name} from the run, beside the checkpoint."
            )
        return {}
    if sidecar.get("start_sha256") not in (None, hashing.sha256(path)):
        raise UserError(
            f"{paths.display_path(path)}: is not what {paths.display_path(adapter)} began with (its content differs from what "
            "the run wrote). Every PiSSA run has its own; name the right one."
        )
    return pth.load(path)
