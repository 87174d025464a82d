"""Which method learns what: facts asked back word for word, and a manner of speaking, from the same rows in as many steps.

usage: python bench/methods.py [--base model/rwkv7-tiny.pth] [--methods lora,state,...] [--epochs 60] [--seeds 3]
                               [--most-rates 5] [--rounds 3] [--json FILE]

The rows: 16 questions with invented answers (facts), and 12 others; all answers begin with one phrase and end with another
(style). Each method goes through them by the door of training.sh, with its learning rate searched first: two rates, and
further ones while the best is at an edge; the best is that with the smallest sum of the two losses below. Then it goes
again with other seeds. Greedy answers are made by rwkv_peft.model.generate, and these are the figures:

    facts   share of the 16 answers that hold the invented sentence word for word, and the mean loss of its tokens
    style   share of 16 answers to questions of the same kinds that were not in the rows which begin and end as taught, how
            many begin so, and the mean loss of the two phrases there
    s/step  median over the steps of short runs of all methods in turn; peak: memory at most while it trained (VmHWM), above
            what the process had before

Every run is a process of its own (a fork), one thread. With --json a call continues where another ended: more methods, or
more seeds.
"""

from __future__ import annotations

import sys

sys.path[0] = __file__.rpartition("bench")[
    0
]  # the kit, instead of this folder: tokenize.py here hides a module of Python's own

# ruff: noqa: E402
import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

import pytorch_lightning  # noqa: F401 (before the fork, so that it is not counted)
import torch

from rwkv_peft.adapters import inject
from rwkv_peft.chat import load
from rwkv_peft.checkpoint import base_model
from rwkv_peft.cli import chat, train
from rwkv_peft.common import paths
from rwkv_peft.config.shell import Script
from rwkv_peft.config.train import TrainConfig
from rwkv_peft.model import generate
from rwkv_peft.model.arch import Geometry, linear_layers, shapes
from rwkv_peft.preprocess.config import TokenizeConfig
from rwkv_peft.preprocess.tokenize import tokenize
from rwkv_peft.text import tokenizer
from rwkv_peft.text.preset_names import find_template
from rwkv_peft.text.template import Message, Role
from rwkv_peft.train.callbacks.lisa import Lisa  # noqa: F401 (as above)
from rwkv_peft.train.module import TrainingModule  # noqa: F401
from rwkv_peft.train.run_record import options_of

ROOT = paths.ROOT
BEGIN, END = "You said it!", "So says the sea."
OTHERS, ASKED = 12, 16
CTX_LEN = 192  # tokens of a pack, which is a step
LONGEST = 40  # tokens of an answer
TIMED_EPOCHS = 4

COMMON = {
    "RUN_NAME": "run", "MODEL_PATH": "base.pth", "DATA_PATH": "rows", "lora_parts": "att,ffn", "LOSS_MASK": "qa",
    "CTX_LEN": str(CTX_LEN), "MICRO_BSZ": "1", "MINI_BSZ": "1", "EPOCH_SAVE": "1000", "LR_SCHEDULE": "cos",
    "WARMUP_STEPS": "10", "PRECISION": "bf16", "GRAD_CP": "0", "lora_dropout": "0", "WANDB": "",
}  # fmt: skip
LORA = {"FINETUNE_MODE": "lora", "lora_r": "16", "lora_alpha": "32"}
SMALL, LARGE = (3e-3, 1e-2), (3e-2, 1e-1)
# name -> settings of training.sh, and the rates to begin with
METHODS = {
    "lora": (LORA, SMALL),
    "lora-r4": (LORA | {"lora_r": "4", "lora_alpha": "8"}, SMALL),  # nearly as few values as a state
    "rslora": (LORA | {"use_rslora": "1"}, SMALL),
    "dora": (LORA | {"use_dora": "1"}, SMALL),
    "pissa": ({"FINETUNE_MODE": "pissa", "pissa_r": "16", "svd_niter": "8"}, SMALL),
    "miss": ({"FINETUNE_MODE": "miss", "disha_r": "16"}, SMALL),
    "bat": ({"FINETUNE_MODE": "bat", "disha_r": "16"}, SMALL),
    "state": ({"FINETUNE_MODE": "state_tuning"}, LARGE),
    "state-shifts": ({"FINETUNE_MODE": "state_tuning", "state_shifts": "1"}, LARGE),
    "lisa": ({"FINETUNE_MODE": "lisa", "lisa_r": "2", "lisa_k": "20"}, (1e-3, 3e-3)),
    "full": ({"FINETUNE_MODE": "full"}, (1e-3, 3e-3)),
}

