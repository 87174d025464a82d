"""What training.sh may say: names, types, bounds and cross-rules, in the order of the script. Values live in the script.

A value or a variable of the field that this version does not have yet is refused by name, with what to do instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

from .errors import Problem
from .project import is_text
from .shell_vars import MOST, convert, var

NOT_YET = "is not part of this version yet; it has {}"


def later(words: str, has: str) -> dict[str, str]:
    return {word: NOT_YET.format(has) for word in words.split()}


def reserved(name: str, belongs_to: str):
    """A variable of the field's script whose feature is still to come: it must stay empty."""
    return var(name, only_empty=f"belongs to {belongs_to}, which this version does not have yet; leave it empty")


# variables of older scripts: what became of them
RETIRED = {
    "FLA": "is retired; choose the kernels with OP",
    "DEEPSPEED_STRATEGY": "is called STRATEGY here",
    "EPOCH_BEGIN": "is retired: it only renamed files and loaded nothing; go on from a checkpoint with lora_load",
    "LOAD": "is retired; use lora_load",
}

MOST_WORKERS = 64
EDGE = 16  # TRAIN_LENGTHS are multiples of this: GPU kernels want it
LORA_PARTS = ("att", "ffn", "time", "ln")


@dataclass(frozen=True)
class TrainConfig:
    """All that training.sh says, in its order."""

    finetune_mode: Literal["lora", "full"] = var(
        "FINETUNE_MODE",
        later=later("pissa dora bone miss disha bat lisa state_tuning state none peft", "lora and full"),
    )
    model_path: str = var("MODEL_PATH")
    data_path: str = var("DATA_PATH")
    run_name: str = var("RUN_NAME")

    model_version: Literal["auto", "v7"] = var("MODEL_VERSION", later=later("v4 v5 v6", "v7"))
    n_layer: Literal["auto"] | int = var("N_LAYER", ge=1, le=MOST)
    embd_size: Literal["auto"] | int = var("EMBD_SIZE", ge=1, le=MOST)
    vocab_size: Literal["auto"] | int = var("VOCAB_SIZE", ge=1, le=MOST)

    ctx_len: Literal["auto"] | int = var("CTX_LEN", ge=1, le=MOST)
    overlong: Literal["truncate", "truncate-left", "drop", "split"] = var("OVERLONG")
    dataload: Literal["pack", "bucket", "pad", "only", "get"] = var("DATALOAD")
    pack: Literal["isolated", "concat"] = var("PACK")
    train_lengths: str = var("TRAIN_LENGTHS")
    train_batch_sizes: str = var("TRAIN_BATCH_SIZES")
    token_budget: Literal["auto"] | int = var("TOKEN_BUDGET", ge=1, le=MOST)
    magic_prime: bool = var("MAGIC_PRIME")
    loss_mask: Literal["qa", "last", "pad", "none", "se"] = var("LOSS_MASK")
    mask_start: str = var("MASK_START")
    mask_end: str = var("MASK_END")
    data_shuffle: bool = var("DATA_SHUFFLE")
    seed: int = var("SEED", ge=0, le=2**31 - 1)
    streaming: bool = var("STREAMING")
    max_steps: int = var("MAX_STEPS", ge=0, le=MOST)
    stream_buffer: int = var("STREAM_BUFFER", ge=1, le=MOST)
    train_type: Literal["none"] = var("TRAIN_TYPE", later=later("infctx state", "none"))
    chunk_ctx: str = reserved("CHUNK_CTX", "TRAIN_TYPE=infctx")

    epoch_count: int = var("EPOCH_COUNT", ge=1, le=MOST)
    epoch_steps: Literal["auto"] | int = var("EPOCH_STEPS", ge=1, le=MOST)
    epoch_save: int = var("EPOCH_SAVE", ge=1, le=MOST)
    micro_bsz: Literal["auto"] | int = var("MICRO_BSZ", ge=1, le=MOST)
    mini_bsz: int = var("MINI_BSZ", ge=1, le=MOST)

    lr_init: float = var("LR_INIT", ge=0)
    lr_final: float = var("LR_FINAL", ge=0)
    lr_schedule: Literal["cos", "wsd", "exp", "linear", "constant"] = var("LR_SCHEDULE")
    warmup_steps: int = var("WARMUP_STEPS", ge=0, le=MOST)
    beta1: float = var("BETA1", ge=0, lt=1)
    beta2: float = var("BETA2", ge=0, lt=1)
    adam_eps: float = var("ADAM_EPS", gt=0)
    weight_decay: float = var("WEIGHT_DECAY", ge=0)
    grad_clip: float = var("GRAD_CLIP", ge=0)

    lora_r: int = var("lora_r", ge=1, le=MOST)
    lora_alpha: float = var("lora_alpha", gt=0, le=MOST)
    lora_dropout: float = var("lora_dropout", ge=0, lt=1)
    lora_parts: str = var("lora_parts")
    emb_finetune: bool = var("EMB_FINETUNE")
    lora_load: str = var("lora_load")

    precision: Literal["auto", "bf16", "fp16", "fp32", "tf32"] = var("PRECISION")
    quant: Literal["none"] = var("QUANT", later=later("int8 4bit nf4 fp4 fp8", "none"))
    op: Literal["auto", "torch", "reference", "cuda", "fla", "triton", "cpu"] = var("OP")
    grad_cp: bool = var("GRAD_CP")
    gpu_count: int = var("GPU_COUNT", ge=1, le=MOST)
    strategy: Literal["auto", "single", "ddp"] = var(
        "STRATEGY",
        later=later(
            "fsdp deepspeed_stage_1 deepspeed_stage_2 deepspeed_stage_3 deepspeed_stage_2_offload "
            "deepspeed_stage_3_offload",
            "auto, single and ddp",
        ),
    )
    num_workers: Literal["auto"] | int = var("NUM_WORKERS", ge=0, le=MOST_WORKERS)
    wandb: str = var("WANDB")

    pissa_load: str = reserved("pissa_load", "FINETUNE_MODE=pissa")
    pissa_init: str = reserved("pissa_init", "FINETUNE_MODE=pissa")
    pissa_r: str = reserved("pissa_r", "FINETUNE_MODE=pissa")
    svd_niter: str = reserved("svd_niter", "FINETUNE_MODE=pissa")
    disha_load: str = reserved("disha_load", "FINETUNE_MODE=bone and bat")
    disha_r: str = reserved("disha_r", "FINETUNE_MODE=bone and bat")
    lisa_r: str = reserved("lisa_r", "FINETUNE_MODE=lisa")
    lisa_k: str = reserved("lisa_k", "FINETUNE_MODE=lisa")

    @property
    def parts(self) -> tuple[str, ...]:
        """What LoRA touches: att and ffn get adapters, the others are trained whole."""
        words = tuple(word.strip() for word in self.lora_parts.split(",") if word.strip())
        return words + (("emb", "head") if self.emb_finetune else ())

    @property
    def lengths(self) -> tuple[int, ...]:
        """TRAIN_LENGTHS; empty for auto."""
        return numbers(self.train_lengths)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """TRAIN_BATCH_SIZES; empty for auto."""
        return numbers(self.train_batch_sizes)

    @staticmethod
    def problems(given: SimpleNamespace) -> list[Problem]:
        """What no single variable can tell. given: the values that are sound, None where one is not."""
        found = []

        def rule(broken, name: str, message: str) -> None:
            if broken:
                found.append(Problem(name, message))

        for name, value in (("MODEL_PATH", given.model_path), ("DATA_PATH", given.data_path)):
            rule(value is not None and not value.strip(), name, "is empty; give a name in model/ or data/, or a path")
        rule(
            given.run_name
            and (given.run_name in (".", "..", "latest") or "/" in given.run_name or given.run_name[0] == "-"),
            "RUN_NAME",
            'must be a plain folder name (no "/", not latest, not starting with "-")',
        )
        rule(given.run_name and not is_text(given.run_name), "RUN_NAME", "is not UTF-8; choose another name")
        found += data_problems(given) + stream_problems(given)
        words = [word.strip() for word in (given.lora_parts or "").split(",")]
        if given.lora_parts is not None:
            wrong = [word for word in words if word not in LORA_PARTS]
            rule(wrong, "lora_parts", f"must be words of {', '.join(LORA_PARTS)}, with commas between")
            rule(
                not wrong and not {"att", "ffn"} & set(words),
                "lora_parts",
                "must name att or ffn, or LoRA has no layer",
            )
        full = given.finetune_mode == "full"
        rule(
            full and given.emb_finetune,
            "EMB_FINETUNE",
            "must be 0 with FINETUNE_MODE=full, which trains emb and head anyway",
        )
        rule(
            full and given.lora_load,
            "lora_load",
            'must be "" with FINETUNE_MODE=full; put the checkpoint into MODEL_PATH',
        )
        exp = given.lr_schedule == "exp" and given.lr_init is not None and given.lr_final is not None
        rule(exp and not given.lr_init, "LR_INIT", "must be more than 0 with LR_SCHEDULE=exp")
        rule(exp and not given.lr_final, "LR_FINAL", "must be more than 0 with LR_SCHEDULE=exp")
        many = given.gpu_count is not None and given.gpu_count > 1
        rule(many and given.strategy == "single", "STRATEGY", f"must be auto or ddp with GPU_COUNT={given.gpu_count}")
        return found


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with spaces or commas between, none for "" and auto. ValueError in the user's words."""
    words = text.replace(",", " ").split()
    if words in ([], ["auto"]):
        return ()
    bounds = var("", ge=1, le=MOST).metadata
    return tuple(convert(word, int, bounds) for word in words)


def stream_problems(given: SimpleNamespace) -> list[Problem]:
    """What STREAMING=1 wants and cannot do, and what belongs to it alone."""
    if not given.streaming:
        wrong = given.streaming is False and given.max_steps
        message = (
            "belongs to STREAMING=1; must be 0 without it, where EPOCH_COUNT and EPOCH_STEPS say how long a run is"
        )
        return [Problem("MAX_STEPS", message)] if wrong else []
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
    return [Problem(name, message) for broken, name, message in rules if broken]


def data_problems(given: SimpleNamespace) -> list[Problem]:
    """What does not go together in the settings of the data; a setting that would do nothing is refused as well."""
    found = []

    def rule(broken, name: str, message: str) -> None:
        if broken:
            found.append(Problem(name, message))

    mode, lists = given.dataload, {}
    for name, text in (("TRAIN_LENGTHS", given.train_lengths), ("TRAIN_BATCH_SIZES", given.train_batch_sizes)):
        try:
            lists[name] = numbers(text or "")
        except ValueError as error:
            found.append(Problem(name, f'{error}, several with spaces between, like "64 128 256", or auto'))
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
        rule(text and not is_text(text), name, "is not UTF-8")
    return found
