"""What a rounding does to each value of a range, measured by drawing many times with the real kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..choices import choose
from ..numerics.formats import FORMATS
from ..numerics.quantized_tensor import quantize_tensor

POINTS = 481


@dataclass(frozen=True)
class RoundingCurve:
    """Measurements at POINTS evenly spaced values; all arrays are float64 (POINTS,)."""

    format: str
    rounding: str
    draws: int
    values: np.ndarray
    below: np.ndarray
    """The largest FP8 value that is not above each value (or the lowest of all)."""
    above: np.ndarray
    """The smallest FP8 value that is not below each value (or the highest of all)."""
    one_draw: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    """Mean squared distance of the draws from their mean."""
    up: np.ndarray
    """Share of draws that gave `above`; NaN where a value is one of the grid."""

    @property
    def step(self) -> np.ndarray:
        """The grid's step at each value; NaN on the grid itself and beyond the format's range."""
        gap = self.above - self.below
        return np.where(gap > 0, gap, np.nan)

    @property
    def fraction(self) -> np.ndarray:
        """Where each value lies between its neighbours: 0 at the lower, towards 1 at the upper; NaN as `step`."""
        return (self.values - self.below) / self.step

    @property
    def theory_variance(self) -> np.ndarray:
        """(above - v)(v - below): that of an unbiased draw between the two; 0 on the grid and beyond the range."""
        return np.where(self.above > self.below, (self.above - self.values) * (self.values - self.below), 0.0)


def measure_rounding(
    format: str, rounding: str, low: float = 0.5, high: float = 2.5, *, draws: int = 1000, seed: int = 0
) -> RoundingCurve:
    """Round each value of a range `draws` times, without a scale.

    Raises ValueError for an unknown choice, no draws, or a range that is empty or not finite.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"the range from {low} to {high} is empty: choose finite values, the lower one first")
    if draws < 1:
        raise ValueError(f"{draws} draws: choose at least one")
    grid = np.unique([value for value in choose(FORMATS, format, "format").values if math.isfinite(value)])
    v = torch.linspace(low, high, POINTS, dtype=torch.float64).float()
    choices = {"format": format, "rounding": rounding, "scaling": "none", "seed": seed, "key": "rounding curve"}
    drawn = quantize_tensor(v.repeat(draws), **choices).codes.float().reshape(draws, POINTS).double().numpy()
    values = v.double().numpy()
    below = grid[np.clip(np.searchsorted(grid, values, side="right") - 1, 0, None)]
    above = grid[np.clip(np.searchsorted(grid, values, side="left"), None, len(grid) - 1)]
    up = np.where(above > below, (drawn == above).mean(0), np.nan)
    return RoundingCurve(format, rounding, draws, values, below, above, drawn[0], drawn.mean(0), drawn.var(0), up)
