"""NAME.lengths.png: how long rows are, with the contexts that DATALOAD=bucket and pack would take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rwkv_peft.common.atomic_io import atomic_write
from rwkv_peft.common.formatting import plural
from rwkv_peft.common.plotting import open_figure

BARS = 60
FAR = 1.5  # lines further out than this many times the longest bar are left out
NEARER = 0.8  # of the shortest row: where the picture begins, if short ones are missing
LINE = 1.5  # a row has one token more than inputs, which are what a context holds; and lines stand behind bars
TAIL = 0.995  # rows that the picture shows; the few longest are named in words


def draw_lengths(prefix: Path, sizes: np.ndarray, median: int, ctx_len: int, bucket_edges: Sequence[int]) -> Path:
    """Draw the lengths of rows (tokens), with what CTX_LEN=auto and TRAIN_LENGTHS=auto become; return the picture's path."""
    path = Path(f"{prefix}.lengths.png")
    longest = int(sizes.max())
    right = max(int(np.quantile(sizes, TAIL)), 16)
    right = longest if longest < 1.5 * right else right
    left = shortest if (shortest := int(sizes.min())) > right / 2 else 0
    edges = np.unique(np.linspace(0, right + 1, min(BARS, right + 1) + 1).round())
    with open_figure(9, 4.2) as (drawing, axes):
        rows, _ = np.histogram(np.minimum(sizes, right), bins=edges)
        axes.stairs(
            rows, edges - 0.5, fill=True, color="#4878a8", edgecolor="white", linewidth=0.7
        )  # one shape: quick to draw
        lines = [n for n in (ctx_len, *bucket_edges) if n <= right * FAR]
        axes.set_xlim(left * NEARER, (max(right, *lines, 0) + LINE) * 1.02)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel(
            "tokens of a row"
            + (f" (the longest has {longest:,}; the last bar holds all above)" if longest > right else "")
        )
        axes.set_ylabel("rows")
        axes.set_title(f"{prefix.name}: {plural(len(sizes), 'row')}, {int(sizes.sum(dtype=np.int64)):,} tokens, "
                       f"median {median:,}, mean {sizes.mean():,.0f}", parse_math=False)  # fmt: skip
        for i, edge in enumerate(e for e in bucket_edges if e in lines):
            label = None if i else "TRAIN_LENGTHS=auto of DATALOAD=bucket"
            axes.axvline(edge + LINE, color="#c44e52", linewidth=1, linestyle=":", label=label)
        if ctx_len in lines:
            axes.axvline(
                ctx_len + LINE, color="#55a868", linewidth=1.5, label=f"CTX_LEN=auto of DATALOAD=pack: {ctx_len:,}"
            )
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        drawing.subplots_adjust(0.08, 0.12, 0.985, 0.92)  # by hand: working it out would double the time
        with atomic_write(path) as file:
            drawing.savefig(file, format="png")
    return path
