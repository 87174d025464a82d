"""Adapters that RWKV-PEFT has saved: their tensors say what they are, and the user where those do not.

Its files have tensors and nothing else: no rank, alpha, base or method. Names of 2024 are the kit's, some of 2025 begin with
"model."; MiSS was .bone until February 2025 and .disha after; Bat has the same names and one more axis. LoRA and PiSSA
look alike, so the user must say which it is, and LoRA's alpha. (RWKV-PEFT at b24c73c, 5b8aac9.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from rwkv_peft.adapters.inject import AdapterConfig
from rwkv_peft.adapters.specs import ALIASES, PARTS
from rwkv_peft.checkpoint import pth, run_dir
from rwkv_peft.common.errors import SettingError, SettingErrors, UserError
from rwkv_peft.common.formatting import join_names, plural
from rwkv_peft.model.arch import ARCHS, STATE_NAME, Geometry, linear_layers

from .fold import MergeInput

PREFIX = "model."
LORA, ADAPTER = ("lora_A", "lora_B"), ("lora_A", "lora_B", "bone", "disha")  # last names of tensors
RENAMED = {"bone": "disha"}
MOST_LEFT = 0.5  # of what a PiSSA took out: next to 0 on its own base, far above 1 on any other


def our_names(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Tensors by the names that we would have saved them under. where: the file, for messages."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.removeprefix(PREFIX).rpartition(".")
        ours = f"{layer}.{RENAMED.get(leaf, leaf)}" if layer else leaf
        if ours in renamed:
            raise UserError(f"{where}: holds {ours} twice, under two names; which one was trained?")
        renamed[ours] = tensor
    return renamed


def has(path: Path, leaves: Sequence[str]) -> bool:
    """Whether a file has tensors of these last names."""
    return any(name.endswith(tuple(leaves)) for name in pth.read_header(path))


def is_model(names) -> bool:
    """Return whether these are the tensors of a whole model."""
    return "head.weight" in names and any(arch.marker in names for arch in ARCHS.values())


def setup_of(tensors: Mapping[str, Tensor], where: str, method: str, alpha: float | None) -> AdapterConfig:
    """How a foreign run was set. method, alpha: what the user says (METHOD, LORA_ALPHA), "" and None if nothing."""
    leaves = {name.rpartition(".")[2] for name in tensors}
    wanted = ALIASES.get(method, method)
    if is_model(tensors):
        return AdapterConfig("full")
    if "lora_A" in leaves:
        rank = one_rank({t.shape[0] for n, t in tensors.items() if n.endswith("lora_A")}, where)
        if wanted not in ("lora", "pissa"):
            message = f"must be lora or pissa: {where} has no sidecar, and the tensors of the two are called alike"
            raise SettingErrors(SettingError("METHOD", message))
        if wanted == "pissa":
            return AdapterConfig("pissa", {"rank": rank, "niter": 0})
        if alpha is None:
            message = f"must be the lora_alpha that {where} was trained with: it has no sidecar that says it"
            raise SettingErrors(SettingError("LORA_ALPHA", message))
        return AdapterConfig("lora", {"rank": rank, "alpha": alpha})
    if "disha" in leaves:
        matrices = [t for n, t in tensors.items() if n.endswith("disha")]
        kinds = {t.dim() for t in matrices}
        if kinds not in ({2}, {3}):
            raise UserError(f"{where}: mixes tensors of Bone (2 axes) and Bat (3 axes); it is no adapter.")
        name = "miss" if kinds == {2} else "bat"
        refuse_other(name, wanted, where)
        return AdapterConfig(
            name, {"rank": one_rank({t.shape[0] if name == "miss" else t.shape[1] for t in matrices}, where)}
        )
    if any(STATE_NAME.fullmatch(name) for name in tensors):
        refuse_other("state", wanted, where)
        return AdapterConfig("state", {"shifts": any(name.endswith("ts_state") for name in tensors)})
    raise UserError(
        f"{where}: is no adapter: it holds {join_names(tensors, 3)}. An adapter holds lora_A and lora_B, disha or bone, or "
        "time_state."
    )


def refuse_other(name: str, said: str, where: str) -> None:
    """Raise SettingErrors if METHOD names another method than the file has."""
    if said not in ("", name):
        raise SettingErrors(SettingError("METHOD", f"but {where} holds {name}; leave it empty"))


def one_rank(ranks: set[int], where: str) -> int:
    """Return the only rank. Raises UserError if there are several."""
    if len(ranks) != 1:
        raise UserError(
            f"{where}: its layers have different ranks ({join_names(map(str, ranks))}); it is no adapter of one run."
        )
    return ranks.pop()


def start_of(path: Path, setup: AdapterConfig, given: Path | None) -> dict[str, Tensor]:
    """What a foreign PiSSA began with: PISSA_INIT, or init_pissa.pth beside it."""
    if setup.method != "pissa":
        return {}
    init = given or run_dir.init_file(path.parent, "pissa")
    if not init.is_file():
        raise SettingErrors(SettingError("PISSA_INIT", f"must name the init_pissa.pth of the run; {init} is not there"))
    return our_names(pth.load(init), str(init))


def warnings(path: Path, part: MergeInput, base: Path, geometry: Geometry) -> Iterator[str]:
    """What looks odd about a foreign adapter on this base, in words. UserError where its PiSSA was taken out of other weights.

    What PiSSA began with are the base's main directions: what is left of the base without them has no share in these.
    """
    missing = [n for n in linear_layers(geometry, PARTS) if n not in part.leaves]
    kinds = sorted({".".join(name.split(".")[2:]) for name in missing})
    if part.leaves and missing:
        yield f"it has no adapter on {join_names(kinds)} ({plural(len(missing), 'layer')}): was it trained so?"
    init = run_dir.init_file(path.parent, "pissa")
    if part.setup.method == "lora" and init.is_file():
        yield f"{init.name} lies beside it: if it is a PiSSA, this result is wrong, and METHOD=pissa makes the right one"
    if part.setup.method != "pissa":
        return
    layer = next(iter(part.leaves))
    with pth.PthReader(base) as archive:
        weight = archive.tensor(f"{layer}.weight").float()
    A, B = (part.start[f"{layer}.{leaf}"].float() for leaf in ("init_lora_A", "init_lora_B"))
    share = (B.T @ (weight - B @ A) @ A.T).norm() / (B.T @ weight @ A.T).norm().clamp_min(1e-30)
    if share > MOST_LEFT:
        raise UserError(
            f"{part.where}: its init_pissa.pth was not taken out of this base ({layer} has other main directions). Name the "
            "right base with MODEL_PATH, or the right file with PISSA_INIT."
        )
