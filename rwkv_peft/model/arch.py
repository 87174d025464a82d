"""The one place that knows what RWKV checkpoints look like inside: which version, how large, what each tensor is called.

Facts only. Versions are found by a tensor that no other version has; every size is read from the shapes, because low
ranks differ between models of the same width and formulas for them are wrong for some.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from ..errors import UserError
from ..words import listed

# a tensor that only this version has -> what the version is called
MARKERS = {
    "blocks.0.att.r_k": "RWKV-7 (x070)",
    "blocks.0.att.time_maa_x": "RWKV-6 (x060)",
    "blocks.0.att.time_mix_g": "RWKV-5 (x052)",
    "blocks.0.att.time_mix_k": "RWKV-4",
}
SUPPORTED = "RWKV-7 (x070)"

# what adapters may wrap, by part
LINEARS = {
    "att": ("att.receptance", "att.key", "att.value", "att.output"),
    "ffn": ("ffn.key", "ffn.value"),
}
# tensors that a part trains whole (regular expressions over official names). RWKV-7 has no name with "time" in it: what
# that part meant in v5 and v6 - the token-shift mixes, decays and their low-rank parts - goes by these names here
WHOLE = {
    "time": r"blocks\.\d+\.(att\.(x_[rwkvag]|[wav][012]|g[12]|k_k|k_a|r_k)|ffn\.x_k)",
    "ln": r"(blocks\.\d+\.(ln[012]|att\.ln_x)|ln_out)\.(weight|bias)",
    "emb": r"emb\.weight",
    "head": r"head\.weight",
}

# learning-rate factors of the official recipe (RWKV-LM train_temp): everything else has 1
LR_SCALES = {r"blocks\.\d+\.att\.w0": 2.0}


@dataclass(frozen=True)
class Geometry:
    """The sizes of an RWKV-7 model. Ranks are the inner widths of w1/w2, a1/a2, v1/v2 and g1/g2."""

    n_layer: int
    n_embd: int
    head_size: int
    vocab_size: int
    dim_ffn: int
    rank_w: int
    rank_a: int
    rank_v: int
    rank_g: int

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_size

    def as_dict(self) -> dict:
        return {"version": "x070", **asdict(self)}


def shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Every tensor of an RWKV-7 file and its shape, in the order of the official trainer.

    Some files hold v0, v1, v2 in layer 0 as well. Nobody uses them there; they pass through merges untouched.
    """
    C, N, F = geometry.n_embd, geometry.head_size, geometry.dim_ffn
    vector = (1, 1, C)
    out: dict[str, tuple[int, ...]] = {"emb.weight": (geometry.vocab_size, C)}
    for i in range(geometry.n_layer):
        block = f"blocks.{i}."
        for ln in ("ln1", "ln2", *(["ln0"] if i == 0 else [])):
            out |= {f"{block}{ln}.weight": (C,), f"{block}{ln}.bias": (C,)}
        att = block + "att."
        out |= {att + x: vector for x in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")}
        for letter, rank in (("w", geometry.rank_w), ("a", geometry.rank_a), ("v", geometry.rank_v)):
            if letter != "v" or i > 0:
                out |= {f"{att}{letter}0": vector, f"{att}{letter}1": (C, rank), f"{att}{letter}2": (rank, C)}
        out |= {att + "g1": (C, geometry.rank_g), att + "g2": (geometry.rank_g, C)}
        out |= {att + "k_k": vector, att + "k_a": vector, att + "r_k": (C // N, N)}
        out |= {f"{block}{linear}.weight": (C, C) for linear in LINEARS["att"]}
        out |= {att + "ln_x.weight": (C,), att + "ln_x.bias": (C,)}
        out |= {block + "ffn.x_k": vector, block + "ffn.key.weight": (F, C), block + "ffn.value.weight": (C, F)}
    return out | {"ln_out.weight": (C,), "ln_out.bias": (C,), "head.weight": (geometry.vocab_size, C)}


def detect(found: Mapping[str, tuple[int, ...]], where: str) -> Geometry:
    """The geometry of a file from its tensors' shapes. UserError when it is no RWKV-7, or not a whole one.

    found: tensor name -> shape. where: the file, for the message.
    """
    version = next((v for marker, v in MARKERS.items() if marker in found), None)
    if version is None:
        if any(name.endswith(("lora_A", "lora_B")) for name in found):
            raise UserError(
                f"{where}: is an adapter (what a run learnt), not a model. Talk to it with ./chat.sh --adapter, fold it into "
                "its base with ./merge.sh, or go on from it with lora_load."
            )
        raise UserError(f"{where}: is not an RWKV model; it holds {listed(found, 3)}.")
    if version != SUPPORTED:
        raise UserError(f"{where}: is {version}; this version of the kit works with {SUPPORTED} only.")
    if any(name.endswith((".ffn.s_emb", ".ffn.s_emb.weight")) for name in found):
        raise UserError(f"{where}: is an RWKV-7 with DeepEmbed (x070a or x070b), which this version does not know.")
    try:
        layers = 1 + max(int(m[1]) for name in found if (m := re.match(r"blocks\.(\d+)\.", name)))
        heads, size = found["blocks.0.att.r_k"]
        geometry = Geometry(
            n_layer=layers,
            n_embd=heads * size,
            head_size=size,
            vocab_size=found["emb.weight"][0],
            dim_ffn=found["blocks.0.ffn.key.weight"][0],
            rank_w=found["blocks.0.att.w1"][1],
            rank_a=found["blocks.0.att.a1"][1],
            rank_v=found["blocks.1.att.v1"][1] if layers > 1 else 0,
            rank_g=found["blocks.0.att.g1"][1],
        )
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{where}: looks like RWKV-7, but a tensor that gives its size is missing: {error}.") from None
    wrong = []
    for name, shape in shapes(geometry).items():
        if name not in found:
            wrong.append(f"{name} is missing")
        elif tuple(found[name]) != shape:
            wrong.append(f"{name} is {list(found[name])} instead of {list(shape)}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{where}: is a damaged RWKV-7 file: {'; '.join(wrong[:3])}{more}.")
    return geometry


def whole_tensors(names, parts) -> list[str]:
    """Those of the names that the given parts (time, ln, emb, head) train whole."""
    patterns = [re.compile(WHOLE[part]) for part in parts if part in WHOLE]
    return [name for name in names if any(p.fullmatch(name) for p in patterns)]


def lr_scale(name: str) -> float:
    return next((scale for pattern, scale in LR_SCALES.items() if re.fullmatch(pattern, name)), 1.0)


def decays(name: str, shape) -> bool:
    """Whether weight decay applies: to large matrices only, never to norms, vectors and the low-rank parts of the decay,
    as in the official trainer (2-D tensors called .weight). An adapter's matrices count as large."""
    return len(shape) == 2 and name.endswith((".weight", "lora_A", "lora_B"))
