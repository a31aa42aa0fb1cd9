"""NaN and infinite values."""

from __future__ import annotations

import math

import torch

from .formats import FORMATS
from .scaling import tensor_to_amax

FLOATS = ("float64", "float32", "bfloat16", "float16", *FORMATS)
"""Names of the dtypes whose NaN and infinite values are counted."""


def count_nonfinite(x: torch.Tensor) -> tuple[int, int]:
    """How many values of a tensor are NaN, and how many are infinite. x: a dtype of FLOATS, contiguous, any shape.

    An fp64 value beyond fp32's range is infinite. Only a tensor that holds such values is widened to fp32.
    """
    float8 = FORMATS.get(str(x.dtype).removeprefix("torch."))
    if float8 is None:
        finite = math.isfinite(tensor_to_amax(x))
    else:
        finite = not x.numel() or int((x.view(torch.uint8) & 0x7F).max()) <= float8.max_code
    if finite:
        return 0, 0
    values = x.float()
    return int(values.isnan().sum()), int(values.isinf().sum())
