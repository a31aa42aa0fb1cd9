"""Socket types of the pack, and schemas that older ComfyUI versions accept as well."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from comfy_api.latest import io

T = TypeVar("T")
AnyInput = TypeVar("AnyInput", bound=io.Input)

CATEGORY = "model/quantization"

FP8Report: Any = io.Custom("FP8_REPORT")
"""The socket type of kernels.Report."""

FP8Calibration: Any = io.Custom("FP8_CALIBRATION")
"""The socket type of kernels.calibration.moments.Calibration."""


def newer(factory: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
    """factory(*arguments, **keywords) without the keywords that the running ComfyUI does not know.

    ComfyUI 0.3.75 has no `search_aliases` in io.Schema.
    """
    known = inspect.signature(factory).parameters
    return factory(*arguments, **{name: value for name, value in keywords.items() if name in known})


def rare(widget: AnyInput) -> AnyInput:
    """The input, which newer pages hide until "Show advanced inputs" is chosen. ComfyUI 0.3.75 always shows it."""
    if "advanced" in inspect.signature(type(widget)).parameters:
        widget.advanced = True
    return widget
