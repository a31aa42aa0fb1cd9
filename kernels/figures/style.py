"""One look for every figure, and the way from a figure to pixels. matplotlib is imported when first used."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES = 10.24
"""Every figure is laid out this wide, at 100 dots an inch for 1024 pixels: a wider one is sharper, not emptier."""

NARROWEST, LARGEST_SIDE = 256, 4096
"""Limits of a figure's width and of both its sides, in pixels."""

BLUE, ORANGE, GREEN, VERMILION, PURPLE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7"
"""Okabe and Ito's palette: told apart with every kind of colour blindness."""
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


@contextmanager
def house_style() -> Iterator[None]:
    """While it is open, or around a decorated function, matplotlib draws in this pack's style, whatever the user's."""
    from matplotlib import style

    with style.context(["default", STYLE]):
        yield


def check_size(width: int, height: int, lowest: float) -> None:
    """Raises ValueError for a width outside NARROWEST..LARGEST_SIDE, or a height outside lowest * width..LARGEST_SIDE.

    width, height: pixels. lowest: see new_figure.
    """
    if not NARROWEST <= width <= LARGEST_SIDE:
        raise ValueError(f"figure width is {width} pixels: choose one from {NARROWEST} to {LARGEST_SIDE}")
    least = math.ceil(lowest * width)
    if not least <= height <= LARGEST_SIDE:
        raise ValueError(f"figure height is {height} pixels: at a width of {width} choose {least} to {LARGEST_SIDE}")


def new_figure(width: int, height: int, lowest: float) -> Figure:
    """An empty figure of width x height pixels on the Agg canvas.

    lowest: the least height, as a share of the width, at which nothing in this figure overlaps.
    Raises ValueError as check_size.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_size(width, height, lowest)
    # A hair more than the pixels, which the canvas rounds down.
    figure = Figure(figsize=(WIDTH_INCHES, WIDTH_INCHES * (height + 1e-3) / (width + 1e-3)))
    figure.set_dpi((width + 1e-3) / WIDTH_INCHES)
    FigureCanvasAgg(figure)
    return figure


@house_style()
def to_image(figure: Figure) -> torch.Tensor:
    """A figure as a ComfyUI IMAGE: float32 (1, H, W, 3) in 0..1."""
    figure.canvas.draw()
    pixels = torch.frombuffer(bytearray(figure.canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = figure.canvas.get_width_height()
    return pixels.reshape(1, height, width, 4)[..., :3].float() / 255


@house_style()
def save_png(figure: Figure, path) -> None:
    """Write a figure to a PNG file. The same figure gives the same bytes, whatever matplotlib's version string."""
    figure.savefig(path, format="png", dpi=figure.dpi, metadata={"Software": None})


def write_titles(figure: Figure, title: str, subtitle: str) -> None:
    """The two lines at the top of a figure."""
    height = figure.get_figheight()
    left = MARGIN / WIDTH_INCHES
    figure.text(left, 1 - 0.22 / height, shorten_middle(title, TITLE_CHARACTERS), size=13, weight="bold", va="top")
    figure.text(left, 1 - 0.47 / height, subtitle, size=9.5, color=FAINT, va="top")


def write_caption(figure: Figure, *sentences: str) -> None:
    """The lines at the bottom of a figure: each sentence starts one, and is wrapped."""
    lines = [line for sentence in sentences for line in textwrap.wrap(sentence, CAPTION_CHARACTERS)]
    figure.text(
        MARGIN / WIDTH_INCHES, 0.14 / figure.get_figheight(), "\n".join(lines), va="bottom", linespacing=1.45, size=9.5
    )


def grid_area(figure: Figure, *, left: float, right: float, top: float, bottom: float) -> dict[str, float]:
    """Margins around the panels, given in inches at WIDTH_INCHES, as fractions for `Figure.add_gridspec`."""
    height = figure.get_figheight()
    return {
        "left": left / WIDTH_INCHES,
        "right": 1 - right / WIDTH_INCHES,
        "top": 1 - top / height,
        "bottom": bottom / height,
    }


def write_inside(axes: Axes, text: str, x: float = 0.5, y: float = 0.5, **options) -> None:
    """A remark inside a panel, at fractions of its sides, e.g. why it is empty."""
    options = {"ha": "center", "va": "center", "color": FAINT, "size": 8.5} | options
    axes.text(x, y, text, transform=axes.transAxes, **options)


def shorten_middle(text: str, length: int) -> str:
    """The text, with an ellipsis in its middle if it is longer than `length` characters; its end says most."""
    if len(text) <= length:
        return text
    tail = (length - 1) * 2 // 3
    return f"{text[: length - 1 - tail]}…{text[len(text) - tail :]}"


def percent(share: float) -> str:
    """A share of 1 as a percentage, with three digits: 0.5 -> "50 %"; never rounded to 0."""
    if 0 < share < 1e-5:
        return "<0.001 %"
    return f"{100 * share:.3g} %"


def signed(value: float) -> str:
    """A small number with its sign and two digits: −1.2e−7."""
    mantissa, exponent = f"{value:+.1e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


def decibels(value: float) -> str:
    """A level in dB as text; "lossless" where it is infinite."""
    if value == float("inf"):
        return "lossless"
    return f"{value:.1f} dB"
