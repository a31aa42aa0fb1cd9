"""Error statistics of a quantized tensor: exact counts, float64 sums, small histograms, all mergeable."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from functools import reduce

import torch

from .formats import Float8Format
from .rounding import FRACTION_BITS, ONE

STEP_BINS = 81
STEP_BIN_BITS = 11
STEP_BIN_WIDTH = 2**STEP_BIN_BITS / ONE
"""`step_histogram` counts errors in steps of the local FP8 grid, in bins of 1/32 step, the middle one centred on 0.
What lies beyond +-1.27 steps (saturated values) is counted in the outermost bins."""

RELATIVE_BINS = 64
RELATIVE_OCTAVES = 32
"""`relative_histogram` counts |error| / amax in two bins an octave, with edges 2^k and 1.5 * 2^k, from 2^-32 to 1.
Unchanged values are not in it: they are counted in `exact`."""

SAMPLES = 512
"""How many (original, dequantized) pairs a tensor keeps for scatter plots."""


@dataclass(frozen=True)
class ErrorStatistics:
    """What quantizing did to `count` numbers. Plain data: JSON-able, no tensors.

    Errors are signed, dequantized minus original, in the units of the original tensor.
    """

    count: int = 0
    sum_error: float = 0.0
    sum_squared_error: float = 0.0
    sum_squared: float = 0.0
    """Sum of the squared original values: the signal power of SQNR."""
    max_error: float = 0.0
    """Largest absolute error."""
    amax: float = 0.0
    saturated: int = 0
    """Values beyond the largest finite one of the format."""
    flushed: int = 0
    """Non-zero values that became zero."""
    exact: int = 0
    """Values that did not change."""
    step_histogram: tuple[int, ...] = (0,) * STEP_BINS
    """Counts of the error in steps of the local FP8 grid: see STEP_BINS."""
    relative_histogram: tuple[int, ...] = (0,) * RELATIVE_BINS
    """Counts of |error| / amax of its own tensor: see RELATIVE_BINS."""
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
        """RMSE over the RMS of the original: 0 for an exact copy, also of an all-zero tensor."""
        return self.rmse / self.rms if self.rms else 0.0

    @property
    def sqnr(self) -> float:
        """Signal-to-quantization-noise ratio in dB; infinite where nothing was lost."""
        if not self.sum_squared_error:
            return math.inf
        return 10 * math.log10(self.sum_squared / self.sum_squared_error) if self.sum_squared else -math.inf

    def __add__(self, other: ErrorStatistics) -> ErrorStatistics:
        """The statistics of both sets of numbers together; `samples` are thinned evenly to SAMPLES."""
        samples = self.samples + other.samples
        return ErrorStatistics(
            count=self.count + other.count,
            sum_error=self.sum_error + other.sum_error,
            sum_squared_error=self.sum_squared_error + other.sum_squared_error,
            sum_squared=self.sum_squared + other.sum_squared,
            max_error=max(self.max_error, other.max_error),
            amax=max(self.amax, other.amax),
            saturated=self.saturated + other.saturated,
            flushed=self.flushed + other.flushed,
            exact=self.exact + other.exact,
            step_histogram=_add(self.step_histogram, other.step_histogram),
            relative_histogram=_add(self.relative_histogram, other.relative_histogram),
            samples=tuple(samples[i] for i in evenly_spaced(len(samples))),
        )

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> ErrorStatistics:
        known = {field.name for field in fields(cls)}
        values = {name: value for name, value in data.items() if name in known}
        for name in ("step_histogram", "relative_histogram"):
            values[name] = tuple(values[name])
        values["samples"] = tuple((x, y) for x, y in values["samples"])
        return cls(**values)


def merge(statistics) -> ErrorStatistics:
    """The statistics of all the given ones together."""
    return reduce(ErrorStatistics.__add__, statistics, ErrorStatistics())


def step_bin_edges() -> list[float]:
    """The STEP_BINS + 1 edges of `step_histogram`, in steps of the local FP8 grid."""
    return [(i - STEP_BINS / 2) * STEP_BIN_WIDTH for i in range(STEP_BINS + 1)]


def relative_bin_edges() -> list[float]:
    """The RELATIVE_BINS + 1 edges of `relative_histogram`, as |error| / amax."""
    return [2.0 ** (i // 2 - RELATIVE_OCTAVES) * (1 + i % 2 / 2) for i in range(RELATIVE_BINS + 1)]


def measure(
    original: torch.Tensor,
    codes: torch.Tensor,
    positions: torch.Tensor,
    scale: torch.Tensor,
    amax: float,
    format: Float8Format,
    counts: torch.Tensor | None = None,
) -> ErrorStatistics:
    """The statistics, without samples, of some numbers; each counted `counts` times.

    original: fp32 or fp64 (n,), finite, in which the errors are computed before they are summed in fp64.
    codes: uint8 (n,). positions: int32 (n,), the unsigned code-space positions with 16 fraction bits, unsaturated.
    counts: int64 (n,) or None for once each.
    """
    if not len(original):
        return ErrorStatistics(amax=amax)
    codes = codes.int()
    values = torch.tensor(format.values, device=codes.device) * scale
    dequantized = values.to(original.dtype).index_select(0, codes)
    error = dequantized - original
    low, high = torch.aminmax(error)
    count = len(original) if counts is None else int(counts.sum())
    changed = _count_nonzero(error, counts)
    histogram = _joint_histogram(_step_bins(codes, positions), _relative_bins(error, amax), counts)
    relative_histogram = histogram.sum(0)
    relative_histogram[0] -= count - changed
    beyond = (positions - (format.max_code << FRACTION_BITS)).clamp_(min=0)
    return ErrorStatistics(
        count=count,
        sum_error=_dot(error, None, counts),
        sum_squared_error=_dot(error, error, counts),
        sum_squared=_dot(original, original, counts),
        max_error=float(torch.maximum(-low, high)),
        amax=amax,
        saturated=_count_nonzero(beyond, counts),
        flushed=_count_nonzero(original, counts) - _count_nonzero(dequantized, counts),
        exact=count - changed,
        step_histogram=tuple(histogram.sum(1).tolist()),
        relative_histogram=tuple(relative_histogram.tolist()),
    )


def _step_bins(codes: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Bin of each error in local grid steps, int32: the distance in code space, with the value's sign."""
    sign = (codes >> 7).mul_(-2).add_(1)
    steps = (codes & 0x7F).bitwise_left_shift_(FRACTION_BITS).sub_(positions).mul_(sign)
    middle = (STEP_BINS << STEP_BIN_BITS) // 2
    return steps.add_(middle).bitwise_right_shift_(STEP_BIN_BITS).clamp_(0, STEP_BINS - 1)


