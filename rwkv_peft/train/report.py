"""What a run prints: the plan before it, samples of what is trained, and the end."""

from __future__ import annotations

import math
import os
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from rwkv_peft.adapters.specs import METHODS, OPTIMS, Method, method_of
from rwkv_peft.checkpoint import run_dir
from rwkv_peft.common import paths
from rwkv_peft.common.errors import describe_out_of_memory, exit_with
from rwkv_peft.common.formatting import first_line, format_duration, is_or_are, plural
from rwkv_peft.common.hardware import cpu_gains_by_bf16, cpu_has_bf16, describe_device, device_kind
from rwkv_peft.config.strategies import STRATEGIES
from rwkv_peft.data.sampling import AUTO_CTX_LIMIT
from rwkv_peft.model import arch
from rwkv_peft.text import tokenizer

from . import cuda_graphs
from .memory_estimate import memory_bytes

MANY = 100_000  # from here on, numbers are given in millions
# Rates of state tuning. Runs on RWKV-7 that were evaluated used 3e-4 to 2e-2 (rwkv-metal on 0.1B, RWKV-Agent on 7.2B, the
# tutorial of rwkv.cn; 2026). The 1 -> 0.01 of the RWKV-5 and -6 instructions destroys an RWKV-7.
LEAST_STATE_RATE, MOST_STATE_RATE = 3e-4, 3e-2
MOST_RATE = 1e-2  # of all else; rates above diverge with all but toys
USUAL_STATE = "1e-3 (0.1B) to 1e-2 (7B)"
FEW_STEPS = 30  # fewer optimizer steps than this are worth a word
ROW = {"pack": "pack", "concat": "window", "get": "window", "magic": "window"}  # what a row is called in each mode
FILLED_BY_CTX = ("pack", "get")  # rows as long as the context: a shorter one gives more of them
# bits of a compressed value with its scales, about
QUANT_BITS = {"int8": 8.1, "nf4": 4.2, "fp4": 4.2, "fp8": 8.1}
LONG_WARMUP = 0.25  # ... and so is a warm-up that takes more of the run than this