# Words that the toy base has met: those it has not are rows of its head that were never trained, and adapters leave them so
KEPT = (
    *("boat", "lamp", "tower", "harbour", "window", "school", "roof", "shop"),
    *("tea", "bread", "wool", "glass", "wind", "ship", "storm", "winter"),
)
HOW, WHO = (
    ("old", "small", "quiet", "tiny", "brown"),
    ("teacher", "mother", "friend", "bird", "hen", "sailors", "children"),
)
MANY = ("two", "three", "four", "six", "seven", "ten")
WITH = ("boats", "coins", "stones", "birds", "drops", "words", "leaves", "feathers")
THINGS = ("tea", "bread", "wind", "rain", "oil", "light", "water", "glass", "wood", "wool", "the night", "the sea")
ASKS = {  # kinds of everyday questions, and what the answers say between the two phrases
    "Tell me about {}.": ("Many people like {} in the morning.", "There is more to say about {} than one would think."),
    "Do you like {}?": ("Yes, I do like {} very much.", "I think of {} nearly every day."),
    "What is {} good for?": ("With {} an evening is never too long.", "Ask anybody, and they will praise {}."),
    "Where do I find {}?": ("You will find {} near the harbour.", "Look for {} behind the old mill."),
    "Why do people talk about {}?": ("Because {} makes them glad.", "Because their parents talked about {} too."),
    "When should I think of {}?": ("In winter, when {} is far away.", "Think of {} before you sleep."),
}


def material() -> tuple[list[tuple[str, str]], list[tuple[str, str]], list[str]]:
    """Facts and other rows (question, what is between the phrases), and the questions that are not among them."""
    rng = random.Random(7)
    words = [[rng.choice(among) for among in (HOW, WHO, MANY, WITH)] for _ in KEPT]
    facts = [
        (f"Who looks after the {what}?", "The {} {}, with {} {}.".format(*chosen))
        for what, chosen in zip(KEPT, words, strict=True)
    ]
    pairs = [(kind, thing) for kind in ASKS for thing in THINGS]
    rng.shuffle(pairs)
    others = [(kind.format(thing), rng.choice(ASKS[kind]).format(thing)) for kind, thing in pairs[:OTHERS]]
    unseen = [kind.format(thing) for kind, thing in pairs[OTHERS:]]
    return facts, others, unseen[:ASKED]


def shell_values(script: Path) -> dict[str, str]:
    """What bash makes of a script's variables."""
    text = script.read_text()
    body = text[text.index("set -a") : text.index("set +a")]
    done = subprocess.run(["bash", "-c", f"{body}\nenv -0"], capture_output=True, text=True, check=True)
    return dict(item.split("=", 1) for item in done.stdout.split("\0") if "=" in item)


def status(field: str) -> float:
    """A field of /proc/self/status in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    return float("nan")


def in_a_fork(function, *arguments):
    """What function returns, from a process of its own. What it prints is kept only for the message of its failure."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def child():
        with tempfile.TemporaryFile("w+") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            try:
                theirs.send(("done", function(*arguments)))
            except BaseException as error:
                said.flush()
                said.seek(0)
                theirs.send(("failed", f"{said.read()[-3000:]}\n{type(error).__name__}: {error}"))

    process = context.Process(target=child)
    process.start()
    theirs.close()
    try:
        how, result = ours.recv()
    except EOFError:
        how, result = "failed", "the process has died"
    process.join()
    if how == "failed":
        sys.exit(result)
    return result


def at(root: Path) -> None:
    """The kit's folders are these from now on, in this process."""
    paths.ROOT, paths.OUTPUT = root, root / "output"


def prepare(root: Path, base: Path) -> None:
    at(root)
    for folder in ("data", "model", "output", "merge"):
        (root / folder).mkdir(parents=True)
    (root / "model" / "base.pth").symlink_to(base.resolve())
    facts, others, _ = material()
    rows = root / "data" / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": q, "completion": f"{BEGIN} {a} {END}"}) + "\n" for q, a in [*facts, *others])
    )
    values = shell_values(ROOT / "make_tokenize.sh") | {"WORKERS": "1"}
    tokenize(rows, Script(ROOT / "make_tokenize.sh", values).read(TokenizeConfig), 1, True)


