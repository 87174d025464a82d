"""What a run prints: the plan before it, samples of the trained data, and the result."""

from __future__ import annotations

import math
import os
import shlex
import sys
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rwkv_peft.adapters.specs import METHODS, OPTIMS, Method, method_of
from rwkv_peft.checkpoint import run_dir
from rwkv_peft.common import paths
from rwkv_peft.common.errors import describe_out_of_memory, exit_with
from rwkv_peft.common.formatting import first_line, format_duration, is_or_are, plural
from rwkv_peft.common.hardware import cpu_gains_by_bf16, cpu_has_bf16, describe_device, device_kind
from rwkv_peft.config.strategies import STRATEGIES
from rwkv_peft.data.buckets import BucketPlan
from rwkv_peft.data.sampling import AUTO_CTX_LIMIT, Plan
from rwkv_peft.data.tokenized_files import Form
from rwkv_peft.data.windows import MagicPrime
from rwkv_peft.model import arch
from rwkv_peft.text import tokenizer

from . import cuda_graphs
from .memory_estimate import memory_bytes

if TYPE_CHECKING:  # these modules import torch's data loaders or more, which the plan of a stream does without
    import torch

    from rwkv_peft.adapters.inject import AdapterConfig
    from rwkv_peft.checkpoint.pth import TensorInfo
    from rwkv_peft.data.dataset import DataStats, TokenDataset
    from rwkv_peft.preprocess.config import TokenizeConfig

Settings = Mapping[str, Any]  # of run.json, by their names in the script
Row = tuple[str, str]  # label and text of a line of the plan

MANY = 100_000  # from here on, numbers are printed in millions
# Rates of state tuning. Runs on RWKV-7 that were evaluated used 3e-4 to 2e-2 (rwkv-metal on 0.1B, RWKV-Agent on 7.2B, the
# tutorial of rwkv.cn; 2026). The 1 -> 0.01 of the RWKV-5 and -6 instructions destroys an RWKV-7.
LEAST_STATE_RATE, MAX_STATE_RATE = 3e-4, 3e-2
MAX_RATE = 1e-2  # of all other methods; rates above diverge with all but tiny models
USUAL_STATE = "1e-3 (0.1B) to 1e-2 (7B)"
FEW_STEPS = 30  # the plan has a note for fewer optimizer steps than this ...
LONG_WARMUP = 0.25  # ... and for a warm-up that takes more of the run than this
ROW = {"pack": "pack", "concat": "window", "get": "window", "magic": "window"}  # what a row is called, by mode
FILLED_BY_CTX = ("pack", "get")  # modes with rows as long as the context: a shorter one gives more of them
# bits of a quantized value with its scales, about
QUANT_BITS = {"int8": 8.1, "nf4": 4.2, "fp4": 4.2, "fp8": 8.1}


