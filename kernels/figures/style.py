"""The style of every figure, their titles and captions, and rendering. matplotlib is imported when first used."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import display
from ..choices import choose
from .fonts import FAMILY, legible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES = 10.24
"""Layout width of every figure: 100 dots per inch at 1024 pixels. More pixels make it sharper, not emptier."""

NARROWEST, LARGEST_SIDE = 256, 4096
"""The smallest width, and the largest width and height, in pixels."""

BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY = "C0", "C1", "C2", "C3", "C4", "C5"
INK, FAINT, RULE, PAPER, PANEL = "C6", "C7", "C8", "C9", "C10"
FAINT_BLUE, STRONG_BLUE, FAINT_VERMILION, STRONG_VERMILION = "C11", "C12", "C13", "C14"
"""Names of colours, which matplotlib looks up in a theme. FAINT_ and STRONG_ are the ends of a scale: on dark paper the
strong end is the brighter one."""

_COLOURS = {
    BLUE: ("#56b4e9", "#0072b2"),
    ORANGE: ("#e69f00", "#e69f00"),
    GREEN: ("#2bbf8f", "#009e73"),
    VERMILION: ("#f0803c", "#d55e00"),
    PURPLE: ("#d98cb5", "#cc79a7"),
    GREY: ("#646d77", "#b5bcc4"),
    INK: ("#e8ebee", "#1b1f24"),
    FAINT: ("#a3abb4", "#57606a"),
    RULE: ("#3a4048", "#d8dee4"),
    PAPER: ("#1c1f23", "#ffffff"),
    PANEL: ("#25292e", "#f6f8fa"),
    FAINT_BLUE: ("#3d7aa3", "#9ccbe8"),
    STRONG_BLUE: ("#cfeaff", "#08306b"),
    FAINT_VERMILION: ("#5c2f17", "#fbdcc8"),
    STRONG_VERMILION: ("#ffd9c2", "#4a1d00"),
}
"""On dark and on light paper, in the order of their names. The first five are of the palette of Okabe and Ito, which is
safe for colour blindness; on dark paper, brighter."""

THEMES = {name: tuple(pair[i] for pair in _COLOURS.values()) for i, name in enumerate(("dark", "light"))}

STYLE = {
    "font.family": FAMILY,
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

_colours = ContextVar("colours", default=THEMES["light"])

MARGIN = 0.3
TITLE_CHARACTERS, LEAD_CHARACTERS, CAPTION_CHARACTERS = 74, 125, 140
NO_BREAK_SPACE = "\u00a0"


@contextmanager
def house_style() -> Iterator[None]:
    """A context or decorator in which matplotlib uses this pack's style and ignores the user's settings."""
    from cycler import cycler  # matplotlib needs it
    from matplotlib import style

    with style.context(["default", {"axes.prop_cycle": cycler(color=_colours.get())}, STYLE]):
        yield


@contextmanager
def drawn_in(theme: str) -> Iterator[None]:
    """A context in which figures are made, and rendered, in a theme: a key of THEMES."""
    before = _colours.set(choose(THEMES, theme, "theme"))
    try:
        yield
    finally:
        _colours.reset(before)


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
    with legible(figure):
        canvas.draw()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
    return pixels.reshape(1, height, width, 4)[..., :3].float() / 255


@house_style()
def save_png(figure: Figure, path: Path) -> None:
    """Write a figure to a PNG file. The same figure gives the same bytes: the matplotlib version is not written."""
    with legible(figure):
        figure.savefig(path, format="png", dpi=figure.dpi, metadata={"Software": None})


def write_titles(figure: Figure, title: str, subtitle: str = "") -> None:
    """The title and a line below it. A long title loses its middle."""
    height = figure.get_figheight()
    left = MARGIN / WIDTH_INCHES
    title = display.shorten_middle(display.printable(title), TITLE_CHARACTERS)
    figure.text(left, 1 - 0.22 / height, title, size=13, weight="bold", va="top")
    figure.text(left, 1 - 0.47 / height, display.printable(subtitle), size=9.5, color=FAINT, va="top")


LINE_INCHES = 0.19
"""Height of a line of a caption."""


def write_lead(figure: Figure, *texts: str) -> float:
    """Lines below the title, the first text in bold, in place of a subtitle. Returns where they end, in inches from
    the top of the figure."""
    height, x, y = figure.get_figheight(), MARGIN / WIDTH_INCHES, 0.5
    for i, text in enumerate(texts):
        lines, weight = (
            (_wrapped(text, CAPTION_CHARACTERS), "normal") if i else (_wrapped(text, LEAD_CHARACTERS), "bold")
        )
        figure.text(x, 1 - y / height, "\n".join(lines), va="top", linespacing=1.45, size=9.5, weight=weight)
        y += LINE_INCHES * len(lines)
    return y


def write_caption(figure: Figure, *texts: str) -> None:
    """Lines at the bottom of a figure. Each text starts a new line and is wrapped, but not between number and unit."""
    lines = [line for text in texts for line in _wrapped(text, CAPTION_CHARACTERS)]
    x, y = MARGIN / WIDTH_INCHES, 0.14 / figure.get_figheight()
    figure.text(x, y, "\n".join(lines), va="bottom", linespacing=1.45, size=9.5)


def _wrapped(text: str, characters: int) -> list[str]:
    glued = re.sub(r"(?<=\d) (?=%|dB)", NO_BREAK_SPACE, display.printable(text))
    return [line.replace(NO_BREAK_SPACE, " ") for line in textwrap.wrap(glued, characters)]


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


def ink_on(colour: str) -> str:
    """INK or PAPER, whichever has the larger contrast with a colour."""
    from matplotlib.colors import to_rgb

    def luminance(name: str) -> float:
        red, green, blue = (channel**2.2 for channel in to_rgb(name))
        return 0.05 + 0.2126 * red + 0.7152 * green + 0.0722 * blue

    return max((INK, PAPER), key=lambda ink: abs(math.log(luminance(ink) / luminance(colour))))


def write_inside(axes: Axes, text: str, x: float = 0.5, y: float = 0.5, **options: Any) -> None:
    """A remark inside a panel, e.g. why it is empty. x, y: fractions of its width and height."""
    defaults: dict[str, Any] = {"ha": "center", "va": "center", "color": FAINT, "size": 8.5}
    axes.text(x, y, text, transform=axes.transAxes, **defaults | options)
