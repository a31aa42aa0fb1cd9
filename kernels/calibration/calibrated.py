"""Weights as a recipe says, with calibrated rounding where a calibration tells what their layers are fed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from ..choices import choose
from ..error import ErrorStatistics, measure, merge
from ..formats import E4M3FN, FORMATS, Float8Format
from ..quantize import QuantizedTensor, finish, quantize_tensor, scale_tensor
from ..reports.report import Recipe
from ..rounding import CALIBRATED, FRACTION_BITS, code_positions
from ..scaling import SCALINGS, SMALLEST_SCALE
from .calibrate import calibrate
from .data import Calibration, CalibrationError, LayerCalibration
from .output_error import OutputError

FEW_ROWS = 3000
"""A layer that saw fewer rows is mentioned in the notes."""

MOST_NAMED = 20
"""Layers that one note lists."""

INPUT_MARGIN = 1.25
"""Room above the largest input that was seen: other prompts go further. On a logarithmic grid it costs nothing."""

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


def quantize_weight(
    x: torch.Tensor,
    key: str,
    recipe: Recipe,
    calibration: Calibration | None,
    *,
    statistics: bool = True,
    device: torch.device | str | None = None,
    **transfer,
) -> QuantizedTensor:
    """One layer's weight as the recipe says. Calibrated rounding falls back to nearest where the calibration never
    saw the layer, or saw one of another width. transfer: quantize_tensor's `out`, `bring_back` and `send`, for which
    calibrated rounding has no use.

    Raises as quantize_tensor, and CalibrationError where the recipe needs a calibration and there is none.
    """
    check_calibration(recipe, calibration)
    choices = {"format": recipe.format, "scaling": recipe.scaling}
    choices |= {"key": key, "statistics": statistics, "device": device}
    if recipe.rounding != CALIBRATED.name:
        return quantize_tensor(x, rounding=recipe.rounding, seed=recipe.seed, **choices, **transfer)
    layer = calibration.layer_of(key, x)
    if layer is None:
        return quantize_tensor(x, rounding="nearest", **choices, **transfer)
    return calibrate_tensor(x, layer, **choices)


def check_calibration(recipe: Recipe, calibration: Calibration | None) -> None:
    """Raises CalibrationError where the recipe needs a calibration and there is none."""
    if recipe.rounding == CALIBRATED.name and calibration is None:
        raise CalibrationError(
            "rounding 'calibrated' needs to know what the layers are fed: connect FP8 Calibration or Load FP8 "
            "Calibration to the input 'calibration' (on the command line: --calibration FILE)"
        )


def input_scale(calibration: Calibration | None, key: str, recipe: Recipe) -> torch.Tensor | None:
    """What a layer's inputs are divided by before they are cast to E4M3: fp32, 0-dim.

    None where they are not cast (matmul "full"), or were never seen.
    """
    if recipe.matmul != "fp8" or calibration is None or key not in calibration.layers:
        return None
    scale = INPUT_MARGIN * calibration.layers[key].amax / E4M3FN.max
    return torch.tensor(max(scale, SMALLEST_SCALE), dtype=torch.float32)


def calibration_notes(errors: Mapping[str, OutputError | None]) -> Iterator[str]:
    """What a user should know of layers with calibrated rounding: tensor key -> predicted error, None for nearest."""
    groups = (
        (
            [key for key, error in errors.items() if error is None],
            "rounded to nearest, since the calibration never saw them or saw another width there",
        ),
        (
            [key for key, error in errors.items() if error and error.chosen == error.nearest > 0],
            "rounded to nearest, since calibrated rounding would not be better",
        ),
        (
            [key for key, error in errors.items() if error and error.rows < FEW_ROWS],
            f"calibrated cautiously on fewer than {FEW_ROWS:,} rows: more runs would serve them better",
        ),
    )
    for keys, text in groups:
        if keys:
            more = f" and {len(keys) - MOST_NAMED} more" if len(keys) > MOST_NAMED else ""
            yield f"{len(keys)} of {len(errors)} layers were {text}: {', '.join(keys[:MOST_NAMED])}{more}"


def _measure(
    flat: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, amax: float, format: Float8Format
) -> ErrorStatistics:
    parts = []
    for start in range(0, flat.numel(), MEASURED_AT_ONCE):
        original = flat[start : start + MEASURED_AT_ONCE].float()
        positions = code_positions(original / scale, format, FRACTION_BITS)
        parts.append(measure(original, codes[start : start + MEASURED_AT_ONCE], positions, scale, amax, format))
    return merge(parts)