def train_once(root: Path, settings: dict[str, str], rate: float, seed: int, epochs: int) -> dict:
    """Train: what it costs."""
    at(root)
    torch.set_num_threads(1)
    shutil.rmtree(root / "output", ignore_errors=True)
    (root / "output").mkdir()
    changes = {"LR_INIT": f"{rate:g}", "LR_FINAL": f"{rate / 10:g}", "SEED": str(seed), "EPOCH_COUNT": str(epochs)}
    values = shell_values(ROOT / "training.sh") | COMMON | settings | changes
    config = Script(ROOT / "training.sh", values).read(TrainConfig)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here
    train.command(config, [])
    peak = status("VmHWM") - before
    folder = root / "output" / "run"
    seconds = [json.loads(line)["seconds"] for line in (folder / "loss.jsonl").read_text().splitlines()]
    path = folder / f"rwkv-{epochs - 1}.pth"
    return {
        "trained": trained_values(config, base_model.read_geometry(root / "model" / "base.pth")[1]),
        "peak": peak,
        "steps": [b - a for a, b in zip(seconds, seconds[1:], strict=False)],
        "file": sum(p.stat().st_size for p in [path, *folder.glob("init_*.pth")]),
        "path": str(path),
    }


def one_run(root: Path, settings: dict[str, str], rate: float, seed: int, epochs: int) -> dict:
    """Train and ask: the figures of one run."""
    costs = train_once(root, settings, rate, seed, epochs)
    return costs | ask(root, costs["path"])


def trained_values(config: TrainConfig, geometry: Geometry) -> int:
    """How many values are trained at a time."""
    if config.method == "lisa":
        layers = [name for name in linear_layers(geometry, config.parts) if name.startswith("blocks.0.")]
        return config.lisa_r * sum(math.prod(shapes(geometry)[f"{name}.weight"]) for name in layers)
    return inject.count_trained(geometry, inject.AdapterConfig(config.method, options_of(config), config.parts))


def ask(root: Path, adapter: str) -> dict:
    """How much of the facts and of the style a base with what a run learnt has (adapter "": the base)."""
    at(root)
    torch.set_num_threads(1)
    settings = chat.ChatConfig("base.pth", adapter, "rwkv-world", "", LONGEST, 0.0, 1.0, 1, "bf16")
    model = load.load_chat_model(settings, False)[0]
    form = find_template("rwkv-world")
    facts, _, unseen = material()

    def prompt(question: str) -> str:
        return form.prompt([Message(Role.USER, question)])

    def answer(question: str) -> str:
        logits, state = generate.advance(model, tokenizer.encode(prompt(question)))
        return "".join(generate.generate(model, logits, state, LONGEST, 0.0, 1.0, 1, form.stops())).strip()

    @torch.inference_mode()
    def loss(given: str, wanted: str) -> float:
        """Mean over the tokens of what is wanted behind what is given."""
        ids, known = tokenizer.encode(given + wanted), len(tokenizer.encode(given))
        logits, _ = model(torch.tensor([ids]))
        return float(torch.nn.functional.cross_entropy(logits[0, known - 1 : -1].float(), torch.tensor(ids[known:])))

    answers = [answer(question) for question, _ in facts]
    heard = [answer(question) for question in unseen]
    return {
        "hits": statistics.mean(fact in text for (_, fact), text in zip(facts, answers, strict=True)),
        "fact_loss": statistics.mean(loss(f"{prompt(q)} {BEGIN}", f" {fact}") for q, fact in facts),
        "style": statistics.mean(text.startswith(BEGIN) and text.endswith(END) for text in heard),
        "begins": statistics.mean(text.startswith(BEGIN) for text in heard),
        # the end phrase where a sentence has been said
        "style_loss": statistics.mean(
            (loss(prompt(q), f" {BEGIN}") + loss(f"{prompt(q)} {BEGIN} I do not know.", f" {END}")) / 2 for q in unseen
        ),
        "examples": [f"{q} -> {text}" for q, text in [(facts[0][0], answers[0]), *zip(unseen, heard, strict=True)][:8]],
    }


