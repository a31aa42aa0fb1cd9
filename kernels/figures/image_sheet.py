"""Compare Images (A/B): two images and their amplified difference side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .. import display
from .style import (
    MARGIN,
    RULE,
    WIDTH_INCHES,
    house_style,
    new_figure,
    write_caption,
    write_titles,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP, TOP, BOTTOM = 0.14, 1.05, 0.75
LARGE_DIFFERENCE = 8
"""Levels of 255. Pixels that differ by more are counted."""
NAME_CHARACTERS = 28
TALLEST = 4
"""Largest ratio of height to width. The sheet of a taller image would be too tall."""


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
    """A, B, and |A - B| times `amplify`, with numbers below.

    a, b: float (H, W, 3) in 0..1, of the same size. psnr: dB, infinite for equal images. ssim: 1 for equal images.
    names: titles of A and B. which: which of several sheets this is, for the title.
    Raises ValueError for images of different sizes, or more than TALLEST times as high as wide.
    """
    if a.shape != b.shape:
        raise ValueError(f"A is {describe_size(a)}, B is {describe_size(b)}; both must have the same size")
    rows, columns = a.shape[:2]
    if rows > TALLEST * columns:
        raise ValueError(f"images of {describe_size(a)} are too tall; crop them to at most {TALLEST} times their width")
    panel = (WIDTH_INCHES - 2 * MARGIN - 2 * GAP) / 3
    inches = TOP + panel * rows / columns + BOTTOM
    figure = new_figure(width, round(width * inches / WIDTH_INCHES), lowest=0)
    difference = np.clip(np.abs(a - b) * amplify, 0, 1)
    panels = zip((a, b, difference), (*names, f"difference × {amplify}"), strict=True)
    for i, (image, name) in enumerate(panels):
        left = (MARGIN + i * (panel + GAP)) / WIDTH_INCHES
        axes = figure.add_axes((left, BOTTOM / inches, panel / WIDTH_INCHES, panel * rows / columns / inches))
        axes.imshow(np.clip(image, 0, 1), aspect="auto", vmin=0, vmax=1)
        axes.set(xticks=(), yticks=())
        axes.set_title(display.shorten_middle(display.printable(name), NAME_CHARACTERS))
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set(visible=True, color=RULE)
    write_titles(figure, ", ".join(filter(None, (" and ".join(names), which))), describe_size(a))
    write_caption(figure, in_plain_words(a, b), in_numbers(a, b, psnr, ssim))
    return figure


def describe_size(image: np.ndarray) -> str:
    return f"{image.shape[1]} × {image.shape[0]} pixels"


def in_plain_words(a: np.ndarray, b: np.ndarray) -> str:
    """How many pixels changed, by the largest difference of their channels, in levels of 255."""
    difference = 255 * np.abs(a - b).max(axis=-1)
    if not difference.any():
        return "The images are identical."
    return (
        f"{display.share(float(np.mean(difference > LARGE_DIFFERENCE)))} of the pixels differ by more than "
        f"{LARGE_DIFFERENCE} of 255 levels, {display.share(float(np.mean(difference < 1)))} by less than 1."
    )


def in_numbers(a: np.ndarray, b: np.ndarray, psnr: float, ssim: float) -> str:
    """PSNR, SSIM, and the mean and largest difference of a channel in levels of 255."""
    difference = 255 * np.abs(a - b)
    return (
        f"PSNR {display.decibels(psnr)} · SSIM {ssim:.4f} · mean difference {difference.mean():.2f} levels · "
        f"largest {difference.max():.0f} levels"
    )
