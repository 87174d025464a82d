"""The methods of Hugging Face's peft that we have not written: its layers, around ours, one at a time.

FINETUNE_MODE=peft trains what the JSON file of PEFT_CONFIG says, {"peft_type": "LOHA", "r": 8, "alpha": 16}. Which layers are
adapted is said in training.sh as for every other method, so nothing in that file may say it too. Only methods for which
the law of adapters was seen to hold are let in: a fresh adapter changes nothing, every trained tensor gets a gradient, and
what peft merges does what its layer did. tests/adapters/test_layers.py goes through the table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_peft.common import json_reader
from rwkv_peft.common.errors import UserError, pip_command
from rwkv_peft.common.formatting import did_you_mean, join_names
from rwkv_peft.common.paths import describe_missing, display_path
from rwkv_peft.model.layers import Linear

from .base import Adapter, AnyLinear, compute_dtype, device_of

INSTALL = pip_command('"peft==0.21.*"')
NAME = "default"  # peft's name for an unnamed adapter; it is part of its tensors' names
PROBES = 4  # random inputs that an adapter is asked for, to see whether it keeps its law
TOLERANCE = 1e-3  # of the size of the outputs; the methods of the table stay below 1e-5 in float32


@dataclass(frozen=True)
class Method:
    """A method of peft.

    Attributes:
        trained: Tensors that it may have, by peft's names without NAME.
        start: Tensors drawn at random once, and needed to merge.
        settings: What must be set to wrap a single layer, or for a fresh adapter to change nothing.
        only: The only settings that may differ from peft's defaults; empty if any may.
    """

    trained: tuple[str, ...]
    start: tuple[str, ...] = ()
    settings: dict = field(default_factory=dict)
    only: tuple[str, ...] = ()


METHODS = {
    "C3A": Method(("c3a_kernel",), settings={"init_weights": True}),
    "DEFT": Method(("deft_P", "deft_R")),
    "DELORA": Method(("delora_A", "delora_B", "delora_lambda")),
    "FOURIERFT": Method(("fourierft_spectrum",), ("indices",), {"init_weights": True}),
    "GRALORA": Method(("gralora_A", "gralora_B", "gralora_A_general_weight", "gralora_B_general_weight")),
    "HIRA": Method(("hira_A", "hira_B")),
    "HRA": Method(("hra_u",)),
    "IA3": Method(("ia3_l",), settings={"feedforward_modules": []}),
    "LOHA": Method(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
    "LOKR": Method(("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")),
    "LORA": Method(
        ("lora_A_weight", "lora_B_weight", "lora_magnitude_vector_weight"),
        only=("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights"),
    ),
    "MISS": Method(("miss_block",)),
    "OFT": Method(("oft_R_weight",)),
    "PEANUT": Method(("peanut_A_weight", "peanut_B_weight")),
    "ROAD": Method(("road_theta", "road_alpha")),
    "SHIRA": Method(("shira_weight",), ("shira_indices",)),
    "WAVEFT": Method(("waveft_spectrum",), ("waveft_indices",)),
}

PROMPTS = "it adds something to the prompt and changes no weight (FINETUNE_MODE=state does such a thing for RWKV)"
SHARED = "it shares tensors between layers, and here every layer stands alone"
REFUSED = {
    "ADALORA": "it moves ranks between layers during the training, by calls that this training loop does not make",
    "ADAMSS": "it needs calls during the training that this training loop does not make",
    "ADAPTION_PROMPT": PROMPTS,
    "BEFT": "it trains biases, and these layers have none",
    "BOFT": "it keeps a dense matrix of inputs x inputs for every layer, and compiles CUDA code of its own; OFT is its kin",
    "CARTRIDGE": PROMPTS,
    "CPT": PROMPTS,
    "FROD": SHARED,
    "LILY": SHARED,
    "LN_TUNING": "it trains whole weights; name ln among the parts to train with another method instead",
    "MULTITASK_PROMPT_TUNING": PROMPTS,
    "OSF": "it trains nearly whole weights",
    "P_TUNING": PROMPTS,
    "POLY": "it needs a task number with every row of the data",
    "PREFIX_TUNING": PROMPTS,
    "PROMPT_TUNING": PROMPTS,
    "PVERA": SHARED,
    "RANDLORA": SHARED,
    "SHADOW": SHARED,
    "TINYLORA": SHARED,
    "TRAINABLE_TOKENS": "it changes embeddings; name emb among the parts to train with another method instead",
    "UNILORA": SHARED,
    "VBLORA": SHARED,
    "VERA": SHARED,
    "XLORA": "it mixes adapters that were trained before",
}

PREPARED = ("corda", "eva", "lora_ga")  # ways to begin that look at data
# where a saved adapter_config.json says what it was made from, which is no setting of a method
NOTES = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config", "task_type",
)  # fmt: skip
# what says which layers, or treats layers differently: empty, or training.sh and this file would both say it
ELSEWHERE = (
    "alpha_pattern", "bias", "exclude_modules", "feedforward_modules", "layers_pattern", "layers_to_transform",
    "layer_replication", "modules_to_save", "n_frequency_pattern", "rank_pattern", "target_modules", "target_parameters",
    "trainable_token_indices",
)  # fmt: skip


def read_config(path: str | Path) -> dict:
    """Read the settings in the file of PEFT_CONFIG: peft_type, in capitals, and the method's own."""
    where = display_path(path)
    if not Path(path).is_file():
        raise UserError(f"{where}: {describe_missing(Path(path))}.")
    config = json_reader.read_json(path)
    example = 'It holds one object, like {"peft_type": "LOHA", "r": 8, "alpha": 16}.'
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise UserError(f"{where}: does not say which method of peft to use. {example}")
    name = config["peft_type"].upper()
    if name in REFUSED:
        raise UserError(f"{where}: peft_type {name} cannot be used here: {REFUSED[name]}. These can: {offered()}.")
    if name not in METHODS:
        meant = did_you_mean(name, METHODS)
        raise UserError(f"{where}: peft_type {name} is not known here{meant or '.'} These are: {offered()}.")
    config = {k: v for k, v in config.items() if k not in (*NOTES, "peft_type")}
    for setting in ELSEWHERE:
        if config.pop(setting, None) not in (None, [], {}, "none"):
            raise UserError(
                f"{where}: take {setting} out of this file. Which layers are adapted is said in training.sh, and all of "
                "them in the same way."
            )
    known = {field.name for field in fields(config_class(name))}
    for setting in config:
        if setting not in known:
            meant = did_you_mean(setting, known)
            raise UserError(
                f"{where}: {name} has no setting {setting}{meant or '.'} It has: {join_names(set(known) - set(ELSEWHERE), 40)}."
            )
    default = config_class(name)()
    for setting in METHODS[name].only and set(config) - set(METHODS[name].only):
        if config[setting] != getattr(default, setting):
            raise UserError(f"{where}: {setting} of {name} cannot be set here, only {join_names(METHODS[name].only)}.")
    for setting, value in METHODS[name].settings.items():
        if config.setdefault(setting, value) != value:
            raise UserError(
                f"{where}: {setting} must be {json.dumps(value)}, or left out: otherwise a fresh {name} adapter would change "
                "what the model says before it has learnt anything."
            )
    begins = str(config.get("init_lora_weights")).lower()
    if begins in PREPARED:
        raise UserError(
            f"{where}: init_lora_weights={begins} begins with what peft has gathered from data beforehand, by calls that this "
            "training loop does not make. Leave it out, or take FINETUNE_MODE=pissa."
        )
    config = {"peft_type": name, **config}
    try:
        peft_config(config)
    except Exception as error:  # peft checks its settings in many ways
        raise UserError(f"{where}: peft does not take these settings: {error}") from error
    return config