def _relative_bins(error: torch.Tensor, amax: float) -> torch.Tensor:
    """Bin of each |error| / amax, int32: two bins an octave are the fp32 exponent and the first mantissa bit."""
    relative = (error / (amax or 1.0)).float().abs_()
    lowest = 2 * (127 - RELATIVE_OCTAVES)
    return relative.view(torch.int32).bitwise_right_shift_(22).sub_(lowest).clamp_(0, RELATIVE_BINS - 1)


def _joint_histogram(rows: torch.Tensor, columns: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    bins = rows.mul_(RELATIVE_BINS).add_(columns)
    return torch.bincount(bins, counts, STEP_BINS * RELATIVE_BINS).reshape(STEP_BINS, RELATIVE_BINS).long()


def _dot(x: torch.Tensor, y: torch.Tensor | None, counts: torch.Tensor | None) -> float:
    """Sum of x * y (of x where y is None), each term `counts` times.

    In x's dtype: torch's pairwise summation keeps fp32 within 1e-6 of the sum of magnitudes for any chunk; chunks are
    added in fp64.
    """
    terms = x if y is None else x * y
    return float(terms.sum() if counts is None else terms.double() @ counts.double())


def _count_nonzero(x: torch.Tensor, counts: torch.Tensor | None) -> int:
    if counts is not None:
        return int(counts[x != 0].sum())
    # A comparison written as fp32 is several times as fast as one written as bool; its sum is exact below 2^24 terms.
    return sum(
        int(torch.ne(part, 0, out=torch.empty_like(part, dtype=torch.float32)).sum()) for part in x.split(1 << 23)
    )


def _add(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def evenly_spaced(n: int, limit: int = SAMPLES) -> list[int]:
    """At most `limit` indices out of 0..n-1, the first included."""
    return list(range(n)) if n <= limit else [i * n // limit for i in range(limit)]
