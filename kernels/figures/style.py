"""The style of every figure, their titles and captions, and rendering. matplotlib is imported when first used."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import display

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES = 10.24
"""Layout width of every figure: 100 dots per inch at 1024 pixels. More pixels make it sharper, not emptier."""

NARROWEST, LARGEST_SIDE = 256, 4096
"""The smallest width, and the largest width and height, in pixels."""

BLUE, ORANGE, GREEN, VERMILION, PURPLE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7"
"""The palette of Okabe and Ito, which is safe for colour blindness."""
INK, FAINT, RULE, PAPER, PANEL = "#1b1f24", "#57606a", "#d8dee4", "#ffffff", "#f6f8fa"
LIGHT_BLUE, DARK_BLUE = "#9ccbe8", "#08306b"

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": PANEL,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 5),
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}

MARGIN = 0.3
TITLE_CHARACTERS, CAPTION_CHARACTERS = 74, 140
NO_BREAK_SPACE = "\u00a0"


@contextmanager
def house_style() -> Iterator[None]:
    """A context or decorator in which matplotlib uses this pack's style and ignores the user's settings."""
    from matplotlib import style

    with style.context(["default", STYLE]):
        yield


def check_size(width: int, height: int, lowest: float) -> None:
    """Raises ValueError for a width outside NARROWEST..LARGEST_SIDE, or a height outside lowest * width..LARGEST_SIDE.

    width, height: pixels. lowest: see new_figure.
    """
    if not NARROWEST <= width <= LARGEST_SIDE:
        raise ValueError(f"figure width is {width} pixels; choose {NARROWEST} to {LARGEST_SIDE}")
    least = math.ceil(lowest * width)
    if not least <= height <= LARGEST_SIDE:
        raise ValueError(f"figure height is {height} pixels; for a width of {width} choose {least} to {LARGEST_SIDE}")


def new_figure(width: int, height: int, lowest: float) -> Figure:
    """An empty figure of width x height pixels on the Agg canvas.

    lowest: the smallest height, as a share of the width, at which nothing in this figure overlaps.
    Raises ValueError like check_size.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_size(width, height, lowest)
    # Slightly more than whole pixels, since the canvas rounds down.
    figure = Figure(figsize=(WIDTH_INCHES, WIDTH_INCHES * (height + 1e-3) / (width + 1e-3)))
    figure.set_dpi((width + 1e-3) / WIDTH_INCHES)
    FigureCanvasAgg(figure)
    return figure


@house_style()
def to_image(figure: Figure) -> torch.Tensor:
    """Render a figure to a ComfyUI IMAGE: float32 (1, H, W, 3) in 0..1."""
    canvas: Any = figure.canvas  # a FigureCanvasAgg, which has buffer_rgba
    canvas.draw()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
    return pixels.reshape(1, height, width, 4)[..., :3].float() / 255


@house_style()
def save_png(figure: Figure, path: Path) -> None:
    """Write a figure to a PNG file. The same figure gives the same bytes: the matplotlib version is not written."""
    figure.savefig(path, format="png", dpi=figure.dpi, metadata={"Software": None})


def write_titles(figure: Figure, title: str, subtitle: str) -> None:
    """The title and a line below it. A long title loses its middle."""
    height = figure.get_figheight()
    left = MARGIN / WIDTH_INCHES
    title = display.shorten_middle(display.printable(title), TITLE_CHARACTERS)
    figure.text(left, 1 - 0.22 / height, title, size=13, weight="bold", va="top")
    figure.text(left, 1 - 0.47 / height, display.printable(subtitle), size=9.5, color=FAINT, va="top")


def write_caption(figure: Figure, *texts: str) -> None:
    """Lines at the bottom of a figure. Each text starts a new line and is wrapped, but not between number and unit."""
    glued = [re.sub(r"(?<=\d) (?=%|dB)", NO_BREAK_SPACE, display.printable(text)) for text in texts]
    lines = [line for text in glued for line in textwrap.wrap(text, CAPTION_CHARACTERS)]
    block = "\n".join(lines).replace(NO_BREAK_SPACE, " ")
    x, y = MARGIN / WIDTH_INCHES, 0.14 / figure.get_figheight()
    figure.text(x, y, block, va="bottom", linespacing=1.45, size=9.5)


def grid_area(figure: Figure, *, left: float, right: float, top: float, bottom: float) -> dict[str, float]:
    """Margins around the panels in inches (at WIDTH_INCHES) -> fractions for `Figure.add_gridspec`."""
    height = figure.get_figheight()
    return {
        "left": left / WIDTH_INCHES,
        "right": 1 - right / WIDTH_INCHES,
        "top": 1 - top / height,
        "bottom": bottom / height,
    }


def add_panels(
    figure: Figure, rows: int, columns: int, area: dict[str, float], *, sharex: bool = False, **spacing: Any
) -> list[Axes]:
    """A grid of panels in an area of `grid_area`, row by row. spacing: options of `Figure.add_gridspec`."""
    grid: Any = figure.add_gridspec(rows, columns, **area, **spacing)
    return list(grid.subplots(sharex=sharex, squeeze=False).flat)


def write_inside(axes: Axes, text: str, x: float = 0.5, y: float = 0.5, **options: Any) -> None:
    """A remark inside a panel, e.g. why it is empty. x, y: fractions of its width and height."""
    defaults: dict[str, Any] = {"ha": "center", "va": "center", "color": FAINT, "size": 8.5}
    axes.text(x, y, text, transform=axes.transAxes, **defaults | options)
