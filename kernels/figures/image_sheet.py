"""Compare Images (A/B): two pictures and their amplified difference side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .style import (
    MARGIN,
    RULE,
    WIDTH_INCHES,
    house_style,
    new_figure,
    percent,
    shorten_middle,
    write_caption,
    write_titles,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP, TOP, BOTTOM = 0.14, 1.05, 0.75
SEEN = 8
NAME_CHARACTERS = 28
TALLEST = 4
"""Times as high as wide: a picture taller than this is refused, since its sheet would be all height."""


@house_style()
def image_sheet(
    a: np.ndarray,
    b: np.ndarray,
    *,
    psnr: float,
    ssim: float,
    amplify: int = 8,
    names: tuple[str, str] = ("A", "B"),
    which: str = "",
    width: int = 1536,
) -> Figure:
    """A, B, and |A - B| times `amplify`, with the numbers below.

    a, b: float (H, W, 3) in 0..1, of one size. psnr in dB, infinite for equal pictures. ssim: 1 for equal ones.
    names: what A and B are called. which: which of several sheets this is, for the title.
    Raises ValueError for pictures of different sizes, or more than TALLEST times as high as wide.
    """
    if a.shape != b.shape:
        raise ValueError(f"A is {describe_size(a)} and B {describe_size(b)}: compare images of one size")
    rows, columns = a.shape[:2]
    if rows > TALLEST * columns:
        raise ValueError(f"images of {describe_size(a)} are too tall for a sheet: crop them first")
    panel = (WIDTH_INCHES - 2 * MARGIN - 2 * GAP) / 3
    inches = TOP + panel * rows / columns + BOTTOM
    figure = new_figure(width, round(width * inches / WIDTH_INCHES), lowest=0)
    difference = np.clip(np.abs(a - b) * amplify, 0, 1)
    panels = zip((a, b, difference), (*names, f"difference × {amplify}"), strict=True)
    for i, (picture, name) in enumerate(panels):
        left = (MARGIN + i * (panel + GAP)) / WIDTH_INCHES
        axes = figure.add_axes((left, BOTTOM / inches, panel / WIDTH_INCHES, panel * rows / columns / inches))
        axes.imshow(np.clip(picture, 0, 1), aspect="auto", vmin=0, vmax=1)
        axes.set(xticks=(), yticks=())
        axes.set_title(shorten_middle(name, NAME_CHARACTERS))
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set(visible=True, color=RULE)
    write_titles(figure, ", ".join(filter(None, (" and ".join(names), which))), describe_size(a))
    write_caption(figure, in_plain_words(a, b), in_numbers(a, b, psnr, ssim))
    return figure


def describe_size(image: np.ndarray) -> str:
    return f"{image.shape[1]} × {image.shape[0]} pixels"


def in_plain_words(a: np.ndarray, b: np.ndarray) -> str:
    """How much of the picture changed, as one sentence. A level is one of 255."""
    difference = 255 * np.abs(a - b).max(axis=-1)
    if not difference.any():
        return "The images are identical."
    return (
        f"{percent(np.mean(difference > SEEN))} of the pixels differ by more than {SEEN} of 255 levels, which the eye "
        f"begins to see; {percent(np.mean(difference < 1))} by less than one."
    )


def in_numbers(a: np.ndarray, b: np.ndarray, psnr: float, ssim: float) -> str:
    difference = 255 * np.abs(a - b)
    level = "infinite" if np.isinf(psnr) else f"{psnr:.1f} dB"
    return (
        f"PSNR {level} · SSIM {ssim:.4f} · mean difference {difference.mean():.2f} levels · "
        f"largest {difference.max():.0f} levels"
    )
