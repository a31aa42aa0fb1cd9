"""Figures as IMAGE outputs; matplotlib is imported when the first one is drawn."""

from __future__ import annotations

from collections.abc import Callable

import torch


def draw_image(figure: Callable[[], object]) -> torch.Tensor:
    """The IMAGE of the Figure that `figure` returns.

    Raises RuntimeError saying what to install where matplotlib is missing.
    """
    try:
        from ..kernels.figures import to_image

        return to_image(figure())
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise RuntimeError(
            "this node draws with matplotlib, which is not installed: run `pip install matplotlib` in ComfyUI's Python "
            "environment and start ComfyUI again"
        ) from error