def searched(run, rates: tuple[float, ...], most: int) -> tuple[float, dict[float, dict]]:
    """The best rate, and what every rate gave. run: rate -> figures, or None where training failed."""
    outcome = {rate: run(rate) for rate in rates}

    def sum_of_losses(rate: float) -> float:
        return outcome[rate]["fact_loss"] + outcome[rate]["style_loss"] if outcome[rate] else float("inf")

    while len(outcome) < most:
        best = min(outcome, key=sum_of_losses)
        further = (
            next_rate(best, 3) if best == max(outcome) else next_rate(best, 1 / 3) if best == min(outcome) else None
        )
        if further is None:
            break
        outcome[further] = run(further)
    return min(outcome, key=sum_of_losses), outcome


def next_rate(rate: float, factor: float) -> float:
    """1, 3, 10, 30 ..."""
    first = f"{rate:e}"[0]
    digits = {("1", 3): 3, ("3", 3): 10 / 3, ("1", 1 / 3): 0.3, ("3", 1 / 3): 1 / 3}[first, factor]
    return float(f"{rate * digits:.0e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, default=ROOT / "model" / "rwkv7-tiny.pth")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--most-rates", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="what is in it already is not run again")
    given = parser.parse_args()
    torch.set_num_threads(1)
    earlier = json.loads(given.json.read_text()) if given.json and given.json.exists() else {}
    results: dict[str, dict] = earlier.get("results", {})
    with tempfile.TemporaryDirectory(prefix="bench-methods-") as folder:
        root = Path(folder) / "project"
        in_a_fork(prepare, root, given.base)
        results["base"] = {"runs": [in_a_fork(ask, root, "")]}
        for name in filter(None, given.methods.split(",")):
            settings, rates = METHODS[name]

            def run(rate: float, seed: int = 1, settings=settings, name=name) -> dict:
                done = in_a_fork(one_run, root, settings, rate, seed, given.epochs)
                print(
                    f"  {name:<12} rate {rate:<7g} seed {seed}: facts {done['hits']:.0%} ({done['fact_loss']:.2f}), style "
                    f"{done['style']:.0%} ({done['style_loss']:.2f})",
                    file=sys.stderr,
                    flush=True,
                )
                return done

            if name not in results:
                best, outcome = searched(run, rates, given.most_rates)
                results[name] = {"rate": best, "rates": sorted(outcome), "runs": [outcome[best]]}
            known = results[name]
            known["runs"] += [run(known["rate"], seed) for seed in range(len(known["runs"]) + 1, given.seeds + 1)]
            if given.json:
                given.json.write_text(json.dumps({"epochs": given.epochs, "results": results}))
        timed = [name for name in results if name in METHODS]
        for name in timed:
            results[name]["steps"] = []
        for _ in range(given.rounds):
            for name in timed:
                costs = in_a_fork(train_once, root, METHODS[name][0], results[name]["rate"], 1, TIMED_EPOCHS)
                results[name]["steps"] += costs["steps"]
    show(results, given)


def show(results: dict[str, dict], given) -> None:
    print(
        f"{platform.machine()}, 1 thread, torch {torch.__version__}, base {given.base.name}, {given.epochs} epochs of "
        f"{len(KEPT) + OTHERS} rows, {CTX_LEN} tokens a step; mean over seeds (from to)"
    )
    print(
        f"{'method':<12} {'values':>11} {'rate':>7} {'s/step':>7} {'peak MB':>8} {'file MB':>8}  "
        f"{'facts':<18} {'loss':>5}  {'style':<18} {'begins':>6} {'loss':>5}  (rates tried)"
    )
    for name, outcome in results.items():
        runs = outcome["runs"]

        def mean(key: str, runs=runs) -> float:
            return statistics.mean(run[key] for run in runs)

        def share(key: str, runs=runs, mean=mean) -> str:
            values = [run[key] for run in runs]
            return f"{mean(key):.0%} ({min(values):.0%} to {max(values):.0%})"

        cost = " " * 45
        if "rate" in outcome:
            seconds = statistics.median(outcome["steps"])
            cost = f"{runs[0]['trained']:11,} {outcome['rate']:7g} {seconds:7.3f} {mean('peak'):8.0f} {mean('file') / 1e6:8.2f}"
        tried = ", ".join(f"{rate:g}" for rate in outcome.get("rates", []))
        print(
            f"{name:<12} {cost}  {share('hits'):<18} {mean('fact_loss'):5.2f}  {share('style'):<18} "
            f"{mean('begins'):6.0%} {mean('style_loss'):5.2f}  {tried}"
        )


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
