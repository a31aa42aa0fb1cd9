"""Figures as IMAGE outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io

from ..kernels.figures import THEMES, drawn_in, to_image
from .schema import rare

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def theme_input() -> io.Input:
    """The last input of a node that draws a figure."""
    return rare(
        io.Combo.Input(
            "theme",
            options=list(THEMES),
            default="dark",
            optional=True,
            tooltip="The colours of the image: dark suits ComfyUI's page, light suits print and white pages.",
        )
    )


def draw_image(draw: Callable[[], Figure], theme: str) -> torch.Tensor:
    """The figure that `draw` returns, as an IMAGE: float32 (1, height, width, 3) in 0..1. theme: a key of THEMES.

    Raises RuntimeError saying what to install where matplotlib is missing: it is imported when a figure is drawn.
    """
    try:
        with drawn_in(theme):
            return to_image(draw())
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise RuntimeError(
            "this node needs matplotlib, which is not installed: run `pip install matplotlib` in ComfyUI's Python "
            "environment and restart ComfyUI"
        ) from error
