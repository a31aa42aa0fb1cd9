"""Builds V3 schemas that older ComfyUI versions accept as well."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar

from comfy_api.latest import io

T = TypeVar("T")

CATEGORY = "model/quantization"

FP8Report = io.Custom("FP8_REPORT")
"""The socket type of kernels.Report."""

FP8Calibration = io.Custom("FP8_CALIBRATION")
"""The socket type of kernels.calibration.Calibration."""


def fit(factory: Callable[..., T], *arguments, **keywords) -> T:
    """factory(*arguments, **keywords), less the keywords that the running version of it does not know."""
    known = inspect.signature(factory).parameters
    return factory(*arguments, **{name: value for name, value in keywords.items() if name in known})
