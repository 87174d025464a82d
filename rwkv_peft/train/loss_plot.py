"""loss.png: the loss of every optimizer step, raw and smoothed, the validation loss, and the learning rate."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rwkv_peft.checkpoint import step_log
from rwkv_peft.common.atomic_io import atomic_write
from rwkv_peft.common.plotting import open_figure
from rwkv_peft.train.callbacks.validation import read

SMOOTHED_SHARE = 0.05  # of the run's steps, of which the smoothed loss is the mean ...
SMOOTHED_LEAST = 5  # ... but at least so many steps


def smoothing_window(steps: int) -> int:
    """Return of how many steps, up to its own, the smoothed loss is the mean. steps: of the run."""
    return max(SMOOTHED_LEAST, round(SMOOTHED_SHARE * steps))


def draw_loss(folder: Path) -> Path:
    """Draw folder/loss.jsonl as folder/loss.png, and return its path.

    Lines break where steps have no record; those gaps are grey.
    """
    records = step_log.read_log(folder)
    written = [r["step"] for r in records]
    gaps = step_log.find_gaps(written, max(written, default=0))
    records = [r for r in records if r["loss"] is not None]
    steps, losses = [r["step"] for r in records], np.array([r["loss"] for r in records])
    # (a step without a loss is no gap: it has a record)
    breaks = np.flatnonzero(np.diff(steps) != np.diff(np.searchsorted(written, steps))) + 1

    def with_breaks(values: Sequence[float] | np.ndarray) -> np.ndarray:
        return np.insert(np.asarray(values, float), breaks, np.nan)

    sums, ends = np.cumsum([0.0, *losses]), np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - smoothing_window(len(losses)), 0)
    smooth = (sums[ends] - sums[starts]) / (ends - starts)
    with open_figure(9, 6.4, (4, 1)) as (drawing, (axes, below)):
        drawing.set_layout_engine("constrained")
        axes.plot(with_breaks(steps), with_breaks(losses), color="#9ec5e8", linewidth=1, label="each step")
        axes.plot(with_breaks(steps), with_breaks(smooth), color="#1f5f99", linewidth=2, label="smoothed")
        if gaps:
            bars = [(first - 0.5, last - first + 1) for first, last in gaps]
            height = axes.get_xaxis_transform()
            axes.broken_barh(bars, yrange=(0, 1), transform=height, color="#dddddd", zorder=0, label="no record")
        validations = read(folder)
        last_data = validations[-1].get("data") if validations else None
        validations = [r for r in validations if r.get("data") == last_data and r["loss"] is not None]
        if validations:
            axes.plot(
                [r["step"] for r in validations], [r["loss"] for r in validations],
                color="#2e8b57", linewidth=1.5, marker="o", markersize=4, label="validation",
            )  # fmt: skip
        pairs = enumerate(itertools.pairwise(records), 1)
        # where an epoch ended within a gap is not known
        epoch_ends = [a["step"] + 0.5 for i, (a, b) in pairs if a["epoch"] != b["epoch"] and i not in breaks]
        for step in epoch_ends:  # fainter the more there are: they are a scale, not the content
            for panel in (axes, below):
                panel.axvline(step, color="#bbbbbb", linewidth=0.8, alpha=min(1.0, 12 / len(epoch_ends)), zorder=0)
        axes.set_title(folder.name, parse_math=False)  # a name with dollar signs is not a formula
        axes.set(ylabel="loss per trained token")
        axes.grid(alpha=0.25)
        rates = axes.twinx()
        rates.plot(
            with_breaks(steps), with_breaks([r["lr"] for r in records]), color="#c98a3c", linewidth=1, linestyle="--",
            label="learning rate",
        )  # fmt: skip
        rates.set_ylabel("learning rate")
        rates.set_ylim(bottom=0)
        lines, labels = axes.get_legend_handles_labels()
        more_lines, more_labels = rates.get_legend_handles_labels()
        axes.legend(lines + more_lines, labels + more_labels, loc="upper right")
        below.plot(with_breaks(steps), with_breaks([r["tokens_per_s"] for r in records]), color="#777777", linewidth=1)
        below.set(xlabel="optimizer step (grey lines: epochs)", ylabel="tokens/s")
        below.set_ylim(bottom=0)
        below.grid(alpha=0.25)
        with atomic_write(folder / "loss.png") as file:
            drawing.savefig(file, format="png")
    return folder / "loss.png"