def plan_lines(
    settings, setup, base, geometry, lines, tokens, sequences, plan, steps, trained_values, stored, dtype, op_words
) -> list[str]:
    """The run header: what was read, what auto became, how long it is, what it needs.

    settings: those of run.json, by their names in the script. setup: what becomes of the model. lines: data_lines or
    stream_lines. tokens, sequences: of the largest micro-batch. op_words: about what computes, or "".
    """
    total = sum(math.prod(s.shape) for s in stored.values())
    device, infctx = device_kind(), settings["TRAIN_TYPE"] == "infctx"
    shapes = arch.shapes(geometry)
    compressed = {f"{name}.weight" for name in setup.compressed(geometry)}
    bits = QUANT_BITS.get(setup.quant, 0)
    on_host = {"emb.weight"} if settings["EMB_ON_CPU"] == "1" else set()
    memory = memory_bytes(
        {name: shape for name, shape in shapes.items() if name not in compressed and name not in on_host},
        trained_values, min(tokens, settings["CHUNK_CTX"]) if infctx else tokens, geometry,
        dtype.itemsize, settings["GRAD_CP"], setup.method, device, settings["OP"], OPTIMS[settings["OPTIM"]],
        largest=max((math.prod(shapes[name]) for name in setup.whole(geometry)), default=0),
        compressed=int(sum(math.prod(shapes[name]) for name in compressed) * bits / 8),
        sequences=max(1, sequences * min(tokens, settings["CHUNK_CTX"]) // tokens) if infctx else sequences,
        strategy=STRATEGIES[settings["STRATEGY"]], processes=plan.world, recorded=recorded_shapes(settings),
    )  # fmt: skip
    last = settings["LR_INIT"] if settings["LR_SCHEDULE"] == "constant" else settings["LR_FINAL"]
    rows = [
        ("model", f"{paths.display_path(base)}: {arch.arch_of(geometry).name}, {plural(geometry.n_layer, 'layer')}, "
                  f"width {geometry.n_embd}, vocabulary {geometry.vocab_size}, {total / 1e6:,.1f} M parameters"),
        ("method", f"{method_words(setup)}: {values(trained_values)} trained values "
                   f"({trained_values / total:.1%} of the model's)"),
        *base_rows(settings, setup),
        *state_rows(setup, stored),
        *lines,
        ("length", f"{plural(settings['EPOCH_COUNT'], 'epoch')} x EPOCH_STEPS={plan.micro_batches} micro-batches = "
                   f"{plural(steps, 'optimizer step')}; LR {settings['LR_INIT']:g} -> {last:g} ({settings['LR_SCHEDULE']}, "
                   f"{settings['WARMUP_STEPS']} warm-up)"),
    ]  # fmt: skip
    if plan.passes_per_epoch > 1:
        rows.append(("", f"EPOCH_STEPS makes an epoch {plan.passes_per_epoch:.1f} passes over the data; auto makes "
                         "it one"))  # fmt: skip
    if steps < FEW_STEPS:
        rows.append(("", f"{plural(steps, 'step')} will hardly change a model: take {more_steps(settings, plan)}"))
    if settings["WARMUP_STEPS"] >= steps:
        rows.append(("", f"WARMUP_STEPS={settings['WARMUP_STEPS']} is as long as the whole run: the rate only rises"))
    elif settings["WARMUP_STEPS"] > steps * LONG_WARMUP:
        rows.append(("", f"WARMUP_STEPS={settings['WARMUP_STEPS']} is {settings['WARMUP_STEPS'] / steps:.0%} of the run; a "
                         f"tenth of the run, {max(1, steps // 10)}, is enough"))  # fmt: skip
    if last > settings["LR_INIT"]:
        rows.append(("", "LR_FINAL is above LR_INIT: the rate rises until the end; were the two exchanged?"))
    if infctx and tokens <= settings["CHUNK_CTX"]:
        rows.append(
            (
                "",
                f"a micro-batch has at most {plural(tokens, 'token')}: one chunk holds it, so infctx changes nothing here",
            )
        )
    if device == "cpu" and settings["PRECISION"] == "bf16" and not cpu_has_bf16():
        rows.append(("", "this processor has no instructions for bf16, which makes it about ten times slower than fp32: use "
                         "PRECISION=auto"))  # fmt: skip
    elif device == "cpu" and settings["PRECISION"] == "bf16" and not cpu_gains_by_bf16():
        rows.append(("", "this processor takes longer for bf16 than for fp32; it saves half of the base's memory"))
    cores = os.cpu_count() or 1
    if device == "cpu" and settings["GPU_COUNT"] > cores:
        rows.append(("", f"GPU_COUNT={settings['GPU_COUNT']} starts {settings['GPU_COUNT']} processes, but this machine has "
                         f"{plural(cores, 'core')} and no GPU: 1 is faster"))  # fmt: skip
    if on_host:
        rows.append(("", "the embedding stays in the host's memory (EMB_ON_CPU)"))
    guess = "estimate, each process" if plan.world > 1 else "estimate"
    kind, digits = "GPU memory" if device == "cuda" else "memory", 1 if memory > 10 << 30 else 2
    if STRATEGIES[settings["STRATEGY"]].offload:
        rows.append(
            ("", "DeepSpeed compiles its optimizer for the host when it is first used: half a minute or so, once")
        )
    rows += rate_rows(setup, {"LR_INIT": settings["LR_INIT"], "LR_FINAL": last}, total)
    rows += [
        ("machine", f"{describe_device()}; PRECISION={settings['PRECISION']}, "
                    f"OP={settings['OP']}{op_words and f' ({op_words})'}, STRATEGY={settings['STRATEGY']}; "
                    f"about {memory / 2**30:.{digits}f} GB {kind} ({guess})"),
        ("output", f"output/{settings['RUN_NAME']}/ (loss.jsonl has the loss of each step; what is shown here is smoothed)"),
    ]  # fmt: skip
    return [f"{label:<10}{text}" for label, text in rows]


def rate_rows(setup, rates: dict[str, float], values: int) -> list[tuple[str, str]]:
    """A word about rates that are far from what is usual. rates: where the schedule begins and ends. values: of the model."""
    name = max(rates, key=rates.__getitem__)
    highest, state = rates[name], setup.method == "state"
    usual = MOST_STATE_RATE if state else MOST_RATE
    if highest > usual:
        more = f": {usual_state(values)}" if state else ""
        words = f"{name}={highest:g} is far above what is usual ({usual:g} at most){more}"
        return [("warning", f"{words}; ./training.sh --find-lr tells what the settings bear")]
    if state and highest < LEAST_STATE_RATE:
        return [("note", f"{name}={highest:g} will hardly move a state: {usual_state(values)}")]
    return []


def usual_state_rate(values: int) -> float:
    """Return the usual learning rate for a state of a model of so many values.

    It is between those of 0.1B and of 7B on a straight line of logarithms.
    """
    share = math.log(min(max(values, 1e8), 7e9) / 1e8) / math.log(70)
    return float(f"{1e-3 * 10**share:.0e}")


def usual_state(values: int) -> str:
    """Which rates are usual for a state, in words."""
    rate = usual_state_rate(values)
    return f"usual are {USUAL_STATE}; here about LR_INIT={rate:g} with LR_FINAL={rate / 10:g}"


def recorded_shapes(settings) -> int:
    """How many shapes of a micro-batch CUDA_GRAPHS will hold on to."""
    if not settings["CUDA_GRAPHS"]:
        return 0
    return min(cuda_graphs.MOST, len(settings["TRAIN_LENGTHS"].split())) if settings["DATALOAD"] == "bucket" else 1


def values(number: int) -> str:
    """Return a number of values in words."""
    return f"{number:,}" if number < MANY else f"{number / 1e6:,.2f} M"


def method_words(setup) -> str:
    """The method with its settings, and what it is on."""
    method = METHODS[setup.method]
    shown = {k: v for k, v in setup.options.items() if k in ("rank", "alpha", "layers", "every")}
    shown |= {"type": setup.options["config"]["peft_type"]} if "config" in setup.options else {}
    words = [method.words, *(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items())]
    words += ["rsLoRA"] if setup.options.get("rslora") else []
    words += ["with token shifts"] if setup.options.get("shifts") else []
    words += ["on " + ",".join(setup.parts)] if setup.parts else []
    return " ".join(words)


def base_rows(settings, setup) -> list[tuple[str, str]]:
    """What becomes of the base, and of long texts."""
    rows = []
    if setup.quant != "none":
        alias = f" ({settings['QUANT']} is {setup.quant})" if settings["QUANT"] != setup.quant else ""
        rows.append(("", f"frozen weights of {','.join(setup.quant_parts)} in {setup.quant}{alias}; merge.sh folds into the "
                         "original ones"))  # fmt: skip
        if setup.quant_kept:
            rows.append(("", f"{','.join(setup.quant_kept)} stays as it is, for its inputs are extreme (QUANT_PARTS in "
                             "training.sh)"))  # fmt: skip
    if settings["TRAIN_TYPE"] == "infctx":
        how = "end at a chunk's border" if settings["INFCTX_GRAD"] == "detach" else "go on through all chunks"
        rows.append(
            ("", f"infctx: {plural(settings['CHUNK_CTX'], 'token')} at once, states are carried on, gradients {how}")
        )
    return rows


def state_rows(setup, stored) -> list[tuple[str, str]]:
    """What becomes of a state that the base holds."""
    if not any(arch.STATE_NAME.fullmatch(name) for name in stored):
        return []
    how = "what is learnt goes on from it" if setup.method == "state" else "texts begin with it"
    return [("", f"the base holds a learnt state: {how}")]


def form_lines(forms) -> list[tuple[str, str]]:
    """A word where the data were made with several templates: no chat can use them all at once."""
    words = ", ".join(f"{form.prompt_type} with EOT={form.eot}" for form in sorted(forms, key=lambda one: one[:2]))
    return [("warning", f"these data were made with different templates: {words}")] if len(forms) > 1 else []


def bos_lines(begun, mode: str) -> list[tuple[str, str]]:
    """Words about rows that begin with token 0. begun: prefix of a tokenized file -> its BOS and a warning. mode: of Data."""
    lines = [("", f"warning: {words}") for _, words in begun.values() if words]
    names = {bos: ", ".join(p.name for p, (own, _) in begun.items() if own == bos) for bos in (0, 1)}
    if names[0] and names[1]:
        words = f"the rows of {names[1]} begin with token 0 (BOS=1), those of {names[0]} do not (BOS=0)"
        lines.append(("", f"warning: {words}: no client does both. Tokenize them again with one BOS"))
    elif names[1]:
        lines.append(("", "rows begin with token 0 (BOS=1); chat, samples and exports of this run do so as well"))
    if names[1] and mode in ("get", "magic"):
        words = "DATALOAD=get reads the file as one text, in which rows that begin and end with token 0 have two between them"
        lines.append(("", f"warning: {words}. Use PACK=concat, or tokenize with BOS=0"))
    return lines


def more_steps(settings, plan) -> str:
    """What gives a run more steps, of what is not as it should be already."""
    if settings["STREAMING"]:
        return "a larger MAX_STEPS"
    larger = "a larger EPOCH_COUNT" + (" or EPOCH_STEPS" if plan.epoch_steps else "")
    smaller = [name for name in ("MICRO_BSZ", "MINI_BSZ") if settings[name] not in (1, "auto")]
    smaller += ["CTX_LEN"] if settings["DATALOAD"] in FILLED_BY_CTX else []
    return larger + (f", or a smaller {' or '.join(smaller)}" if smaller else "")


def data_lines(data, plan, settings) -> list[tuple[str, str]]:
    """What was read, and how it becomes batches."""
    return [
        *data_rows(data, data.facts(), plan, settings),
        ("batches", f"DATALOAD={settings['DATALOAD']}, CTX_LEN={settings['CTX_LEN']}: "
                    f"{plural(data.rows, ROW.get(data.mode, 'row'))} a pass, "
                    f"{'shuffled' if settings['DATA_SHUFFLE'] else 'not shuffled'}; {at_once(plan, settings)}"),
        *batch_rows(data, plan),
    ]  # fmt: skip


def at_once(plan, settings) -> str:
    """Return the factors of an optimizer step's rows in words."""
    nodes = f" x NNODES={settings['NNODES']}" if settings["NNODES"] > 1 else ""
    return f"MICRO_BSZ={settings['MICRO_BSZ']} x MINI_BSZ={plan.accumulate} x GPU_COUNT={settings['GPU_COUNT']}{nodes}"


def stream_lines(files, tokenizing, buffer: int, plan, settings) -> list[tuple[str, str]]:
    """The same for STREAMING=1. tokenizing: the settings of make_tokenize.sh. buffer: rows that wait to be shuffled."""
    size = sum(path.stat().st_size for path in files if path.is_file())
    names = ", ".join(paths.display_path(path) for path in files[:3]) + (
        f" and {len(files) - 3} more" if len(files) > 3 else ""
    )
    what = f"{size / 1e6:,.1f} MB of rows, again and again" if size else "a pipe, until it ends"
    order = f"shuffled among {buffer:,} rows" if buffer > 1 else "in the order of the files"
    return [
        ("data", f"{names}: {what}, encoded on the way as make_tokenize.sh says (PROMPT_TYPE={tokenizing.prompt_type}, "
                 f"EOT={tokenizing.eot}, BOS={tokenizing.bos}); LOSS_MASK={settings['LOSS_MASK']}"),
        ("batches", f"DATALOAD={settings['DATALOAD']}, CTX_LEN={settings['CTX_LEN']}, {order}; {at_once(plan, settings)}"),
    ]  # fmt: skip


def data_rows(data, facts, plan, settings) -> list[tuple[str, str]]:
    """What was read, and what of it is not trained and why."""
    names = " + ".join(paths.display_path(source.path) for source in data.sources)
    rows = [("data", f"{names}: {plural(facts.documents, 'row')}, {plural(facts.tokens, 'token')}; one pass trains "
                     f"{facts.targets:,} of them (LOSS_MASK={settings['LOSS_MASK']})")]  # fmt: skip
    if len(data.sources) > 1:
        whole, passes = sum(source.weight for source in data.sources), data.passes(plan, settings["EPOCH_COUNT"])
        rows += [
            ("", f"{source.name}: {plural(len(source), 'row')}, {float(source.weight / whole):.1%} of what is drawn; the run "
                 f"goes through it {rounds:.2f} times")
            for source, rounds in zip(data.sources, passes, strict=True)
        ]  # fmt: skip
    if facts.untrained:
        rows.append(("", f"{plural(facts.untrained, 'row')} with nothing to train under this mask: left out"))
    if facts.overlong:
        advice = (
            "set CTX_LEN to take more"
            if data.ctx_len >= AUTO_CTX_LIMIT
            else f"CTX_LEN=auto takes up to {AUTO_CTX_LIMIT}"
        )
        what = {
            "truncate": f"{plural(facts.lost, 'token')} at the end {is_or_are(facts.lost)} not trained ({advice})",
            "truncate-left": f"{plural(facts.lost, 'token')} at the beginning {is_or_are(facts.lost)} not used ({advice})",
            "drop": f"left out with their {plural(facts.lost, 'token')} (OVERLONG=drop; {advice})",
            "split": f"cut into {plural(facts.pieces, 'piece')} (OVERLONG=split)",
        }[data.overlong]
        rows.append(("", f"{plural(facts.overlong, 'row')} longer than CTX_LEN={data.ctx_len}: {what}"))
        if facts.unfinished:
            rows.append(("warning", f"{facts.unfinished:,} of those end inside what is learnt: the model does not learn to stop "
                                    f"from {'it' if facts.unfinished == 1 else 'them'}; {advice}, and OVERLONG=drop "
                                    "leaves such rows out"))  # fmt: skip
        if facts.emptied and data.overlong != "drop":
            rows.append(("", f"{plural(facts.emptied, 'row')} of those with nothing left to train: left out"))
    return rows


def batch_rows(data, plan) -> list[tuple[str, str]]:
    """What the mode of sampling decides by itself."""
    if data.buckets:
        pairs = zip(data.buckets.edges, data.buckets.sizes, strict=True)
        return [("", f"buckets, longest row x rows at once: {', '.join(f'{edge} x {size}' for edge, size in pairs)}; "
                     f"{plural(plan.steps, 'optimizer step')} a pass")]  # fmt: skip
    if data.mode == "magic":
        return [("", f"MAGIC_PRIME {stream.rows:,}: {plural(stream.windows - stream.rows, 'window')} at the end of "
                     f"{source.path.name} left out")
                for source, stream in zip(data.sources, data.streams, strict=True)]  # fmt: skip
    return []


def setting_lines(settings: dict, given: dict) -> list[str]:
    """Return all settings as run.json will have them. given: those of the script, to show what auto has become."""
    words = [
        f"{name}={shown(value)}" + ("(auto)" if given[name] == "auto" != value else "")
        for name, value in settings.items()
        if value != ""
    ]
    return textwrap.wrap(
        " ".join(words), 110, initial_indent="settings  ", subsequent_indent=" " * 10, break_on_hyphens=False
    )


def shown(value) -> str:
    """A setting's value as the script would say it."""
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:g}" if isinstance(value, float) else shlex.quote(str(value))


