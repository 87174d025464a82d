"""What a run tells its user: the plan before it, samples of what is trained, and the last words."""

from __future__ import annotations

import itertools
import math
import os
import shlex
import sys
import textwrap
from pathlib import Path

from .. import project, tokenizer
from ..data.sampling import AUTO_CTX_LIMIT
from ..errors import leave
from ..machine import cpu_has_bf16, device_kind, device_words
from ..model import arch
from ..words import clock, count
from .estimate import memory_bytes

FEW_STEPS = 30  # fewer optimizer steps than this are worth a word
LONG_WARMUP = 0.25  # ... and so is a warm-up that takes more of the run than this


def plan_lines(settings, base, geometry, data, plan, steps, trained_values, stored, dtype) -> list[str]:
    """The run header: what was read, what auto became, how long it is, what it needs.

    settings: those of run.json, by their names in the script.
    """
    facts, total = data.facts(), sum(math.prod(s.shape) for s in stored.values())
    device, full = device_kind(), settings["FINETUNE_MODE"] == "full"
    tokens = min(plan.micro_bsz * data.ctx_len, facts.tokens)
    memory = memory_bytes(
        arch.shapes(geometry), trained_values, tokens, geometry.n_layer, geometry.n_embd, dtype.itemsize,
        settings["GRAD_CP"], full, device,
        mapped=sum(s.bytes for s in stored.values() if full or s.dtype != dtype) if device == "cpu" else 0,
    )  # fmt: skip
    method = settings["FINETUNE_MODE"]
    if not full:
        parts = settings["lora_parts"] + (",emb,head" if settings["EMB_FINETUNE"] else "")
        method += f" r={settings['lora_r']} alpha={settings['lora_alpha']:g} on {parts}"
    last = settings["LR_INIT"] if settings["LR_SCHEDULE"] == "constant" else settings["LR_FINAL"]
    rows = [
        ("model", f"{project.shown(base)}: {arch.SUPPORTED}, {geometry.n_layer} layers, width {geometry.n_embd}, "
                  f"vocabulary {geometry.vocab_size}, {total / 1e6:,.1f} M parameters"),
        ("method", f"{method}: {trained_values / 1e6:,.2f} M trained values ({trained_values / total:.1%} of the model's)"),
        ("data", f"{project.shown(data.reader.path)}: {count(facts.documents, 'row')}, {facts.tokens:,} tokens; one pass trains "
                 f"{facts.targets:,} of them (LOSS_MASK={settings['LOSS_MASK']})"),
    ]  # fmt: skip
    left_out = facts.documents - facts.trained_documents
    if left_out and settings["DATALOAD"] != "get":
        rows.append(("", f"{count(left_out, 'row')} with nothing to train under this mask: left out"))
    if facts.truncated:
        auto = data.ctx_len >= AUTO_CTX_LIMIT
        advice = "set CTX_LEN to take more" if auto else f"CTX_LEN=auto takes up to {AUTO_CTX_LIMIT}"
        rows.append(("", f"{count(facts.truncated, 'row')} longer than CTX_LEN={data.ctx_len}: {facts.lost:,} tokens at the "
                         f"end are not trained ({advice})"))  # fmt: skip
    what = {"pack": "pack", "get": "window"}.get(settings["DATALOAD"], "row")
    rows += [
        ("batches", f"DATALOAD={settings['DATALOAD']}, CTX_LEN={data.ctx_len}: {count(data.rows, what)} a pass, "
                    f"{'shuffled' if settings['DATA_SHUFFLE'] else 'not shuffled'}; "
                    f"MICRO_BSZ={plan.micro_bsz} x MINI_BSZ={plan.accumulate} x GPU_COUNT={plan.world}"),
        ("length", f"{count(settings['EPOCH_COUNT'], 'epoch')} x EPOCH_STEPS={plan.micro_batches} micro-batches = "
                   f"{count(steps, 'optimizer step')}; LR {settings['LR_INIT']:g} -> {last:g} ({settings['LR_SCHEDULE']}, "
                   f"{settings['WARMUP_STEPS']} warm-up)"),
    ]  # fmt: skip
    if plan.rows_per_epoch > plan.rows:
        rows.append(("", f"EPOCH_STEPS makes an epoch {plan.rows_per_epoch / plan.rows:.1f} passes over the data; auto makes "
                         "it one"))  # fmt: skip
    if steps < FEW_STEPS:
        rows.append(("", f"{count(steps, 'step')} will hardly change a model: take a larger EPOCH_COUNT, or a smaller "
                         "MICRO_BSZ, MINI_BSZ or CTX_LEN"))  # fmt: skip
    if settings["WARMUP_STEPS"] >= steps:
        rows.append(("", f"WARMUP_STEPS={settings['WARMUP_STEPS']} is as long as the whole run: the rate only rises"))
    elif settings["WARMUP_STEPS"] > steps * LONG_WARMUP:
        rows.append(("", f"WARMUP_STEPS={settings['WARMUP_STEPS']} is {settings['WARMUP_STEPS'] / steps:.0%} of the run; a "
                         "tenth of it is enough"))  # fmt: skip
    if device == "cpu" and settings["PRECISION"] == "bf16" and not cpu_has_bf16():
        rows.append(("", "this processor has no instructions for bf16, which makes it about ten times slower than fp32: use "
                         "PRECISION=auto"))  # fmt: skip
    cores = os.cpu_count() or 1
    if device == "cpu" and plan.world > cores:
        rows.append(("", f"GPU_COUNT={plan.world} starts {plan.world} processes, but this machine has {count(cores, 'core')} "
                         "and no GPU: 1 is faster"))  # fmt: skip
    kind = "GPU memory" if device == "cuda" else "memory"
    rows += [
        ("machine", f"{device_words()}; PRECISION={settings['PRECISION']}, OP={settings['OP']}, "
                    f"STRATEGY={settings['STRATEGY']}; about {memory / 2**30:.1f} GB {kind} (estimate)"),
        ("output", f"output/{settings['RUN_NAME']}/"),
    ]  # fmt: skip
    return [f"{label:<10}{text}" for label, text in rows]


