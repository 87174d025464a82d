"""Pictures: a figure whose letters are there, whatever language a name is in. matplotlib is imported where one is drawn."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

DPI = 110
# fonts that have the Chinese letters of a name, where one of them is installed; the last is Windows' own under WSL
CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
)
WINDOWS_FONT = Path("/mnt/c/Windows/Fonts/msyh.ttc")


def fonts() -> list[str]:
    """Matplotlib's own font, then the first of ours that is there."""
    from matplotlib import font_manager

    if WINDOWS_FONT.is_file():
        font_manager.fontManager.addfont(WINDOWS_FONT)
    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *[name for name in CHINESE_FONTS if name in installed][:1]]


@contextlib.contextmanager
def figure(width: float, height: float, parts: Sequence[float] = (1,)) -> Iterator:
    """A matplotlib figure of this size in inches, and its axes; draw and save it inside the block. parts: shares of the height
    that several axes have, which lie above one another and share their x.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), matplotlib.rc_context({"font.family": fonts()}):
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # no font here has that letter: a box does
        drawing = Figure(figsize=(width, height), dpi=DPI)
        FigureCanvasAgg(drawing)
        yield drawing, drawing.subplots(len(parts), sharex=True, height_ratios=parts)