def plan_lines(
    settings: Settings, setup: AdapterConfig, base: Path, geometry: arch.Geometry, lines: list[Row], tokens: int, sequences: int,
    plan: Plan, steps: int, trained_values: int, stored: Mapping[str, TensorInfo], dtype: torch.dtype, op_words: str,
) -> list[str]:  # fmt: skip
    """Return the plan of a run: what was read, what auto became, how long the run is, what it needs.

    Args:
        settings: of the run.
        setup: the method and what it applies to.
        base: the base model's file.
        geometry: of the model.
        lines: data_lines or stream_lines.
        tokens: of the largest micro-batch.
        sequences: of the largest micro-batch.
        plan: of the data.
        steps: optimizer steps of the run.
        trained_values: how many values are trained.
        stored: the tensors of the base model's file.
        dtype: in which the model computes.
        op_words: why this backend was chosen, or "".
    """
    total = sum(math.prod(s.shape) for s in stored.values())
    last = settings["LR_INIT"] if settings["LR_SCHEDULE"] == "constant" else settings["LR_FINAL"]
    memory = _estimate_memory(settings, setup, geometry, tokens, sequences, plan.world, trained_values, dtype)
    device = "GPU memory" if device_kind() == "cuda" else "memory"
    digits = 1 if memory > 10 << 30 else 2
    guess = "estimate, each process" if plan.world > 1 else "estimate"
    rows = [
        ("model", f"{paths.display_path(base)}: {arch.arch_of(geometry).name}, {plural(geometry.n_layer, 'layer')}, "
                  f"width {geometry.n_embd}, vocabulary {geometry.vocab_size}, {total / 1e6:,.1f} M parameters"),
        ("method", f"{_method_words(setup)}: {_format_count(trained_values)} trained values "
                   f"({trained_values / total:.1%} of the model's)"),
        *_base_rows(settings, setup),
        *_state_rows(setup, stored),
        *lines,
        ("length", f"{plural(settings['EPOCH_COUNT'], 'epoch')} x EPOCH_STEPS={plan.micro_batches} micro-batches = "
                   f"{plural(steps, 'optimizer step')}; LR {settings['LR_INIT']:g} -> {last:g} ({settings['LR_SCHEDULE']}, "
                   f"{settings['WARMUP_STEPS']} warm-up)"),
        *(("", note) for note in _notes(settings, tokens, plan, steps, last)),
        *_rate_rows(setup, {"LR_INIT": settings["LR_INIT"], "LR_FINAL": last}, total),
        ("machine", f"{describe_device()}; PRECISION={settings['PRECISION']}, "
                    f"OP={settings['OP']}{op_words and f' ({op_words})'}, STRATEGY={settings['STRATEGY']}; "
                    f"about {memory / 2**30:.{digits}f} GB {device} ({guess})"),
        ("output", f"output/{settings['RUN_NAME']}/ (loss.jsonl has the loss of each step; what is shown here is smoothed)"),
    ]  # fmt: skip
    return [f"{label:<10}{text}" for label, text in rows]


