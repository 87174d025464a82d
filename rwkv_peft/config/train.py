"""What training.sh may say: names, types, bounds and cross-rules, in the order of the script. Values live in the script.

A value or a variable of the field that this version does not have yet is refused by name, with what to do instead.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

from rwkv_peft.adapters.specs import (
    METHODS,
    MODES,
    MOST_ALPHA,
    OPTIMS,
    PARTS,
    QUANT_ALIASES,
    QUANTS,
    load_variables,
    method_of,
)
from rwkv_peft.common.errors import SettingError
from rwkv_peft.common.names import fault
from rwkv_peft.common.paths import is_utf8
from rwkv_peft.model.arch import NUMBERS

from .shell import MOST, parse_value, setting
from .strategies import STRATEGIES, chosen

NOT_YET = "is not part of this version yet; it has {}"


def refused(words: str, has: str) -> dict[str, str]:
    return {word: NOT_YET.format(has) for word in words.split()}


# variables of older scripts: what became of them
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

MOST_WORKERS = 64
EDGE = 16  # TRAIN_LENGTHS are multiples of this: GPU kernels want it
QUANT_PARTS = ("att", "ffn", "emb", "head")
# One channel of this layer's input is some 7e6 times the median; a 2.9B model in 4 to 5 bits loses 2.43 % with it left as it is,
# and 4.04 % without (rwkv-quant 0.3.0, 2026)
EXTREME, FOUR_BITS = "blocks.0.att.output", ("nf4", "fp4")


@dataclass(frozen=True)
class TrainConfig:
    """All that training.sh says, in its order."""

    finetune_mode: Literal[MODES] = setting(
        "FINETUNE_MODE",
        later={
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

    model_version: Literal[("auto", *NUMBERS.values())] = setting("MODEL_VERSION", later=refused("v4", "v7, v6 and v5"))
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
    train_type: Literal["none", "infctx"] = setting("TRAIN_TYPE", later={"state": "is FINETUNE_MODE=state_tuning"})
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
    optim: Literal[tuple(OPTIMS)] = setting("OPTIM")
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
    quant: Literal[("none", *QUANTS, *QUANT_ALIASES)] = setting(
        "QUANT", later={"int4": "is QUANT=nf4, the usual 4 bits", "8bit": "is QUANT=int8"}
    )
    quant_parts: str = setting("QUANT_PARTS")
    op: Literal["auto", "cuda", "fla", "cpu", "torch", "reference"] = setting(
        "OP", resume="free", later=refused("triton", "auto, cuda and fla")
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
    strategy: Literal[("auto", *STRATEGIES)] = setting("STRATEGY", resume="free")
    num_workers: Literal["auto"] | int = setting("NUM_WORKERS", resume="free", per_node=True, ge=0, le=MOST_WORKERS)
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
        """A name in methods.METHODS."""
        return method_of(self.finetune_mode, self.use_dora)

    @property
    def trackers(self) -> dict[str, str]:
        """Those that are asked for -> the project there; keys of training.trackers.OPEN."""
        values = {f.metadata["tracker"]: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: "files" if value is True else value for name, value in values.items() if name and value}

    @property
    def processes(self) -> int:
        """Of the whole training, on all machines."""
        return self.gpu_count * self.nnodes

    @property
    def strategy_name(self) -> str:
        """A key of strategies.STRATEGIES."""
        return chosen(self.strategy, self.processes)

    @property
    def parts(self) -> tuple[str, ...]:
        """What is trained: att and ffn get the method's adapters, the others are trained whole; () where the method
        leaves no choice.
        """
        if not METHODS[self.method].parts:
            return ()
        return tuple(dict.fromkeys((*words_of(self.lora_parts), *(("emb", "head") if self.emb_finetune else ()))))

    @property
    def quantised(self) -> str:
        """none, or a mode of quantize.MODES."""
        return QUANT_ALIASES.get(self.quant, self.quant)

    @property
    def quantised_parts(self) -> tuple[str, ...]:
        return tuple(w for w in words_of(self.quant_parts) if w != EXTREME) if self.quant != "none" else ()

    @property
    def quant_kept(self) -> tuple[str, ...]:
        """Layers of these parts that are left as they are."""
        kept = (
            self.quantised in FOUR_BITS and "att" in self.quantised_parts and EXTREME not in words_of(self.quant_parts)
        )
        return (EXTREME,) if kept else ()

    @property
    def lengths(self) -> tuple[int, ...]:
        """TRAIN_LENGTHS; empty for auto."""
        return numbers(self.train_lengths)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """TRAIN_BATCH_SIZES; empty for auto."""
        return numbers(self.train_batch_sizes)

    @staticmethod
    def problems(given: SimpleNamespace) -> list[SettingError]:
        """What no single variable can tell. given: the values that are sound, None where one is not."""
        found = []

        def rule(broken, name: str, message: str) -> None:
            if broken:
                found.append(SettingError(name, message))

        for name, value in (("VAL_PATIENCE", given.val_patience), ("KEEP_BEST", given.keep_best)):
            rule(given.val_data == "none" and value, name, "needs held-out data; VAL_DATA is none")
        for name, value in (
            ("MODEL_PATH", given.model_path),
            ("DATA_PATH", given.data_path),
            ("VAL_DATA", given.val_data),
        ):
            rule(value is not None and not value.strip(), name, "is empty; give a name in model/ or data/, or a path")
        rule(
            given.run_name in (".", "..", "latest") or "/" in (given.run_name or ""),
            "RUN_NAME",
            'must be a plain folder name (no "/", not latest)',
        )
        projects = [
            (f.metadata["var"], getattr(given, f.name))
            for f in dataclasses.fields(TrainConfig)
            if f.metadata["tracker"]
        ]
        for name, value in (("RUN_NAME", given.run_name), *(pair for pair in projects if isinstance(pair[1], str))):
            rule(wrong := fault(value or ""), name, f"{wrong}; choose another name")
        for name, value in (("MASTER_ADDR", given.master_addr), ("MODEL_PATH", given.model_path)):
            rule(wrong := fault(value or "", edges=False), name, wrong)
        eps = ctypes.c_float(given.adam_eps or 1).value
        rule(not eps, "ADAM_EPS", "is 0 in float32, in which optimizers compute; must be 1e-45 or more")
        rule(
            math.isinf(eps), "ADAM_EPS", "is infinite in float32, in which optimizers compute: nothing would be learnt"
        )
        found += (
            data_problems(given)
            + stream_problems(given)
            + method_problems(given)
            + quant_problems(given)
            + embedding_problems(given)
            + graph_problems(given)
        )
        exp = given.lr_schedule == "exp" and given.lr_init is not None and given.lr_final is not None
        rule(exp and not given.lr_init, "LR_INIT", "must be more than 0 with LR_SCHEDULE=exp")
        rule(exp and not given.lr_final, "LR_FINAL", "must be more than 0 with LR_SCHEDULE=exp")
        return found + strategy_problems(given)


def words_of(text: str) -> tuple[str, ...]:
    """Words with commas or spaces between."""
    return tuple(text.replace(",", " ").split())


def method_problems(given: SimpleNamespace) -> list[SettingError]:
    """What does not go with the method; a setting of another method that would do nothing is refused."""
    found = []

    def rule(broken, name: str, message: str) -> None:
        if broken:
            found.append(SettingError(name, message))

    parts = words_of(given.lora_parts or "")
    wrong = [word for word in parts if word not in PARTS]
    rule(wrong, "lora_parts", f"must be words of {', '.join(PARTS)}, with commas between")
    mode = given.finetune_mode
    if mode is None:
        return found
    name = method_of(mode, bool(given.use_dora))
    method, chosen = METHODS[name], f"FINETUNE_MODE={mode}"
    adapted = {"att", "ffn"} & set(parts)
    if method.parts and not wrong and given.lora_parts is not None:
        rule(
            (method.wraps or name == "lisa") and not adapted,
            "lora_parts",
            f"must name att or ffn, or {method.words} has no layer; FINETUNE_MODE=none trains whole tensors only",
        )
        rule(
            name == "none" and adapted,
            "lora_parts",
            f"must not name {' and '.join(sorted(adapted))} with FINETUNE_MODE=none, which has no adapters for them",
        )
        rule(
            name == "none" and not parts and not given.emb_finetune, "lora_parts", "is empty: nothing would be trained"
        )
    rule(
        not method.parts and given.emb_finetune,
        "EMB_FINETUNE",
        f"must be 0 with {chosen}, which trains {'emb and head anyway' if name == 'full' else 'states only'}",
    )
    for variable, modes in load_variables().items():
        value = getattr(given, variable)
        if value and mode not in modes:
            instead = method.load or "MODEL_PATH (its checkpoints are whole models)"
            rule(
                True,
                variable,
                f'belongs to FINETUNE_MODE={" or ".join(modes)}; must be "" with {chosen}, which has {instead}',
            )
    lora = name in ("lora", "dora")
    for variable, value, neutral in (
        ("use_rslora", given.use_rslora, 0),
        ("use_dora", given.use_dora, 0),
        ("loraplus_lr_ratio", given.loraplus_lr_ratio, 1),
    ):
        rule(
            value not in (None, neutral) and not lora,
            variable,
            f"belongs to FINETUNE_MODE=lora; must be {neutral} with {chosen}",
        )
    rule(
        given.pissa_init and name != "pissa", "pissa_init", f'belongs to FINETUNE_MODE=pissa; must be "" with {chosen}'
    )
    rule(
        given.state_shifts and name != "state",
        "state_shifts",
        f"belongs to FINETUNE_MODE=state_tuning; must be 0 with {chosen}",
    )
    rule(
        given.peft_config and name != "peft", "PEFT_CONFIG", f'belongs to FINETUNE_MODE=peft; must be "" with {chosen}'
    )
    rule(
        name == "peft" and given.peft_config == "",
        "PEFT_CONFIG",
        "is empty; FINETUNE_MODE=peft needs a file, like lokr.json",
    )
    for variable, value in (("GPU_COUNT", given.gpu_count), ("NNODES", given.nnodes)):
        rule(
            name == "lisa" and value not in (None, 1),
            variable,
            "must be 1 with FINETUNE_MODE=lisa: which weights are trained changes on the way, and several processes cannot "
            "follow",
        )
    return found


def strategy_problems(given: SimpleNamespace) -> list[SettingError]:
    """What does not go with the way processes share the training."""
    found = []

    def rule(broken, name: str, message: str) -> None:
        if broken:
            found.append(SettingError(name, message))

    word = given.strategy
    strategy = STRATEGIES.get(word)
    for name, value in (("GPU_COUNT", given.gpu_count), ("NNODES", given.nnodes)):
        rule(word == "single" and value not in (None, 1), "STRATEGY", f"must be auto or ddp with {name}={value}")
    nodes, number = given.nnodes, given.node_rank
    rule(
        nodes is not None and number is not None and number >= nodes,
        "NODE_RANK",
        f"must be less than NNODES={nodes}: nodes are counted from 0",
    )
    lisa = given.finetune_mode == "lisa"
    rule(lisa and word not in (None, "auto", "single"), "STRATEGY", "must be auto or single with FINETUNE_MODE=lisa")
    if strategy is None or not strategy.spread:
        return found
    rule(given.optim not in (None, "adamw"), "OPTIM", f"must be adamw with STRATEGY={word}; ddp takes any")
    rule(given.precision == "fp16", "PRECISION", f"must not be fp16 with STRATEGY={word}; use bf16, or STRATEGY=ddp")
    if strategy.spread == "weights":
        state = given.finetune_mode in ("state", "state_tuning")
        rule(
            state,
            "STRATEGY",
            f"must be ddp with FINETUNE_MODE={given.finetune_mode}, which trains too little to cut it up",
        )
        why = "whose processes would wait for each other's chunks"
        rule(
            given.train_type == "infctx",
            "STRATEGY",
            f"must be ddp or deepspeed_stage_1 or 2 with TRAIN_TYPE=infctx, {why}",
        )
    return found


def quant_problems(given: SimpleNamespace) -> list[SettingError]:
    """What does not go with a compressed base."""
    found = []
    parts = words_of(given.quant_parts or "")
    if given.quant_parts is not None and (not parts or set(parts) - {*QUANT_PARTS, EXTREME}):
        words = f"must be words of {', '.join(QUANT_PARTS)}, with commas between (and {EXTREME}, see the script)"
        found.append(SettingError("QUANT_PARTS", words))
    if EXTREME in parts and "att" not in parts:
        found.append(SettingError("QUANT_PARTS", f"names {EXTREME} without att, to which it belongs"))
    if given.quant in (None, "none") or given.finetune_mode is None:
        return found
    name = method_of(given.finetune_mode, bool(given.use_dora))
    if METHODS[name].saves_model:
        message = (
            f"must be none with FINETUNE_MODE={given.finetune_mode}, which trains the weights that it would compress"
        )
        found.append(SettingError("QUANT", message))
    elif METHODS[name].parts:
        trained = {*words_of(given.lora_parts or ""), *(("emb", "head") if given.emb_finetune else ())}
        both = sorted(trained & set(parts) & {"emb", "head"})
        if both:
            found.append(
                SettingError("QUANT_PARTS", f"names {' and '.join(both)}, which lora_parts or EMB_FINETUNE trains")
            )
    return found


def embedding_problems(given: SimpleNamespace) -> list[SettingError]:
    """What EMB_ON_CPU=1 does not go with: only a frozen embedding that is there as a whole can stay behind."""
    if given.emb_on_cpu != "1":
        return []
    mode, quant = given.finetune_mode, given.quant not in (None, "none")
    strategy = STRATEGIES.get(given.strategy)
    reasons = {
        f"FINETUNE_MODE={mode}, which trains it": mode == "full",
        "EMB_FINETUNE=1, which trains it": given.emb_finetune,
        "emb in lora_parts, which trains it": "emb" in words_of(given.lora_parts or ""),
        "emb in QUANT_PARTS, which compresses it": quant and "emb" in words_of(given.quant_parts or ""),
        f"STRATEGY={given.strategy}, which lays weights where it wants": strategy is not None and bool(strategy.spread),
    }
    return [SettingError("EMB_ON_CPU", f"must be 0 or auto with {why}") for why, so in reasons.items() if so]


def graph_problems(given: SimpleNamespace) -> list[SettingError]:
    """What CUDA_GRAPHS=1 does not go with: what has no addresses that stay, and what is begun again inside a backward pass."""
    if not given.cuda_graphs:
        return []
    from rwkv_peft.common.hardware import device_kind  # (with torch, which takes a second: who wants graphs has it)

    if device_kind() != "cuda":
        return [SettingError("CUDA_GRAPHS", "is for GPUs, and none was found; use 0")]
    reasons = {
        "GRAD_CP=1, which computes blocks again; take GRAD_CP=selective": given.grad_cp == "1",
        "TRAIN_TYPE=infctx, whose chunks hand on their states": given.train_type == "infctx",
        "FINETUNE_MODE=lisa, whose blocks come and go": given.finetune_mode == "lisa",
        "FINETUNE_MODE=peft, whose package may wait for the GPU": given.finetune_mode == "peft",
        f"STRATEGY={given.strategy}; it is for a model in one piece": given.strategy not in ("auto", "single", None),
        f"OP={given.op}; it is for those of OP=cuda": given.op not in ("auto", "cuda", None),
        "several processes": (given.gpu_count or 1) > 1 or (given.nnodes or 1) > 1,
    }
    return [SettingError("CUDA_GRAPHS", f"must be 0 with {why}") for why, so in reasons.items() if so]


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with spaces or commas between, none for "" and auto. ValueError in the user's words."""
    words = text.replace(",", " ").split()
    if words in ([], ["auto"]):
        return ()
    bounds = setting("", ge=1, le=MOST).metadata
    return tuple(parse_value(word, int, bounds) for word in words)


