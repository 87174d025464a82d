"""Matplotlib figures with fonts for names in Chinese."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 110
# fonts with Chinese characters; the last one is Windows' own under WSL
_CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
)
_WINDOWS_FONT = Path("/mnt/c/Windows/Fonts/msyh.ttc")


def _installed_fonts() -> list[str]:
    """Return matplotlib's own font, then the first Chinese one that is installed."""
    from matplotlib import font_manager  # matplotlib is imported where a figure is drawn, to keep start-up fast

    if _WINDOWS_FONT.is_file():
        font_manager.fontManager.addfont(_WINDOWS_FONT)
    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *[name for name in _CHINESE_FONTS if name in installed][:1]]


@contextlib.contextmanager
def open_figure(width: float, height: float, parts: Sequence[float] = (1,)) -> Iterator[tuple[Figure, Any]]:
    """Make a matplotlib figure; draw and save it inside the block.

    Args:
        width: in inches.
        height: in inches.
        parts: shares of the height of several axes, which are stacked and share their x.

    Yields:
        The figure, and its axes (an array of them for several parts).
    """
    import matplotlib  # (here to keep start-up fast)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), matplotlib.rc_context({"font.family": _installed_fonts()}):
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing"
        )  # no installed font has that character: a box is drawn
        canvas = FigureCanvasAgg(Figure(figsize=(width, height), dpi=_DPI))
        yield canvas.figure, canvas.figure.subplots(len(parts), sharex=True, height_ratios=parts)
