"""Calibrated rounding of one weight, with its error statistics."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..choices import choose
from ..numerics.backends import choose_backend
from ..numerics.error_statistics import ErrorStatistics, measure, merge
from ..numerics.formats import FORMATS, Float8Format
from ..numerics.memory import with_enough_memory
from ..numerics.quantized_tensor import QuantizedTensor, build_result, find_amax, flatten
from ..numerics.rounding import FRACTION_BITS, code_positions
from ..numerics.scaling import SCALINGS, amax_to_scale
from ..numerics.transfers import Send, to_device
from .gptq import gptq_round
from .moments import LayerCalibration

WHOLE = 0
"""The size of slices that cannot become smaller: calibrated rounding needs the whole weight."""

MEASURED_AT_ONCE = 1 << 22
"""Elements measured at once, which bounds the memory of intermediates."""
MEASURED_AT_ONCE_ON_GPU = 1 << 24
"""The same on a GPU, where few large operations are faster."""


def calibrate_tensor(
    x: torch.Tensor,
    calibration: LayerCalibration,
    *,
    format: str = "float8_e4m3fn",
    scaling: str = "absmax",
    key: str = "",
    statistics: bool = False,
    device: torch.device | str | None = None,
    leave_on_device: bool = False,
    send: Send = to_device,
) -> QuantizedTensor:
    """quantize_tensor with calibrated rounding, for a Linear weight (out, in) with recorded inputs; see gptq.py.

    Unless `scaling` is "none", the best scale near that of `scaling` is searched for. The bytes are the same on one
    device and version of torch. A GPU without enough memory falls back to the CPU, with a warning. Raises as
    quantize_tensor, and CalibrationError if the weight does not have the calibration's width. leave_on_device, send:
    see Placement.
    """
    float8, scaler = choose(FORMATS, format, "format"), choose(SCALINGS, scaling, "scaling")

    def calibrate(device: torch.device, _: int) -> QuantizedTensor:
        flat = send(flatten(x, key), device)
        amax = find_amax([flat], choose_backend(flat.device), key)
        scale = amax_to_scale(amax, float8, scaler).to(flat.device)
        codes, scale, output_error = gptq_round(
            flat.reshape(x.shape), scale, calibration, float8, search_scale=scaler.target is not None
        )
        codes = codes.reshape(-1)
        error = _measure(flat, codes.view(torch.uint8), scale, amax, float8) if statistics else None
        codes = codes if leave_on_device else to_device(codes, x.device)
        return replace(build_result(x, flat, codes, scale, amax, error), output_error=output_error)

    without_float64 = x.device.type == "mps" and device is None
    return with_enough_memory(calibrate, torch.device("cpu" if without_float64 else device or x.device), WHOLE, key)


def _measure(
    flat: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, amax: float, float8: Float8Format
) -> ErrorStatistics:
    parts, size = [], MEASURED_AT_ONCE_ON_GPU if flat.is_cuda else MEASURED_AT_ONCE
    for start in range(0, flat.numel(), size):
        original = flat[start : start + size].float()
        part = codes[start : start + size]
        positions = code_positions(original / scale, float8, FRACTION_BITS)
        positions = torch.where((original < 0) == (part > 0x7F), positions, -positions)
        parts.append(measure(original, part, positions, scale, amax, float8))
    return merge(parts)
