"""The settings of training.sh: names, types and bounds, in the order of the script. Their values are in the script.

A value or a variable that other kits know, and that this version does not have, is refused with what to use instead.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

from rwkv_peft.adapters.specs import METHODS, MODES, MOST_ALPHA, OPTIMS, QUANT_ALIASES, QUANTS, method_of
from rwkv_peft.common.errors import SettingError
from rwkv_peft.model.arch import NUMBERS

from .shell import MOST, parse_numbers, setting, split_words
from .strategies import STRATEGIES, resolve_strategy
from .train_checks import EXTREME_LAYER, find_problems

# variable of older scripts -> what replaces it
RETIRED = {
    "FLA": "is retired; choose the kernels with OP",
    "DEEPSPEED_STRATEGY": "is called STRATEGY here",
    "EPOCH_BEGIN": "is retired: it only renamed files and loaded nothing; go on from a checkpoint with lora_load",
    "LOAD": "is retired; use lora_load",
    "train_parts": "is called lora_parts here",
    "LORA_ALPHA": "is called lora_alpha here",
    "NUM_NODES": "is called NNODES here",
    "NPROC_PER_NODE": "is called GPU_COUNT here",
    "VAL_PERCENT": "is VALID_PERCENT in make_tokenize.sh, which puts held-out rows into NAME.valid",
}

_MAX_WORKERS = 64


@dataclass(frozen=True)
class TrainConfig:
    """The settings of training.sh, in its order."""

    finetune_mode: str = setting(
        "FINETUNE_MODE",
        choices=MODES,
        refused={
            "dora": "is FINETUNE_MODE=lora with use_dora=1",
            "rslora": "is FINETUNE_MODE=lora with use_rslora=1",
            "qlora": "is FINETUNE_MODE=lora with QUANT=nf4",
        },
    )
    lora_parts: str = setting("lora_parts")
    emb_finetune: bool = setting("EMB_FINETUNE")
    model_path: str = setting("MODEL_PATH", resume="content", per_node=True)
    data_path: str = setting("DATA_PATH", resume="content", per_node=True)
    run_name: str = setting("RUN_NAME", resume="free")

    model_version: str = setting(
        "MODEL_VERSION",
        choices=("auto", *NUMBERS.values()),
        refused={"v4": "is not part of this version yet; it has v7, v6 and v5"},
    )
    n_layer: Literal["auto"] | int = setting("N_LAYER", ge=1, le=MOST)
    embd_size: Literal["auto"] | int = setting("EMBD_SIZE", ge=1, le=MOST)
    vocab_size: Literal["auto"] | int = setting("VOCAB_SIZE", ge=1, le=MOST)

    vocabulary: Literal["world", "own"] = setting("VOCABULARY", resume="free")

    ctx_len: Literal["auto"] | int = setting("CTX_LEN", ge=1, le=MOST)
    overlong: Literal["truncate", "truncate-left", "drop", "split"] = setting("OVERLONG")
    dataload: Literal["pack", "bucket", "pad", "only", "get"] = setting("DATALOAD")
    pack: Literal["isolated", "concat"] = setting("PACK")
    train_lengths: str = setting("TRAIN_LENGTHS")
    train_batch_sizes: str = setting("TRAIN_BATCH_SIZES")
    token_budget: Literal["auto"] | int = setting("TOKEN_BUDGET", ge=1, le=MOST)
    magic_prime: bool = setting("MAGIC_PRIME")
    loss_mask: Literal["qa", "last", "pad", "none", "se"] = setting("LOSS_MASK")
    mask_start: str = setting("MASK_START")
    mask_end: str = setting("MASK_END")
    data_shuffle: bool = setting("DATA_SHUFFLE")
    seed: int = setting("SEED", ge=0, le=2**31 - 1)
    streaming: bool = setting("STREAMING")
    max_steps: int = setting("MAX_STEPS", resume="free", ge=0, le=MOST)
    stream_buffer: int = setting("STREAM_BUFFER", ge=1, le=MOST)
    train_type: Literal["none", "infctx"] = setting("TRAIN_TYPE", refused={"state": "is FINETUNE_MODE=state_tuning"})
    chunk_ctx: int = setting("CHUNK_CTX", ge=1, le=MOST)
    infctx_grad: Literal["detach", "full"] = setting("INFCTX_GRAD")

    epoch_count: int = setting("EPOCH_COUNT", resume="free", ge=1, le=MOST)
    epoch_steps: Literal["auto"] | int = setting("EPOCH_STEPS", resume="split", ge=1, le=MOST)
    epoch_save: int = setting("EPOCH_SAVE", resume="free", ge=1, le=MOST)
    save_steps: int = setting("SAVE_STEPS", resume="free", ge=0, le=MOST)
    keep_last: int = setting("KEEP_LAST", resume="free", ge=0, le=1000)
    micro_bsz: Literal["auto"] | int = setting("MICRO_BSZ", resume="split", ge=1, le=MOST)
    mini_bsz: int = setting("MINI_BSZ", resume="split", ge=1, le=MOST)

    lr_init: float = setting("LR_INIT", ge=0)
    lr_final: float = setting("LR_FINAL", ge=0)
    lr_schedule: Literal["cos", "wsd", "exp", "linear", "constant"] = setting("LR_SCHEDULE")
    warmup_steps: int = setting("WARMUP_STEPS", ge=0, le=MOST)
    optim: str = setting("OPTIM", choices=tuple(OPTIMS))
    beta1: float = setting("BETA1", ge=0, lt=1)
    beta2: float = setting("BETA2", ge=0, lt=1)
    adam_eps: float = setting("ADAM_EPS", gt=0)
    weight_decay: float = setting("WEIGHT_DECAY", ge=0)
    grad_clip: float = setting("GRAD_CLIP", ge=0)
    nan_limit: int = setting("NAN_LIMIT", resume="free", ge=1)

    lora_r: int = setting("lora_r", ge=1, le=MOST)
    lora_alpha: float = setting("lora_alpha", gt=0, le=MOST_ALPHA)
    lora_dropout: float = setting("lora_dropout", ge=0, lt=1)
    use_rslora: bool = setting("use_rslora")
    use_dora: bool = setting("use_dora")
    loraplus_lr_ratio: float = setting("loraplus_lr_ratio", gt=0, le=MOST)
    lora_load: str = setting("lora_load")

    pissa_r: int = setting("pissa_r", ge=1, le=MOST)
    svd_niter: int = setting("svd_niter", ge=0, le=1000)
    pissa_load: str = setting("pissa_load")
    pissa_init: str = setting("pissa_init")

    disha_r: int = setting("disha_r", ge=1, le=MOST)
    disha_load: str = setting("disha_load")

    state_shifts: bool = setting("state_shifts")
    state_load: str = setting("state_load")

    lisa_r: int = setting("lisa_r", ge=1, le=MOST)
    lisa_k: int = setting("lisa_k", ge=1, le=MOST)

    peft_config: str = setting("PEFT_CONFIG")
    peft_load: str = setting("peft_load")

    precision: Literal["auto", "bf16", "fp16", "fp32", "tf32"] = setting("PRECISION")
    quant: str = setting(
        "QUANT",
        choices=("none", *QUANTS, *QUANT_ALIASES),
        refused={"int4": "is QUANT=nf4, the usual 4 bits", "8bit": "is QUANT=int8"},
    )
    quant_parts: str = setting("QUANT_PARTS")
    op: Literal["auto", "cuda", "fla", "cpu", "torch", "reference"] = setting(
        "OP", resume="free", refused={"triton": "is not part of this version yet; it has auto, cuda and fla"}
    )
    grad_cp: Literal["0", "1", "selective"] = setting("GRAD_CP", resume="free")
    emb_on_cpu: Literal["auto", "0", "1"] = setting("EMB_ON_CPU", resume="free", per_node=True)
    cuda_graphs: bool = setting("CUDA_GRAPHS", resume="free")
    gpu_count: int = setting("GPU_COUNT", resume="split", ge=1, le=MOST)
    nnodes: int = setting("NNODES", resume="split", ge=1, le=MOST)
    node_rank: int = setting("NODE_RANK", resume="free", per_node=True, ge=0, le=MOST)
    master_addr: str = setting("MASTER_ADDR", resume="free", per_node=True)
    master_port: Literal["auto"] | int = setting("MASTER_PORT", resume="free", ge=1, le=65535)
    gloo_socket_ifname: str = setting("GLOO_SOCKET_IFNAME", resume="free", per_node=True)
    nccl_socket_ifname: str = setting("NCCL_SOCKET_IFNAME", resume="free", per_node=True)
    strategy: str = setting("STRATEGY", resume="free", choices=("auto", *STRATEGIES))
    num_workers: Literal["auto"] | int = setting("NUM_WORKERS", resume="free", per_node=True, ge=0, le=_MAX_WORKERS)
    val_data: str = setting("VAL_DATA", resume="free", per_node=True)
    val_steps: int = setting("VAL_STEPS", resume="free", ge=0)
    val_patience: int = setting("VAL_PATIENCE", resume="free", ge=0)
    keep_best: bool = setting("KEEP_BEST", resume="free")
    sample_prompts: str = setting("SAMPLE_PROMPTS", resume="free")
    sample_steps: int = setting("SAMPLE_STEPS", resume="free", ge=0)
    sample_tokens: int = setting("SAMPLE_TOKENS", resume="free", ge=1, le=MOST)
    wandb: str = setting("WANDB", resume="free", tracker="wandb")
    tensorboard: bool = setting("TENSORBOARD", resume="free", tracker="tensorboard")
    swanlab: str = setting("SWANLAB", resume="free", tracker="swanlab")
    trackio: str = setting("TRACKIO", resume="free", tracker="trackio")

    @property
    def method(self) -> str:
        """A key of specs.METHODS."""
        return method_of(self.finetune_mode, self.use_dora)

    @property
    def adapter_options(self) -> dict[str, Any]:
        """The settings of the method by the keywords of its adapter, as sidecars have them. That of peft is a file's name."""
        return {option: self._value(variable) for option, variable in METHODS[self.method].options.items()}

    @property
    def adapter_dropout(self) -> float | None:
        """The dropout of the method, or None if it has none."""
        variable = METHODS[self.method].dropout
        return self._value(variable) if variable else None

    @property
    def adapter_load(self) -> str:
        """The checkpoint of the method to start from, or ""."""
        variable = METHODS[self.method].load
        return self._value(variable) if variable else ""

    def _value(self, variable: str) -> Any:
        return next(getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["var"] == variable)

    @property
    def trackers(self) -> dict[str, str]:
        """Tracker -> project, for those to use; keys of common.trackers.TRACKERS."""
        values = {f.metadata["tracker"]: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: "files" if value is True else value for name, value in values.items() if name and value}

    @property
    def processes(self) -> int:
        """The number of processes on all nodes."""
        return self.gpu_count * self.nnodes

    @property
    def strategy_name(self) -> str:
        """A key of strategies.STRATEGIES."""
        return resolve_strategy(self.strategy, self.processes)

    @property
    def parts(self) -> tuple[str, ...]:
        """The trained parts: att and ffn get adapters, the others are trained whole; () if the method allows no choice."""
        if not METHODS[self.method].parts:
            return ()
        return tuple(dict.fromkeys((*split_words(self.lora_parts), *(("emb", "head") if self.emb_finetune else ()))))

    @property
    def quantised(self) -> str:
        """none, or a key of quantize.MODES."""
        return QUANT_ALIASES.get(self.quant, self.quant)

    @property
    def quantised_parts(self) -> tuple[str, ...]:
        """The parts of the base that are quantised."""
        return tuple(w for w in split_words(self.quant_parts) if w != EXTREME_LAYER) if self.quant != "none" else ()

    @property
    def quant_kept(self) -> tuple[str, ...]:
        """The layers of these parts that are not quantised."""
        four_bits = self.quantised in ("nf4", "fp4") and "att" in self.quantised_parts
        return (EXTREME_LAYER,) if four_bits and EXTREME_LAYER not in split_words(self.quant_parts) else ()

    @property
    def lengths(self) -> tuple[int, ...]:
        """TRAIN_LENGTHS; empty for auto."""
        return parse_numbers(self.train_lengths)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """TRAIN_BATCH_SIZES; empty for auto."""
        return parse_numbers(self.train_batch_sizes)

    @staticmethod
    def problems(values: SimpleNamespace) -> list[SettingError]:
        """Return what is wrong with combinations of settings; see Script.read."""
        projects = {
            f.metadata["var"]: getattr(values, f.name) for f in dataclasses.fields(TrainConfig) if f.metadata["tracker"]
        }
        return find_problems(values, projects)
