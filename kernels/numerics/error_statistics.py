"""Error statistics of a quantized tensor: exact counts, float64 sums and small histograms, all mergeable."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from .formats import Float8Format
from .rounding import FP32_BIAS, FP32_MANTISSA, FRACTION_BITS, ONE

STEP_SIDE = 40
STEP_BINS = 2 * STEP_SIDE + 1
STEP_BIN_BITS = 11
STEP_BIN_WIDTH = 2**STEP_BIN_BITS / ONE
"""`step_histogram` counts errors in steps of the local FP8 grid. The middle bin counts errors of 0. On each side of it
are STEP_SIDE bins of 1/32 step, so that +-1/2 and +-1 are edges. An error on an edge is counted in the bin nearer to 0:
bins above 0 are k/32 < error <= (k + 1)/32, and those below 0 mirror them. The outermost bins also count all errors
beyond +-1.25 steps (saturated values, calibrated rounding). Errors are multiples of 2^-16 step, as positions are."""

RELATIVE_BINS = 64
RELATIVE_OCTAVES = 32
"""`relative_histogram` counts |error| / amax in two bins per octave, with edges 2^k and 1.5 * 2^k, from 2^-32 to 1.
Unchanged values are left out; `exact` counts them."""

_ADDED = ("count", "sum_error", "sum_squared_error", "sum_squared", "saturated", "flushed", "exact")

SQUARES_FIT = 1e-12, 1e15
"""Range of amax for which sums of squares and of squared errors fit into fp32 (0 always does)."""

SAMPLES = 128
"""(original, dequantized) pairs per tensor, for scatter plots. A few kB each, which is acceptable for 10,000 layers."""


@dataclass(frozen=True, slots=True)
class ErrorStatistics:
    """The errors of `count` quantized numbers. Plain data that JSON can hold; no tensors.

    An error is dequantized minus original, in the units of the original tensor.
    """

    count: int = 0
    sum_error: float = 0.0
    sum_squared_error: float = 0.0
    sum_squared: float = 0.0
    """Sum of the squared original values: count times the signal power of SQNR."""
    max_error: float = 0.0
    """Largest absolute error."""
    amax: float = 0.0
    saturated: int = 0
    """Values beyond the largest finite FP8 value."""
    flushed: int = 0
    """Non-zero values that became zero."""
    exact: int = 0
    """Values that did not change."""
    step_histogram: tuple[int, ...] = (0,) * STEP_BINS
    """Errors in steps of the local FP8 grid; see STEP_BINS."""
    relative_histogram: tuple[int, ...] = (0,) * RELATIVE_BINS
    """|error| / amax of the value's own tensor; see RELATIVE_BINS."""
    samples: tuple[tuple[float, float], ...] = ()
    """Up to SAMPLES pairs (original, dequantized), evenly spaced over the tensor."""

    @property
    def bias(self) -> float:
        """Mean signed error."""
        return self.sum_error / self.count if self.count else 0.0

    @property
    def rmse(self) -> float:
        return math.sqrt(self.sum_squared_error / self.count) if self.count else 0.0

    @property
    def rms(self) -> float:
        """Root mean square of the original values."""
        return math.sqrt(self.sum_squared / self.count) if self.count else 0.0

    @property
    def relative_rmse(self) -> float:
        """RMSE over the RMS of the original; 0 for an exact copy and for an all-zero tensor."""
        return self.rmse / self.rms if self.rms else 0.0

    @property
    def sqnr(self) -> float:
        """Signal-to-quantization-noise ratio in dB; infinite if no value changed."""
        if not self.sum_squared_error:
            return math.inf
        return 10 * math.log10(self.sum_squared / self.sum_squared_error) if self.sum_squared else -math.inf

    @property
    def nearest_gain(self) -> float | None:
        """By how many dB rounding to nearest would raise `sqnr`, for a rounding to one of the two neighbours.

        Estimated from step_histogram: the other neighbour of a value with an error of e steps is 1 - e steps away.
        Steps of all sizes count alike. None without errors, and with saturated values, whose errors stay.
        """
        edges = step_bin_edges()
        errors = [abs(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
        chosen, nearest = (
            sum(count * error**2 for count, error in zip(self.step_histogram, distances, strict=True))
            for distances in (errors, [min(error, abs(1 - error)) for error in errors])
        )
        return 10 * math.log10(chosen / nearest) if chosen and nearest and not self.saturated else None


def merge(parts: Iterable[ErrorStatistics]) -> ErrorStatistics:
    """The statistics of all parts together; `samples` are thinned evenly to SAMPLES."""
    parts = tuple(parts) or (ErrorStatistics(),)
    if len(parts) == 1:
        return parts[0]
    merged: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in _ADDED}
    merged |= {name: max(getattr(part, name) for part in parts) for name in ("max_error", "amax")}
    for name in ("step_histogram", "relative_histogram"):
        merged[name] = tuple(map(sum, zip(*(getattr(part, name) for part in parts), strict=True)))
    samples = [pair for part in parts for pair in part.samples]
    return ErrorStatistics(**merged, samples=tuple(samples[i] for i in evenly_spaced(len(samples))))


def step_bin_edges() -> list[float]:
    """The STEP_BINS + 1 bin edges of `step_histogram`, in steps of the local FP8 grid.

    0 appears twice: both edges of the middle bin are 0.
    """
    above = [i * STEP_BIN_WIDTH for i in range(STEP_SIDE + 1)]
    return [-edge for edge in reversed(above)] + above


def relative_bin_edges() -> list[float]:
    """The RELATIVE_BINS + 1 bin edges of `relative_histogram`, as |error| / amax."""
    return [2.0 ** (i // 2 - RELATIVE_OCTAVES) * (1 + i % 2 / 2) for i in range(RELATIVE_BINS + 1)]


def squares_fit(amax: float) -> bool:
    """Whether the sums of squares of a tensor with this amax fit into fp32."""
    return not amax or SQUARES_FIT[0] <= amax <= SQUARES_FIT[1]


class Scratch:
    """Buffers for `measure`, reused for every chunk. New memory would take several times as long as the arithmetic."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device | str = "cpu"):
        self.integers = torch.empty(size, dtype=torch.int32, device=device)
        self.floats = torch.empty((3, size), dtype=dtype, device=device)


def measure(
    original: torch.Tensor,
    codes: torch.Tensor,
    positions: torch.Tensor,
    scale: torch.Tensor,
    amax: float,
    float8: Float8Format,
    counts: torch.Tensor | None = None,
    scratch: Scratch | None = None,
) -> ErrorStatistics:
    """The statistics of some numbers, without samples; each number counts `counts` times.

    original: fp32 or fp64 (n,), n <= 2^24, finite. Errors are computed in this dtype; fp32 is widened to fp64 if its
    squares would not fit (see SQUARES_FIT). codes: uint8 (n,). positions: int32 (n,), code-space positions of the
    magnitudes with 16 fraction bits, unsaturated, negative where the code has the opposite sign; overwritten. scale:
    fp32, 0-dim. counts: int64 (n,), or None for once each. scratch: same dtype and device as original, at least n long.
    """
    n = len(original)
    if not n:
        return ErrorStatistics(amax=amax)
    if original.dtype == torch.float32 and not squares_fit(amax):
        original, scratch = original.double(), None
    scratch = scratch or Scratch(n, original.dtype, original.device)
    code = scratch.integers[:n]
    dequantized, error, terms = (buffer[:n] for buffer in scratch.floats)
    values = (_values(float8, codes.device) * scale).to(original.dtype)
    torch.index_select(values, 0, code.copy_(codes), out=dequantized)
    torch.sub(dequantized, original, out=error)
    low, high = torch.aminmax(error)
    count = n if counts is None else int(counts.sum())
    changed, nonzero, nonzero_after = (_count_nonzero(x, counts, terms) for x in (error, original, dequantized))
    sum_error = _sum(error, counts)
    sum_squared_error = _sum(torch.mul(error, error, out=terms), counts)
    sum_squared = _sum(torch.mul(original, original, out=terms), counts)
    distances = code.bitwise_and_(0x7F).mul_(ONE).sub_(positions)
    step_histogram, relative_histogram = _histograms(distances, torch.div(error, amax or 1.0, out=terms), counts)
    relative_histogram[0] -= count - changed
    last = float8.max_code << FRACTION_BITS
    saturated = _count_nonzero(positions.sub_(last).clamp_(min=0), counts, terms) if positions.max() > last else 0
    return ErrorStatistics(
        count=count,
        sum_error=sum_error,
        sum_squared_error=sum_squared_error,
        sum_squared=sum_squared,
        max_error=float(torch.maximum(-low, high)),
        amax=amax,
        saturated=saturated,
        flushed=nonzero - nonzero_after,
        exact=count - changed,
        step_histogram=tuple(step_histogram.tolist()),
        relative_histogram=tuple(relative_histogram.tolist()),
    )


@lru_cache(maxsize=16)
def _values(float8: Float8Format, device: torch.device) -> torch.Tensor:
    return torch.tensor(float8.values, dtype=torch.float32, device=device)


def _histograms(
    distances: torch.Tensor, relative: torch.Tensor, counts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """step_histogram, and relative_histogram with the errors of 0 in its lowest bin: int64.

    Both are counted in one table (sign, half octave, steps). distances: int32 (n,), from positions to codes in code
    space, of either sign. relative: float (n,), errors / amax. counts: see measure. Overwrites both tensors.
    """
    almost_one_bin = (1 << STEP_BIN_BITS) - 1
    steps = distances.abs_().add_(almost_one_bin).bitwise_right_shift_(STEP_BIN_BITS).clamp_(max=STEP_SIDE)
    # The exponent and the first mantissa bit: 0 to 511, and -512 to -1 for negative errors.
    half_octaves = relative.float().view(torch.int32).bitwise_right_shift_(FP32_MANTISSA - 1)
    bins = half_octaves.add_(512).mul_(STEP_SIDE + 1).add_(steps)
    table = torch.bincount(bins, counts, 1024 * (STEP_SIDE + 1)).view(2, 512, STEP_SIDE + 1)
    below, above = table.sum(1).long()
    step_histogram = torch.cat([below[1:].flip(0), below[:1] + above[:1], above[1:]])
    lowest = 2 * (FP32_BIAS - RELATIVE_OCTAVES)
    sizes = [lowest, RELATIVE_BINS, 512 - lowest - RELATIVE_BINS]
    too_small, relative_histogram, too_large = table.sum((0, 2)).long().split(sizes)
    relative_histogram[0] += too_small.sum()
    relative_histogram[-1] += too_large.sum()
    return step_histogram, relative_histogram


def _sum(x: torch.Tensor, counts: torch.Tensor | None) -> float:
    """The sum of x, each term `counts` times.

    Without counts the sum is in x's dtype: torch sums pairwise, which keeps fp32 within 1e-6 of the sum of magnitudes
    for any chunk. Chunks are added in fp64.
    """
    return float(x.sum() if counts is None else x.double() @ counts.double())


def _count_nonzero(x: torch.Tensor, counts: torch.Tensor | None, scratch: torch.Tensor) -> int:
    if counts is not None:
        return int(counts[x != 0].sum())
    # Writing comparisons as floats is several times faster than as bool. fp32 counts exactly up to 2^24.
    return int(torch.ne(x, 0, out=scratch).sum())


def evenly_spaced(n: int, limit: int = SAMPLES) -> list[int]:
    """At most `limit` evenly spaced indices in 0..n-1, starting with 0."""
    return list(range(n)) if n <= limit else [i * n // limit for i in range(limit)]