def stream_problems(given: SimpleNamespace) -> list[SettingError]:
    """What STREAMING=1 wants and cannot do, and what belongs to it alone."""
    if not given.streaming:
        wrong = given.streaming is False and given.max_steps
        message = (
            "belongs to STREAMING=1; must be 0 without it, where EPOCH_COUNT and EPOCH_STEPS say how long a run is"
        )
        return [SettingError("MAX_STEPS", message)] if wrong else []
    rules = (
        (given.max_steps == 0, "MAX_STEPS", "must say how many optimizer steps a run with STREAMING=1 has"),
        (
            given.ctx_len == "auto",
            "CTX_LEN",
            "must be a number with STREAMING=1: nobody knows the longest row beforehand",
        ),
        (given.dataload in ("bucket", "get"), "DATALOAD", "must be pack, pad or only with STREAMING=1"),
        (given.pack == "concat", "PACK", "must be isolated with STREAMING=1"),
        (
            given.epoch_count not in (None, 1),
            "EPOCH_COUNT",
            "must be 1 with STREAMING=1, where MAX_STEPS says how long it is",
        ),
        (given.epoch_steps not in (None, "auto"), "EPOCH_STEPS", "must be auto with STREAMING=1; set MAX_STEPS"),
        (given.num_workers not in (None, "auto", 0, 1), "NUM_WORKERS", "must be auto, 0 or 1 with STREAMING=1"),
    )
    return [SettingError(name, message) for broken, name, message in rules if broken]


