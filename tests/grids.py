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
