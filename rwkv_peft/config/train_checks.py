"""Checks of training.sh across settings: values that cannot be combined, and settings that would be ignored.

Every check gets the settings as attributes of a namespace, None for one whose own value is invalid, and yields rules: whether
it is broken, the variable, and the message.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from rwkv_peft.adapters.specs import METHODS, PARTS, load_variables, method_of
from rwkv_peft.common.errors import SettingError
from rwkv_peft.common.names import describe_fault
from rwkv_peft.common.paths import is_utf8

from .shell import parse_numbers, split_words
from .strategies import STRATEGIES

_LENGTH_STEP = 16  # TRAIN_LENGTHS are multiples of it, for GPU kernels
_QUANT_PARTS = ("att", "ffn", "emb", "head")
# One channel of this layer's input is some 7e6 times the median; a 2.9B model in 4 to 5 bits loses 2.43 % if it is not quantised,
# and 4.04 % if it is (rwkv-quant 0.3.0, 2026)
EXTREME_LAYER = "blocks.0.att.output"

_Rules = Iterator[tuple[object, str, str]]


def find_problems(given: SimpleNamespace, projects: Mapping[str, Any]) -> list[SettingError]:
    """Return the broken rules of all checks. projects: the values of the trackers' variables."""
    checks = (
        _check_names, _check_adam_eps, _check_data, _check_streaming, _check_method, _check_quant, _check_emb_on_cpu,
        _check_cuda_graphs, _check_exp_schedule, _check_strategy,
    )  # fmt: skip
    rules = itertools.chain(_check_projects(projects), *(check(given) for check in checks))
    return [SettingError(name, message) for broken, name, message in rules if broken]


def _check_projects(projects: Mapping[str, Any]) -> _Rules:
    for name, value in projects.items():
        wrong = describe_fault(value) if isinstance(value, str) else ""
        yield wrong, name, f"{wrong}; choose another name"


def _values(given: SimpleNamespace, *names: str) -> list[tuple[str, Any]]:
    return [(name, getattr(given, name.lower())) for name in names]


def _check_names(given: SimpleNamespace) -> _Rules:
    for name, value in _values(given, "VAL_PATIENCE", "KEEP_BEST"):
        yield given.val_data == "none" and value, name, "needs held-out data; VAL_DATA is none"
    for name, value in _values(given, "MODEL_PATH", "DATA_PATH", "VAL_DATA"):
        empty = value is not None and not value.strip()
        yield empty, name, "is empty; give a name in model/ or data/, or a path"
    no_folder = given.run_name in (".", "..", "latest") or "/" in (given.run_name or "")
    yield no_folder, "RUN_NAME", 'must be a plain folder name (no "/", not latest)'
    wrong = describe_fault(given.run_name or "")
    yield wrong, "RUN_NAME", f"{wrong}; choose another name"
    for name, value in _values(given, "MASTER_ADDR", "MODEL_PATH"):
        wrong = describe_fault(value or "", edges=False)
        yield wrong, name, wrong


def _check_adam_eps(given: SimpleNamespace) -> _Rules:
    eps = ctypes.c_float(given.adam_eps or 1).value
    computes = "in float32, in which optimizers compute"
    yield not eps, "ADAM_EPS", f"is 0 {computes}; must be 1e-45 or more"
    yield math.isinf(eps), "ADAM_EPS", f"is infinite {computes}: nothing would be learnt"


def _check_exp_schedule(given: SimpleNamespace) -> _Rules:
    if given.lr_schedule == "exp" and given.lr_init is not None and given.lr_final is not None:
        for name, value in _values(given, "LR_INIT", "LR_FINAL"):
            yield not value, name, "must be more than 0 with LR_SCHEDULE=exp"


