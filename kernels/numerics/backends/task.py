"""What backends are asked to do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats import Float8Format
from ..rounding import Rounding


@dataclass(frozen=True)
class Task:
    """What a tensor, or a slice of it, is rounded with."""

    scale: torch.Tensor
    """fp32, 0-dim, on the CPU."""
    amax: float
    """The tensor's largest magnitude."""
    format: Float8Format
    rounding: Rounding
    stream: int
    """random_bits.stream_key, or what stream_from makes of it for a slice that begins at a later block."""
