"""The arguments that all backends share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats import Float8Format
from ..rounding import Rounding


@dataclass(frozen=True)
class Task:
    """How a tensor, or one slice of it, is quantized."""

    scale: torch.Tensor
    """fp32, 0-dim, on the CPU."""
    amax: float
    """The largest magnitude of the whole tensor."""
    float8: Float8Format
    rounding: Rounding
    stream: int
    """random_bits.stream_key; for a slice that starts at a later block, stream_from of it."""
