"""The FP8 grids from ml_dtypes and numpy: the oracle of the rounding tests. Shares no code with the pack."""

import ml_dtypes
import numpy as np

ML_DTYPES = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}
LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def decode(codes, format):
    """The float64 values of uint8 codes."""
    return np.asarray(codes, np.uint8).view(ML_DTYPES[format]).astype(np.float64)


def magnitudes(format):
    """All finite magnitudes, float64, in code order: entry k has code k."""
    values = decode(np.arange(128), format)
    return values[np.isfinite(values)]


def bracket(values, format):
    """(code below, value below, value above) of each |value|, float64. The largest value is the top of its bracket."""
    grid = magnitudes(format)
    below = np.minimum(np.searchsorted(grid, np.abs(values), side="right") - 1, len(grid) - 2)
    return below, grid[below], grid[below + 1]


def position(values, format):
    """The code-space position of each |value|: exact in float64 for values in range of up to 24 significant bits."""
    below, low, high = bracket(values, format)
    return below + (np.abs(values) - low) / (high - low)


def nearest_codes(values, format):
    """Codes of float32 values, clamped to the format's range and rounded to nearest even by ml_dtypes."""
    return np.clip(values, -LARGEST[format], LARGEST[format]).astype(ML_DTYPES[format]).view(np.uint8)


def all_finite(dtype):
    """Every finite value of a 16-bit dtype ("bfloat16" or "float16"), as float32."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16).astype(np.float32)
    return values[np.isfinite(values)]


def steps(scaled, codes, format):
    """The error of each code in steps of the local grid, signed, as multiples of 2^-16: float64.

    Beyond the largest value, the grid goes on as if the format had two more binades.
    scaled: float32 values divided by the scale. codes: uint8.
    """
    codes_per_binade = np.diff(np.searchsorted(magnitudes(format), (1, 2)))
    beyond = np.abs(scaled) > LARGEST[format]
    within = np.where(beyond, scaled / 4, scaled).astype(np.float64)
    positions = position(within, format) + 2 * beyond * codes_per_binade
    positions = np.copysign(np.rint(positions * 2**16) / 2**16, scaled)
    return np.where(codes > 0x7F, -1.0, 1.0) * (codes & 0x7F) - positions


def step_histogram(errors):
    """How many errors are in each bin of 1/32 step: 40 below 0, one for 0, 40 above. Counted by comparing with edges.

    An error on an edge belongs to the bin nearer to 0. The outermost bins have no end.
    """
    ends = [i / 32 for i in range(1, 40)] + [np.inf]
    above = [int(((errors > i / 32) & (errors <= end)).sum()) for i, end in enumerate(ends)]
    below = [int(((errors < -i / 32) & (errors >= -end)).sum()) for i, end in enumerate(ends)]
    return (*reversed(below), int((errors == 0).sum()), *above)


def values_at_bin_edges(format):
    """Values of both signs that are multiples of 1/32 step from the grid, or 2^-16 step off: float32.

    They are subnormal, from 16 on, and up to 1.5 steps too large.
    """
    parts = np.arange(48) / 32
    parts = np.concatenate([parts - 2**-16, parts, parts + 2**-16])
    grid = magnitudes(format)
    last = len(grid) - 1
    starts = {code: grid[code + 1] - grid[code] for code in (1, np.searchsorted(grid, 16))}
    starts[last] = grid[last] - grid[last - 1]
    values = np.concatenate([grid[code] + parts * step for code, step in starts.items()])
    return np.concatenate([values, -values]).astype(np.float32)