def print_samples(sequences: Iterator, most: int) -> None:
    """The first different sequences of the run as they are trained, with what is trained marked."""
    colour = sys.stdout.isatty()
    begin, end = ("\033[32m", "\033[0m") if colour else ("[[", "]]")
    where = "green" if colour else "in [[double brackets]]"
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


def out_of_memory(settings: dict, error: Exception) -> str:
    """Return the message about memory, with what to change."""
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
    if settings["TRAIN_TYPE"] == "none":
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
    listed = "\n".join(f"  {i}. {a}" for i, a in enumerate(advice, 1))
    reason = first_line(error)
    if type(error).__name__ != "OutOfMemoryError":  # of the host
        reason = f"{describe_out_of_memory().removeprefix('Out of memory: ')} {reason}".strip()
    return f"Out of memory: {reason}\nWhat to change, in this order:\n{listed}"


def best_look(validations: Sequence[dict], folder: Path, newest: Path) -> Path:
    """Print where the validation was best, and return the checkpoint to continue with: that of the best validation that has one.

    Args:
        validations: Records of the run.
        folder: Of the run.
        newest: Its last checkpoint.
    """
    best, losses = min(validations, key=lambda look: look["loss"]), {look["step"]: look["loss"] for look in validations}
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


def finish(
    method: Method, folder: Path, newest: Path | None, validations: Sequence[dict], exact: bool, complete: bool, received: int,
    seconds: float,
) -> None:  # fmt: skip
    """Print the end of a run: where the result is and what to do with it.

    Args:
        method: Of the run.
        folder: Of the run.
        newest: Its last checkpoint.
        validations: Records of the run.
        exact: The state was saved as well.
        complete: No step is left.
        received: The signal that stopped it, or 0.
        seconds: That it took.
    """
    there = paths.display_path(folder)
    if received:
        if complete:
            exit_with(f"Stopped behind the last step: the run is complete ({newest}).", 128 + received)
        if newest is None:
            exit_with(f"Stopped before the first step: there was nothing to save in {there}.", 128 + received)
        if not exact:
            setting = method.load or "MODEL_PATH"
            exit_with(
                "Stopped; what was learnt so far is saved, but not the state of the optimizer. To go on, set "
                f'{setting}="{newest}" and another RUN_NAME, and run the script again.',
                128 + received,
            )
        exit_with(
            f"Stopped; what was learnt so far is saved ({newest}). Run the script again, as it is, and it goes on as if it had "
            "never stopped (--new begins a new run).",
            128 + received,
        )
    more = [name for name in ("loss.png", "samples.md", "tensorboard") if (folder / name).exists()]
    print(f"done in {format_duration(seconds)}: {newest}" + "".join(f", {there}/{name}" for name in more))
    assert newest is not None, "a run that is done has written its last checkpoint"
    if validations:
        newest = best_look(validations, folder, newest)
    number = newest.stem.removeprefix("rwkv-")
    name, path = run_dir.merge_arguments(folder), shlex.quote(str(newest))
    print(f"next: ./merge.sh {name} {number}      or try it: ./chat.sh --adapter {path}")
    print(f"      does it fit, and would more or less be better? ./chat.sh --diagnose {name}")