def offered() -> str:
    """Return the names of the methods, for messages."""
    return join_names(METHODS, len(METHODS))


class PeftLayer(Adapter):
    """One linear layer and peft's layer of it.

    `tensors` and `start` of the class are all that any method may have; those of an instance are what it has.

    peft's layer is kept out of the module tree; its tensors are here, under the names they have in files. For each call
    it gets them in the dtype of the sum, and `Stand` in place of its base layer. So the model may be moved, and the
    layer below be quantised later, as with any other adapter.
    """

    tensors = tuple(dict.fromkeys(n for method in METHODS.values() for n in method.trained))
    start = tuple(dict.fromkeys(n for method in METHODS.values() for n in method.start))
    row_axes = None
    inner: Any  # peft's layer
    stand: Stand

    def __init__(self, linear: Linear, config: dict, start: dict[str, Tensor] | None = None):
        super().__init__(linear)
        kind = config["peft_type"]
        stand = Stand(linear)
        inner = injected(stand, config, device_of(linear))
        self.__dict__.update(inner=inner, stand=stand)  # not as submodules
        inside, plain = tensors_of(inner), plain_tensors(inner)
        strange = [n for n, t in inside.items() if is_trained(t) and leaf(n) not in METHODS[kind].trained]
        if strange:
            raise UserError(f"With these settings {kind} trains {join_names(strange)}, which is not supported here.")
        self.tensors = tuple(leaf(n) for n, t in inside.items() if is_trained(t))
        self.start = METHODS[kind].start
        self.lent = {leaf(n): n for n in inside}
        self.plain = tuple(plain)
        for name, tensor in inside.items():
            if isinstance(tensor, nn.Parameter) and is_trained(tensor):
                self.register_parameter(leaf(name), tensor)
            else:
                self.register_buffer(leaf(name), tensor.detach(), persistent=False)
        for name, tensor in plain.items():
            self.register_buffer(name, tensor, persistent=False)
        for name in self.start if start is not None else ():
            assert start is not None
            own = getattr(self, name)
            if name not in start or start[name].shape != own.shape:
                raise UserError(f"What this {kind} run began with does not fit: {name} is missing or of another shape.")
            setattr(self, name, start[name].to(own))
        self.must_change_nothing(kind)

    @torch.no_grad()
    def must_change_nothing(self, kind: str) -> None:
        """Some settings begin at random, and some by changing the base: neither can be merged here, or trusted."""
        self.eval()
        x = probes(self.linear)
        before, after = self.linear(x), self(x)
        self.train()
        if not difference(after, before) <= TOLERANCE:  # NaN is refused too
            raise UserError(
                f"With these settings a fresh {kind} adapter changes what the model says before it has learnt "
                "anything. Leave out its settings for initial weights; some methods also need an even r."
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted layer's output, [..., out]."""
        kind = compute_dtype(x.dtype)
        lent = {n: as_kind(getattr(self, name), kind) for name, n in self.lent.items()}
        for name in self.plain:
            vars(self.inner)[name][NAME] = getattr(self, name)
        self.stand.lend(self.linear, x.dtype, kind)
        return torch.func.functional_call(self.inner, lent, (x.to(kind),)).to(x.dtype)

    def train(self, mode: bool = True) -> PeftLayer:
        """Switch peft's layer as well."""
        self.inner.train(mode)
        return super().train(mode)

    @staticmethod
    def shapes(outputs: int, inputs: int, config: dict) -> dict[str, tuple[int, ...]]:
        """Return the trained tensors' shapes by name."""
        inner = injected(Linear(inputs, outputs), config, torch.device("cpu"))
        return {leaf(name): tuple(t.shape) for name, t in tensors_of(inner).items() if is_trained(t)}

    @classmethod
    def starts(cls, **options: Any) -> tuple[str, ...]:
        """Return the names of the start tensors."""
        return METHODS[options["config"]["peft_type"]].start

    @staticmethod
    def refusal(outputs: int, inputs: int, config: dict) -> str:
        """Tries the law on a layer of this size: settings of peft are many, and some combinations do not keep it."""
        try:
            must_keep_its_law(outputs, inputs, config)
        except UserError as error:
            return str(error)
        return ""

    def begun(self) -> dict[str, Tensor]:
        """Return copies of the start tensors."""
        return {name: getattr(self, name).clone() for name in self.start}

    @staticmethod
    def merge(weight: Tensor, tensors: dict[str, Tensor], sidecar: Mapping[str, Any]) -> Tensor:
        """As peft merges a plain linear layer of this weight, in float32 (float64 if the weight is)."""
        kind = compute_dtype(weight.dtype)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight.detach().to(kind, copy=True), requires_grad=False)
        inner = injected(linear, sidecar["config"], weight.device)
        with torch.no_grad():
            for name, tensor in tensors_of(inner).items():
                if is_trained(tensor):
                    tensor.data = as_kind(tensors[leaf(name)], kind)
            for name in METHODS[sidecar["config"]["peft_type"]].start:
                vars(inner)[name][NAME] = tensors[name]
            inner.eval()
            inner.merge()
        return linear.weight.detach()