def data_problems(given: SimpleNamespace) -> list[SettingError]:
    """What does not go together in the settings of the data; a setting that would do nothing is refused as well."""
    found = []

    def rule(broken, name: str, message: str) -> None:
        if broken:
            found.append(SettingError(name, message))

    mode, lists = given.dataload, {}
    for name, text in (("TRAIN_LENGTHS", given.train_lengths), ("TRAIN_BATCH_SIZES", given.train_batch_sizes)):
        try:
            lists[name] = numbers(text or "")
        except ValueError as error:
            found.append(SettingError(name, f'{error}, several with spaces between, like "64 128 256", or auto'))
    lengths, sizes = lists.get("TRAIN_LENGTHS", ()), lists.get("TRAIN_BATCH_SIZES", ())
    if mode is not None and mode != "bucket":
        for name, used in (("TRAIN_LENGTHS", lengths), ("TRAIN_BATCH_SIZES", sizes)):
            rule(used, name, f"belongs to DATALOAD=bucket; must be auto with DATALOAD={mode}")
        rule(
            given.token_budget not in (None, "auto"),
            "TOKEN_BUDGET",
            f"belongs to DATALOAD=bucket; must be auto with DATALOAD={mode}, where MICRO_BSZ says how much goes at once",
        )
    if mode == "bucket":
        rule(
            given.micro_bsz not in (None, "auto"),
            "MICRO_BSZ",
            "must be auto with DATALOAD=bucket, where every bucket has its own: set TOKEN_BUDGET or TRAIN_BATCH_SIZES",
        )
        rule(list(lengths) != sorted(set(lengths)), "TRAIN_LENGTHS", "must rise from number to number")
        rule(any(n % EDGE for n in lengths), "TRAIN_LENGTHS", f"must be multiples of {EDGE}")
        rule(
            sizes and not lengths,
            "TRAIN_BATCH_SIZES",
            "has one number for each of TRAIN_LENGTHS, which is auto: set both",
        )
        rule(
            sizes and lengths and len(sizes) != len(lengths),
            "TRAIN_BATCH_SIZES",
            f"must have {len(lengths)} numbers, one for each of TRAIN_LENGTHS; it has {len(sizes)}",
        )
        rule(
            sizes and given.token_budget not in (None, "auto"),
            "TOKEN_BUDGET",
            "must be auto where TRAIN_BATCH_SIZES says how much goes at once",
        )
        rule(
            lengths and isinstance(given.ctx_len, int) and given.ctx_len > lengths[-1],
            "CTX_LEN",
            f"must be auto, or {lengths[-1] if lengths else 0} (the last of TRAIN_LENGTHS) or less",
        )
        steps, mini = given.epoch_steps, given.mini_bsz
        rule(
            steps not in (None, "auto") and mini and steps % mini,
            "EPOCH_STEPS",
            f"must be a multiple of MINI_BSZ={mini} with DATALOAD=bucket, whose steps are whole, or auto",
        )
    rule(given.pack == "concat" and mode not in (None, "pack"), "PACK", f"must be isolated with DATALOAD={mode}")
    rule(
        given.magic_prime and mode not in (None, "get"),
        "MAGIC_PRIME",
        f"must be 0 with DATALOAD={mode}; it belongs to get",
    )
    rule(
        given.magic_prime and given.data_shuffle is False,
        "MAGIC_PRIME",
        "must be 0 with DATA_SHUFFLE=0: it is an order of its own",
    )
    whole = "get" if mode == "get" else "pack and PACK=concat" if (mode, given.pack) == ("pack", "concat") else ""
    rule(
        whole and given.overlong not in (None, "truncate"),
        "OVERLONG",
        f"must be truncate with DATALOAD={whole}, which cuts nothing off anyway",
    )
    for name, text in (("MASK_START", given.mask_start), ("MASK_END", given.mask_end)):
        rule(text and given.loss_mask not in (None, "se"), name, 'belongs to LOSS_MASK=se; must be "" with others')
        rule(text == "" and given.loss_mask == "se", name, "is empty; LOSS_MASK=se needs it")
        rule(text and not is_utf8(text), name, "is not UTF-8")
    return found