def _check_method(given: SimpleNamespace) -> _Rules:
    """A setting of another method, which would be ignored, is refused."""
    parts = split_words(given.lora_parts or "")
    wrong = [word for word in parts if word not in PARTS]
    yield wrong, "lora_parts", f"must be words of {', '.join(PARTS)}, with commas between"
    mode = given.finetune_mode
    if mode is None:
        return
    name = method_of(mode, bool(given.use_dora))
    method, chosen = METHODS[name], f"FINETUNE_MODE={mode}"
    adapted = sorted({"att", "ffn"} & set(parts))
    if method.parts and not wrong and given.lora_parts is not None:
        yield (
            (method.wraps or name == "lisa") and not adapted,
            "lora_parts",
            f"must name att or ffn, or {method.words} has no layer; FINETUNE_MODE=none trains whole tensors only",
        )
        yield (
            name == "none" and adapted,
            "lora_parts",
            f"must not name {' and '.join(adapted)} with FINETUNE_MODE=none, which has no adapters for them",
        )
        nothing = name == "none" and not parts and not given.emb_finetune
        yield nothing, "lora_parts", "is empty: nothing would be trained"
    trained = "emb and head anyway" if name == "full" else "states only"
    yield not method.parts and given.emb_finetune, "EMB_FINETUNE", f"must be 0 with {chosen}, which trains {trained}"
    instead = method.load or "MODEL_PATH (its checkpoints are whole models)"
    for variable, modes in load_variables().items():
        yield (
            getattr(given, variable) and mode not in modes,
            variable,
            f'belongs to FINETUNE_MODE={" or ".join(modes)}; must be "" with {chosen}, which has {instead}',
        )
    for variable, is_set, neutral, owner in (
        ("use_rslora", given.use_rslora, "0", "lora"),
        ("use_dora", given.use_dora, "0", "lora"),
        ("loraplus_lr_ratio", given.loraplus_lr_ratio not in (None, 1), "1", "lora"),
        ("pissa_init", given.pissa_init, '""', "pissa"),
        ("state_shifts", given.state_shifts, "0", "state_tuning"),
        ("PEFT_CONFIG", given.peft_config, '""', "peft"),
    ):
        is_foreign = is_set and method_of(owner, False) != method_of(mode, False)
        yield is_foreign, variable, f"belongs to FINETUNE_MODE={owner}; must be {neutral} with {chosen}"
    no_file = name == "peft" and given.peft_config == ""
    yield no_file, "PEFT_CONFIG", "is empty; FINETUNE_MODE=peft needs a file, like lokr.json"
    for variable, value in _values(given, "GPU_COUNT", "NNODES"):
        yield (
            name == "lisa" and value not in (None, 1),
            variable,
            "must be 1 with FINETUNE_MODE=lisa: which weights are trained changes on the way, and several processes cannot "
            "follow",
        )


def _check_strategy(given: SimpleNamespace) -> _Rules:
    word = given.strategy
    for name, value in _values(given, "GPU_COUNT", "NNODES"):
        yield word == "single" and value not in (None, 1), "STRATEGY", f"must be auto or ddp with {name}={value}"
    nodes, number = given.nnodes, given.node_rank
    beyond = nodes is not None and number is not None and number >= nodes
    yield beyond, "NODE_RANK", f"must be less than NNODES={nodes}: nodes are counted from 0"
    lisa = given.finetune_mode == "lisa" and word not in (None, "auto", "single")
    yield lisa, "STRATEGY", "must be auto or single with FINETUNE_MODE=lisa"
    if not _shards(given):
        return
    yield given.optim not in (None, "adamw"), "OPTIM", f"must be adamw with STRATEGY={word}; ddp takes any"
    yield given.precision == "fp16", "PRECISION", f"must not be fp16 with STRATEGY={word}; use bf16, or STRATEGY=ddp"
    if STRATEGIES[word].spread == "weights":
        mode = given.finetune_mode
        why = f"FINETUNE_MODE={mode}, which trains too little to cut it up"
        yield mode in ("state", "state_tuning"), "STRATEGY", f"must be ddp with {why}"
        why = "TRAIN_TYPE=infctx, whose processes would wait for each other's chunks"
        yield given.train_type == "infctx", "STRATEGY", f"must be ddp or deepspeed_stage_1 or 2 with {why}"


def _shards(given: SimpleNamespace) -> bool:
    return given.strategy in STRATEGIES and bool(STRATEGIES[given.strategy].spread)