def must_keep_its_law(outputs: int, inputs: int, config: dict) -> None:
    """UserError unless an adapter with these settings begins as its base, merges into what it does, and learns."""
    base = Linear(inputs, outputs).requires_grad_(False)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base.weight.normal_(std=base.in_features**-0.5)
        layer = PeftLayer(base, config).eval()
        for name in layer.tensors:
            moved = getattr(layer, name)
            moved.add_(torch.randn_like(moved), alpha=0.05)
        kept = {name: getattr(layer, name) for name in (*layer.tensors, *layer.start)}
        merged = PeftLayer.merge(base.weight, kept, {"config": config})
        x = probes(base)
        wrong = difference(F.linear(x, merged), layer(x))
    layer(x).square().sum().backward()
    still = [
        name
        for name in layer.tensors
        if not (getattr(layer, name).grad is not None and getattr(layer, name).grad.any())
    ]
    shut = [name for name, share in config.items() if "dropout" in name and share == 1]
    if still or shut:
        why = f"{join_names(still)} never gets a gradient. Is an alpha 0?" if still else f"{join_names(shut)} is 1."
        raise UserError(f"With these settings {config['peft_type']} learns nothing: {why}")
    if not wrong <= TOLERANCE:
        raise UserError(
            f"With these settings what peft merges for {config['peft_type']} is not what its layer does (outputs differ by "
            f"{wrong:.0%}). Leave out the less common ones."
        )