def _estimate_memory(
    settings: Settings, setup: AdapterConfig, geometry: arch.Geometry, tokens: int, sequences: int, processes: int,
    trained_values: int, dtype: torch.dtype,
) -> int:  # fmt: skip
    shapes = arch.shapes(geometry)
    quantized = {f"{name}.weight" for name in setup.compressed(geometry)}
    on_host = {"emb.weight"} if settings["EMB_ON_CPU"] == "1" else set()
    if settings["TRAIN_TYPE"] == "infctx":
        chunk = min(tokens, settings["CHUNK_CTX"])
        tokens, sequences = chunk, max(1, sequences * chunk // tokens)
    return memory_bytes(
        {name: shape for name, shape in shapes.items() if name not in quantized | on_host},
        trained_values, tokens, geometry, dtype.itemsize, settings["GRAD_CP"], setup.method, device_kind(), settings["OP"],
        OPTIMS[settings["OPTIM"]],
        largest=max((math.prod(shapes[name]) for name in setup.whole(geometry)), default=0),
        compressed=int(sum(math.prod(shapes[name]) for name in quantized) * QUANT_BITS.get(setup.quant, 0) / 8),
        sequences=sequences, strategy=STRATEGIES[settings["STRATEGY"]], processes=processes,
        recorded=recorded_shapes(settings),
    )  # fmt: skip


def _notes(settings: Settings, tokens: int, plan: Plan, steps: int, last: float) -> Iterator[str]:
    # hints about settings that are unusual. last: the rate of the last step
    warmup, on_cpu = settings["WARMUP_STEPS"], device_kind() == "cpu"
    if plan.passes_per_epoch > 1:
        yield f"EPOCH_STEPS makes an epoch {plan.passes_per_epoch:.1f} passes over the data; auto makes it one"
    if steps < FEW_STEPS:
        yield f"{plural(steps, 'step')} will hardly change a model: take {_more_steps(settings, plan)}"
    if warmup >= steps:
        yield f"WARMUP_STEPS={warmup} is as long as the whole run: the rate only rises"
    elif warmup > steps * LONG_WARMUP:
        tenth = max(1, steps // 10)
        yield f"WARMUP_STEPS={warmup} is {warmup / steps:.0%} of the run; a tenth of the run, {tenth}, is enough"
    if last > settings["LR_INIT"]:
        yield "LR_FINAL is above LR_INIT: the rate rises until the end; were the two exchanged?"
    if settings["TRAIN_TYPE"] == "infctx" and tokens <= settings["CHUNK_CTX"]:
        yield f"a micro-batch has at most {plural(tokens, 'token')}: one chunk holds it, so infctx changes nothing here"
    if on_cpu and settings["PRECISION"] == "bf16":
        if not cpu_has_bf16():
            yield (
                "this processor has no instructions for bf16, which makes it about ten times slower than fp32: use "
                "PRECISION=auto"
            )
        elif not cpu_gains_by_bf16():
            yield "this processor takes longer for bf16 than for fp32; it saves half of the base's memory"
    cores = os.cpu_count() or 1
    if on_cpu and settings["GPU_COUNT"] > cores:
        count = settings["GPU_COUNT"]
        yield (
            f"GPU_COUNT={count} starts {count} processes, but this machine has {plural(cores, 'core')} and no GPU: 1 is faster"
        )
    if settings["EMB_ON_CPU"] == "1":
        yield "the embedding stays in the host's memory (EMB_ON_CPU)"
    if STRATEGIES[settings["STRATEGY"]].offload:
        yield "DeepSpeed compiles its optimizer for the host when it is first used: half a minute or so, once"


def _rate_rows(setup: AdapterConfig, rates: dict[str, float], values: int) -> list[Row]:
    # a warning of unusual rates. rates: first and last, by setting. values: parameters of the model
    name = max(rates, key=rates.__getitem__)
    highest, is_state = rates[name], setup.method == "state"
    limit = MAX_STATE_RATE if is_state else MAX_RATE
    if highest > limit:
        more = f": {usual_state(values)}" if is_state else ""
        words = f"{name}={highest:g} is far above what is usual ({limit:g} at most){more}"
        return [("warning", f"{words}; ./training.sh --find-lr tells what the settings bear")]
    if is_state and highest < LEAST_STATE_RATE:
        return [("note", f"{name}={highest:g} will hardly move a state: {usual_state(values)}")]
    return []


def usual_state_rate(values: int) -> float:
    """Return the usual rate for a state of a model of so many values.

    It is interpolated on a straight line of logarithms between 1e-3 for 0.1B and 1e-2 for 7B.
    """
    share = math.log(min(max(values, 1e8), 7e9) / 1e8) / math.log(70)
    return float(f"{1e-3 * 10**share:.0e}")


def usual_state(values: int) -> str:
    """Describe the usual rates for a state. values: parameters of the model."""
    rate = usual_state_rate(values)
    return f"usual are {USUAL_STATE}; here about LR_INIT={rate:g} with LR_FINAL={rate / 10:g}"


def recorded_shapes(settings: Settings) -> int:
    """Return of how many shapes of a micro-batch CUDA_GRAPHS will keep the activations."""
    if not settings["CUDA_GRAPHS"]:
        return 0
    return (
        min(cuda_graphs.MAX_RECORDED, len(settings["TRAIN_LENGTHS"].split())) if settings["DATALOAD"] == "bucket" else 1
    )


def _format_count(number: int) -> str:
    return f"{number:,}" if number < MANY else f"{number / 1e6:,.2f} M"


def _method_words(setup: AdapterConfig) -> str:
    options = {k: v for k, v in setup.options.items() if k in ("rank", "alpha", "layers", "every")}
    options |= {"type": setup.options["config"]["peft_type"]} if "config" in setup.options else {}
    words = [METHODS[setup.method].words]
    words += [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in options.items()]
    words += ["rsLoRA"] if setup.options.get("rslora") else []
    words += ["with token shifts"] if setup.options.get("shifts") else []
    words += ["on " + ",".join(setup.parts)] if setup.parts else []
    return " ".join(words)


def _base_rows(settings: Settings, setup: AdapterConfig) -> Iterator[Row]:
    # quantization of the base, and chunks
    if setup.quant != "none":
        alias = f" ({settings['QUANT']} is {setup.quant})" if settings["QUANT"] != setup.quant else ""
        parts, kept = ",".join(setup.quant_parts), ",".join(setup.quant_kept)
        yield "", f"frozen weights of {parts} in {setup.quant}{alias}; merge.sh folds into the original ones"
        if kept:
            yield "", f"{kept} stays as it is, for its inputs are extreme (QUANT_PARTS in training.sh)"
    if settings["TRAIN_TYPE"] == "infctx":
        how = "end at a chunk's border" if settings["INFCTX_GRAD"] == "detach" else "go on through all chunks"
        yield "", f"infctx: {plural(settings['CHUNK_CTX'], 'token')} at once, states are carried on, gradients {how}"


def _state_rows(setup: AdapterConfig, stored: Iterable[str]) -> list[Row]:
    # use of a state that the base holds
    if not any(arch.STATE_NAME.fullmatch(name) for name in stored):
        return []
    how = "what is learnt goes on from it" if setup.method == "state" else "texts begin with it"
    return [("", f"the base holds a learnt state: {how}")]


def template_lines(forms: Collection[Form]) -> list[Row]:
    """Warn where the data were made with several templates: no chat can use them all at once."""
    words = ", ".join(f"{form.prompt_type} with EOT={form.eot}" for form in sorted(forms, key=lambda one: one[:2]))
    return [("warning", f"these data were made with different templates: {words}")] if len(forms) > 1 else []


def bos_lines(bos_of: Mapping[Path, tuple[int, str]], mode: str) -> list[Row]:
    """Describe rows that begin with token 0.

    Args:
        bos_of: the BOS of each tokenized file and a warning or "", by its prefix.
        mode: of TokenDataset.
    """
    rows = [("", f"warning: {words}") for _, words in bos_of.values() if words]
    names = {bos: ", ".join(p.name for p, (own, _) in bos_of.items() if own == bos) for bos in (0, 1)}
    if names[0] and names[1]:
        words = f"the rows of {names[1]} begin with token 0 (BOS=1), those of {names[0]} do not (BOS=0)"
        rows.append(("", f"warning: {words}: no client does both. Tokenize them again with one BOS"))
    elif names[1]:
        rows.append(("", "rows begin with token 0 (BOS=1); chat, samples and exports of this run do so as well"))
    if names[1] and mode in ("get", "magic"):
        words = "DATALOAD=get reads the file as one text, in which rows that begin and end with token 0 have two between them"
        rows.append(("", f"warning: {words}. Use PACK=concat, or tokenize with BOS=0"))
    return rows


def _more_steps(settings: Settings, plan: Plan) -> str:
    # which settings give a run more steps
    if settings["STREAMING"]:
        return "a larger MAX_STEPS"
    larger = "a larger EPOCH_COUNT" + (" or EPOCH_STEPS" if plan.epoch_steps else "")
    smaller = [name for name in ("MICRO_BSZ", "MINI_BSZ") if settings[name] not in (1, "auto")]
    smaller += ["CTX_LEN"] if settings["DATALOAD"] in FILLED_BY_CTX else []
    return larger + (f", or a smaller {' or '.join(smaller)}" if smaller else "")


def data_lines(data: TokenDataset, plan: Plan, settings: Settings) -> list[Row]:
    """Describe the data, and how they become batches."""
    return [
        *_data_rows(data, data.facts(), plan, settings),
        ("batches", f"DATALOAD={settings['DATALOAD']}, CTX_LEN={settings['CTX_LEN']}: "
                    f"{plural(data.rows, ROW.get(data.mode, 'row'))} a pass, "
                    f"{'shuffled' if settings['DATA_SHUFFLE'] else 'not shuffled'}; {_step_rows(plan, settings)}"),
        *_batch_rows(data, plan),
    ]  # fmt: skip


def _step_rows(plan: Plan, settings: Settings) -> str:
    # the rows of an optimizer step
    nodes = f" x NNODES={settings['NNODES']}" if settings["NNODES"] > 1 else ""
    return f"MICRO_BSZ={settings['MICRO_BSZ']} x MINI_BSZ={plan.accumulate} x GPU_COUNT={settings['GPU_COUNT']}{nodes}"


def stream_lines(
    files: Sequence[Path], tokenizing: TokenizeConfig, buffer: int, plan: Plan, settings: Settings
) -> list[Row]:
    """Describe the data of STREAMING=1.

    Args:
        files: that are read.
        tokenizing: the settings of make_tokenize.sh.
        buffer: rows that are shuffled among each other.
        plan: of the data.
        settings: of the run.
    """
    size = sum(path.stat().st_size for path in files if path.is_file())
    names = ", ".join(paths.display_path(path) for path in files[:3]) + (
        f" and {len(files) - 3} more" if len(files) > 3 else ""
    )
    what = f"{size / 1e6:,.1f} MB of rows, again and again" if size else "a pipe, until it ends"
    order = f"shuffled among {buffer:,} rows" if buffer > 1 else "in the order of the files"
    return [
        ("data", f"{names}: {what}, encoded on the way as make_tokenize.sh says (PROMPT_TYPE={tokenizing.prompt_type}, "
                 f"EOT={tokenizing.eot}, BOS={tokenizing.bos}); LOSS_MASK={settings['LOSS_MASK']}"),
        ("batches", f"DATALOAD={settings['DATALOAD']}, CTX_LEN={settings['CTX_LEN']}, {order}; {_step_rows(plan, settings)}"),
    ]  # fmt: skip


def _data_rows(data: TokenDataset, facts: DataStats, plan: Plan, settings: Settings) -> Iterator[Row]:
    # what was read, and what of it is not trained and why
    names = " + ".join(paths.display_path(source.path) for source in data.sources)
    size = f"{plural(facts.documents, 'row')}, {plural(facts.tokens, 'token')}"
    yield "data", f"{names}: {size}; one pass trains {facts.targets:,} of them (LOSS_MASK={settings['LOSS_MASK']})"
    if len(data.sources) > 1:
        whole, passes = sum(source.weight for source in data.sources), data.passes(plan, settings["EPOCH_COUNT"])
        for source, rounds in zip(data.sources, passes, strict=True):
            share = f"{float(source.weight / whole):.1%} of what is drawn"
            yield (
                "",
                f"{source.name}: {plural(len(source), 'row')}, {share}; the run goes through it {rounds:.2f} times",
            )
    if facts.untrained:
        yield "", f"{plural(facts.untrained, 'row')} with nothing to train under this mask: left out"
    if facts.overlong:
        is_at_limit = data.ctx_len >= AUTO_CTX_LIMIT
        advice = "set CTX_LEN to take more" if is_at_limit else f"CTX_LEN=auto takes up to {AUTO_CTX_LIMIT}"
        what = {
            "truncate": f"{plural(facts.lost, 'token')} at the end {is_or_are(facts.lost)} not trained ({advice})",
            "truncate-left": f"{plural(facts.lost, 'token')} at the beginning {is_or_are(facts.lost)} not used ({advice})",
            "drop": f"left out with their {plural(facts.lost, 'token')} (OVERLONG=drop; {advice})",
            "split": f"cut into {plural(facts.pieces, 'piece')} (OVERLONG=split)",
        }[data.overlong]
        yield "", f"{plural(facts.overlong, 'row')} longer than CTX_LEN={data.ctx_len}: {what}"
        if facts.unfinished:
            them = "it" if facts.unfinished == 1 else "them"
            yield (
                "warning",
                (
                    f"{facts.unfinished:,} of those end inside what is learnt: the model does not learn to stop from {them}; "
                    f"{advice}, and OVERLONG=drop leaves such rows out"
                ),
            )
        if facts.emptied and data.overlong != "drop":
            yield "", f"{plural(facts.emptied, 'row')} of those with nothing left to train: left out"


def _batch_rows(data: TokenDataset, plan: Plan) -> list[Row]:
    # what the mode of sampling decides by itself
    if data.buckets and isinstance(plan, BucketPlan):
        pairs = zip(data.buckets.edges, data.buckets.sizes, strict=True)
        return [("", f"buckets, longest row x rows at once: {', '.join(f'{edge} x {size}' for edge, size in pairs)}; "
                     f"{plural(plan.steps, 'optimizer step')} a pass")]  # fmt: skip
    return [("", f"MAGIC_PRIME {stream.rows:,}: {plural(stream.windows - stream.rows, 'window')} at the end of "
                 f"{source.path.name} left out")
            for source, stream in zip(data.sources, data.streams, strict=True) if isinstance(stream, MagicPrime)]  # fmt: skip


def setting_lines(settings: Settings, script_values: Settings) -> list[str]:
    """List all settings as run.json will hold them. script_values: those of the script, which show where auto was."""
    words = [
        f"{name}={_format_setting(value)}" + ("(auto)" if script_values[name] == "auto" != value else "")
        for name, value in settings.items()
        if value != ""
    ]
    return textwrap.wrap(
        " ".join(words), 110, initial_indent="settings  ", subsequent_indent=" " * 10, break_on_hyphens=False
    )


def _format_setting(value: object) -> str:
    # as the script would have it
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:g}" if isinstance(value, float) else shlex.quote(str(value))


def print_samples(sequences: Iterable[tuple[np.ndarray, np.ndarray]], most: int) -> None:
    """Print the first different sequences of the run, with the trained tokens marked.

    Args:
        sequences: tokens [n] and the weights of their targets [n - 1].
        most: how many are printed.
    """
    in_colour = sys.stdout.isatty()
    begin, end = ("\033[32m", "\033[0m") if in_colour else ("[[", "]]")
    where = "green" if in_colour else "in [[double brackets]]"
    print(f"\nThe first samples of the run; what is {where} is trained:")
    seen: set[bytes] = set()  # repeats of a row often share a pack
    for tokens, weights in sequences:
        if tokens.tobytes() in seen:
            continue
        number = len(seen) + 1
        seen.add(tokens.tobytes())
        print(f"\n--- sample {number}: {plural(len(tokens), 'token')}, {int(weights.sum())} trained")
        print(tokenizer.mark_trained(tokens.tolist(), [False, *(weights > 0).tolist()], begin, end))
        if len(seen) == most:
            break


def advise_on_memory(settings: Settings, error: Exception) -> str:
    """Describe an error of missing memory, and which settings to change, in this order."""
    advice = []
    if settings.get("CUDA_GRAPHS"):
        advice.append("CUDA_GRAPHS=0 (each shape that is recorded keeps a pass's activations)")
    if settings["GRAD_CP"] == "0":
        advice.append("GRAD_CP=selective (a third less for activations, hardly any time)")
    if settings["GRAD_CP"] != "1":
        advice.append("GRAD_CP=1 (much less memory, a third more time)")
    if OPTIMS[settings["OPTIM"]].moments > 2 and settings["FINETUNE_MODE"] in ("full", "lisa"):
        lean = "adamw8bit (6 bytes" if device_kind() == "cuda" else "adafactor (8 bytes"
        advice.append(f"OPTIM={lean} less for each trained value)")
    if settings["DATALOAD"] == "bucket":
        sizes = zip(settings["TRAIN_LENGTHS"].split(), settings["TRAIN_BATCH_SIZES"].split(), strict=True)
        most = max(int(length) * int(rows) for length, rows in sizes)
        advice.append(
            f"TOKEN_BUDGET={most // 2} with TRAIN_LENGTHS=auto and TRAIN_BATCH_SIZES=auto, and twice MINI_BSZ"
        )
    elif settings["MICRO_BSZ"] > 1:
        advice.append(
            f"MICRO_BSZ={settings['MICRO_BSZ'] // 2} and MINI_BSZ={settings['MINI_BSZ'] * 2}, and twice EPOCH_STEPS if it is "
            "a number (the same result)"
        )
    if settings["TRAIN_TYPE"] == "none":
        advice.append(f"CTX_LEN={max(16, settings['CTX_LEN'] // 2)} (longer rows are cut)")
        advice.append("TRAIN_TYPE=infctx with CHUNK_CTX=512 (memory of 512 tokens, whatever the context)")
    elif settings["CHUNK_CTX"] > 16:
        advice.append(f"CHUNK_CTX={settings['CHUNK_CTX'] // 2}")
    method = METHODS[method_of(settings["FINETUNE_MODE"], settings["use_dora"])]
    if method.saves_model:
        advice.append("FINETUNE_MODE=lora")
    else:
        if settings["QUANT"] == "none":
            advice.append("QUANT=nf4 (the frozen weights in 4 bits)")
        if "rank" in method.options:
            variable = method.options["rank"]
            advice.append(f"{variable}={max(1, settings[variable] // 2)}")
    numbered = "\n".join(f"  {i}. {a}" for i, a in enumerate(advice, 1))
    reason = first_line(error)
    if type(error).__name__ != "OutOfMemoryError":  # of the host
        reason = f"{describe_out_of_memory().removeprefix('Out of memory: ')} {reason}".strip()
    return f"Out of memory: {reason}\nWhat to change, in this order:\n{numbered}"


def report_best_validation(validations: Sequence[dict], folder: Path, newest: Path) -> Path:
    """Print where the validation loss was lowest.

    Args:
        validations: records of the run, with finite losses.
        folder: of the run.
        newest: its last checkpoint.

    Returns:
        The checkpoint to use: of those with a validation, the one with the lowest loss.
    """
    best, losses = min(validations, key=lambda record: record["loss"]), {r["step"]: r["loss"] for r in validations}
    saved = {step: path for path, step in run_dir.checkpoint_steps(folder) if step in losses}
    where = f"at step {best['step']}, in epoch {best['epoch'] + 1}"
    if not best["step"]:
        where = "before training: nothing that was learnt does better on held-out rows"
    if saved:
        step = min(saved, key=losses.__getitem__)
        path = paths.display_path(saved[step])
        last = next((step for step, path in saved.items() if path.name == newest.name), None)
        if step == best["step"]:
            newest, where = saved[step], f"{where}; {path} holds it"
        elif last is not None and losses[step] < losses[last]:
            newest, where = saved[step], f"{where}; of what was saved, {path} was best ({losses[step]:.4f})"
    print(f"validation was best, {best['loss']:.4f}, {where}")
    return Path(paths.display_path(newest))


def report_result(
    method: Method, folder: Path, newest: Path | None, validations: Sequence[dict], exact: bool, complete: bool,
    received: int, seconds: float,
) -> None:  # fmt: skip
    """Print where the result is and what to do with it. Ends the program if a signal has stopped the run.

    Args:
        method: of the run.
        folder: of the run.
        newest: its last checkpoint, None if there is none.
        validations: records of the run, with finite losses.
        exact: whether the train state was saved as well.
        complete: whether no step is left.
        received: number of the signal that has stopped the run, 0 for none.
        seconds: that the run took.
    """
    there = paths.display_path(folder)
    if received:
        if complete:
            words = f"Stopped behind the last step: the run is complete ({newest})."
        elif newest is None:
            words = f"Stopped before the first step: there was nothing to save in {there}."
        elif not exact:
            words = (
                "Stopped; what was learnt so far is saved, but not the state of the optimizer. To go on, set "
                f'{method.load or "MODEL_PATH"}="{newest}" and another RUN_NAME, and run the script again.'
            )
        else:
            words = (
                f"Stopped; what was learnt so far is saved ({newest}). Run the script again, as it is, and it goes on as if "
                "it had never stopped (--new begins a new run)."
            )
        exit_with(words, 128 + received)
    assert newest is not None  # a run that was not stopped has written its last checkpoint
    more = [name for name in ("loss.png", "samples.md", "tensorboard") if (folder / name).exists()]
    print(f"done in {format_duration(seconds)}: {newest}" + "".join(f", {there}/{name}" for name in more))
    if validations:
        newest = report_best_validation(validations, folder, newest)
    number = newest.stem.removeprefix("rwkv-")
    name, path = run_dir.merge_arguments(folder), shlex.quote(str(newest))
    print(f"next: ./merge.sh {name} {number}      or try it: ./chat.sh --adapter {path}")
    print(f"      does it fit, and would more or less be better? ./chat.sh --diagnose {name}")
