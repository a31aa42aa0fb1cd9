"""Figures as IMAGE outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..kernels.figures import to_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_image(draw: Callable[[], Figure]) -> torch.Tensor:
    """The figure that `draw` returns, as an IMAGE: float32 (1, height, width, 3) in 0..1.

    Raises RuntimeError saying what to install where matplotlib is missing: it is imported when a figure is drawn.
    """
    try:
        return to_image(draw())
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise RuntimeError(
            "this node needs matplotlib, which is not installed: run `pip install matplotlib` in ComfyUI's Python "
            "environment and restart ComfyUI"
        ) from error