def _check_quant(given: SimpleNamespace) -> _Rules:
    parts = split_words(given.quant_parts or "")
    wrong = given.quant_parts is not None and (not parts or set(parts) - {*_QUANT_PARTS, EXTREME_LAYER})
    words = f"{', '.join(_QUANT_PARTS)}, with commas between (and {EXTREME_LAYER}, see the script)"
    yield wrong, "QUANT_PARTS", f"must be words of {words}"
    alone = EXTREME_LAYER in parts and "att" not in parts
    yield alone, "QUANT_PARTS", f"names {EXTREME_LAYER} without att, to which it belongs"
    mode = given.finetune_mode
    if given.quant in (None, "none") or mode is None:
        return
    method = METHODS[method_of(mode, bool(given.use_dora))]
    why = f"FINETUNE_MODE={mode}, which trains the weights that it would compress"
    yield method.saves_model, "QUANT", f"must be none with {why}"
    if method.parts and not method.saves_model:
        trained = {*split_words(given.lora_parts or ""), *(("emb", "head") if given.emb_finetune else ())}
        both = sorted(trained & set(parts) & {"emb", "head"})
        yield both, "QUANT_PARTS", f"names {' and '.join(both)}, which lora_parts or EMB_FINETUNE trains"


def _check_emb_on_cpu(given: SimpleNamespace) -> _Rules:
    """Only a frozen embedding that is not sharded can stay on the host."""
    if given.emb_on_cpu != "1":
        return
    quant = given.quant not in (None, "none")
    for broken, why in (
        (given.finetune_mode == "full", f"FINETUNE_MODE={given.finetune_mode}, which trains it"),
        (given.emb_finetune, "EMB_FINETUNE=1, which trains it"),
        ("emb" in split_words(given.lora_parts or ""), "emb in lora_parts, which trains it"),
        (quant and "emb" in split_words(given.quant_parts or ""), "emb in QUANT_PARTS, which compresses it"),
        (_shards(given), f"STRATEGY={given.strategy}, which lays weights where it wants"),
    ):
        yield broken, "EMB_ON_CPU", f"must be 0 or auto with {why}"


def _check_cuda_graphs(given: SimpleNamespace) -> _Rules:
    """CUDA graphs need addresses that do not change, and no forward pass inside of a backward pass."""
    if not given.cuda_graphs:
        return
    from rwkv_peft.common.hardware import device_kind  # imports torch, which takes a second: only for CUDA graphs

    if device_kind() != "cuda":
        yield True, "CUDA_GRAPHS", "is for GPUs, and none was found; use 0"
        return
    for broken, why in (
        (given.grad_cp == "1", "GRAD_CP=1, which computes blocks again; take GRAD_CP=selective"),
        (given.train_type == "infctx", "TRAIN_TYPE=infctx, whose chunks hand on their states"),
        (given.finetune_mode == "lisa", "FINETUNE_MODE=lisa, whose blocks come and go"),
        (given.finetune_mode == "peft", "FINETUNE_MODE=peft, whose package may wait for the GPU"),
        (
            given.strategy not in ("auto", "single", None),
            f"STRATEGY={given.strategy}; it is for a model in one piece",
        ),
        (given.op not in ("auto", "cuda", None), f"OP={given.op}; it is for those of OP=cuda"),
        ((given.gpu_count or 1) > 1 or (given.nnodes or 1) > 1, "several processes"),
    ):
        yield broken, "CUDA_GRAPHS", f"must be 0 with {why}"


def _check_streaming(given: SimpleNamespace) -> _Rules:
    if not given.streaming:
        why = "where EPOCH_COUNT and EPOCH_STEPS say how long a run is"
        ignored = given.streaming is False and given.max_steps
        yield ignored, "MAX_STEPS", f"belongs to STREAMING=1; must be 0 without it, {why}"
        return
    workers = given.num_workers not in (None, "auto", 0, 1)
    epochs = given.epoch_count not in (None, 1)
    steps = given.epoch_steps not in (None, "auto")
    yield given.max_steps == 0, "MAX_STEPS", "must say how many optimizer steps a run with STREAMING=1 has"
    why = "nobody knows the longest row beforehand"
    yield given.ctx_len == "auto", "CTX_LEN", f"must be a number with STREAMING=1: {why}"
    yield given.dataload in ("bucket", "get"), "DATALOAD", "must be pack, pad or only with STREAMING=1"
    yield given.pack == "concat", "PACK", "must be isolated with STREAMING=1"
    yield epochs, "EPOCH_COUNT", "must be 1 with STREAMING=1, where MAX_STEPS says how long it is"
    yield steps, "EPOCH_STEPS", "must be auto with STREAMING=1; set MAX_STEPS"
    yield workers, "NUM_WORKERS", "must be auto, 0 or 1 with STREAMING=1"


