"""./training.sh --find-lr and --find-batch: tries the script's settings. Nothing of a run is written.

--find-lr is the LR range test (https://arxiv.org/abs/1506.01186): the loss of steps whose rate rises from far too low to far too
high, each with new rows. --find-batch finds the largest MICRO_BSZ whose largest micro-batch fits the device.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rwkv_peft.common import hardware, paths
from rwkv_peft.common.atomic_io import atomic_write
from rwkv_peft.common.errors import SettingError, SettingErrors, UserError
from rwkv_peft.common.formatting import plural
from rwkv_peft.common.plotting import open_figure
from rwkv_peft.config.train import TrainConfig
from rwkv_peft.data.dataset import Batch, largest_batch
from rwkv_peft.distributed.launch import ProcessInfo
from rwkv_peft.distributed.strategy import FP16_SCALE
from rwkv_peft.model import arch

from .model_setup import make_module, make_train_model
from .module import TrainingModule
from .optim import optimizer_of
from .report import MAX_STATE_RATE, USUAL_STATE, usual_state_rate
from .setup import RunSetup, prepare_run

STEPS = 100  # from the lowest rate to the highest
LOWEST, HIGHEST = 1e-7, 10.0
STATE_RATES = (1e-6, 10.0)  # lowest and highest for a state
SMOOTHING = 0.8  # weight of the mean before, in each step's smoothed loss
DIVERGED = (
    0.3  # of the first loss: smoothed so far above the lowest, the loss has diverged, and later steps show nothing
)
FIRST = 10  # steps whose loss is that of the base: their rates are too low to change it
LEAST_FALL = 0.01  # of the first loss: less is noise
MAX_ROWS = 4096


@dataclass
class Trial:
    """A model and its optimizer, which takes steps with any learning rate.

    Attributes:
        run: the run that the script describes.
        module: what is trained.
        optimizer: over the trained parameters.
        factors: of the rate, by parameter group.
    """

    run: RunSetup
    module: TrainingModule
    optimizer: torch.optim.Optimizer
    factors: list[float]

    def step(self, batches: Sequence[Batch], rate: float) -> float:
        """Take one optimizer step over micro-batches, and return its loss."""
        scale = FP16_SCALE if self.module.model.dtype == torch.float16 else 1.0
        total, device = 0.0, self.module.model.ln_out.weight.device
        for batch in batches:
            moved = self.module.transfer_batch_to_device(batch, device, 0)
            loss = self.module.summed_loss(moved) / max(batch.step_targets, 1)
            (loss * scale).backward()
            total += float(loss.detach())
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_([p.grad for p in parameters], 1 / scale)
        self.run.compute.sharding.clip(parameters, self.module.grad_clip)
        for group, factor in zip(self.optimizer.param_groups, self.factors, strict=True):
            group["lr"] = factor * rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def make_trial(config: TrainConfig, place: ProcessInfo, cleanup: contextlib.ExitStack) -> Trial:
    """Load the model.

    Raises:
        SettingErrors: for several processes, and for all that a run refuses.
    """
    counts = [("GPU_COUNT", config.gpu_count), ("NNODES", config.nnodes)]
    if wrong := [
        SettingError(name, "must be 1 here; give MINI_BSZ the rest of a step's rows")
        for name, value in counts
        if value > 1
    ]:
        raise SettingErrors(*wrong)
    run = prepare_run(config, place, True, True, cleanup, print)
    learner = make_train_model(run, cleanup, print)
    module = make_module(run, learner)
    module.settle("")  # nothing is sharded here, whatever STRATEGY says
    learner.model.to(hardware.local_device(0))
    module.train()
    groups = learner.groups()
    factors = [group["lr"] for group in groups]
    optimizer = optimizer_of(
        run.compute.sharding, config.optim, groups, module.betas, module.adam_eps, module.model.dtype != torch.float16
    )
    return Trial(run, module, optimizer, factors)


def rising_rates(lowest: float, highest: float) -> list[float]:
    """Return STEPS rates, each the same factor above the one before."""
    return [lowest * (highest / lowest) ** (i / (STEPS - 1)) for i in range(STEPS)]


def smooth(losses: Sequence[float]) -> list[float]:
    """Return exponential moving averages, without a bias to where they begin."""
    means, mean = [], 0.0
    for i, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        means.append(mean / (1 - SMOOTHING**i))
    return means


def has_diverged(losses: Sequence[float]) -> bool:
    """Return whether a rate was too high: the last loss is not finite, or far above the lowest."""
    if not math.isfinite(losses[-1]):
        return True
    means = smooth(losses)
    return means[-1] > min(means) + DIVERGED * means[0]


@dataclass(frozen=True)
class Advice:
    """The result of a range test.

    Attributes:
        lowest: the rate at which the smoothed loss is lowest.
        take: the rate to begin with, None where nothing was learnt at any rate.
        stable: whether that rate is the last one that was tried.
    """

    lowest: float
    take: float | None
    stable: bool


def advise(tried: Sequence[float], losses: Sequence[float]) -> Advice:
    """Return the result of a range test.

    Args:
        tried: rates, rising.
        losses: of the steps with them, all of them finite.
    """
    means = smooth(losses)
    low = min(range(len(means)), key=means.__getitem__)
    first = sum(losses[:FIRST]) / len(losses[:FIRST])
    learnt = first - means[low] > LEAST_FALL * first
    take = float(f"{tried[low] / 10:.0e}") if learnt else None
    return Advice(tried[low], take, low == len(means) - 1)


def limit_rate(rate: float, usual: float | None) -> float:
    """Return the rate to begin with.

    Args:
        rate: the one that the first steps bear.
        usual: for a state, the rate that is usual for its model: what the first steps bear is no measure there. Else None.
    """
    return rate if usual is None or rate <= MAX_STATE_RATE else usual


def find_lr(config: TrainConfig, place: ProcessInfo) -> None:
    """Print which rates the first steps bear, and draw output/find-lr-TIME.png."""
    with contextlib.ExitStack() as cleanup:
        trial = make_trial(config, place, cleanup)
        is_state = trial.run.config.method == "state"
        usual = (
            usual_state_rate(sum(map(math.prod, arch.shapes(trial.run.base.geometry).values()))) if is_state else None
        )
        rates, batches = rising_rates(*(STATE_RATES if is_state else (LOWEST, HIGHEST))), _batches_of_steps(trial.run)
        losses: list[float] = []
        began = time.monotonic()
        for rate in rates:
            losses.append(trial.step(next(batches), rate))
            if has_diverged(losses):
                break
        trial.run.watch.must_be_unchanged()
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        raise UserError(
            "The first loss is NaN or infinite, though the base's weights are finite: PRECISION does not suit it (try bf16 or "
            "fp32)."
        )
    tried = rates[: len(finite)]
    picture = draw(tried, finite, paths.OUTPUT / time.strftime("find-lr-%Y%m%d-%H%M%S.png"), usual)
    spent = f"{len(losses)} of {STEPS} steps in {time.monotonic() - began:.0f} s"
    why = ": there the loss burst" if len(losses) < STEPS else ""
    print(f"{spent}{why}; rates from {rates[0]:.0e} to {tried[-1]:.0e}: {paths.display_path(picture)}")
    advice = advise(tried, finite)
    if advice.take is None:
        print(
            "The loss did not fall at any rate: are these rows what the base knows already, or is nothing trained of them?"
        )
        return
    high = "" if advice.stable else ", and rises behind it"
    print(f"The loss is lowest at {advice.lowest:.0e}{high}.")
    take = limit_rate(advice.take, usual)
    if take < advice.take:
        print(
            f"warning: a tenth of that is {advice.take:.0e}. What the first steps bear is no measure for a state: a rate of 1 "
            f"has destroyed models over a whole run. Begin with LR_INIT={take:g} and LR_FINAL={take / 10:g}: usual are "
            f"{USUAL_STATE}, and {MAX_STATE_RATE:g} at most."
        )
        return
    print(f"Begin with LR_INIT={take:.0e} (a tenth of that) and LR_FINAL={take / 10:.0e}.")
    if is_state:
        print(f"Usual for a state are {USUAL_STATE}; take {MAX_STATE_RATE:g} at most.")
    print(
        "This is what the first steps bear. Which rate is best after a whole run, only whole runs tell: try it and a third of it."
    )


def _batches_of_steps(run: RunSetup) -> Iterator[list[Batch]]:
    # the micro-batches of one optimizer step after another, without an end
    data, accumulate = run.data.train.batches(0, 0), run.plan.accumulate
    source = iter(data) if run.config.streaming else (data[number] for number in itertools.count())
    while True:
        yield [next(source) for _ in range(accumulate)]


def draw(tried: Sequence[float], losses: Sequence[float], path: Path, usual: float | None = None) -> Path:
    """Draw a range test, write its numbers beside the picture as .jsonl, and return `path`. usual: see limit_rate."""
    with open_figure(8, 4.5) as (drawing, axes):
        drawing.set_layout_engine("constrained")
        axes.plot(tried, losses, color="#9ec5e8", linewidth=1, label="each step")
        axes.plot(tried, smooth(losses), color="#1f5f99", linewidth=2, label="smoothed")
        advice = advise(tried, losses)
        if advice.take is not None:
            axes.axvline(advice.lowest, color="#999999", linewidth=1, label=f"the lowest: {advice.lowest:.0e}")
            take = limit_rate(advice.take, usual)
            why = "usual for a state of this model" if take < advice.take else "a tenth of the lowest"
            axes.axvline(take, color="#2e8b57", linewidth=1.5, label=f"{why}: {take:.0e}")
        bears = f"a state {MAX_STATE_RATE:g} at most" if usual else "about a tenth of the last good one"
        axes.set_title(f"each step has a higher rate; a whole run bears {bears}")
        axes.set_xscale("log")
        low, high = min(losses), max(losses[: max(2, len(losses) // 2)])
        axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low) + 1e-6)
        axes.set(xlabel="learning rate, higher at each step", ylabel="loss per trained token")
        axes.grid(alpha=0.25)
        axes.legend(loc="upper left")
        with atomic_write(path) as file:
            drawing.savefig(file, format="png")
    with atomic_write(path.with_suffix(".jsonl"), "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"lr": rate, "loss": loss}) + "\n" for rate, loss in zip(tried, losses, strict=True))
    return path


def find_largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number that fits, up to `most`, 0 for none. What is smaller than one that fits must fit."""
    good, bad = 0, most + 1
    size = 1
    while size < bad and fits(size):  # double it while it fits ...
        good, size = size, min(2 * size, most) if size < most else bad
    bad = min(bad, size)
    while bad - good > 1:  # ... and halve what is left
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def find_batch(config: TrainConfig, place: ProcessInfo) -> None:
    """Print the largest MICRO_BSZ that fits the GPU.

    Raises:
        UserError: without a GPU, because a full host ends the program; and if not one row fits.
        SettingErrors: for DATALOAD=bucket, and for all that a run refuses.
    """
    if hardware.device_kind() != "cuda":
        raise UserError(
            "--find-batch fills a GPU until it is full, and there is none here. (A full host ends programs without a word; "
            "--dry-run tells how much memory a run will take.)"
        )
    if config.dataload == "bucket":
        raise SettingErrors(
            SettingError("DATALOAD", "must not be bucket with --find-batch: its batches go by TOKEN_BUDGET")
        )
    with contextlib.ExitStack() as cleanup:
        trial = make_trial(replace(config, micro_bsz=1), place, cleanup)
        tokens = trial.run.data.train.ctx_len

        def fits(rows: int) -> bool:
            try:
                for _ in range(2):  # the second one has the optimizer state in memory as well
                    trial.step([largest_batch(tokens, rows)], 0.0)
            except torch.OutOfMemoryError:
                trial.optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                return False
            print(f"MICRO_BSZ={rows} of {plural(tokens, 'token')} fits", flush=True)
            return True

        rows = find_largest(fits, MAX_ROWS)
        trial.run.watch.must_be_unchanged()
    if not rows:
        raise UserError(
            f"Not one row of {plural(tokens, 'token')} fits. Lower CTX_LEN, or take GRAD_CP=1, QUANT=nf4, TRAIN_TYPE=infctx."
        )
    print(f"The largest that fits is MICRO_BSZ={rows}. Nothing was changed: set it, or a little less, in the script.")
