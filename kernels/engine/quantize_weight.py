"""One weight as a recipe says: the one place that chooses between rounding numbers and rounding whole weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ..calibration.calibrate_tensor import calibrate_tensor
from ..calibration.moments import Calibration
from ..errors import CalibrationError
from ..numerics.formats import E4M3FN
from ..numerics.output_error import OutputError
from ..numerics.quantized_tensor import QuantizedTensor, quantize_tensor
from ..numerics.rounding import CALIBRATED
from ..numerics.scaling import SMALLEST_SCALE
from ..recipe import Recipe

FEW_ROWS = 3000
"""A layer that saw fewer rows is mentioned in the notes."""

MOST_NAMED = 20
"""Layers that one note lists."""

INPUT_MARGIN = 1.25
"""Room above the largest input that was seen: other prompts go further. On a logarithmic grid it costs nothing."""


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
