"""loss.png: the loss of every optimizer step, raw and smoothed, on held-out data, and the learning rate."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rwkv_peft.checkpoint import step_log
from rwkv_peft.common.atomic_io import atomic_write
from rwkv_peft.common.plotting import open_figure
from rwkv_peft.train.callbacks.validation import of_one_set, read

SMOOTHED_SHARE = 0.05  # of the run that the smoothed line looks back on ...
SMOOTHED_LEAST = 5  # ... but at least so many steps


def smoothing_steps(steps: int) -> int:
    """How many steps the smoothed loss is the mean of."""
    return max(SMOOTHED_LEAST, round(SMOOTHED_SHARE * steps))


def draw_loss(folder: Path) -> Path:
    """Draw folder/loss.jsonl as folder/loss.png. Lines break where steps have no record, and what is missing is grey."""
    records = step_log.read_log(folder)
    written = [r["step"] for r in records]
    gaps = step_log.find_gaps(written, max(written, default=0))
    records = [r for r in records if r["loss"] is not None]
    steps, losses = [r["step"] for r in records], np.array([r["loss"] for r in records])
    # (a step without a loss is no gap: it has its place among those that are written)
    breaks = np.flatnonzero(np.diff(steps) != np.diff(np.searchsorted(written, steps))) + 1

    def broken(values: Sequence[float] | np.ndarray) -> np.ndarray:
        return np.insert(np.asarray(values, float), breaks, np.nan)

    sums, behind = np.cumsum([0.0, *losses]), np.arange(1, len(losses) + 1)
    first = np.maximum(behind - smoothing_steps(len(losses)), 0)
    smooth = (sums[behind] - sums[first]) / (behind - first)
    with open_figure(9, 6.4, (4, 1)) as (drawing, (axes, below)):
        drawing.set_layout_engine("constrained")
        axes.plot(broken(steps), broken(losses), color="#9ec5e8", linewidth=1, label="each step")
        axes.plot(broken(steps), broken(smooth), color="#1f5f99", linewidth=2, label="smoothed")
        if gaps:
            places = [(first - 0.5, last - first + 1) for first, last in gaps]
            whole_height = {"yrange": (0, 1), "transform": axes.get_xaxis_transform()}
            axes.broken_barh(places, **whole_height, color="#dddddd", zorder=0, label="no record")
        validations = read(folder)
        validations = of_one_set(validations, validations[-1].get("data")) if validations else []
        if validations:
            places, losses_there = [r["step"] for r in validations], [r["loss"] for r in validations]
            axes.plot(
                places, losses_there, color="#2e8b57", linewidth=1.5, marker="o", markersize=4, label="validation"
            )
        pairs = enumerate(itertools.pairwise(records), 1)
        known = {*range(len(records))} - {*breaks.tolist()}  # in a gap, the end of an epoch is not known
        epoch_ends = [a["step"] + 0.5 for i, (a, b) in pairs if a["epoch"] != b["epoch"] and i in known]
        for step in epoch_ends:  # fainter the more there are: they are a scale, not the picture
            for panel in (axes, below):
                panel.axvline(step, color="#bbbbbb", linewidth=0.8, alpha=min(1.0, 12 / len(epoch_ends)), zorder=0)
        axes.set_title(folder.name, parse_math=False)  # a name with dollar signs is no formula
        axes.set(ylabel="loss per trained token")
        axes.grid(alpha=0.25)
        rates = axes.twinx()
        rates.plot(
            broken(steps), broken([r["lr"] for r in records]), color="#c98a3c", linewidth=1, linestyle="--",
            label="learning rate",
        )  # fmt: skip
        rates.set_ylabel("learning rate")
        rates.set_ylim(bottom=0)
        lines, labels = axes.get_legend_handles_labels()
        more_lines, more_labels = rates.get_legend_handles_labels()
        axes.legend(lines + more_lines, labels + more_labels, loc="upper right")
        below.plot(broken(steps), broken([r["tokens_per_s"] for r in records]), color="#777777", linewidth=1)
        below.set(xlabel="optimizer step (grey lines: epochs)", ylabel="tokens/s")
        below.set_ylim(bottom=0)
        below.grid(alpha=0.25)
        with atomic_write(folder / "loss.png") as file:
            drawing.savefig(file, format="png")
    return folder / "loss.png"
