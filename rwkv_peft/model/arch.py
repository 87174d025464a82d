"""The one place that knows what RWKV checkpoints look like inside: which version, how large, what each tensor is called.

Facts only. Versions are shapes_of_file by a tensor that no other version has; every size is read from the shapes, because low
ranks differ between models of the same width and formulas for them are wrong for some.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

from rwkv_peft.common.errors import UserError
from rwkv_peft.common.formatting import join_names

EMB_AND_HEAD = {"emb": r"emb\.weight", "head": r"head\.weight"}
NORMS = {"ln": r"(blocks\.\d+\.(ln[012]|att\.ln_x)|ln_out)\.(weight|bias)"}


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model.

    Ranks are the inner widths of its low-rank parts, 0 where the version has none: w (decays of RWKV-7 and -6), a, v, g
    (RWKV-7), mix (token-shift mixes of RWKV-6).
    """

    version: str
    n_layer: int
    n_embd: int
    head_size: int
    vocab_size: int
    dim_ffn: int
    rank_w: int = 0
    rank_a: int = 0
    rank_v: int = 0
    rank_g: int = 0
    rank_mix: int = 0

    @property
    def n_head(self) -> int:
        """Heads of a layer."""
        return self.n_embd // self.head_size

    def as_dict(self) -> dict:
        """Return the sizes that are not 0, by name."""
        return {name: value for name, value in asdict(self).items() if value != 0}


Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Activations:
    """What one block keeps of a token for the backward pass, without the channel mix's inner values.

    values: per channel, in the working dtype. floats: per channel, in float32. inputs: those of `values` that are inputs of
    layers that learn, cheap to recompute. Fitted to bench/memory.py, malloc's holes included: they are not what is kept by name.
    """

    values: float
    floats: float
    inputs: float = 5


@dataclass(frozen=True)
class Arch:
    """A version of RWKV.

    Attributes:
        version: Its name in the code.
        number: Its name in scripts and for users.
        name: Both, for messages.
        marker: A tensor that only this version has.
        heads: The tensor [H, N] from whose shape heads and head size are read.
        linears: What adapters may wrap, by part.
        whole: By part, a regular expression over names of the tensors that the part trains whole.
        lr_scales: Learning-rate factors of the official recipe; everything else has 1.
        ranks: Field of Geometry -> tensor and the axis of its inner width.
        layer: Returns the shapes of one block.
        activations: Backend ("cpu", or "torch" for everything else) -> what a block keeps.
    """

    version: str
    number: str
    name: str
    marker: str
    heads: str
    linears: Mapping[str, tuple[str, ...]]
    whole: Mapping[str, str]
    lr_scales: Mapping[str, float]
    ranks: Mapping[str, tuple[str, int]]
    layer: Callable[[Geometry, int], Shapes]
    activations: Mapping[str, Activations]


