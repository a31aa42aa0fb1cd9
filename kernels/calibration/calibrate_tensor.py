"""Weights as a recipe says, with calibrated rounding where a calibration tells what their layers are fed."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..choices import choose
from ..numerics.error_statistics import ErrorStatistics, measure, merge
from ..numerics.formats import FORMATS, Float8Format
from ..numerics.quantized_tensor import QuantizedTensor, finish, scale_tensor
from ..numerics.rounding import FRACTION_BITS, code_positions
from ..numerics.scaling import SCALINGS
from .gptq import calibrate
from .moments import LayerCalibration

MEASURED_AT_ONCE = 1 << 22


def calibrate_tensor(
    x: torch.Tensor,
    calibration: LayerCalibration,
    *,
    format: str = "float8_e4m3fn",
    scaling: str = "absmax",
    key: str = "",
    statistics: bool = False,
    device: torch.device | str | None = None,
) -> QuantizedTensor:
    """quantize_tensor for a Linear weight (out, in) of which the inputs are known: see calibrate.py.

    With a scaling other than "none" the best scale around that of `scaling` is searched for. The same bytes on one
    device and version of torch. Raises as quantize_tensor, and CalibrationError for another number of inputs.
    """
    float8, scaler = choose(FORMATS, format, "format"), choose(SCALINGS, scaling, "scaling")
    if x.device.type == "mps":  # has no float64
        device = device or "cpu"
    flat, amax, scale = scale_tensor(x, float8, scaler, key, device)
    searching = scaler.target is not None
    codes, scale, output_error = calibrate(flat.reshape(x.shape), scale, calibration, float8, search_scale=searching)
    codes = codes.reshape(-1)
    error = _measure(flat, codes.view(torch.uint8), scale, amax, float8) if statistics else None
    return replace(finish(x, flat, codes.to(x.device), scale, amax, error), output_error=output_error)


def _measure(
    flat: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, amax: float, format: Float8Format
) -> ErrorStatistics:
    parts = []
    for start in range(0, flat.numel(), MEASURED_AT_ONCE):
        original = flat[start : start + MEASURED_AT_ONCE].float()
        positions = code_positions(original / scale, format, FRACTION_BITS)
        parts.append(measure(original, codes[start : start + MEASURED_AT_ONCE], positions, scale, amax, format))
    return merge(parts)