class Stand(nn.Linear):
    """What peft takes for its base layer: asks the real one, in the dtype of the input that the adapter was given."""

    linear: AnyLinear
    inputs: torch.dtype
    sums: torch.dtype

    def __init__(self, linear: Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", None)
        self.lend(linear, torch.float32, torch.float32)

    def lend(self, linear: AnyLinear, inputs: torch.dtype, sums: torch.dtype) -> None:
        """Give the layer and dtypes of the next call."""
        self.__dict__.update(linear=linear, inputs=inputs, sums=sums)

    @property  # peft reads its base layer's weight, and nothing sets it
    def weight(self) -> Tensor:  # type: ignore[override]
        """The layer's weight, in the dtype of the sums."""
        return self.linear.dense(self.sums).detach()

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        return self.linear(x.to(self.inputs)).to(x.dtype)


def peft_config(config: dict):
    """Peft's own object for settings as read_config gives them."""
    settings = {k: v for k, v in config.items() if k != "peft_type"}
    kind = config_class(str(config.get("peft_type")))
    try:
        return kind(target_modules=["layer"], **settings)
    except TypeError as error:
        raise UserError(f"peft does not take these settings: {error}") from None


def config_class(name: str) -> Any:
    """Return peft's configuration class of a method. Raises UserError if peft does not have it."""
    try:
        from peft import PeftType
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ModuleNotFoundError as error:
        raise UserError(f"FINETUNE_MODE=peft needs the package peft: {INSTALL}") from error
    if name not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise UserError(f"This version of peft has no {name}: {INSTALL}")
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)]


def injected(linear: nn.Linear | Linear, config: dict, device: torch.device) -> Any:
    """Peft's layer around this linear one, on this device."""
    settings = peft_config(config)
    from peft import inject_adapter_in_model

    holder = nn.Module()
    holder.layer = linear
    # peft takes the device of a model's first parameter for the model's
    holder.place = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
    try:
        inject_adapter_in_model(settings, holder, adapter_name=NAME)
    # its methods refuse settings in all these ways; the message says which, and the error is its cause
    except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        shape = f"{linear.out_features} x {linear.in_features}"
        raise UserError(f"peft cannot put {config['peft_type']} on a layer of {shape}: {error}") from error
    return holder.layer


def tensors_of(inner: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of peft's layer without those of the layer below it."""
    both = (*inner.named_parameters(), *inner.named_buffers())
    return {name: tensor for name, tensor in both if not name.startswith("base_layer.")}


def plain_tensors(inner: nn.Module) -> dict[str, Tensor]:
    """What it keeps in ordinary dicts: places drawn at random, which no state dict holds."""
    kept = {name: value.get(NAME) for name, value in vars(inner).items() if isinstance(value, dict)}
    return {name: tensor for name, tensor in kept.items() if isinstance(tensor, Tensor)}


def leaf(name: str) -> str:
    """lora_A.default.weight -> lora_A_weight: in our files the last dot ends the name of the layer."""
    return "_".join(part for part in name.split(".") if part != NAME)


def is_trained(tensor: Tensor) -> bool:
    """Return whether a tensor is a trained parameter."""
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad


def as_kind(tensor: Tensor, kind: torch.dtype) -> Tensor:
    """Cast a floating-point tensor; return others unchanged."""
    return tensor.to(kind) if tensor.is_floating_point() else tensor


def probes(linear: AnyLinear) -> Tensor:
    """Return fixed random inputs of a layer, [PROBES, in]."""
    x = torch.randn(PROBES, linear.in_features, generator=torch.Generator().manual_seed(0))
    return x.to(device_of(linear))


def difference(a: Tensor, b: Tensor) -> float:
    """Of two sets of outputs, in units of the second's size; of a layer of zeros, in units of about its inputs' size."""
    return float((a - b).norm() / b.norm().clamp_min(1.0))
