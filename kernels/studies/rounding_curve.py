"""What a rounding does to each value in a range, measured over many draws with the real kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..choices import choose
from ..numerics.formats import FORMATS
from ..numerics.quantized_tensor import quantize_tensor

POINTS = 481
"""Evenly spaced values in the range."""


@dataclass(frozen=True)
class RoundingCurve:
    """Measurements at POINTS values of a range. All arrays are float64 (POINTS,)."""

    format: str
    rounding: str
    draws: int
    values: np.ndarray
    below: np.ndarray
    """The largest FP8 value <= each value; the lowest FP8 value for those below the range."""
    above: np.ndarray
    """The smallest FP8 value >= each value; the highest FP8 value for those above the range."""
    one_draw: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    """Mean squared difference between the draws and their mean."""
    up: np.ndarray
    """Share of draws that gave `above`; NaN on the FP8 grid and outside its range."""

    @property
    def step(self) -> np.ndarray:
        """The FP8 grid step at each value; NaN on the grid and outside its range."""
        gap = self.above - self.below
        return np.where(gap > 0, gap, np.nan)

    @property
    def fraction(self) -> np.ndarray:
        """Position of each value between its neighbours: 0 at the lower, 1 at the upper. NaN where `step` is."""
        return (self.values - self.below) / self.step

    @property
    def theory_variance(self) -> np.ndarray:
        """(above - v)(v - below), the variance of an unbiased draw; 0 on the FP8 grid and outside its range."""
        return np.where(self.above > self.below, (self.above - self.values) * (self.values - self.below), 0.0)


def measure_rounding(
    format: str, rounding: str, low: float = 0.5, high: float = 2.5, *, draws: int = 1000, seed: int = 0
) -> RoundingCurve:
    """Round each value in a range `draws` times, without a scale.

    format: key of FORMATS. rounding: key of ROUNDINGS.
    Raises ValueError for an unknown choice, no draws, or a range that is empty or not finite.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"the range from {low} to {high} is not valid; choose finite numbers with low < high")
    if draws < 1:
        raise ValueError(f"draws is {draws}; choose 1 or more")
    grid = np.unique([value for value in choose(FORMATS, format, "format").values if math.isfinite(value)])
    v = torch.linspace(low, high, POINTS, dtype=torch.float64, device="cpu").float()
    quantized = quantize_tensor(
        v.repeat(draws), format=format, rounding=rounding, scaling="none", seed=seed, key="rounding curve"
    )
    drawn = quantized.codes.float().reshape(draws, POINTS).double().numpy()
    values = v.double().numpy()
    below = grid[np.clip(np.searchsorted(grid, values, side="right") - 1, 0, None)]
    above = grid[np.clip(np.searchsorted(grid, values, side="left"), None, len(grid) - 1)]
    up = np.where(above > below, (drawn == above).mean(0), np.nan)
    return RoundingCurve(format, rounding, draws, values, below, above, drawn[0], drawn.mean(0), drawn.var(0), up)