def setting_lines(settings: dict, given: dict) -> list[str]:
    """All settings as run.json will hold them. given: those of the script, to tell what auto has become."""
    words = [
        f"{name}={shown(value)}" + ("(auto)" if given[name] == "auto" else "")
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


def print_samples(data, most: int) -> None:
    """The first different rows of the first epoch, one by one as they are trained, with what is trained marked."""
    colour = sys.stdout.isatty()
    begin, end = ("\033[32m", "\033[0m") if colour else ("[[", "]]")
    where = "green" if colour else "in [[double brackets]]"
    print(f"\nThe first samples of the run; what is {where} is trained:")
    seen: set[bytes] = set()  # repeats of a row often share a pack
    for tokens, weights in itertools.chain.from_iterable(map(data.row, range(data.rows))):
        if tokens.tobytes() in seen:
            continue
        number = len(seen) + 1
        seen.add(tokens.tobytes())
        print(f"\n--- sample {number}: {len(tokens)} tokens, {int(weights.sum())} trained")
        print(marked(tokens, weights, begin, end))
        if len(seen) == most:
            break


def marked(tokens, weights, begin: str, end: str) -> str:
    """The text of a sequence with marks around every run of trained tokens; <end> is token 0.

    tokens: [n]; weights: [n-1], of the targets tokens[1:].
    """
    flags = [False, *(weights > 0).tolist()]
    text = ""
    for trained, group in itertools.groupby(zip(flags, tokens.tolist(), strict=True), key=lambda pair: pair[0]):
        documents = [[]]
        for _, token in group:
            if token == tokenizer.END_OF_DOC:
                documents.append([])
            else:
                documents[-1].append(token)
        words = "<end>".join(tokenizer.decode(ids) for ids in documents)
        text += f"{begin}{words}{end}" if trained else words
    return text


def out_of_memory(settings: dict, error: Exception) -> str:
    advice = []
    if not settings["GRAD_CP"]:
        advice.append("GRAD_CP=1 (much less memory, a third more time)")
    if settings["MICRO_BSZ"] > 1:
        advice.append(
            f"MICRO_BSZ={settings['MICRO_BSZ'] // 2} and MINI_BSZ={settings['MINI_BSZ'] * 2}, and twice EPOCH_STEPS if it is "
            "a number (the same result)"
        )
    advice.append(f"CTX_LEN={max(16, settings['CTX_LEN'] // 2)} (longer rows are cut)")
    if settings["FINETUNE_MODE"] == "full":
        advice.append("FINETUNE_MODE=lora")
    else:
        advice.append(f"lora_r={max(1, settings['lora_r'] // 2)}")
    listed = "\n".join(f"  {i}. {a}" for i, a in enumerate(advice, 1))
    return f"Out of memory: {str(error).splitlines()[0]}\nWhat to change, in this order:\n{listed}"


def finish(full: bool, folder: Path, newest: Path | None, received: int, seconds: float) -> None:
    """The last words: where the result is and what to do with it."""
    there = project.shown(folder)
    if received:
        if newest is None:
            leave(f"Stopped before the first step: there was nothing to save in {there}.", 128 + received)
        setting = "MODEL_PATH" if full else "lora_load"
        leave(
            f'Stopped; what was learnt so far is saved. To go on from it, set {setting}="{newest}" '
            "(and a new RUN_NAME, if one is set) and run the script again; the optimizer and the schedule start anew.",
            128 + received,
        )
    print(f"done in {clock(seconds)}: {newest}, {there}/loss.png")
    number = newest.stem.removeprefix("rwkv-")
    name, path = shlex.quote(folder.name), shlex.quote(str(newest))
    print(f"next: RUN={name} ./merge.sh {number}      or try it: ./chat.sh --adapter {path}")