def layer_of_v7(geometry: Geometry, layer: int) -> Shapes:
    """Return the shapes of a block of RWKV-7.

    Some files have v0, v1, v2 in layer 0 as well. The model does not use them there; merges pass them through unchanged.
    """
    C, N, F = geometry.n_embd, geometry.head_size, geometry.dim_ffn
    vector = (1, 1, C)
    out: Shapes = {f"att.{x}": vector for x in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")}
    for letter, rank in (("w", geometry.rank_w), ("a", geometry.rank_a), ("v", geometry.rank_v)):
        if letter != "v" or layer > 0:
            out |= {f"att.{letter}0": vector, f"att.{letter}1": (C, rank), f"att.{letter}2": (rank, C)}
    out |= {"att.g1": (C, geometry.rank_g), "att.g2": (geometry.rank_g, C)}
    out |= {"att.k_k": vector, "att.k_a": vector, "att.r_k": (C // N, N)}
    out |= {f"{linear}.weight": (C, C) for linear in V7.linears["att"]}
    out |= {"att.ln_x.weight": (C,), "att.ln_x.bias": (C,)}
    return out | {"ffn.x_k": vector, "ffn.key.weight": (F, C), "ffn.value.weight": (C, F)}


def attention_of_v5_and_v6(geometry: Geometry) -> Shapes:
    """What the two have in common."""
    C, N = geometry.n_embd, geometry.head_size
    return {
        "att.time_faaaa": (C // N, N),
        **{f"{linear}.weight": (C, C) for linear in V5.linears["att"]},
        **{"att.ln_x.weight": (C,), "att.ln_x.bias": (C,)},
    }


def channel_of_v5_and_v6(geometry: Geometry, mix: str) -> Shapes:
    """Return the shapes of a channel mix of RWKV-5 or -6."""
    C, F = geometry.n_embd, geometry.dim_ffn
    return {
        **{f"ffn.{mix}_{x}": (1, 1, C) for x in "kr"},
        **{"ffn.key.weight": (F, C), "ffn.receptance.weight": (C, C), "ffn.value.weight": (C, F)},
    }


def layer_of_v6(geometry: Geometry, layer: int) -> Shapes:
    """Return the shapes of a block of RWKV-6."""
    C = geometry.n_embd
    out: Shapes = {f"att.time_maa_{x}": (1, 1, C) for x in "xwkvrg"}
    out |= {"att.time_maa_w1": (C, 5 * geometry.rank_mix), "att.time_maa_w2": (5, geometry.rank_mix, C)}
    out |= {"att.time_decay": (1, 1, C)}
    out |= {"att.time_decay_w1": (C, geometry.rank_w), "att.time_decay_w2": (geometry.rank_w, C)}
    return out | attention_of_v5_and_v6(geometry) | channel_of_v5_and_v6(geometry, "time_maa")


def layer_of_v5(geometry: Geometry, layer: int) -> Shapes:
    """Return the shapes of a block of RWKV-5."""
    C, N = geometry.n_embd, geometry.head_size
    out: Shapes = {f"att.time_mix_{x}": (1, 1, C) for x in "kvrg"} | {"att.time_decay": (C // N, N)}
    return out | attention_of_v5_and_v6(geometry) | channel_of_v5_and_v6(geometry, "time_mix")


V7 = Arch(
    version="x070",
    number="v7",
    name="RWKV-7 (x070)",
    marker="blocks.0.att.r_k",
    heads="blocks.0.att.r_k",
    linears={
        "att": ("att.receptance", "att.key", "att.value", "att.output"),
        "ffn": ("ffn.key", "ffn.value"),
    },
    # RWKV-7 has no name with "time" in it: what that part means in v5 and v6 - the token-shift mixes, decays and their
    # low-rank parts - goes by these names here
    whole=EMB_AND_HEAD | NORMS | {"time": r"blocks\.\d+\.(att\.(x_[rwkvag]|[wav][012]|g[12]|k_k|k_a|r_k)|ffn\.x_k)"},
    lr_scales={r"blocks\.\d+\.att\.w0": 2.0},
    ranks={
        "rank_w": ("blocks.0.att.w1", 1),
        "rank_a": ("blocks.0.att.a1", 1),
        "rank_v": ("blocks.1.att.v1", 1),
        "rank_g": ("blocks.0.att.g1", 1),
    },
    layer=layer_of_v7,
    activations={"cpu": Activations(4.5, 10.5), "torch": Activations(12, 17)},
)
V6 = Arch(
    version="x060",
    number="v6",
    name="RWKV-6 (x060)",
    marker="blocks.0.att.time_maa_x",
    heads="blocks.0.att.time_faaaa",
    linears={
        "att": ("att.receptance", "att.key", "att.value", "att.gate", "att.output"),
        "ffn": ("ffn.key", "ffn.receptance", "ffn.value"),
    },
    whole=EMB_AND_HEAD
    | NORMS
    | {"time": r"blocks\.\d+\.(att\.time_(maa_([xwkvrg]|w[12])|decay(_w[12])?|faaaa)|ffn\.time_maa_[kr])"},
    lr_scales={r"blocks\.\d+\.att\.time_decay(_w[12])?": 2.0},
    ranks={"rank_mix": ("blocks.0.att.time_maa_w2", 1), "rank_w": ("blocks.0.att.time_decay_w1", 1)},
    layer=layer_of_v6,
    activations={"cpu": Activations(24, 10.5), "torch": Activations(30, 8)},
)
V5 = Arch(
    version="x052",
    number="v5",
    name="RWKV-5 (x052)",
    marker="blocks.0.att.time_mix_g",
    heads="blocks.0.att.time_faaaa",
    linears=V6.linears,
    whole=EMB_AND_HEAD | NORMS | {"time": r"blocks\.\d+\.(att\.time_(mix_[kvrg]|decay|faaaa)|ffn\.time_mix_[kr])"},
    lr_scales={r"blocks\.\d+\.att\.time_decay": 2.0},
    ranks={},
    layer=layer_of_v5,
    activations={"cpu": Activations(9, 10.5), "torch": Activations(12, 8)},
)
ARCHS = {arch.version: arch for arch in (V7, V6, V5)}
NUMBERS = {arch.version: arch.number for arch in ARCHS.values()}

# the state a block may begin with, learnt by state tuning: the WKV matrices [H, value, key], and the two token shifts [C]
STATE_NAME = re.compile(r"blocks\.\d+\.(att\.(time|ts)_state|ffn\.ts_state)")


def arch_of(geometry: Geometry) -> Arch:
    """Return the version of a model."""
    return ARCHS[geometry.version]


def shapes(geometry: Geometry) -> Shapes:
    """Every tensor of a file and its shape, in the order of the official trainer."""
    C = geometry.n_embd
    layer = ARCHS[geometry.version].layer
    out: Shapes = {"emb.weight": (geometry.vocab_size, C)}
    for i in range(geometry.n_layer):
        for ln in ("ln1", "ln2", *(["ln0"] if i == 0 else [])):
            out |= {f"blocks.{i}.{ln}.weight": (C,), f"blocks.{i}.{ln}.bias": (C,)}
        out |= {f"blocks.{i}.{name}": shape for name, shape in layer(geometry, i).items()}
    return out | {"ln_out.weight": (C,), "ln_out.bias": (C,), "head.weight": (geometry.vocab_size, C)}


def state_shapes(geometry: Geometry) -> Shapes:
    """The tensors of a learnt state, by name."""
    C, N = geometry.n_embd, geometry.head_size
    one = {"att.time_state": (C // N, N, N), "att.ts_state": (C,), "ffn.ts_state": (C,)}
    return {f"blocks.{i}.{name}": shape for i in range(geometry.n_layer) for name, shape in one.items()}


def detect(shapes_of_file: Mapping[str, tuple[int, ...]], where: str) -> Geometry:
    """The geometry of a file from its tensors' shapes. UserError when it is no RWKV, or not a whole one.

    shapes_of_file: tensor name -> shape. where: the file, for the message.
    """
    arch = next((arch for arch in ARCHS.values() if arch.marker in shapes_of_file), None)
    if other := other_version(shapes_of_file):
        raise UserError(f"{where}: is {other}; this kit works with {versions()}. Use another base: {OFFICIAL}.")
    if arch is None:
        raise UserError(f"{where}: {what_it_is(shapes_of_file)}")
    if of_web_rwkv(shapes_of_file):
        raise UserError(
            f"{where}: is a model in the form of web-rwkv and Ai00 (.st): its low-rank matrices are transposed, and of RWKV-5 "
            "and -6 some names are other ones. Use the .pth that it was made from."
        )
    try:
        layers = 1 + max(int(m[1]) for name in shapes_of_file if (m := re.match(r"blocks\.(\d+)\.", name)))
        heads, size = shapes_of_file[arch.heads]
        ranks = {
            field: shapes_of_file[name][axis]
            for field, (name, axis) in arch.ranks.items()
            if layers > 1 or not name.startswith("blocks.1.")
        }
        geometry = Geometry(
            version=arch.version,
            n_layer=layers,
            n_embd=heads * size,
            head_size=size,
            vocab_size=shapes_of_file["emb.weight"][0],
            dim_ffn=shapes_of_file["blocks.0.ffn.key.weight"][0],
            **ranks,
        )
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"{where}: looks like {arch.name}, but a tensor that gives its size is missing: {error}."
        ) from None
    wrong = misfits(shapes_of_file, shapes(geometry))
    states = state_shapes(geometry)
    wrong += misfits(shapes_of_file, {name: shape for name, shape in states.items() if name in shapes_of_file})
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{where}: is a damaged {arch.name} file: {'; '.join(wrong[:3])}{more}.")
    return geometry


def versions() -> str:
    """Return the names of all versions, for messages."""
    return join_names([arch.name for arch in ARCHS.values()])


# a part of a name that no official tensor of versions 5 to 7 has -> the version that has it
LATER = {
    "ffn.s_emb": "an RWKV-7 with DeepEmbed (x070a or x070b)",
    ".qkv.": "an RWKV-7 with DeepEmbedAttention (x070b)",
    "att.time_aaa": "an early draft of RWKV-7",
    "att.time_kkk": "an early draft of RWKV-7",
    ".rosa": "an RWKV-8 (ROSA)",
    "att.rosa": "an RWKV-8 (ROSA)",
}


def other_version(shapes_of_file: Mapping[str, tuple[int, ...]]) -> str:
    """Which other version of RWKV a whole model with the official names is, in words; "" for none."""
    block = {
        name.removeprefix("blocks.0."): shape for name, shape in shapes_of_file.items() if name.startswith("blocks.0.")
    }
    later = next((words for part, words in LATER.items() if any(part in name for name in shapes_of_file)), "")
    if later and "emb.weight" in shapes_of_file and block:
        return later
    decay = block.get("att.time_decay", ())
    if "att.time_mix_k" not in block and "att.time_mix_g" not in block:
        return ""
    if "att.time_mix_g" in block or "att.gate.weight" in block:
        return "RWKV-5.1" if decay and (len(decay) == 1 or decay[1] == 1) and decay[0] > 1 else ""
    return "RWKV-5.0" if "att.ln_x.weight" in block else "RWKV-4"


def of_web_rwkv(shapes_of_file: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether web-rwkv's converter has made a file.

    The low-rank matrices of RWKV-7 are [out, in] there, and those of RWKV-5 and -6 have other names.
    """
    if {"blocks.0.att.time_first", "blocks.0.att.time_mix_g"} <= {*shapes_of_file}:
        return True
    width = shapes_of_file.get("emb.weight", (0, 0))[-1]
    first, second = (shapes_of_file.get(f"blocks.0.att.{name}", (0, 0)) for name in ("w1", "w2"))
    return len(first) == len(second) == 2 and first[1] == second[0] == width and first[0] == second[1] != width


RUN_WORDS = (
    "Talk to it with ./chat.sh --adapter, fold it into its base with ./merge.sh, or go on from it with {}. MODEL_PATH names the "
    "base that it was trained on."
)
OFFICIAL = (
    "the official .pth (BlinkDL/rwkv7-g1 on Hugging Face, RWKV/rwkv7-g1 on ModelScope; model/README.md lists more)"
)


def what_it_is(shapes_of_file: Iterable[str]) -> str:
    """What a file without any version's marker seems to be, and what to do, in words behind its name."""
    names = list(shapes_of_file)
    if not names:
        return f"holds no tensor. Use {OFFICIAL}."
    if all(name.endswith(("time_state", "ts_state")) for name in names):
        return "is an adapter, not a model: a learnt state (state tuning). " + RUN_WORDS.format("state_load")
    if any(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names):
        return (
            "is an adapter of the peft package, not a model. The kit reads the checkpoint that it was made from "
            "(output/RUN/rwkv-N.pth); MODEL_PATH names the base."
        )
    if any(name.endswith(("lora_A", "lora_B", "disha", "bone", "lora_magnitude")) for name in names):
        load = "disha_load" if any(name.endswith(("disha", "bone")) for name in names) else "lora_load or pissa_load"
        return "is an adapter (what a run learnt), not a model. " + RUN_WORDS.format(load)
    if any(".attn.r_proj." in name or ".attn.r_k" in name or ".attn.x_r" in name for name in names):
        return (
            "is an RWKV-7 with the names of flash-linear-attention (fla, Hugging Face), which this version does not read: it "
            f"holds {join_names(names, 2)}. Use {OFFICIAL}; it has the same weights."
        )
    if any(re.search(r"\bblocks\.\d+\.attention\.", name) for name in names):
        marks = {"time_maa": "RWKV-6", "attention.gate": "RWKV-5"}
        version = next((words for mark, words in marks.items() if any(mark in name for name in names)), "RWKV-4")
        return f"is {version} with the names of the transformers library (Hugging Face). Use {OFFICIAL}."
    if any(part in name for name in names for part in (".self_attn.", ".mixer.", "attn.c_attn", ".attention.query")):
        other = "a model of another architecture (a transformer or Mamba), not RWKV"
        return f"is {other}: it holds {join_names(names, 3)}. Use {OFFICIAL}."
    if "emb.weight" in names and any(name.startswith("blocks.") for name in names):
        return (
            f"is an RWKV of a version that is not known, or only a part of a model. This kit works with {versions()}."
        )
    markers = join_names([arch.marker for arch in ARCHS.values()])
    return f"is not an RWKV model: it holds none of {markers}, but {join_names(names, 3)}."


def misfits(shapes_of_file: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is missing or has another shape, in words."""
    wrong = []
    for name, shape in wanted.items():
        if name not in shapes_of_file:
            wrong.append(f"{name} is missing")
        elif tuple(shapes_of_file[name]) != tuple(shape):
            wrong.append(f"{name} is {list(shapes_of_file[name])} instead of {list(shape)}")
    return wrong


def linear_layers(geometry: Geometry, parts: Iterable[str]) -> list[str]:
    """The layers of att and ffn that adapters wrap and that are quantised, in the order of the blocks."""
    linears = arch_of(geometry).linears
    chosen = [linear for part in parts for linear in linears.get(part, ())]
    return [f"blocks.{i}.{linear}" for i in range(geometry.n_layer) for linear in chosen]


def whole_tensors(geometry: Geometry, parts: Iterable[str]) -> list[str]:
    """The tensors that the given parts (time, ln, emb, head) train whole."""
    whole = arch_of(geometry).whole
    patterns = [re.compile(whole[part]) for part in parts if part in whole]
    return [name for name in shapes(geometry) if any(p.fullmatch(name) for p in patterns)]


def lr_scale(geometry: Geometry, name: str) -> float:
    """Return a tensor's learning-rate factor."""
    scales = arch_of(geometry).lr_scales
    return next((scale for pattern, scale in scales.items() if re.fullmatch(pattern, name)), 1.0)


def decays(name: str, shape) -> bool:
    """Return whether weight decay applies to a parameter.

    It applies to large matrices only, never to norms, vectors, states and the low-rank parts of the decay, as in the
    official trainer (tensors called .weight). An adapter's matrices count as large; they are recognised by their names,
    which go one level deeper (blocks.0.att.key.lora_A).
    """
    return len(shape) >= 2 and (name.endswith(".weight") or name.count(".") == 4)