def _check_data(given: SimpleNamespace) -> _Rules:
    mode = given.dataload
    lists: dict[str, tuple[int, ...]] = {"TRAIN_LENGTHS": (), "TRAIN_BATCH_SIZES": ()}
    for name, text in _values(given, *lists):
        try:
            lists[name] = parse_numbers(text or "")
        except ValueError as error:
            yield True, name, f'{error}, several with spaces between, like "64 128 256", or auto'
    if mode == "bucket":
        yield from _check_buckets(given, *lists.values())
    elif mode is not None:
        must = f"belongs to DATALOAD=bucket; must be auto with DATALOAD={mode}"
        for name, numbers in lists.items():
            yield numbers, name, must
        budget = given.token_budget not in (None, "auto")
        yield budget, "TOKEN_BUDGET", f"{must}, where MICRO_BSZ says how much goes at once"
    yield given.pack == "concat" and mode not in (None, "pack"), "PACK", f"must be isolated with DATALOAD={mode}"
    prime = given.magic_prime
    yield prime and mode not in (None, "get"), "MAGIC_PRIME", f"must be 0 with DATALOAD={mode}; it belongs to get"
    sequential = prime and given.data_shuffle is False
    yield sequential, "MAGIC_PRIME", "must be 0 with DATA_SHUFFLE=0: it is an order of its own"
    windows = "get" if mode == "get" else "pack and PACK=concat" if (mode, given.pack) == ("pack", "concat") else ""
    ignored = windows and given.overlong not in (None, "truncate")
    yield ignored, "OVERLONG", f"must be truncate with DATALOAD={windows}, which cuts nothing off anyway"
    for name, text in _values(given, "MASK_START", "MASK_END"):
        ignored = text and given.loss_mask not in (None, "se")
        yield ignored, name, 'belongs to LOSS_MASK=se; must be "" with others'
        yield text == "" and given.loss_mask == "se", name, "is empty; LOSS_MASK=se needs it"
        yield text and not is_utf8(text), name, "is not UTF-8"


def _check_buckets(given: SimpleNamespace, lengths: tuple[int, ...], sizes: tuple[int, ...]) -> _Rules:
    why = "where every bucket has its own: set TOKEN_BUDGET or TRAIN_BATCH_SIZES"
    yield given.micro_bsz not in (None, "auto"), "MICRO_BSZ", f"must be auto with DATALOAD=bucket, {why}"
    yield list(lengths) != sorted(set(lengths)), "TRAIN_LENGTHS", "must rise from number to number"
    yield any(n % _LENGTH_STEP for n in lengths), "TRAIN_LENGTHS", f"must be multiples of {_LENGTH_STEP}"
    why = "has one number for each of TRAIN_LENGTHS, which is auto: set both"
    yield sizes and not lengths, "TRAIN_BATCH_SIZES", why
    yield (
        sizes and lengths and len(sizes) != len(lengths),
        "TRAIN_BATCH_SIZES",
        f"must have {len(lengths)} numbers, one for each of TRAIN_LENGTHS; it has {len(sizes)}",
    )
    both = sizes and given.token_budget not in (None, "auto")
    yield both, "TOKEN_BUDGET", "must be auto where TRAIN_BATCH_SIZES says how much goes at once"
    if lengths:
        longer = isinstance(given.ctx_len, int) and given.ctx_len > lengths[-1]
        yield longer, "CTX_LEN", f"must be auto, or {lengths[-1]} (the last of TRAIN_LENGTHS) or less"
    steps, mini = given.epoch_steps, given.mini_bsz
    yield (
        steps not in (None, "auto") and mini and steps % mini,
        "EPOCH_STEPS",
        f"must be a multiple of MINI_BSZ={mini} with DATALOAD=bucket, whose steps are whole, or auto",
    )
